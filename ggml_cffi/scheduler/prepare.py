"""Preparation of a graph, and of ggml's scheduler, before a graph is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ggml_cffi import c
from ggml_cffi.c import library
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.context import Context
from ggml_cffi.core.handle import Owner
from ggml_cffi.core.op_sets import VIEWS
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Op, TensorFlag, Type
from ggml_cffi.errors import ClosedError, OutOfMemoryError
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.held_graph import HeldGraph, unread_tensors
from ggml_cffi.scheduler.overlap import overlapping
from ggml_cffi.scheduler.placements import Placements

MAX_BACKENDS = 16
_ALL_OPERANDS = frozenset({Op.CUSTOM, Op.MAP_CUSTOM1, Op.MAP_CUSTOM2, Op.MAP_CUSTOM3})  # they may read any operand
_READS_SECOND_OPERAND_LAST = frozenset({Op.ADD_ID, Op.SOFT_MAX_BACK})


def check_backends(backends: Sequence[Backend]) -> None:
    """Raise ``ValueError`` if a scheduler cannot have these backends, the last of which is the CPU."""
    if len({b.ptr for b in backends}) < len(backends):
        raise ValueError("a backend is listed twice; open the device twice for two streams on it")
    if len(backends) > MAX_BACKENDS:
        raise ValueError(f"{len(backends)} backends with the CPU; a scheduler has at most {MAX_BACKENDS}")


def graph_owners(graph: Graph) -> list[Owner]:
    """Return the owners of the graph and of its buffers, which other threads could close.

    Raises
    ------
    ClosedError
        If a context or a buffer of the graph is closed.
    """
    owners = [graph.owner, *(b.owner for ctx in graph.contexts for b in ctx.buffers)]
    for ctx in graph.contexts:
        ctx.ptr  # noqa: B018 - raises when closed
        for p in ctx.released & graph.members:
            raise ClosedError(f"the buffer of {Tensor(ctx, p, c.ggml_n_dims(p))!r} was closed")
    return owners


def keep_second_operands(graph: Graph) -> None:
    """Mark operands that are read while the result is written, so that ggml does not put the result over them."""
    for p in graph.node_pointers():
        if p.op in _READS_SECOND_OPERAND_LAST:
            second = p.src[1]
            for t in (second, second.view_src) if second.view_src else (second,):
                t.flags |= TensorFlag.OUTPUT


def order_for_overlap(scheduler: Any, prepared: HeldGraph, backends: Sequence[Backend], placements: Placements) -> None:
    """Order the nodes so that several GPUs work at once, and pin them; see :mod:`ggml_cffi.scheduler.overlap`."""
    graph = prepared.graph
    placements.apply(scheduler, graph, backends[-1])
    c.ggml_backend_sched_split_graph(scheduler, graph.ptr)
    numbers = {b.ptr: i for i, b in enumerate(backends)}
    find = c.ggml_backend_sched_get_tensor_backend
    assigned = {p: numbers[find(scheduler, p)] for p in graph.node_pointers()}
    prepared.restore()
    ordered = overlapping(graph.node_pointers(), assigned, len(backends) - 1)
    if ordered is None:
        return
    graph.reorder(ordered)
    # In another order ggml could choose other devices.
    placements.pinned = {p: backends[i] for p, i in assigned.items() if p.op not in VIEWS}
    if library.provides("ggml_prec_set_acc"):
        _start_without_waiting(scheduler, prepared, backends, placements)


def _start_without_waiting(
    scheduler: Any, prepared: HeldGraph, backends: Sequence[Backend], placements: Placements
) -> None:
    """Give splits that need no copy a small one, from the CPU.

    From version 0.25 on, ggml lets the host wait for the split before, if it is on another device, unless it copies
    something first. Two branches would run one after the other.
    """
    graph = prepared.graph
    placements.apply(scheduler, graph, backends[-1])
    c.ggml_backend_sched_split_graph(scheduler, graph.ptr)
    known, first, copies, device = graph.members, [], [], None
    for p in graph.node_pointers():
        if p.op in VIEWS:
            continue
        if placements.pinned[p] is not device:
            device = placements.pinned[p]
            first.append(p)
            copies.append(False)
        copies[-1] = copies[-1] or any(src and src not in known for src in p.src)
    prepared.restore()
    idle = [p for p, copied in zip(first[1:], copies[1:], strict=True) if not copied]
    idle = [p for p in idle if placements.pinned[p].device.is_gpu and p.op not in _ALL_OPERANDS]
    prepared.add_operands(dict(zip(idle, unread_tensors(len(idle)), strict=True)))
    placements.pinned |= dict.fromkeys(prepared.added.values(), backends[-1])


def uses_cpu(scheduler: Any, graph: Graph, backends: Sequence[Backend]) -> bool:
    """Return whether ggml assigned a node of ``graph`` to the CPU, the last of ``backends``."""
    cpu, find = backends[-1].ptr, c.ggml_backend_sched_get_tensor_backend
    return len(backends) == 1 or any(find(scheduler, p) == cpu for p in graph.node_pointers())


def prime(scheduler: Any, backends: Sequence[Backend]) -> None:
    """Allocate a buffer on each backend, through a graph with one number on each.

    An empty tensor needs a buffer with an address. If no earlier graph needed memory, ggml would put the tensor into a
    buffer that does not exist, or treat it as not allocated.
    """
    with Context() as ctx:
        nodes = [ctx.build(c.ggml_dup, 1, ctx.new_tensor(Type.F32, (1,)).ptr) for _ in backends]
        with Graph(*nodes) as graph:
            c.ggml_backend_sched_reset(scheduler)
            for node, backend in zip(nodes, backends, strict=True):
                c.ggml_backend_sched_set_tensor_backend(scheduler, node.ptr, backend.ptr)
            enough = c.ggml_backend_sched_reserve(scheduler, graph.ptr)
            c.ggml_backend_sched_reset(scheduler)
    if not enough:
        raise OutOfMemoryError("no room for a single number on each device")
