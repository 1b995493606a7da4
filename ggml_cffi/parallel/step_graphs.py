"""What one device computes at a time, as C graphs; some of them such that they can be recorded before it may begin.

ggml's Vulkan backend records commands for the device while it goes through a graph, and hands them over with the last
node, or before that if there are many. Recording takes about as long as the device takes for the few operations of a
token. So it is done while the device is still at what comes before: what is recorded is a graph that ends with a node
without memory, which ggml passes over, and with it the handing over. An event that is recorded next hands over all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.device import Device, DeviceType
from ggml_cffi.core.op_sets import VIEWS
from ggml_cffi.enums import Op, Type
from ggml_cffi.scheduler.graph import Graph

#: Columns of products up to which a graph is one that a device is soon done with.
_SHORT = 16

#: Operations by whose size ggml's Vulkan decides when to hand work over.
_COUNTED = frozenset({Op.MUL_MAT, Op.MUL_MAT_ID, Op.CONV_2D, Op.CONV_TRANSPOSE_2D, Op.CONV_3D, Op.FLASH_ATTN_EXT})

#: Operations that ggml's Vulkan records before it hands them over without being asked.
_MOST_NODES = 100

#: Settings of ggml with which each operation, piece of work, or graph is waited for.
_WITHOUT = ("GGML_VK_PERF_LOGGER", "GGML_VK_SERIALIZE_SUBMISSIONS", "GGML_VK_DISABLE_ASYNC")

#: A device of which ggml waits for each graph.
_WAITED_FOR = "(DG1)"

#: What may read sums of squares that ggml clears with the next graph, without waiting: no part ends with it.
_NORM = (Op.RMS_NORM, Op.MUL)

#: Operations of a first part. Recording them takes half as long as computing them.
_HELD = 64


@dataclass(frozen=True)
class Step:
    """C graphs of one device, to be computed in this order."""

    held: tuple[Any, ...] = ()
    """Graphs that a backend records, and hands to its device once an event is recorded, or it is waited for."""
    rest: tuple[Any, ...] = ()
    """Graphs that it hands over by itself."""

    @property
    def graphs(self) -> tuple[Any, ...]:
        """All of them."""
        return self.held + self.rest


class Steps:
    """Makes steps of nodes. Its C graphs are there until it is closed."""

    def __init__(self) -> None:
        self._pools: list[Any] = []

    def make(self, graph: Graph, freeze: Callable[[Iterable[Any]], None], *, shared: bool, hold: bool) -> Step:
        """The step that computes a graph.

        Parameters
        ----------
        freeze
            Makes nodes pass for leaves.
        shared
            Whether other devices wait for this one at the end of the step.
        hold
            Whether to have the step recorded ahead: all of it if ``shared``, else its beginning; if it is short.
        """
        nodes = graph.node_pointers()
        if not _is_short(nodes):
            head = next((i for i, p in enumerate(nodes) if p.op in _COUNTED), 0) if shared else 0
            return self._in_two(nodes[:head], nodes[head:], freeze) if head else Step(rest=(graph.ptr,))
        if hold and not shared:
            return self._parts(nodes, freeze)
        if hold and _n_operations(nodes) <= _most_nodes():
            return Step(self._held(nodes))
        _fill(graph.ptr, nodes)
        return Step(rest=(_nothing(), graph.ptr) if shared else (graph.ptr,))

    def _in_two(self, first: Sequence[Any], rest: Sequence[Any], freeze: Callable[[Iterable[Any]], None]) -> Step:
        """What comes before the first product as a graph of its own, and the rest.

        ggml's Vulkan hands work to the device each time that it has as many operations as a 40th of the graph before
        had. In a graph of few nodes that is before and after each product. After a graph without any, it hands over the
        next as a whole.
        """
        _keep_for_later([first, rest])
        made = self._expanded(first, 0)
        freeze(first)
        return Step(rest=(made, self._expanded(rest, 0)))

    def _parts(self, nodes: Sequence[Any], freeze: Callable[[Iterable[Any]], None]) -> Step:
        """A first part to be recorded ahead, and the rest as one or more parts.

        ggml would hand over the rest a few operations at a time, to have the device begin; but it has begun, and each
        time takes it as long as two operations of a token.
        """
        most = _most_nodes()
        size = min(_HELD, most)
        parts: list[Sequence[Any]] = []
        while nodes:
            end = _end_of_part(nodes, size)
            parts.append(nodes[:end])
            nodes, size = nodes[end:], min(2 * size, most)
        _keep_for_later(parts)
        held: tuple[Any, ...] = ()
        rest: list[Any] = []
        for i, part in enumerate(parts):
            if i == 0 and _n_operations(part) <= most:
                held = self._held(part)
            else:
                rest += [_nothing(), self._filled(part)]
            freeze(part)
        return Step(held, tuple(rest))

    def _held(self, nodes: Sequence[Any]) -> tuple[Any, ...]:
        more = 1 + _n_fillers(len(nodes))
        made = self._expanded(nodes, more)
        for _ in range(more):
            c.ggml_graph_add_node(made, _passed_over())
        return _nothing(), made

    def _filled(self, nodes: Sequence[Any]) -> Any:
        made = self._expanded(nodes, _n_fillers(len(nodes)))
        _fill(made, nodes)
        return made

    def _expanded(self, nodes: Sequence[Any], more: int) -> Any:
        """A C graph of these nodes in this order, with room for some more. It knows how often each is used, which
        ``ggml_graph_add_node`` does not tell it: without that, none are computed together.
        """
        size = len({p for node in nodes for p in (node, *node.src) if p}) + more + 1
        made, pool = _new_graph(size)
        self._pools.append(pool)
        for p in nodes:
            c.ggml_build_forward_expand(made, p)
        return made

    def close(self) -> None:
        """Give the graphs up."""
        pools, self._pools = self._pools, []
        for pool in pools:
            c.ggml_free(pool)


def _is_short(nodes: Iterable[Any]) -> bool:
    """Whether a device is soon done with these nodes."""
    return not any(p.op == Op.MUL_MAT and p.ne[1] > _SHORT for p in nodes)


def can_record_ahead(device: Device) -> bool:
    """Whether ggml's Vulkan keeps what it has recorded for a device, and hands over all of it when it is told to. Not
    for one that shares its memory with the processor, which does part of the work then.
    """
    if device.type is not DeviceType.GPU or _WAITED_FOR in device.description:
        return False
    return not any(name in os.environ for name in _WITHOUT)


def _most_nodes() -> int:
    return min(int(os.environ.get("GGML_VK_MAX_NODES_PER_SUBMIT", _MOST_NODES)), _MOST_NODES)


def _n_operations(nodes: Iterable[Any]) -> int:
    return sum(p.op not in VIEWS for p in nodes)


def _end_of_part(nodes: Sequence[Any], most: int) -> int:
    """How many nodes make a part of at most so many operations, if it can be made to end there.

    It ends before a product, with which ggml computes nothing that comes before, and none that it computes side by
    side with another, nor one of what was normalized just before.
    """
    end = count = 0
    before = None
    for i, p in enumerate(nodes):
        if p.op in VIEWS:
            continue
        if count > most and end:
            break
        if p.op == Op.MUL_MAT and before not in (Op.MUL_MAT, *_NORM):
            end = i
        before = p.op
        count += 1
    return end if count > most and end else len(nodes)


def _keep_for_later(parts: Sequence[Sequence[Any]]) -> None:
    """Have each part compute what a later one reads: else it could be left out, together with whose it is."""
    needed: set[Any] = set()
    for part in reversed(parts):
        for p in part:
            if p in needed:
                c.ggml_set_output(p)
        needed.update(src for p in part for src in p.src if src)


def _new_graph(size: int) -> tuple[Any, Any]:
    """A C graph for so many tensors, and its context."""
    need = c.ggml_graph_overhead_custom(size, False) + c.ggml_tensor_overhead() + 64
    pool = c.ggml_init({"mem_size": need, "mem_buffer": c.NULL, "no_alloc": True})  # type: ignore[arg-type]
    return c.ggml_new_graph_custom(pool, size, False), pool


@cache
def _passed_over() -> Any:
    """A node that ggml's Vulkan takes for one that computes something, and passes over: it has no memory."""
    _, pool = _new_graph(1)  # for good
    made = c.ggml_new_tensor_1d(pool, Type.F32, 1)
    made.op, made.flags = Op.SUM, c.GGML_TENSOR_FLAG_COMPUTE
    return made


@cache
def _nothing() -> Any:
    """A C graph that computes nothing: ggml's Vulkan hands over the next as a whole; see ``_in_two``."""
    made, _ = _new_graph(2)  # for good
    c.ggml_graph_add_node(made, _passed_over())
    return made


def _fill(graph: Any, nodes: Sequence[Any]) -> None:
    """Put views, which compute nothing, behind the nodes of a C graph that a device is soon done with.

    ggml's Vulkan has a device tell it when it is about to begin the last fifth of a graph's nodes, sleeps until then,
    and looks again and again from there on. It wakes up too late where that fifth takes some microseconds: so that
    fifth is to be views.
    """
    view = next((p for p in nodes if p.op in VIEWS), None)
    n, size = c.ggml_graph_n_nodes(graph), c.ggml_graph_size(graph)
    if view is not None:
        for _ in range(min(_n_fillers(n), size - n)):
            c.ggml_graph_add_node(graph, view)


def _n_fillers(n: int) -> int:
    """Nodes behind ``n`` that make the last fifth of all."""
    return max((n - 10) // 4 + 1, 0)
