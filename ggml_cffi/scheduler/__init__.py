"""Graphs, and the scheduler that computes them over several backends."""

from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.scheduler import Scheduler
from ggml_cffi.scheduler.splits import Split

__all__ = ["Graph", "Scheduler", "Split"]
