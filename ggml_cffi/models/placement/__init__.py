"""Placement: which device holds which layers, and how many bytes that takes, known before loading."""
