"""Executor of devices that wait for one another by events in their streams, without the host."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.backend import Backend
from ggml_cffi.parallel.executors.base import EMPTY, Steps
from ggml_cffi.parallel.executors.turns import Turns


class Streams(Turns):
    """Executor that submits all steps of a program at once. Each device waits for the others' events between steps.

    Parameters
    ----------
    backends
        Backends of one kind, whose devices read partial sums where the others write them.
    """

    def __init__(self, backends: Sequence[Backend]) -> None:
        super().__init__(backends)
        self._events: list[Any] = [c.ggml_backend_event_new(b.device.ptr) for b in self.backends]
        pairs = [(b.ptr, event) for b, event in zip(self.backends, self._events, strict=True)]
        self._records = pairs
        self._waits = [(pointer, event) for pointer, own in pairs for _, event in pairs if event is not own]

    def run_steps(self, steps: Steps) -> int:
        """Compute a program, without locks and counters."""
        try:
            return self._submit_all(steps)
        finally:
            self._wait()

    def submit(self, steps: Steps) -> int:
        """Begin to compute a program, and return before it is complete.

        Call :meth:`finish` before the next program, whose first step would not wait for the other devices: they may
        still read partial sums that it overwrites.
        """
        with self.locks:
            status = self._submit_all(steps)
        self._count(steps)
        return status

    def _submit_all(self, steps: Steps) -> int:
        """Submit the steps. C: ``ggml_backend_event_record``, ``ggml_backend_event_wait``."""
        compute, record, wait = (
            c.ggml_backend_graph_compute_async,
            c.ggml_backend_event_record,
            c.ggml_backend_event_wait,
        )
        pointers = [backend.ptr for backend in self.backends]
        status = 0
        for k, step in enumerate(zip_longest(*steps, fillvalue=EMPTY)):
            if k:
                for pointer, event in self._records:
                    record(event, pointer)
                for pointer, event in self._waits:
                    wait(pointer, event)
            for pointer, own in zip(pointers, step, strict=True):
                for graph in own.graphs:
                    status = compute(pointer, graph) or status
        return status

    def close(self) -> None:
        """Free the events."""
        events, self._events = self._events, []
        for event in events:
            c.ggml_backend_event_free(event)
