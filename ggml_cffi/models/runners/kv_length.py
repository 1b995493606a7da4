"""The KV slots that a graph reads, changed in place.

A graph of 32 layers takes tens of milliseconds to build. It is built once for all KV slots; before a run, the views of
the caches, the masks and the scores are changed to the slots in use. No other tensor depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.dtypes import row_size
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.models.architectures.base import KVResult, KVView


class KVLength:
    """The tensors of one graph that depend on the KV slots that attention reads.

    Parameters
    ----------
    views
        Views of the caches, which have memory.
    masks
        Masks ``(..., n_kv)``.
    n_kv
        The number of KV slots with which the graph was built.
    results
        Intermediates of attention.
    ranges
        True if attention has an axis of ranges of KV slots.
    """

    def __init__(
        self,
        views: Sequence[KVView],
        masks: Sequence[Tensor],
        n_kv: int,
        results: Sequence[KVResult] = (),
        *,
        ranges: bool = False,
    ) -> None:
        self._sizes = [(view.tensor.ptr, view.axis) for view in views]
        self._places = [(view.tensor.ptr, view.slot_bytes, *_place(view.tensor.ptr)) for view in views]
        contiguous = [*map(KVResult, masks), *results]
        self._contiguous: list[tuple[Any, Type, int]] = [(t.ptr, t.dtype, axis) for t, axis in contiguous]
        self._ranges = ranges
        self._place = (0, 0)
        self.n_kv = n_kv
        """The number of KV slots that the next run reads."""

    def set(self, n_kv: int) -> None:
        """Change the number, while no run is in progress."""
        if n_kv == self.n_kv:
            return
        for p, axis in self._sizes:
            p.ne[axis] = n_kv
        for p, dtype, axis in self._contiguous:
            p.ne[axis] = n_kv
            size = row_size(dtype, p.ne[0])
            for k in (1, 2, 3):
                p.nb[k] = size
                size *= p.ne[k]
        self.n_kv = n_kv

    def move(self, start: int, stride: int) -> None:
        """Change the first KV slot, and the number of slots from one range to the next."""
        if (start, stride) == self._place:
            return
        for p, slot_bytes, base, offset in self._places:
            p.view_offs = offset + start * slot_bytes
            p.data = c.ffi.cast("void *", base + p.view_offs)
            if self._ranges:
                p.nb[3] = stride * slot_bytes
        self._place = start, stride


def _place(p: Any) -> tuple[int, int]:
    """Return the address of a view's source, and the bytes from there to the view."""
    return int(c.ffi.cast("uintptr_t", p.view_src.data)), p.view_offs
