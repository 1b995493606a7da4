"""The number of KV slots that a graph reads, changed in place.

A graph of 32 layers takes tens of milliseconds to build. It is built once for all KV slots; before a run, the views of
the caches and the masks are shortened to the slots in use. With flash attention no tensor that a run computes depends
on that number. Without it the scores of attention do: such a graph must be allocated again after each change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ggml_cffi.core.dtypes import row_size
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Op
from ggml_cffi.scheduler.graph import Graph

_ELEMENTWISE = frozenset({Op.SCALE, Op.UNARY, Op.SOFT_MAX})  # nodes between the product and the scores


class KVLength:
    """The tensors of one graph whose size is the number of KV slots.

    Parameters
    ----------
    views
        Views of the caches, each with the number of the axis of the slots, in ggml's order.
    rows
        Contiguous tensors with one number for each KV slot in a row: attention masks ``(n, n_kv)`` and scores.
    n_kv
        The number with which the graph was built: the largest one.
    """

    def __init__(self, views: Sequence[tuple[Tensor, int]], rows: Sequence[Tensor], n_kv: int) -> None:
        self._views: list[tuple[Any, int]] = [(view.ptr, axis) for view, axis in views]
        self._rows = [(t.ptr, t.dtype, t.ne[1], t.ne[2]) for t in rows]
        self.n_kv = n_kv
        """The number of KV slots that the next run reads."""

    def set(self, n_kv: int) -> None:
        """Change the number, while no run is in progress."""
        if n_kv == self.n_kv:
            return
        for p, axis in self._views:
            p.ne[axis] = n_kv
        for p, dtype, n, heads in self._rows:
            size = row_size(dtype, n_kv)
            p.ne[0] = n_kv
            p.nb[1], p.nb[2], p.nb[3] = size, n * size, heads * n * size
        self.n_kv = n_kv


def find_scores(graph: Graph, masks: Sequence[Tensor], n_layers: int) -> tuple[list[tuple[Tensor, int]], list[Tensor]]:
    """Return the tensors of attention without flash attention whose size is the number of KV slots.

    Returns
    -------
    views
        Views of the values in the cache, each with the axis of the slots, as for :class:`KVLength`.
    scores
        Scores before and after the softmax.

    Raises
    ------
    ValueError
        If the attention of a layer consists of other nodes: its size cannot be changed.
    """
    own = {mask.ptr for mask in masks}
    views: list[tuple[Tensor, int]] = []
    scores: list[Any] = []
    softmax: set[Any] = set()
    n_flash = 0
    for p in graph.node_pointers():
        op = p.op
        if op == Op.FLASH_ATTN_EXT:
            n_flash += 1
        elif op == Op.SOFT_MAX and p.src[1] in own:
            softmax.add(p)
            while p.op in _ELEMENTWISE:
                scores.append(p)
                p = p.src[0]
            scores.append(p)
            if p.op != Op.MUL_MAT:
                raise ValueError(f"scores come from {graph.wrap(p)!r}, not from a product")
        elif op == Op.MUL_MAT and p.src[1] in softmax:
            views.append((graph.wrap(p.src[0]), 0))
    if not n_flash + len(softmax) == n_flash + len(views) == n_layers:
        raise ValueError(f"attention was found in {n_flash + len(softmax)} of {n_layers} layers")
    return views, [graph.wrap(p) for p in scores]
