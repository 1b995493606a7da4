"""Executor with one thread, which submits work to one device after the other."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest

from ggml_cffi import c
from ggml_cffi.parallel.executors.base import EMPTY, Executor, Step, Steps
from ggml_cffi.parallel.executors.polling import PolledResults


class Turns(Executor):
    """Executor that submits each step to one device after the other, then waits for all of them.

    With one device, the caller may do other work between :meth:`submit` and :meth:`finish`.
    """

    def run(
        self, steps: Steps, meanwhile: Callable[[], object] | None = None, sums: PolledResults | None = None
    ) -> int:
        """Compute a program and wait for it, without polling ``sums``. See :meth:`Executor.run`."""
        if len(self.backends) > 1:
            return super().run(steps, meanwhile)
        with self.locks:
            try:
                status = self.submit(steps)
                if meanwhile is not None:
                    meanwhile()
            finally:
                self.finish()
        return status

    def run_steps(self, steps: Steps) -> int:
        """Compute a program step by step, without locks and counters."""
        status = 0
        for step in zip_longest(*steps, fillvalue=EMPTY):
            try:
                for r, own in enumerate(step):
                    status = self._start(r, own) or status
            finally:
                self._wait()
        return status

    def submit(self, steps: Steps) -> int:
        """Begin to compute a program. With one device, return before it is complete."""
        if len(self.backends) > 1:
            return super().submit(steps)
        status = 0
        with self.locks:
            for step in steps[0]:
                status = self._start(0, step) or status
        self._count(steps)
        return status

    def finish(self, *, if_free: bool = False) -> None:
        """Wait for a submitted program. With ``if_free``, do not wait for a device that another thread holds."""
        for backend in self.backends:
            if backend.lock.acquire(blocking=not if_free):
                try:
                    c.ggml_backend_synchronize(backend.ptr)
                finally:
                    backend.lock.release()

    def _start(self, r: int, step: Step) -> int:
        """Submit a step to device ``r``. C: ``ggml_backend_graph_compute_async``."""
        pointer, status = self.backends[r].ptr, 0
        for graph in step.graphs:
            status = c.ggml_backend_graph_compute_async(pointer, graph) or status
        return status

    def _wait(self) -> None:
        """Wait for all devices. C: ``ggml_backend_synchronize``."""
        for backend in self.backends:
            c.ggml_backend_synchronize(backend.ptr)
