"""Graphs, and the scheduler that computes them over several backends."""

from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.scheduler import Scheduler, Split

__all__ = ["Graph", "Scheduler", "Split"]
