"""Several devices at work: a replica on each (data parallelism), or a part of every layer (tensor parallelism)."""

from ggml_cffi.parallel.data_parallel import DataParallel, Executor
from ggml_cffi.parallel.executors.executor import Driver
from ggml_cffi.parallel.function import ParallelFunction
from ggml_cffi.parallel.group import Group
from ggml_cffi.parallel.program import Program
from ggml_cffi.parallel.rank import Gathered, Rank
from ggml_cffi.parallel.replicas import Replica, release
from ggml_cffi.parallel.shard import COLUMNS, MIRROR, ROWS, Cut, share_out
from ggml_cffi.parallel.tensor_parallel import TensorParallel

__all__ = [
    "COLUMNS",
    "MIRROR",
    "ROWS",
    "Cut",
    "DataParallel",
    "Driver",
    "Executor",
    "Gathered",
    "Group",
    "ParallelFunction",
    "Program",
    "Rank",
    "Replica",
    "TensorParallel",
    "release",
    "share_out",
]
