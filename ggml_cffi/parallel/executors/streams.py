"""Executor of devices that wait for one another by events in their streams, without the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.backend import Backend
from ggml_cffi.parallel.executors.base import EMPTY, Step, Steps
from ggml_cffi.parallel.executors.polling import PolledResults
from ggml_cffi.parallel.executors.turns import Turns

#: A function of C with its two arguments.
Call = tuple[Callable[[Any, Any], int | None], Any, Any]


class _ArrangedSteps(tuple[Sequence[Step], ...]):
    """The steps of each device, with the calls that submit them."""

    calls: Sequence[Call]


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

    def arrange(self, steps: Steps) -> Steps:
        """Return the steps of a program with the calls that submit them. The calls are a few hundred for a token."""
        arranged = _ArrangedSteps(steps)
        arranged.calls = [*self._calls(steps)]
        return arranged

    def run(
        self, steps: Steps, meanwhile: Callable[[], object] | None = None, sums: PolledResults | None = None
    ) -> int:
        """Compute a program and wait for it, without polling ``sums``. See :meth:`Executor.run`."""
        with self.locks:
            try:
                status = self._submit_all(steps)
                if meanwhile is not None:
                    meanwhile()
            finally:
                self._wait()
        self._count(steps)
        return status

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
        """Submit the steps."""
        for backend in self.backends:
            backend.ptr  # noqa: B018 - raises when closed
        status = 0
        for function, a, b in steps.calls if isinstance(steps, _ArrangedSteps) else self._calls(steps):
            status = function(a, b) or status
        return status

    def _calls(self, steps: Steps) -> Iterator[Call]:
        """Yield the calls that submit the steps. C: ``ggml_backend_event_record``, ``ggml_backend_event_wait``."""
        compute, record, wait = (
            c.ggml_backend_graph_compute_async,
            c.ggml_backend_event_record,
            c.ggml_backend_event_wait,
        )
        for k, step in enumerate(zip_longest(*steps, fillvalue=EMPTY)):
            if k:
                yield from ((record, event, pointer) for pointer, event in self._records)
                yield from ((wait, pointer, event) for pointer, event in self._waits)
            for backend, own in zip(self.backends, step, strict=True):
                yield from ((compute, backend.ptr, graph) for graph in own.graphs)

    def close(self) -> None:
        """Free the events."""
        events, self._events = self._events, []
        for event in events:
            c.ggml_backend_event_free(event)
