"""Executor with a thread for each device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ggml_cffi import c
from ggml_cffi.core.backend import Backend
from ggml_cffi.parallel.executors.barrier import Barrier
from ggml_cffi.parallel.executors.base import Executor, Step, Steps

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor


class Threads(Executor):
    """Executor with a thread for each device, so that all devices get their graphs at the same time."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        super().__init__(backends)
        self._barrier = Barrier(len(self.backends))
        self._pool: ThreadPoolExecutor | None = None

    def run_steps(self, steps: Steps) -> int:
        """Compute a program in the devices' threads, without locks and counters."""
        if self._pool is None:
            from concurrent.futures import ThreadPoolExecutor  # slow to import

            self._pool = ThreadPoolExecutor(len(self.backends), thread_name_prefix="ggml_cffi device")
        # The calling thread does not take part: a signal's exception there would leave the others at the barrier.
        n = max(map(len, steps))
        futures = [self._pool.submit(self._run_device, r, b.ptr, steps[r], n) for r, b in enumerate(self.backends)]
        try:
            found = [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.exception()
            raise
        return next((status for status in found if status), 0)

    def _run_device(self, r: int, pointer: Any, own: Sequence[Step], n: int) -> int:
        """Compute the steps of device ``r``; ``n`` is the number of steps of the whole program."""
        # A thread may wait for the GIL after each C call. To save a call, the last call of a step also waits for the
        # device.
        submit, compute, wait = c.ggml_backend_graph_compute_async, c.ggml_backend_graph_compute, self._barrier.wait
        status, last = 0, n - 1
        for k, step in enumerate(own):
            *graphs, end = step.graphs
            for graph in graphs:
                status = submit(pointer, graph) or status
            status = compute(pointer, end) or status
            if k < last:
                wait(r, k)
        return status

    def close(self) -> None:
        """End the threads."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()
