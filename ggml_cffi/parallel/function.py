"""Functions of arrays that several devices compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from ggml_cffi.core.context import Context
from ggml_cffi.core.dtypes import as_array, as_type
from ggml_cffi.core.lru import LRU
from ggml_cffi.enums import Type
from ggml_cffi.parallel.group import Group
from ggml_cffi.parallel.program import ParallelProgram
from ggml_cffi.parallel.rank import Rank

_PROGRAMS = 16

_R = TypeVar("_R", covariant=True)
"""The result of a function: an array, or a tuple of arrays."""


class ParallelFunction(Generic[_R]):
    """A function of arrays that several devices compute, made by ``TensorParallel.compile``.

    ``float64`` arrays are computed in F32. Others keep their type: F32, F16, I32 and I64.
    """

    def __init__(self, group: Group, function: Callable[..., Any]) -> None:
        self.group, self.function = group, function
        self._programs: LRU[Any, ParallelProgram] = LRU(_PROGRAMS)
        self._lock = group.lock

    def __call__(self, *arrays: npt.ArrayLike) -> _R:
        """Run, and wait for the result: an array for each tensor that the function returns.

        Raises
        ------
        ClosedError
            If the group is closed.
        ValueError
            If the ranks' functions differ, or row numbers are out of range.
        UnsupportedOpError
            If a device cannot compute a node.
        GgmlError
            If a device reports failure.
        """
        given = [as_array(a) for a in arrays]
        with self._lock:
            out: _R = self._find(given).run(given)
        return out

    def trace(self, *arrays: npt.ArrayLike) -> ParallelProgram:
        """Return the program for arrays of these shapes and types, traced but not run."""
        with self._lock:
            return self._find([as_array(a) for a in arrays])

    @property
    def programs(self) -> tuple[ParallelProgram, ...]:
        """The kept programs, from the least to the most recently used."""
        return self._programs.values

    def clear(self) -> None:
        """Close all programs."""
        with self._lock:
            self._programs.clear()

    def _find(self, arrays: Sequence[npt.NDArray[Any]]) -> ParallelProgram:
        n = len(self.group.backends)
        key = tuple((a.shape, Type.F32 if a.dtype == np.float64 else as_type(a.dtype)) for a in arrays)

        def make() -> ParallelProgram:
            group = self.group
            contexts = [Context(precision=group.precision, devices=group.devices) for _ in range(n)]
            ranks = [Rank(r, n, group.half_above, context) for r, context in enumerate(contexts)]
            return ParallelProgram(self.group, ranks, self.function, key)

        return self._programs.get(key, make)
