"""Several GPUs at work on every layer: tensor parallelism."""

from ggml_cffi.parallel.cut import COLUMNS, MIRROR, ROWS, Cut, share_out
from ggml_cffi.parallel.program import Program
from ggml_cffi.parallel.rank import Gathered, Rank
from ggml_cffi.parallel.tensor import ParallelFunction, TensorParallel

__all__ = [
    "COLUMNS",
    "MIRROR",
    "ROWS",
    "Cut",
    "Gathered",
    "ParallelFunction",
    "Program",
    "Rank",
    "TensorParallel",
    "share_out",
]
