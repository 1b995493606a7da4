"""Allocation by a scheduler: placements, the backend of each node, and the memory of the results."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

from ggml_cffi import c
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.context import Context
from ggml_cffi.core.handle import Owner
from ggml_cffi.core.locks import Locks
from ggml_cffi.core.op_sets import VIEWS
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.errors import OutOfMemoryError
from ggml_cffi.scheduler import prepare
from ggml_cffi.scheduler.checks import check_in_place, check_ops
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.held_graph import HeldGraph
from ggml_cffi.scheduler.inspection import SchedulerInspection
from ggml_cffi.scheduler.placements import Placements, check_placement
from ggml_cffi.scheduler.preparation import Preparation
from ggml_cffi.scheduler.splits import Split

MAX_SIZE = 2**22  # ggml reserves 20 KB of address space for each


class SchedulerAllocation(SchedulerInspection):
    """Part of :class:`Scheduler <ggml_cffi.Scheduler>` that places, reserves and allocates graphs.

    It is a base class, because users write ``scheduler.alloc``.
    """

    __slots__ = (
        "_capacity",
        "_held",
        "_known",
        "_locks",
        "_pending",
        "_primed",
        "_reserved",
        "_unfinished",
        "overlap",
        "parallel",
        "placements",
    )
    parallel: bool
    overlap: bool
    placements: Placements
    _capacity: int
    _known: WeakKeyDictionary[Graph, Preparation]
    _locks: Locks
    _pending: bool
    _primed: bool
    _unfinished: list[HeldGraph]

    @abstractmethod
    def _open_sched(self) -> None:
        """Open the C scheduler, with room for as many tensors as the capacity."""

    def place(self, tensor: Tensor, backend: Backend | str) -> None:
        """Compute ``tensor``, or store it if it is an input, on ``backend`` from the next :meth:`alloc` on.

        The placement stays until it is changed or :meth:`unplace` is called.

        Raises
        ------
        ValueError
            If the backend is not one of this scheduler's, or the tensor has memory on another device.

        C: ``ggml_backend_sched_set_tensor_backend``.
        """
        chosen = self.find_backend(backend)
        if self._held is None:
            check_placement(tensor, chosen)
        with self.lock:
            self.placements.set(tensor, chosen)

    def unplace(self, tensor: Tensor | None = None) -> None:
        """Remove the placement of ``tensor``, or all placements."""
        with self.lock:
            self.placements.remove(tensor)

    # ------------------------------------------------------------------ allocation

    def reserve(self, graph: Graph) -> dict[Backend, int]:
        """Make room for ``graph``, usually the largest to come, so that later graphs fit without reallocation.

        The graph itself does not change. A previously held graph is released.

        Returns
        -------
        dict
            Bytes of the compute buffer on each backend.

        Raises
        ------
        OutOfMemoryError
            If a device does not have enough. The scheduler stays usable.
        UnsupportedOpError
            If no backend can compute a node.

        C: ``ggml_backend_sched_reserve``.
        """
        with self.lock:
            self.reset()
            prepared = self._prepare(graph)
            try:
                self._reserve(graph)
            finally:
                prepared.restore()
            return self.buffer_sizes()

    def reserve_size(self, graph: Graph) -> dict[Backend, int]:
        """Return the bytes that :meth:`reserve` would take on each backend. A held graph is released.

        Inputs without memory are allocated, as in :meth:`alloc`.

        C: ``ggml_backend_sched_reserve_size``.
        """
        with self.lock:
            self.reset()
            prepared = self._prepare(graph)
            sizes = c.ffi.new("size_t[]", len(self.backends))
            try:
                self.placements.apply(self.ptr, graph, self.backends[-1])
                with self.exclusive():
                    c.ggml_backend_sched_reserve_size(self.ptr, graph.ptr, sizes)
            finally:
                prepared.restore()
                c.ggml_backend_sched_reset(self.ptr)
            # ggml frees buffers that it finds too small, so no buffer has a size until the next reserve.
            self._reserved = self._primed = False
            return dict(zip(self.backends, sizes, strict=True))

    def split_graph(self, graph: Graph) -> list[Split]:
        """Return the splits that ``graph`` would have, without memory for its results. A held graph is released.

        C: ``ggml_backend_sched_split_graph``.
        """
        with self.lock:
            self.reset()
            prepared = self._prepare(graph)
            try:
                self.placements.apply(self.ptr, graph, self.backends[-1])
                c.ggml_backend_sched_split_graph(self.ptr, graph.ptr)
                return self.splits_of(graph)
            finally:
                prepared.restore()
                c.ggml_backend_sched_reset(self.ptr)

    def alloc(self, graph: Graph, *, wait: bool = True) -> None:
        """Assign every node of ``graph`` to a backend, and allocate its tensors. A previously held graph is released.

        Inputs (leaves without memory) get memory of their own, zeroed, on the backend that they were placed on, else
        on the preferred backend. Set them after this call, once or before each run.

        A graph that this scheduler allocated before is not checked again, unless placements, the memory of its leaves
        or the compute buffers have changed.

        Parameters
        ----------
        wait
            False to return while devices compute the previously held graph, if that is possible. Do not set its inputs
            before :meth:`synchronize`.

        Raises
        ------
        OutOfMemoryError
            If a device does not have enough. The scheduler stays usable.
        UnsupportedOpError
            If no backend can compute a node.
        ClosedError
            If a context of the graph is closed.
        ValueError
            If another scheduler holds a graph with some of the same tensors.

        C: ``ggml_backend_sched_reserve``, ``ggml_backend_sched_alloc_graph``.
        """
        with self.lock:
            known = self._known.get(graph)
            if known is None or wait or self.parallel or self._locks.remote:
                self.reset()
            else:
                self._release()
            owners = prepare.graph_owners(graph)  # kept: other threads could close what the leaves are in
            self.placements.remove_closed()
            if known is not None and known.is_valid(self.placements, self.buffer_sizes()):
                self._alloc_again(graph, owners, known)
            else:
                self.reset()
                self._alloc_first(graph)

    def _alloc_first(self, graph: Graph) -> None:
        prepared = self._prepare(graph)
        try:
            if self.overlap and len(self.backends) > 2 and not self.placements.concern(graph):
                prepare.order_for_overlap(self.ptr, prepared, self.backends, self.placements)
            # ggml's alloc_graph crashes if memory runs out; its reserve reports it.
            self._reserve(graph)
            prepared.restore(keep_added=True)
            self._alloc(graph)
            for p in graph.node_pointers():
                if p.view_src and p.op not in VIEWS:
                    check_in_place(p, graph, self.backend_at(p))
            cpu = self.backends[-1] if prepare.uses_cpu(self.ptr, graph, self.backends) else None
            self._known[graph] = Preparation.of(prepared, self.placements, cpu, self.buffer_sizes())
        except BaseException:
            prepared.restore()
            c.ggml_backend_sched_reset(self.ptr)
            raise
        finally:
            self.placements.pinned = {}
        self._hold(prepared, cpu)

    def _alloc_again(self, graph: Graph, owners: list[Owner], known: Preparation) -> None:
        graph.check_free()
        prepared = HeldGraph(graph, owners, known.saved)
        self.placements.required = known.required
        try:
            prepared.add_operands(known.added)
            self._alloc(graph)  # it takes the buffers as they are: the graph fitted before
        except BaseException:
            prepared.restore()
            c.ggml_backend_sched_reset(self.ptr)
            raise
        finally:
            self.placements.pinned = {}
        self._hold(prepared, known.cpu)

    def _alloc(self, graph: Graph) -> None:
        self.placements.apply(self.ptr, graph, self.backends[-1])
        with self.exclusive():
            done = c.ggml_backend_sched_alloc_graph(self.ptr, graph.ptr)
        if not done:
            raise OutOfMemoryError("the scheduler could not allocate the graph")

    def _hold(self, prepared: HeldGraph, cpu: Backend | None) -> None:
        prepared.hold(cpu)
        self._held = prepared

    def _prepare(self, graph: Graph) -> HeldGraph:
        """Check ``graph``, make room for it, give its inputs memory, and save the fields that ggml overwrites."""
        owners = prepare.graph_owners(graph)
        graph.check_free()
        self.placements.remove_closed()
        if graph.n_tensors > MAX_SIZE:
            raise ValueError(f"{graph!r} is larger than a scheduler can hold ({MAX_SIZE} tensors)")
        if graph.n_tensors > self._capacity:
            self._capacity = min(2 * graph.n_tensors, MAX_SIZE)
            self._open_sched()
        self._alloc_inputs(graph)
        owners += prepare.graph_owners(graph)  # with the buffers of the inputs
        prepare.keep_second_operands(graph)
        self.placements.require(graph, self.backends)
        check_ops(graph, self.backends, self.placements.by_pointer(), self.placements.cpu_only)
        return HeldGraph(graph, owners)

    def _alloc_inputs(self, graph: Graph) -> None:
        groups: dict[tuple[Context, Backend], list[Tensor]] = {}
        for t in graph.unallocated_leaves():
            backend = self.placements.get(t.ptr) or self.backends[0]
            groups.setdefault((t.context, backend), []).append(t)
        for (ctx, backend), tensors in groups.items():
            ctx.alloc(backend.buffer_type, tensors)

    def _reserve(self, graph: Graph) -> None:
        if not self._primed and any(not p.view_src and c.ggml_is_empty(p) for p in graph.node_pointers()):
            with self.exclusive():
                prepare.prime(self.ptr, self.backends)
            self._primed = True
        self.placements.apply(self.ptr, graph, self.backends[-1])
        with self.exclusive():
            enough = c.ggml_backend_sched_reserve(self.ptr, graph.ptr)
        if not enough:
            free = ", ".join(f"{b.name} {b.device.memory().free:,}" for b in self.backends)
            raise OutOfMemoryError(f"no room for the intermediate results of {graph!r}; bytes free: {free}")
        self._reserved = True

    def reset(self) -> None:
        """Release the held graph. Its inputs keep their memory and values; its other results can no longer be read.

        C: ``ggml_backend_sched_reset``.
        """
        with self.lock:
            if self._held is None and not self._unfinished:
                return
            self._locks.acquire()  # even if a server is lost: the graph must be released
            try:
                c.ggml_backend_sched_synchronize(self.ptr)
                self._finished()
            finally:
                self._locks.release()
            self._release()

    def _release(self) -> None:
        """Release the held graph, if there is one. While devices compute it, its memory is kept."""
        held, self._held = self._held, None
        if held is not None:
            if self._pending:
                self._unfinished.append(held)
            held.restore()
            c.ggml_backend_sched_reset(self.ptr)

    def _finished(self) -> None:
        self._pending = False
        self._unfinished.clear()

    def exclusive(self) -> AbstractContextManager[Any]:
        """Return the lock of all backends: a backend takes work from one thread at a time."""
        return self._locks.plain
