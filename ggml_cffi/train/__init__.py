"""Training: gradients by reverse accumulation, and optimizers that compute a whole step in one graph."""

from ggml_cffi.train.gradients import gradients
from ggml_cffi.train.optimizers import SGD, AdamW, Optimizer

__all__ = ["SGD", "AdamW", "Optimizer", "gradients"]
