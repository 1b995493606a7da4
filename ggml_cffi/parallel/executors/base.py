"""Interface of an executor, and of the steps that it submits.

A program of several devices has steps. The devices compute a step in parallel, exchange partial sums, and then compute
the next step. A step of one device is one or more C graphs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from time import perf_counter
from typing import Any, ClassVar

from ggml_cffi import c
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.handle import Closing
from ggml_cffi.core.locks import Locks
from ggml_cffi.parallel.executors.polling import PolledResults
from ggml_cffi.scheduler.graph import Graph

#: Marks nodes (C pointers) as leaves, so that a graph begins at them.
Freeze = Callable[[Iterable[Any]], None]


@dataclass(frozen=True)
class Step:
    """C graphs of one step of one device, in the order in which they are computed."""

    deferred: tuple[Any, ...] = ()
    """Graphs that a backend records and keeps until an event is recorded or the backend is synchronized."""
    immediate: tuple[Any, ...] = ()
    """Graphs that a backend submits to its device at once."""

    @cached_property
    def graphs(self) -> tuple[Any, ...]:
        """All graphs of the step."""
        return self.deferred + self.immediate


#: The steps of each device. The last step may be missing on some devices.
Steps = Sequence[Sequence[Step]]

EMPTY = Step()


class StepMaker(Closing):
    """Maker of the step for each graph of one device. This class makes a step of the one graph.

    A subclass may divide a graph so that a certain backend computes it faster. Its C graphs are valid until it is
    closed.
    """

    def make(self, graph: Graph, freeze: Freeze) -> Step:
        """Return the step that computes ``graph``.

        Parameters
        ----------
        freeze
            Marks nodes as leaves. The caller marks all nodes of ``graph`` afterwards.
        """
        return Step(immediate=(graph.ptr,))

    def nodes_changed(self) -> None:
        """Note that nodes of the graphs have other sizes now. No run may be in progress."""

    def close(self) -> None:
        """Free the C graphs that were made."""


class Executor(Closing, ABC):
    """Base class of executors, which submit step ``k`` of a program to all of its devices, then step ``k + 1``.

    Parameters
    ----------
    backends
        One for each device.
    """

    records_ahead: ClassVar[bool] = False
    """True if the executor records deferred graphs while devices compute. Other executors should get none."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        self.backends = tuple(backends)
        self._processors = [backend for backend in self.backends if backend.device.is_cpu]
        self.steps_computed = [0] * len(self.backends)
        """Number of steps that each device has computed."""
        self.locks = Locks(b.lock for b in self.backends).plain
        """Locks of the devices, which every call holds."""

    def arrange(self, steps: Steps) -> Steps:
        """Return the steps of a program in a form that this executor submits in less time, for many runs."""
        return steps

    def run(
        self, steps: Steps, meanwhile: Callable[[], object] | None = None, sums: PolledResults | None = None
    ) -> int:
        """Compute a program and wait for it. Return 0, or the status that ggml reports.

        Parameters
        ----------
        steps
            ``steps[r][k]`` is step ``k`` of device ``r``. Step ``k`` begins when step ``k - 1`` of all devices is done.
        meanwhile
            Called once: while devices compute and this thread holds their locks, or before the first step if the host
            has no time then. It must not wait for locks that another thread may hold.
        sums
            The partial sums at the end of each step except the last, if they can be polled.
        """
        if meanwhile is not None:
            meanwhile()
        with self.locks:
            for backend in self._processors:
                if (now := perf_counter()) >= backend.load.next_look:
                    backend.follow_load(now)
            status = self.run_steps(steps)
        self._count(steps)
        return status

    @abstractmethod
    def run_steps(self, steps: Steps) -> int:
        """Compute a program and wait for it, without locks and counters. Return 0, or the status that ggml reports."""

    def run_first(self, steps: Steps) -> int:
        """Compute a program as :meth:`run` does, and wait after each graph.

        The first run of a program with deferred graphs must use this method, because ggml submits recorded work if it
        finds that a device needs more memory.

        C: ``ggml_backend_graph_compute``.
        """
        status = 0
        with self.locks:
            for step in zip_longest(*steps, fillvalue=EMPTY):
                for backend, own in zip(self.backends, step, strict=True):
                    for graph in own.graphs:
                        status = c.ggml_backend_graph_compute(backend.ptr, graph) or status
        self._count(steps)
        return status

    # ------------------------------------------------------------------ parts of a run

    def record(self, steps: Steps) -> None:
        """Record the beginning of a program before its inputs are known, if the executor supports it."""

    def submit(self, steps: Steps) -> int:
        """Begin to compute a program. Return 0, or the status that ggml reports. Call :meth:`finish` afterwards.

        If the host has work between steps, the program is complete when this method returns.
        """
        return self.run(steps)

    def finish(self, *, if_free: bool = False) -> None:
        """Wait for a program that was submitted.

        Parameters
        ----------
        if_free
            Do nothing while another thread holds the device.
        """

    def _count(self, steps: Steps) -> None:
        for r, own in enumerate(steps):
            self.steps_computed[r] += len(own)

    def close(self) -> None:
        """Free threads and events. The backends stay open."""
