"""Parallel computation: several devices work at the same time.

``DataParallel`` keeps a replica of a function on each device and sends each call to a free one. ``TensorParallel``
gives each device a shard of every weight, and compiles functions that all devices compute together: ``rank`` and
``trace`` build their graphs, ``step_graphs`` divides them into steps, ``executors`` submits the steps. ``meta`` is
ggml's own tensor parallelism, for comparison.
"""

from ggml_cffi.parallel.data_parallel import DataParallel, TaskExecutor
from ggml_cffi.parallel.executors import Executor
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
