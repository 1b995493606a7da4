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
from contextlib import nullcontext
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ggml_cffi import c
from ggml_cffi.core.backend import Backend, open_backend
from ggml_cffi.core.device import Device
from ggml_cffi.core.handle import Owner
from ggml_cffi.core.locks import Locks, free_when_unlocked
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.scheduler import prepare
from ggml_cffi.scheduler.allocation import MAX_SIZE, SchedulerAllocation
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.held_graph import HeldGraph
from ggml_cffi.scheduler.observe import Observer
from ggml_cffi.scheduler.placements import Placements
from ggml_cffi.scheduler.preparation import Preparation

if TYPE_CHECKING:
    from ggml_cffi.viz import Profile, Report

#: Owners of schedulers that were never closed and were still computing: not freed, since devices write to them.
_abandoned: list[Owner] = []

#: A tensor, host memory, bytes from the start of the tensor, number of bytes.
Transfer = tuple[Any, Any, int, int]


class Scheduler(SchedulerAllocation):
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

    __slots__ = ("_opened", "backends", "lock", "op_offload")

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
        if not isinstance(graph_size, int) or not 1 <= graph_size <= MAX_SIZE:
            raise ValueError(f"graph_size must be 1 to {MAX_SIZE}, not {graph_size}")
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
        self._unfinished: list[HeldGraph] = []  # released while devices compute them
        self._known: WeakKeyDictionary[Graph, Preparation] = WeakKeyDictionary()
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
            self._finished()

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
