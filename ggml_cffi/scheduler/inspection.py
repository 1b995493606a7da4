"""Inspection of the graph that a scheduler holds: assignment, splits, copies and sizes."""

from __future__ import annotations

from threading import RLock
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.buffer import BufferType
from ggml_cffi.core.device_choice import find
from ggml_cffi.core.handle import Handle
from ggml_cffi.core.op_sets import VIEWS
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.held_graph import HeldGraph
from ggml_cffi.scheduler.splits import Split, find_copies, find_splits


class SchedulerInspection(Handle):
    """Read-only part of :class:`Scheduler <ggml_cffi.Scheduler>`, which inherits it.

    It is a base class and not an attribute, because users write ``scheduler.splits``: twelve methods of the scheduler
    would only pass calls on.
    """

    __slots__ = ()
    backends: tuple[Backend, ...]
    lock: RLock
    _held: HeldGraph | None
    _reserved: bool

    @property
    def graph(self) -> Graph | None:
        """The held graph."""
        held = self._held
        return None if held is None else held.graph

    @property
    def held(self) -> HeldGraph:
        """The held graph, with its state.

        Raises
        ------
        ValueError
            If no graph is held.
        """
        held = self._held
        if held is None:
            self.ptr  # noqa: B018 - raises when closed
            raise ValueError("the scheduler holds no graph: call alloc(graph) first")
        return held

    def find_backend(self, backend: Backend | str | Any) -> Backend:
        """Return the scheduler's backend that is given as an object, by its name or by its C pointer.

        Raises
        ------
        ValueError
            If there is none.
        """
        device = find(backend, [b.device for b in self.backends]) if isinstance(backend, str) else None
        for b in self.backends:
            if b is backend or b.ptr == backend or b.device == device:
                return b
        raise ValueError(f"{backend!r} is not one of this scheduler's: {', '.join(b.name for b in self.backends)}")

    def backend_at(self, pointer: Any) -> Backend:
        """Return the backend that ggml assigned the node at a C pointer to. The caller holds :attr:`lock`."""
        return self.find_backend(c.ggml_backend_sched_get_tensor_backend(self.ptr, pointer))

    def backend_of(self, tensor: Tensor) -> Backend:
        """Return the backend that ggml assigned ``tensor`` of the held graph to.

        Raises
        ------
        ValueError
            If no graph is held, or the tensor is not part of it.

        C: ``ggml_backend_sched_get_tensor_backend``.
        """
        with self.lock:
            if tensor not in self.held.graph:
                raise ValueError(f"{tensor!r} is not part of the graph that the scheduler holds")
            return self.backend_at(tensor.ptr)

    def assignment(self) -> list[tuple[Tensor, Backend]]:
        """Return the nodes of the held graph in order, with their backends. Views compute nothing and are omitted."""
        with self.lock:
            return [(t, self.backend_at(t.ptr)) for t in self.held.graph.nodes if t.op not in VIEWS]

    @property
    def splits(self) -> list[Split]:
        """The splits of the held graph, in order of computation."""
        with self.lock:
            return self.splits_of(self.held.graph)

    def splits_of(self, graph: Graph) -> list[Split]:
        """Return the splits of ``graph``, which ggml has split. The caller holds :attr:`lock`."""
        return [Split(*found) for found in find_splits(graph.nodes, self.backend_at)]

    @property
    def copies(self) -> list[tuple[Tensor, Backend]]:
        """The tensors that each run of the held graph copies between backends, each with its target."""
        with self.lock:
            held = self.held
            found = find_copies(held.sources(), self.backend_at)
            return [(held.graph.wrap(copy.source), copy.target) for copy in found]

    @property
    def n_splits(self) -> int:
        """Number of splits of the held graph. C: ``ggml_backend_sched_get_n_splits``."""
        with self.lock:
            self.held  # noqa: B018 - raises when nothing is held
            return c.ggml_backend_sched_get_n_splits(self.ptr)

    @property
    def n_copies(self) -> int:
        """Copies of the inputs, 4 with ``parallel`` and 1 without. C: ``ggml_backend_sched_get_n_copies``."""
        return c.ggml_backend_sched_get_n_copies(self.ptr)

    def buffer_sizes(self) -> dict[Backend, int]:
        """Return the bytes of the compute buffer on each backend. C: ``ggml_backend_sched_get_buffer_size``."""
        with self.lock:
            if not self._reserved:
                return dict.fromkeys(self.backends, 0)
            return {b: c.ggml_backend_sched_get_buffer_size(self.ptr, b.ptr) for b in self.backends}

    def buffer_type(self, backend: Backend | str) -> BufferType:
        """Return the buffer type of the results on ``backend``. C: ``ggml_backend_sched_get_buffer_type``."""
        return BufferType(c.ggml_backend_sched_get_buffer_type(self.ptr, self.find_backend(backend).ptr))
