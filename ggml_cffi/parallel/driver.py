"""Runs the steps of several devices: step ``k`` on all of them, then step ``k + 1``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any

from ggml_cffi import c
from ggml_cffi._handle import Closing
from ggml_cffi.backend import Backend, default_threads
from ggml_cffi.parallel._arrivals import Arrivals
from ggml_cffi.parallel._barrier import Barrier

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

#: For each device, for each step, C pointers of graphs.
Graphs = Sequence[Sequence[Sequence[Any]]]

_SPARE = 2  # processors for each device from which on each has a thread


class Driver(Closing):
    """Runs graphs on several backends in step.

    Parameters
    ----------
    backends
        One for each device.
    threads
        Whether each device has a thread of its own, which hands it the nodes of its graphs while others do so for
        theirs. Else one thread hands out all, one device after the other. Default whatever is quickest.
    """

    def __init__(self, backends: Sequence[Backend], *, threads: bool | None = None) -> None:
        self.backends = tuple(backends)
        n = len(self.backends)
        spare = default_threads() >= _SPARE * n + 1
        self.threads = n > 1 and (spare if threads is None else threads)
        """Whether each device has a thread of its own."""
        self.ways: list[Callable[[Graphs, Arrivals], int]] = [self._run_waiting]
        """The ways there are to run graphs whose sums can be seen to arrive."""
        if threads is None:
            self.ways.append(self._run_watching)
        self.computed = [0] * n
        """Graphs that each device has computed."""
        self._locks = list({id(b.lock): b.lock for b in sorted(self.backends, key=lambda b: id(b.lock))}.values())
        self._barrier = Barrier(n)
        self._pool: ThreadPoolExecutor | None = None

    def run(
        self,
        graphs: Graphs,
        meanwhile: Callable[[], object] | None = None,
        arrivals: Arrivals | None = None,
        way: Callable[[Graphs, Arrivals], int] | None = None,
    ) -> int:
        """Compute ``graphs[r][k]`` (C pointers) on backend ``r``, one after another; step ``k`` after ``k - 1`` of all.
        0, or ggml's status.

        Some backends may have no graph for the last step. ``meanwhile`` is called while one backend computes; where
        there are several, whose steps need this process at any moment, before. ``way`` is one of :attr:`ways`, for
        graphs whose sums can be seen to arrive, at ``arrivals``.

        C: ``ggml_backend_graph_compute_async``, ``ggml_backend_graph_compute``, ``ggml_backend_synchronize``.
        """
        if len(self.backends) == 1:
            status = self._run_one(graphs[0], meanwhile)
        else:
            if meanwhile is not None:
                meanwhile()
            with ExitStack() as stack:
                for lock in self._locks:
                    stack.enter_context(lock)
                status = self._run_waiting(graphs) if way is None or arrivals is None else way(graphs, arrivals)
        for r, own in enumerate(graphs):
            self.computed[r] += len(own)
        return status

    def _run_waiting(self, graphs: Graphs, _arrivals: Arrivals | None = None) -> int:
        """Wait for the devices at each step."""
        return self._run_threads(graphs) if self.threads else self._run_in_turns(graphs)

    def _run_watching(self, graphs: Graphs, arrivals: Arrivals) -> int:
        """Hand out each step in pieces, to all devices in turns, when the sum before has arrived from all of them."""
        compute, pointers = c.ggml_backend_graph_compute_async, [b.ptr for b in self.backends]
        status = 0

        def synchronize() -> None:
            for pointer in pointers:
                c.ggml_backend_synchronize(pointer)

        arrivals.clear(0)
        try:
            for k, step in enumerate(zip_longest(*graphs, fillvalue=())):
                for pieces in zip_longest(*step):
                    for pointer, graph in zip(pointers, pieces, strict=True):
                        if graph is not None:
                            status = compute(pointer, graph) or status
                arrivals.clear(k + 1)
                arrivals.wait(k, synchronize)
        finally:
            synchronize()
        return status

    def _run_one(self, graphs: Sequence[Sequence[Any]], meanwhile: Callable[[], object] | None) -> int:
        """All graphs of the only backend, without waiting in between."""
        (backend,), status = self.backends, 0
        pointer = backend.ptr
        with self._locks[0]:
            try:
                for graph in chain.from_iterable(graphs):
                    status = c.ggml_backend_graph_compute_async(pointer, graph) or status
                if meanwhile is not None:
                    meanwhile()
            finally:
                c.ggml_backend_synchronize(pointer)
        return status

    def begin(self, graphs: Graphs) -> int:
        """Have the only backend compute all graphs. 0, or ggml's status. :meth:`finish` is to follow."""
        (backend,), (own,), status = self.backends, graphs, 0
        with self._locks[0]:
            for graph in chain.from_iterable(own):
                status = c.ggml_backend_graph_compute_async(backend.ptr, graph) or status
        self.computed[0] += len(own)
        return status

    def finish(self, *, if_free: bool = False) -> None:
        """Wait for the only backend; with ``if_free`` not while another thread uses it."""
        if self._locks[0].acquire(not if_free):
            try:
                c.ggml_backend_synchronize(self.backends[0].ptr)
            finally:
                self._locks[0].release()

    def _run_in_turns(self, graphs: Graphs) -> int:
        compute, synchronize = c.ggml_backend_graph_compute_async, c.ggml_backend_synchronize
        pointers = [b.ptr for b in self.backends]
        status = 0
        for step in zip_longest(*graphs, fillvalue=()):
            try:
                for pointer, own in zip(pointers, step, strict=True):
                    for graph in own:
                        status = compute(pointer, graph) or status
            finally:
                for pointer in pointers:
                    synchronize(pointer)
        return status

    def _run_threads(self, graphs: Graphs) -> int:
        if self._pool is None:
            from concurrent.futures import ThreadPoolExecutor  # slow to import

            self._pool = ThreadPoolExecutor(len(self.backends), thread_name_prefix="ggml_cffi device")
        # None of them is this thread: an exception of a signal would leave the others waiting.
        steps = max(map(len, graphs))
        going = [self._pool.submit(self._follow, r, b.ptr, graphs[r], steps) for r, b in enumerate(self.backends)]
        try:
            found = [future.result() for future in going]
        except BaseException:
            for future in going:
                future.exception()
            raise
        return next((status for status in found if status), 0)

    def _follow(self, r: int, pointer: Any, graphs: Sequence[Sequence[Any]], steps: int) -> int:
        # Each call may have to wait for the interpreter, which the other threads use too: the last of a step waits for
        # the device as well.
        begin, finish, wait = c.ggml_backend_graph_compute_async, c.ggml_backend_graph_compute, self._barrier.wait
        status, last = 0, steps - 1
        for k, step in enumerate(graphs):
            for graph in step[:-1]:
                status = begin(pointer, graph) or status
            status = finish(pointer, step[-1]) or status
            if k < last:
                wait(r, k)
        return status

    def close(self) -> None:
        """End the threads."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()
