"""The objects behind :mod:`ggml_cffi.flat`: they may be forgotten, and inputs move to where they are placed later."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from ggml_cffi import c
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.context import Context
from ggml_cffi.core.device import Device
from ggml_cffi.core.handle import Handle
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.scheduler import Scheduler


class _Quiet(Handle):
    """A handle that closes without a warning when it is forgotten, as a C pointer would be."""

    __slots__ = ()

    def __del__(self) -> None:
        if getattr(self, "_owner", None) is not None and not self.closed and not sys.is_finalizing():
            self.close()


class FlatBackend(_Quiet, Backend):
    """A :class:`Backend` that may be forgotten."""

    __slots__ = ()


class FlatGraph(_Quiet, Graph):
    """A :class:`Graph` that may be forgotten. It is freed with its context."""

    __slots__ = ()


class FlatContext(_Quiet, Context):
    """A :class:`Context` that may be forgotten, and that frees the graphs made in it."""

    __slots__ = ("given", "graphs", "running")

    def __init__(self) -> None:
        super().__init__()
        self.graphs: weakref.WeakSet[Graph] = weakref.WeakSet()
        """Graphs made here, as C has them in the memory of the context."""
        self.given: set[Any] = set()
        """C pointers of the inputs that have their memory from a scheduler."""
        self.running: weakref.WeakSet[Scheduler] = weakref.WeakSet()
        """Schedulers that were started on tensors of this context and not waited for."""

    def close(self) -> None:
        """Close the context, its buffers and its graphs."""
        for graph in list(getattr(self, "graphs", ())):
            graph.close()
        super().close()

    def take_back(self, t: Tensor) -> None:
        """Give up the memory of an input; its values are written to what it gets next.

        Nothing happens where a graph that a scheduler holds reads it there.
        """
        if any(t.ptr in graph.members for graph in self.held):
            return
        pointer, data = t.ptr, np.empty(t.nbytes, np.uint8)
        with t.memory_lock(pointer):
            c.ggml_backend_tensor_get(pointer, c.ffi.from_buffer(data), 0, data.size)
        before = pointer.buffer
        pointer.buffer = pointer.data = c.NULL
        self.given.discard(pointer)
        self.set_on_alloc(t, data)
        for buffer in self.buffers:
            if buffer.ptr == before and not any(other.ptr.buffer == before for other in self.tensors()):
                buffer.close()


class FlatScheduler(_Quiet, Scheduler):
    """A :class:`Scheduler` that may be forgotten, and that moves inputs to where they are placed later."""

    __slots__ = ()

    def _open(self, given: Sequence[Backend | Device | str]) -> tuple[Backend, ...]:
        if given and isinstance(given[-1], Backend) and not given[-1].device.is_cpu:
            cpu = FlatBackend("CPU")
            self._opened.append(cpu)
            given = [*given, cpu]
        return super()._open(given)

    def place(self, tensor: Tensor, backend: Backend | str) -> None:
        """As :meth:`Scheduler.place`; an input that a scheduler put elsewhere is moved by the next reservation."""
        with self.lock:
            self._placed[tensor.ptr] = (tensor, self._find(backend))

    def placed_on(self, tensor: Tensor) -> Backend | None:
        """Where the scheduler computes the tensor, or was told to, None where neither is known."""
        with self.lock:
            if self._graph is not None and tensor in self._graph:
                return self.backend_of(tensor)
            return self._placed.get(tensor.ptr, (tensor, None))[1]

    def _alloc_inputs(self, graph: Graph) -> None:
        flat = [ctx for ctx in graph.contexts if isinstance(ctx, FlatContext)]
        for ctx in flat:
            for pointer in ctx.given & graph.members:
                t = Tensor(ctx, pointer, c.ggml_n_dims(pointer))
                kind = t.buffer_type
                _, placed = self._placed.get(pointer, (t, None))
                readers = self.backends if placed is None else (placed,)
                if kind is not None and not any(b.supports_buffer_type(kind) for b in readers):
                    ctx.take_back(t)
        fresh = list(graph.unallocated_leaves())
        super()._alloc_inputs(graph)
        for t in fresh:
            if isinstance(t.context, FlatContext):
                t.context.given.add(t.ptr)


class GraphBuilder:
    """What ``ggml_new_graph`` returns: it collects outputs, and is a :class:`Graph` once it is used."""

    def __init__(self, ctx: Context) -> None:
        self.context = ctx
        self.outputs: list[Tensor] = []
        self._graph: Graph | None = None

    def expand(self, tensor: Tensor) -> None:
        """Add an output."""
        if tensor not in self.outputs:
            self.outputs.append(tensor)
            self._graph = None

    def graph(self) -> Graph:
        """The graph of the outputs so far."""
        if self._graph is None:
            self._graph = new_graph(self.context, self.outputs)
        return self._graph


def new_graph(ctx: Context, outputs: Sequence[Tensor]) -> Graph:
    """A graph that is freed with ``ctx``."""
    ctx.ptr  # noqa: B018 - raises when closed
    graph = FlatGraph(*outputs)
    if isinstance(ctx, FlatContext):
        ctx.graphs.add(graph)
    return graph
