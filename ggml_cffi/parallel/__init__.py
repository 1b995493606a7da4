"""Several devices at work: a replica on each (data parallelism), or a part of every layer (tensor parallelism)."""

from ggml_cffi.parallel.data_parallel import DataParallel, TaskExecutor
from ggml_cffi.parallel.executors.base import Executor
from ggml_cffi.parallel.function import ParallelFunction
from ggml_cffi.parallel.group import Group
from ggml_cffi.parallel.program import ParallelProgram
from ggml_cffi.parallel.rank import AllGather, Rank
from ggml_cffi.parallel.replicas import Replica, release
from ggml_cffi.parallel.shard import COLUMNS, MIRROR, ROWS, ShardSpec, split_evenly
from ggml_cffi.parallel.tensor_parallel import TensorParallel

__all__ = [
    "COLUMNS",
    "MIRROR",
    "ROWS",
    "AllGather",
    "DataParallel",
    "Executor",
    "Group",
    "ParallelFunction",
    "ParallelProgram",
    "Rank",
    "Replica",
    "ShardSpec",
    "TaskExecutor",
    "TensorParallel",
    "release",
    "split_evenly",
]
