"""Several devices at work: a replica on each."""

from ggml_cffi.parallel.data import DataParallel, Executor
from ggml_cffi.parallel.replicas import Replica, release

__all__ = ["DataParallel", "Executor", "Replica", "release"]
