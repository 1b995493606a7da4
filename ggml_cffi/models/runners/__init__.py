"""Runners: a model with its weights and KV cache on its devices, tokens in and logits out."""
