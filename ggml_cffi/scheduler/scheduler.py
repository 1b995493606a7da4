"""The scheduler: one graph over several devices.

The scheduler chooses the backend of each node, copies tensors to the devices that need them, and allocates
intermediates. In addition to ggml's scheduler, this one

* keeps inputs valid from run to run, since they have memory of their own on the preferred device;
* allows a graph to be reserved, allocated, released and allocated again;
* keeps placements until they are changed;
* raises exceptions where ggml would end the process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any

from ggml_cffi import c
from ggml_cffi.core.backend import Backend, open_backend
from ggml_cffi.core.context import Context
from ggml_cffi.core.device import Device
from ggml_cffi.core.handle import Owner
from ggml_cffi.core.locks import Locks, free_when_unlocked
from ggml_cffi.core.op_sets import VIEWS
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.errors import OutOfMemoryError
from ggml_cffi.scheduler import prepare
from ggml_cffi.scheduler.checks import check_in_place, check_ops
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.held_graph import HeldGraph
from ggml_cffi.scheduler.inspection import SchedulerInspection
from ggml_cffi.scheduler.observe import Observer
from ggml_cffi.scheduler.placements import Placements, check_placement
from ggml_cffi.scheduler.splits import Split

if TYPE_CHECKING:
    from ggml_cffi.viz import Profile, Report

_MAX_SIZE = 2**22  # ggml reserves 20 KB of address space for each

#: Owners of schedulers that were never closed and were still computing: not freed, since devices write to them.
_abandoned: list[Owner] = []

#: A tensor, host memory, bytes from the start of the tensor, number of bytes.
Transfer = tuple[Any, Any, int, int]


class Scheduler(SchedulerInspection):
    """A scheduler that computes graphs over several backends.

    Parameters
    ----------
    backends
        Backends, devices or names, the preferred first. The CPU, which computes the rest, is added last if missing.
        Backends given by device or name are opened here and closed with the scheduler.
    parallel
        Keep four copies of the inputs, so that several runs can be in flight (pipeline parallelism).
    op_offload
        Compute large batches on GPUs even if the weights are in host memory.
    overlap
        Compute the nodes in an order in which several GPUs work at once, where the graph allows it and none of its
        nodes was placed by hand. False keeps the order in which the graph was built.
    graph_size
        Nodes and leaves to make room for; the scheduler grows when a graph has more.

    Raises
    ------
    ValueError
        Without a backend, with more than 16, with one twice, or if the CPU is not last.

    C: ``ggml_backend_sched_new``.
    """

    __slots__ = (
        "_capacity",
        "_held",
        "_locks",
        "_opened",
        "_pending",
        "_primed",
        "_reserved",
        "backends",
        "lock",
        "op_offload",
        "overlap",
        "parallel",
        "placements",
    )

    def __init__(
        self,
        backends: Sequence[Backend | Device | str],
        *,
        parallel: bool = False,
        op_offload: bool = True,
        overlap: bool = True,
        graph_size: int = 2048,
    ) -> None:
        if isinstance(backends, str | Backend | Device):
            raise TypeError("backends is a sequence: put the one backend in a list")
        if not isinstance(graph_size, int) or not 1 <= graph_size <= _MAX_SIZE:
            raise ValueError(f"graph_size must be 1 to {_MAX_SIZE}, not {graph_size}")
        self.parallel, self.op_offload, self.overlap = parallel, op_offload, overlap
        self._opened: list[Backend] = []
        try:
            self.backends = self._open(backends)
            """The backends in order of preference, the CPU last."""
            self._capacity = graph_size
            self._locks = Locks(b.lock for b in self.backends)
            self._open_sched()
        except BaseException:
            for backend in self._opened:
                backend.close()
            raise
        self.lock = threading.RLock()
        """Lock that every call holds. If other threads run the scheduler too, hold it until the outputs are read."""
        self.placements = Placements()
        """The placements of tensors; see :meth:`place`."""
        self._held: HeldGraph | None = None
        self._pending = False
        self._reserved = False

    def _open(self, given: Sequence[Backend | Device | str]) -> tuple[Backend, ...]:
        found: list[Backend] = []
        for which in given:
            backend, opened = open_backend(which)
            if opened:
                self._opened.append(backend)
            found.append(backend)
        if not found:
            raise ValueError("a scheduler needs at least one backend")
        if any(b.device.is_cpu for b in found[:-1]):
            raise ValueError("the CPU comes last: it takes the nodes that no backend before it can compute")
        if not found[-1].device.is_cpu:
            cpu = Backend("CPU")
            self._opened.append(cpu)
            found.append(cpu)
        prepare.check_backends(found)
        return tuple(found)

    def _open_sched(self) -> None:
        self._primed = False
        keep = [b.owner for b in self.backends]  # another thread may close the backends meanwhile
        pointers = c.ffi.new("ggml_backend_t[]", [b.ptr for b in self.backends])
        # The hash table holds nodes, leaves and copies: twice the number of tensors is enough.
        pointer = c.ggml_backend_sched_new(
            pointers, c.NULL, len(self.backends), 2 * self._capacity, self.parallel, self.op_offload
        )
        free: Callable[[Any], None] = c.ggml_backend_sched_free
        if self._locks.remote:
            free = partial(free_when_unlocked, self._locks.remote, free, keep)
        super().__init__(pointer, free, self.backends, fork_safe=False)

    # ------------------------------------------------------------------ placement

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

    def alloc(self, graph: Graph) -> None:
        """Assign every node of ``graph`` to a backend, and allocate its tensors. A previously held graph is released.

        Inputs (leaves without memory) get memory of their own, zeroed, on the backend that they were placed on, else
        on the preferred backend. Set them after this call, once or before each run.

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
            self.reset()
            prepared = self._prepare(graph)
            try:
                if self.overlap and len(self.backends) > 2 and not self.placements.concern(graph):
                    prepare.order_for_overlap(self.ptr, prepared, self.backends, self.placements)
                # ggml's alloc_graph crashes if memory runs out; its reserve reports it.
                self._reserve(graph)
                prepared.restore(keep_added=True)
                self.placements.apply(self.ptr, graph, self.backends[-1])
                with self.exclusive():
                    done = c.ggml_backend_sched_alloc_graph(self.ptr, graph.ptr)
                if not done:
                    raise OutOfMemoryError("the scheduler could not allocate the graph")
                for p in graph.node_pointers():
                    if p.view_src and p.op not in VIEWS:
                        check_in_place(p, graph, self.backend_at(p))
            except BaseException:
                prepared.restore()
                c.ggml_backend_sched_reset(self.ptr)
                raise
            finally:
                self.placements.pinned = {}
            prepared.hold(self.backends[-1] if prepare.uses_cpu(self.ptr, graph, self.backends) else None)
            self._held = prepared

    def _prepare(self, graph: Graph) -> HeldGraph:
        """Check ``graph``, make room for it, give its inputs memory, and save the fields that ggml overwrites."""
        owners = prepare.graph_owners(graph)
        graph.check_free()
        self.placements.remove_closed()
        if graph.n_tensors > _MAX_SIZE:
            raise ValueError(f"{graph!r} is larger than a scheduler can hold ({_MAX_SIZE} tensors)")
        if graph.n_tensors > self._capacity:
            self._capacity = min(2 * graph.n_tensors, _MAX_SIZE)
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
            held, self._held = self._held, None
            if held is not None:
                self._locks.acquire()  # even if a server is lost: the graph must be released
                try:
                    c.ggml_backend_sched_synchronize(self.ptr)
                    self._pending = False
                finally:
                    self._locks.release()
                held.restore()
                c.ggml_backend_sched_reset(self.ptr)
            del held

    # ------------------------------------------------------------------ computation

    def compute(
        self,
        graph: Graph | None = None,
        *,
        observe: Callable[[Tensor], object] | None = None,
        only: Collection[Tensor] | None = None,
    ) -> None:
        """Compute the held graph, and wait. A graph is allocated first if none is held.

        Parameters
        ----------
        observe
            Called with each node once it is computed; its values can be read during the call. Returning False stops
            the run. Nodes then run one by one, which is slower.
        only
            The nodes to observe; the others run as usual. Default all.

        Raises
        ------
        ValueError
            If another graph is held, or there is none.
        AbortedError
            If ``observe`` or :meth:`Backend.abort` stopped the run.
        GgmlError
            If a backend reports failure.
        Exception
            An exception of ``observe``, or of an operation written in Python.

        C: ``ggml_backend_sched_graph_compute``, ``ggml_backend_sched_set_eval_callback``.
        """
        if observe is None:
            self._run(graph, c.ggml_backend_sched_graph_compute, wait=True)
            return
        with self.lock:
            observer = Observer(self._ready(graph), observe, only)
            c.ggml_backend_sched_set_eval_callback(self.ptr, observer.callback, c.NULL)
            try:
                self._run(graph, c.ggml_backend_sched_graph_compute, wait=True)
            finally:
                c.ggml_backend_sched_set_eval_callback(self.ptr, c.NULL, c.NULL)
                if observer.error is not None:
                    raise observer.error

    def compute_async(self, graph: Graph | None = None) -> None:
        """Start computing the held graph and return; :meth:`synchronize` waits. Errors as :meth:`compute`.

        C: ``ggml_backend_sched_graph_compute_async``.
        """
        self._pending = True
        self._run(graph, c.ggml_backend_sched_graph_compute_async, wait=False)

    def _run(self, graph: Graph | None, start: Callable[[Any, Any], int], *, wait: bool) -> None:
        with self.lock:
            self._ready(graph)
            with self._locks:
                self.compute_held(start)
                if wait:
                    self._locks.wait()

    def replay(self, inputs: Iterable[Transfer], outputs: Iterable[Transfer]) -> None:
        """Set inputs, compute the held graph, and get outputs under one lock, without checks.

        C: ``ggml_backend_tensor_set``, ``ggml_backend_sched_graph_compute``, ``ggml_backend_tensor_get``.
        """
        with self.lock, self._locks:
            for transfer in inputs:
                c.ggml_backend_tensor_set(*transfer)
            self.compute_held()
            for transfer in outputs:
                c.ggml_backend_tensor_get(*transfer)

    def compute_held(self, start: Callable[[Any, Any], int] | None = None) -> None:
        """Compute the held graph. The caller holds :attr:`lock` and :meth:`exclusive`.

        ``start`` is ``ggml_backend_sched_graph_compute`` (default), which waits, or its asynchronous counterpart.
        """
        held = self._held or self.held
        held.compute(self._cell[0] or self.ptr, start or c.ggml_backend_sched_graph_compute)

    def synchronize(self) -> None:
        """Wait for everything that was started. C: ``ggml_backend_sched_synchronize``."""
        with self.lock, self.exclusive():
            c.ggml_backend_sched_synchronize(self.ptr)
            self._locks.wait()
            self._pending = False

    def wait_for_servers(self) -> None:
        """Wait within a run for the remote devices: ggml's own wait does not cover them."""
        self._locks.wait()

    def _ready(self, graph: Graph | None) -> Graph:
        """Return the held graph, which is ``graph`` if one is given; allocate that if none is held."""
        if self._held is None:
            self.ptr  # noqa: B018 - raises when closed
            if graph is None:
                raise ValueError("the scheduler holds no graph: call alloc(graph) first, or pass the graph")
            self.alloc(graph)
        held = self.held.graph
        if graph is not None and graph is not held:
            raise ValueError(f"the scheduler holds {held!r}, not {graph!r}: call alloc() with the new one first")
        for ctx in held.contexts:
            ctx.ptr  # noqa: B018 - raises when closed
        return held

    def exclusive(self) -> AbstractContextManager[Any]:
        """Return the lock of all backends: a backend takes work from one thread at a time."""
        return self._locks.plain

    def report(self) -> Report:
        """Return splits, copies and memory of the held graph; ``str()`` of it is a table. See :mod:`ggml_cffi.viz`."""
        from ggml_cffi import viz

        return viz.report(self)

    def draw(self, path: str | PathLike[str] | None = None) -> str:
        """Return the held graph as an SVG document, and write it to ``path``. See :func:`ggml_cffi.viz.svg`."""
        from ggml_cffi import viz

        return viz.svg(self, path)

    def profile(self, graph: Graph | None = None, *, runs: int = 3, warmup: int = 1) -> Profile:
        """Measure each node and each split of the graph. See :func:`ggml_cffi.viz.profile`."""
        from ggml_cffi import viz

        return viz.profile(self, graph, runs=runs, warmup=warmup)

    def close(self) -> None:
        """Close the scheduler, and the backends that it opened."""
        with getattr(self, "lock", nullcontext()):
            if not self.closed:
                self.reset()
                for backend in self._opened:
                    backend.close()
            super().close()

    def forgotten(self) -> None:
        """Close without waiting for locks. While a device still computes, free nothing."""
        if self._pending:
            _abandoned.append(self.owner)
        elif self._held is not None:
            self._held.restore()
            self._held = None
        for backend in self._opened:
            super(Backend, backend).close()
        super().close()

    def __repr__(self) -> str:
        return f"<Scheduler {'closed' if self.closed else ', '.join(b.name for b in self.backends)}>"
