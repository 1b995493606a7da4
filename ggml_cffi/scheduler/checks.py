"""Pre-flight checks of graphs: without them, ggml would end the process when it schedules or runs a bad graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.buffer import BufferType, read_only
from ggml_cffi.core.cuda import has_cuda_kernels
from ggml_cffi.core.op_sets import VIEWS
from ggml_cffi.core.shapes import fits_in_32_bits
from ggml_cffi.enums import Op
from ggml_cffi.errors import UnsupportedOpError
from ggml_cffi.scheduler import cuda_rules
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.spread import supports_copied

#: Operations whose GPU kernels take operands at any offset. Other kernels end the process, or read wrong data.
_START_ANYWHERE = frozenset(
    {Op.ADD, Op.SUB, Op.MUL, Op.DIV, Op.SCALE, Op.SQR, Op.SQRT, Op.SIN, Op.COS, Op.LOG, Op.UNARY, Op.GLU, Op.CLAMP}
    | {Op.RMS_NORM, Op.NORM, Op.L2_NORM, Op.SUM, Op.SUM_ROWS, Op.MEAN, Op.CUMSUM, Op.REPEAT, Op.CONCAT, Op.DIAG}
    | {Op.ACC, Op.SET, Op.SET_ROWS, Op.CPY, Op.CONT, Op.DUP, Op.PAD}
)


#: Bytes of one tensor that kernels on every GPU can read, by Vulkan's specification. Some GPUs cannot read more.
_READ_ANYWHERE = 2**27


#: Operations written in Python, which only this process can call.
_IN_PYTHON = frozenset({Op.MAP_CUSTOM1, Op.MAP_CUSTOM2, Op.MAP_CUSTOM3, Op.CUSTOM})


def find_cpu_only(graph: Graph, backends: Sequence[Backend]) -> dict[Any, str]:
    """Return nodes that only the CPU can compute although other backends report support, each with the reason."""
    alignment = max((b.buffer_type.alignment for b in backends if not b.device.is_cpu), default=1)
    found = {
        p: "reads or writes a view at an offset that GPUs do not support: use cont, or the CPU"
        for p in graph.node_pointers()
        if p.op not in _START_ANYWHERE
        and p.op not in VIEWS
        and any(t and t.view_src and t.view_offs % alignment for t in (p, *p.src))
    }
    if any(has_cuda_kernels(b.device) for b in backends):
        for p in graph.node_pointers():
            if p not in found and (reason := cuda_rules.fault(p)):
                found[p] = reason
    if any(b.device.is_remote for b in backends):
        cpu = backends[-1].device.ptr
        for p in graph.node_pointers():
            if p.op in _IN_PYTHON:
                found[p] = "is computed by this process, which cannot write to a server's memory: place it on the CPU"
            elif p.op not in VIEWS and not _can_be_sent(p, cpu):
                found[p] = (
                    "cannot be computed by a server, or has sizes of 2**32 or more, which cannot be sent: use the CPU"
                )
    return found


def _can_be_sent(p: Any, cpu: Any) -> bool:
    """Return whether a server can compute a node. Servers report support for all, so this machine's CPU is asked."""
    return all(fits_in_32_bits(t) for t in (p, *p.src) if t) and bool(c.ggml_backend_dev_supports_op(cpu, p))


def check_memory(graph: Graph, backends: Sequence[Backend], placed: Mapping[Any, Backend]) -> dict[Any, list[Any]]:
    """Return the devices of ``backends`` that can read each buffer of ``graph``, by C pointer.

    Raises
    ------
    ValueError
        If no backend can read a buffer, or a tensor was placed on another device than its memory is on.
    UnsupportedOpError
        If a tensor is larger than its device's kernels can read.
    """
    where: dict[Any, list[Any]] = {}
    for p in graph.members:
        buffer = (p.view_src or p).buffer
        if p.view_src and p.view_src.op != Op.NONE and c.ggml_is_empty(p.view_src):
            raise ValueError(f"{graph.wrap(p)!r} is a view of a result of no elements, which gets no memory")
        if buffer and buffer not in where:
            kind = BufferType(c.ggml_backend_buffer_get_type(buffer))
            where[buffer] = [b.device.ptr for b in backends if b.supports_buffer_type(kind)]
            if not where[buffer]:
                names = ", ".join(b.name for b in backends)
                raise ValueError(
                    f"{graph.wrap(p)!r} is in {kind.name}, which none of {names} can read: "
                    "add that device to the scheduler"
                )
        if (
            buffer
            and p.op == Op.NONE
            and c.ggml_nbytes(p) > _READ_ANYWHERE
            and not any(c.ggml_backend_dev_supports_op(d, p) for d in where[buffer])
        ):
            raise UnsupportedOpError(f"{graph.wrap(p)!r} is larger than what its device can read of one tensor")
        if buffer and p in placed and placed[p].device.ptr not in where[buffer]:
            raise ValueError(f"{graph.wrap(p)!r} was placed on {placed[p].name}, but has memory elsewhere")
    return where


def check_ops(
    graph: Graph, backends: Sequence[Backend], placed: Mapping[Any, Backend], moved: Mapping[Any, str]
) -> None:
    """Check that some backend can compute each node.

    For a node that was placed, this is the backend of its placement. For a node with memory, it is any backend that can
    read the memory; for another node, any backend.

    ``moved`` has the nodes that only the CPU can compute, each with the reason.

    Raises
    ------
    UnsupportedOpError
        If no backend can compute a node.
    ValueError
        If a node writes to read-only memory; and as :func:`check_memory`.
    """
    where = check_memory(graph, backends, placed)
    devices = [(b, b.device.ptr) for b in backends]
    supports = c.ggml_backend_dev_supports_op
    for p in graph.node_pointers():
        buffer = (p.view_src or p).buffer
        candidates = [d for b, d in devices if b is placed[p]] if p in placed else [d for _, d in devices]
        if buffer:
            if buffer in read_only and p.op not in VIEWS:
                raise ValueError(f"{graph.wrap(p)!r} writes to memory that is read-only")
            candidates = [d for d in candidates if d in where[buffer]]
        if p in moved:
            candidates = [d for d in candidates if d == devices[-1][1]]
            if not candidates:
                raise UnsupportedOpError(f"{graph.wrap(p)!r} {moved[p]}")
        if not any(supports(d, p) for d in candidates) and not any(
            d in candidates and supports_copied(b, p) for b, d in devices
        ):
            names = ", ".join(b.name for b, d in devices if d in candidates) or "no backend of this scheduler"
            raise UnsupportedOpError(
                f"{graph.wrap(p)!r} cannot be computed on {names}, where it was placed or has its memory"
                if buffer or p in placed
                else f"{graph.wrap(p)!r} cannot be computed on any of {names}"
            )


def check_in_place(p: Any, graph: Graph, backend: Backend) -> None:
    """Check that ggml runs an in-place node on a backend that can write the node's memory.

    Raises
    ------
    UnsupportedOpError
        If ``backend``, which ggml chose, cannot write the memory.
    """
    t = graph.wrap(p)
    kind = t.buffer_type
    if kind is not None and not backend.supports_buffer_type(kind):
        raise UnsupportedOpError(
            f"{t!r} writes to {kind.name} but runs on {backend.name}: place both on one backend, or use "
            "the form that is not in place"
        )
