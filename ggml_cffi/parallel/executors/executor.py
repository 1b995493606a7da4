"""Runs the steps of several devices: step ``k`` on all of them, then step ``k + 1``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from ggml_cffi import c
from ggml_cffi.core.backend import Backend, default_threads
from ggml_cffi.core.handle import Closing
from ggml_cffi.core.locks import Locks
from ggml_cffi.parallel.executors.arrivals import Arrivals
from ggml_cffi.parallel.executors.barrier import Barrier
from ggml_cffi.parallel.step_graphs import Step

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

#: For each device its steps.
Plans = Sequence[Sequence[Step]]

_SPARE = 2  # processors for each device from which on each has a thread

_EMPTY = Step()


class Executor(Closing):
    """Runs steps on several backends.

    Parameters
    ----------
    backends
        One for each device.
    threads
        Whether each device has a thread of its own, which hands it the nodes of its graphs while others do so for
        theirs. Else one thread hands out all, one device after the other. Default threads, where there are processors
        enough; and one thread where sums can be watched for.
    """

    def __init__(self, backends: Sequence[Backend], *, threads: bool | None = None) -> None:
        self.backends = tuple(backends)
        n = len(self.backends)
        spare = default_threads() >= _SPARE * n + 1
        self.threads = n > 1 and (spare if threads is None else threads)
        """Whether each device has a thread of its own."""
        self.watches = threads is None
        """Whether sums are watched for, where they can be seen to arrive."""
        self.computed = [0] * n
        """Steps that each device has computed."""
        self.locks = Locks(b.lock for b in self.backends)
        """Of the devices; held by every call."""
        self._barrier = Barrier(n)
        self._pool: ThreadPoolExecutor | None = None
        self._events: list[Any] = [None] * n
        self._ahead: Step | None = None  # what the only backend has recorded

    def run(
        self,
        plans: Plans,
        meanwhile: Callable[[], object] | None = None,
        arrivals: Arrivals | None = None,
    ) -> int:
        """Compute ``plans[r][k]`` on backend ``r``, one after another; step ``k`` after ``k - 1`` of all. 0, or ggml's
        status.

        Some backends may have nothing for the last step. ``meanwhile`` is called while one backend computes; where
        there are several, whose steps need this process at any moment, before. ``arrivals`` is where the sums can be
        seen to arrive.

        C: ``ggml_backend_graph_compute_async``, ``ggml_backend_graph_compute``, ``ggml_backend_event_record``,
        ``ggml_backend_synchronize``.
        """
        if len(self.backends) == 1:
            with self.locks:
                try:
                    status = self.begin(plans)
                    if meanwhile is not None:
                        meanwhile()
                finally:
                    self.finish()
            return status
        if meanwhile is not None:
            meanwhile()
        with self.locks:
            if arrivals is not None and self.watches:
                status = self._run_watching(plans, arrivals)
            else:
                status = self._run_threads(plans) if self.threads else self._run_in_turns(plans)
        self._count(plans)
        return status

    def run_first(self, plans: Plans) -> int:
        """As :meth:`run`, waiting after each graph. To be done once before graphs are recorded ahead: ggml may find
        that a device needs more memory for them, and then hands over what it has recorded until then.
        """
        status = 0
        with self.locks:
            for step in zip_longest(*plans, fillvalue=_EMPTY):
                for backend, own in zip(self.backends, step, strict=True):
                    for graph in own.graphs:
                        status = c.ggml_backend_graph_compute(backend.ptr, graph) or status
        self._count(plans)
        return status

    def _count(self, plans: Plans) -> None:
        for r, own in enumerate(plans):
            self.computed[r] += len(own)

    # ------------------------------------------------------------------ parts of steps

    def _record(self, r: int, step: Step) -> int:
        """Have backend ``r`` record what is held of a step."""
        status = 0
        for graph in step.held:
            status = c.ggml_backend_graph_compute_async(self.backends[r].ptr, graph) or status
        return status

    def _hand_out(self, r: int, step: Step) -> int:
        """Have the device of backend ``r`` compute what was recorded, and then the rest of the step."""
        pointer, status = self.backends[r].ptr, 0
        if step.held:
            if self._events[r] is None:
                self._events[r] = c.ggml_backend_event_new(self.backends[r].device.ptr)
            c.ggml_backend_event_record(self._events[r], pointer)
        for graph in step.rest:
            status = c.ggml_backend_graph_compute_async(pointer, graph) or status
        return status

    def _wait_for_events(self) -> None:
        """Wait until devices have computed what was recorded before the last events; not for what is recorded."""
        for event in self._events:
            if event is not None:
                c.ggml_backend_event_synchronize(event)

    def _wait(self) -> None:
        """Wait until devices have computed all, also what is recorded."""
        for backend in self.backends:
            c.ggml_backend_synchronize(backend.ptr)
        self._wait_for_events()  # which has them used again

    # ------------------------------------------------------------------ one device

    def record(self, plans: Plans) -> None:
        """Have the only backend record the beginning for the next :meth:`begin`, if it can be held, and no other thread
        uses the device. It is this thread's until then, or until :meth:`finish`, one of which is to follow.
        """
        ((step,),) = plans
        if self._ahead is not None:  # of a run that was interrupted twice
            self.finish()
        if step.held and self.backends[0].lock.acquire(blocking=False):
            self._ahead = step
            # What computes nothing is handed out at once: with each graph, ggml has the device clear some memory.
            nothing, graph = (Step((held,)) for held in step.held)
            self._record(0, nothing)
            self._hand_out(0, nothing)
            self._record(0, graph)

    def begin(self, plans: Plans) -> int:
        """Have the only backend compute all steps. 0, or ggml's status. :meth:`finish` is to follow."""
        (own,), status = plans, 0
        with self.locks:
            try:
                for step in own:
                    if step is not self._ahead:
                        status = self._record(0, step) or status
                    status = self._hand_out(0, step) or status
            finally:
                self._let_go()
        self._count(plans)
        return status

    def finish(self, *, if_free: bool = False) -> None:
        """Wait for the only backend; with ``if_free`` not while another thread uses the device."""
        lock = self.backends[0].lock
        if lock.acquire(blocking=not if_free):
            try:
                self._wait()
            finally:
                self._let_go()
                lock.release()

    def _let_go(self) -> None:
        """Have the device no longer for what was recorded ahead."""
        if self._ahead is not None:
            self._ahead = None
            self.backends[0].lock.release()

    # ------------------------------------------------------------------ several devices

    def _run_watching(self, plans: Plans, arrivals: Arrivals) -> int:
        """Have each step recorded while the devices compute the one before, and hand it out when the sums are seen to
        be there.
        """
        steps = [*zip_longest(*plans, fillvalue=_EMPTY)]
        status = 0
        arrivals.clear(0)
        try:
            for r, own in enumerate(steps[0]):
                status = self._record(r, own) or status
            for k, step in enumerate(steps):
                for r, own in enumerate(step):
                    status = self._hand_out(r, own) or status
                if k + 1 < len(steps):
                    arrivals.clear(k + 1)
                    for r, own in enumerate(steps[k + 1]):
                        status = self._record(r, own) or status
                    arrivals.wait(k, self._wait_for_events)
        except BaseException:
            self._wait_for_events()  # else what is recorded would be computed with sums that are not there: NaN
            raise
        finally:
            self._wait()
        return status

    def _run_in_turns(self, plans: Plans) -> int:
        status = 0
        for step in zip_longest(*plans, fillvalue=_EMPTY):
            try:
                for r, own in enumerate(step):
                    status = self._record(r, own) or status
                    status = self._hand_out(r, own) or status
            finally:
                self._wait()
        return status

    def _run_threads(self, plans: Plans) -> int:
        if self._pool is None:
            from concurrent.futures import ThreadPoolExecutor  # slow to import

            self._pool = ThreadPoolExecutor(len(self.backends), thread_name_prefix="ggml_cffi device")
        # None of them is this thread: an exception of a signal would leave the others waiting.
        steps = max(map(len, plans))
        going = [self._pool.submit(self._follow, r, b.ptr, plans[r], steps) for r, b in enumerate(self.backends)]
        try:
            found = [future.result() for future in going]
        except BaseException:
            for future in going:
                future.exception()
            raise
        return next((status for status in found if status), 0)

    def _follow(self, r: int, pointer: Any, own: Sequence[Step], steps: int) -> int:
        # Each call may have to wait for the interpreter, which the other threads use too: the last of a step waits for
        # the device as well.
        begin, finish, wait = c.ggml_backend_graph_compute_async, c.ggml_backend_graph_compute, self._barrier.wait
        status, last = 0, steps - 1
        for k, step in enumerate(own):
            *graphs, end = step.graphs
            for graph in graphs:
                status = begin(pointer, graph) or status
            status = finish(pointer, end) or status
            if k < last:
                wait(r, k)
        return status

    def close(self) -> None:
        """End the threads."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()
        events, self._events = self._events, [None] * len(self.backends)
        for event in events:
            if event is not None:
                c.ggml_backend_event_free(event)
