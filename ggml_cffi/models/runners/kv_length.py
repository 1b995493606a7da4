"""The number of KV slots that a graph reads, changed in place.

A graph of 32 layers takes tens of milliseconds to build. It is built once for all KV slots; before a run, the views of
the caches and the masks are shortened to the slots in use. No tensor that a run computes depends on that number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ggml_cffi.core.dtypes import row_size
from ggml_cffi.core.tensor import Tensor


class KVLength:
    """The tensors of one graph whose size is the number of KV slots.

    Parameters
    ----------
    views
        Views of the caches, each with the number of the axis of the slots, in ggml's order.
    masks
        Attention masks ``(n, n_kv)``.
    n_kv
        The number with which the graph was built: the largest one.
    """

    def __init__(self, views: Sequence[tuple[Tensor, int]], masks: Sequence[Tensor], n_kv: int) -> None:
        self._views: list[tuple[Any, int]] = [(view.ptr, axis) for view, axis in views]
        self._masks = [(mask.ptr, mask.dtype, mask.shape[0]) for mask in masks]
        self.n_kv = n_kv
        """The number of KV slots that the next run reads."""

    def set(self, n_kv: int) -> None:
        """Change the number, while no run is in progress."""
        if n_kv == self.n_kv:
            return
        for p, axis in self._views:
            p.ne[axis] = n_kv
        for p, dtype, n in self._masks:
            size = row_size(dtype, n_kv)
            p.ne[0] = n_kv
            p.nb[1], p.nb[2], p.nb[3] = size, n * size, n * size
        self.n_kv = n_kv
