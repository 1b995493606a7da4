"""Executors: how the graphs of a step are submitted to several devices."""
