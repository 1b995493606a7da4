"""Objects behind :mod:`ggml_cffi.flat`: nobody needs to close them, and inputs move to where they are placed later."""

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


class _SilentHandle(Handle):
    """A handle that closes without a warning when it is garbage collected."""

    __slots__ = ()

    def __del__(self) -> None:
        if getattr(self, "_owner", None) is not None and not self.closed and not sys.is_finalizing():
            self.close()


class FlatBackend(_SilentHandle, Backend):
    """A :class:`Backend` that need not be closed."""

    __slots__ = ()


class FlatGraph(_SilentHandle, Graph):
    """A :class:`Graph` that need not be closed. It is freed with its context."""

    __slots__ = ()


class FlatContext(_SilentHandle, Context):
    """A :class:`Context` that need not be closed, and that frees its graphs."""

    __slots__ = ("graphs", "running", "scheduler_allocated")

    def __init__(self) -> None:
        super().__init__()
        self.graphs: weakref.WeakSet[Graph] = weakref.WeakSet()
        """Graphs of this context. In C they are part of the context's memory."""
        self.scheduler_allocated: set[Any] = set()
        """C pointers of the inputs that a scheduler has allocated."""
        self.running: weakref.WeakSet[Scheduler] = weakref.WeakSet()
        """Schedulers with an asynchronous run on tensors of this context."""

    def close(self) -> None:
        """Close the context, its buffers and its graphs."""
        for graph in list(getattr(self, "graphs", ())):
            graph.close()
        super().close()

    def release_input(self, t: Tensor) -> None:
        """Release the memory of an input, and keep its values for its next allocation.

        An input of a graph that a scheduler holds is left alone.
        """
        if any(t.ptr in held.graph.members for held in self.held):
            return
        pointer, data = t.ptr, np.empty(t.nbytes, np.uint8)
        with t.memory_lock(pointer):
            c.ggml_backend_tensor_get(pointer, c.ffi.from_buffer(data), 0, data.size)
        before = pointer.buffer
        pointer.buffer = pointer.data = c.NULL
        self.scheduler_allocated.discard(pointer)
        self.set_on_alloc(t, data)
        for buffer in self.buffers:
            if buffer.ptr == before and not any(other.ptr.buffer == before for other in self.tensors()):
                buffer.close()


class FlatScheduler(_SilentHandle, Scheduler):
    """A :class:`Scheduler` that need not be closed, and that moves inputs placed after their allocation."""

    __slots__ = ()

    def _open(self, given: Sequence[Backend | Device | str]) -> tuple[Backend, ...]:
        if given and isinstance(given[-1], Backend) and not given[-1].device.is_cpu:
            cpu = FlatBackend("CPU")
            self._opened.append(cpu)
            given = [*given, cpu]
        return super()._open(given)

    def place(self, tensor: Tensor, backend: Backend | str) -> None:
        """Place a tensor; see :meth:`Scheduler.place`. The next reservation moves an input allocated elsewhere."""
        with self.lock:
            self.placements.set(tensor, self.find_backend(backend))

    def placed_on(self, tensor: Tensor) -> Backend | None:
        """Return the backend that computes the tensor or on which it was placed, None if there is neither."""
        with self.lock:
            if self.graph is not None and tensor in self.graph:
                return self.backend_of(tensor)
            return self.placements.get(tensor.ptr)

    def _alloc_inputs(self, graph: Graph) -> None:
        flat = [ctx for ctx in graph.contexts if isinstance(ctx, FlatContext)]
        for ctx in flat:
            for pointer in ctx.scheduler_allocated & graph.members:
                t = Tensor(ctx, pointer, c.ggml_n_dims(pointer))
                kind = t.buffer_type
                placed = self.placements.get(pointer)
                readers = self.backends if placed is None else (placed,)
                if kind is not None and not any(b.supports_buffer_type(kind) for b in readers):
                    ctx.release_input(t)
        fresh = list(graph.unallocated_leaves())
        super()._alloc_inputs(graph)
        for t in fresh:
            if isinstance(t.context, FlatContext):
                t.context.scheduler_allocated.add(t.ptr)


class GraphBuilder:
    """The result of ``ggml_new_graph``: it collects outputs and builds a :class:`Graph` when one is needed."""

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
        """Return the graph of the outputs so far."""
        if self._graph is None:
            self._graph = new_graph(self.context, self.outputs)
        return self._graph


def new_graph(ctx: Context, outputs: Sequence[Tensor]) -> Graph:
    """Return a graph that is freed with ``ctx``."""
    ctx.ptr  # noqa: B018 - raises when closed
    graph = FlatGraph(*outputs)
    if isinstance(ctx, FlatContext):
        ctx.graphs.add(graph)
    return graph
