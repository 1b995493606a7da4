"""Queues of the batches in flight at the stages of a pipeline."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf
from threading import Condition
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ggml_cffi import c
from ggml_cffi.core.handle import Closing
from ggml_cffi.models.runners.base import Batch
from ggml_cffi.models.runners.stage import Stage, StageProgram
from ggml_cffi.parallel.group import Group

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

Hidden = npt.NDArray[np.float32]

#: Batches that a device has at a time: it begins one when it ends the one before, without the host.
_SUBMITTED = 2

#: Part of a batch's shortest time in which another one may come. After it, the thread only waits for the device.
_PATIENCE = 0.7


def queues_of(stages: Sequence[Stage]) -> list[StageQueue]:
    """Return a queue for each stage. Stages that share devices share the thread that waits for these."""
    threads: dict[Group, DeviceThread] = {}
    for stage in stages:
        if stage.group not in threads:
            threads[stage.group] = DeviceThread(stage.group)
    in_turn = max(len(threads), stages[0].n_slots)
    return [StageQueue(stage, i, in_turn, threads[stage.group]) for i, stage in enumerate(stages)]


@dataclass(order=True)
class _Work:
    """A batch at a stage: its inputs are written."""

    order: tuple[int, ...]
    """The first in order of what is ready is computed next."""
    program: StageProgram = field(compare=False)
    result: Future[Hidden] = field(compare=False)
    copied: bool = field(compare=False)
    """True to copy the result out of the memory of the slot."""
    begun: float = field(default=0.0, compare=False)
    event: Any = field(default=c.NULL, compare=False)


class DeviceThread(Closing):
    """Thread that submits what is ready to the devices of one or several stages, and waits for them.

    A device with events has two batches at a time.

    Parameters
    ----------
    group
        The devices.
    """

    def __init__(self, group: Group) -> None:
        self._executor, self._thread = group.executor, _thread("stage")
        self._ready: list[_Work] = []  # a heap
        self._changed = Condition()
        self._running: deque[_Work] = deque()
        self._backend = group.backends[0]
        n = _SUBMITTED if len(group.backends) == 1 else 0
        events = [c.ggml_backend_event_new(self._backend.device.ptr) for _ in range(n)]
        self._events = deque(event for event in events if event)  # those not in use

    def submit(self, work: _Work) -> None:
        """Compute ``work`` when it is the first in order of what is ready."""
        with self._changed:
            self._thread.submit(self._next)  # first: it raises if the thread has ended, and then nothing is ready
            heappush(self._ready, work)
            self._changed.notify()

    def _next(self) -> None:
        """Begin the first of what is ready, and end earlier work until there is more to begin."""
        with self._changed:
            work = heappop(self._ready)
        self._begin(work)
        while self._running and not (self._events and self._comes(self._running[-1])):
            self._end(self._running.popleft())

    def _comes(self, work: _Work) -> bool:
        """Return whether other work is ready before the devices are nearly done with ``work``."""
        seconds = work.begun + _PATIENCE * work.program.seconds - perf_counter()
        with self._changed:
            return bool(self._changed.wait_for(lambda: self._ready, max(seconds, 0.0)))

    def _begin(self, work: _Work) -> None:
        """Submit work. C: ``ggml_backend_event_record``."""
        work.begun = perf_counter()
        try:
            if not self._events:
                work.program.program.compute()
            else:
                work.program.program.submit()
                with self._executor.locks:
                    c.ggml_backend_event_record(self._events[0], self._backend.ptr)
                work.event = self._events.popleft()
        except BaseException as error:
            work.result.set_exception(error)
        else:
            self._running.append(work)

    def _end(self, work: _Work) -> None:
        """Wait for the device, and set the result. C: ``ggml_backend_event_synchronize``."""
        try:
            if work.event:
                self._events.append(work.event)
                with self._executor.locks:
                    c.ggml_backend_event_synchronize(work.event)
            now = perf_counter()
            work.program.seconds = min(work.program.seconds or inf, now - work.begun)
            for other in self._running:
                other.begun = now
            found: Hidden = work.program.program.result()
            if work.copied:
                found = found.copy()
        except BaseException as error:
            work.result.set_exception(error)
        else:
            work.result.set_result(found)

    def finish(self) -> None:
        """Wait for all work that was submitted."""
        self._thread.submit(self._executor.finish).result()

    def close(self) -> None:
        """Wait for the devices, end the thread, and free the events."""
        self._thread.shutdown()
        if not any(backend.closed for backend in self._executor.backends):
            self._executor.finish()  # a backend may keep pointers to the nodes of programs until it has waited for all
        events, self._events = self._events, deque()
        for event in events:
            c.ggml_backend_event_free(event)


class StageQueue(Closing):
    """Queue of the batches in flight at one stage.

    One thread writes the inputs of a batch while another waits for the devices, which compute the previous batch. The
    devices therefore never wait for the first thread.

    Parameters
    ----------
    stage, number
        The stage, and its number.
    in_turn
        Number of batches that pass one stage of a device one after another, before its next stage.
    thread
        The thread that waits for the devices; closed with this object.
    """

    def __init__(self, stage: Stage, number: int, in_turn: int, thread: DeviceThread) -> None:
        self.stage, self._number, self._in_turn = stage, number, in_turn
        self._writer, self._thread = _thread("inputs"), thread
        self.read: list[Future[Any] | None] = [None] * stage.n_slots
        """For each slot of host memory a future that is done once nothing uses its inputs and its result any more."""
        self.computed_after: list[Future[Any] | None] = [None] * stage.n_slots
        """For each slot of the link to the next stage a future that is done once that stage has computed from it."""

    def start(
        self, batch: Batch, i: int, x: Future[Hidden] | None, *, copied: bool
    ) -> tuple[Future[StageProgram], Future[Hidden]]:
        """Queue batch ``i``: write its inputs once ``x``, the result of the previous stage, is there, then compute it.

        Returns
        -------
        tuple
            A future that is done when ``x`` has been read, and a future of the result. The result is in the memory of
            the slot, unless ``copied`` is True.
        """
        from concurrent.futures import Future  # slow to import

        result: Future[Hidden] = Future()
        slot, order = i % self.stage.n_slots, (i // self._in_turn, self._number, i)
        read, link_is_free = self.read[slot], self.computed_after[slot]
        return self._writer.submit(self._write, batch, slot, x, read, link_is_free, order, result, copied), result

    def _write(
        self,
        batch: Batch,
        slot: int,
        x: Future[Hidden] | None,
        read: Future[Any] | None,
        link_is_free: Future[Any] | None,
        order: tuple[int, ...],
        result: Future[Hidden],
        copied: bool,
    ) -> StageProgram:
        """Write the inputs of a batch, and pass it on to the thread of the devices."""
        try:
            _wait(read)
            program = self.stage.write(batch, slot)
            program.write_start(batch, None if x is None else x.result())
            _wait(link_is_free)
            self._thread.submit(_Work(order, program, result, copied))
        except BaseException as error:
            result.set_exception(error)
            _wait(x)  # before this method ends: it has the memory of the slot of the previous stage
            raise
        return program

    def finish(self) -> None:
        """Wait for all batches in flight at this stage, and clear the results.

        A batch may have failed at a later stage already: then its result is no sign that this stage is done with it.
        """
        self._writer.submit(bool).result()  # it passes its batches on to the other thread
        self._thread.finish()
        self.read = [None] * self.stage.n_slots
        self.computed_after = [None] * self.stage.n_slots

    def close(self) -> None:
        """End the threads."""
        self._writer.shutdown()
        self._thread.close()


def _thread(name: str) -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor  # slow to import

    return ThreadPoolExecutor(1, thread_name_prefix=f"ggml_cffi {name}")


def _wait(future: Future[Any] | None) -> None:
    """Wait for the use of memory by an earlier batch. Its exception is raised to the caller of that batch."""
    if future is not None:
        future.exception()
