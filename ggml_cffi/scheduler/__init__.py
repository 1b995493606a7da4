"""Graphs, and the scheduler that computes them over several backends.

A :class:`Graph` has the nodes that some outputs need. A :class:`Scheduler` checks a graph, orders its nodes so that
GPUs overlap, allocates and runs it. It also reports the splits, copies and buffer sizes of the graph that it holds.
"""

from ggml_cffi.scheduler.graph import Graph, steps
from ggml_cffi.scheduler.held_graph import HeldGraph
from ggml_cffi.scheduler.placements import Placements
from ggml_cffi.scheduler.scheduler import Scheduler
from ggml_cffi.scheduler.splits import Split, find_copies, find_splits

__all__ = ["Graph", "HeldGraph", "Placements", "Scheduler", "Split", "find_copies", "find_splits", "steps"]
