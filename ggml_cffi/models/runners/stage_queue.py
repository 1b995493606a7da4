"""Queues of the batches in flight at the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from queue import PriorityQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ggml_cffi.core.handle import Closing
from ggml_cffi.models.runners.base import Batch
from ggml_cffi.models.runners.link import N_SLOTS
from ggml_cffi.models.runners.stage import Stage, StageProgram
from ggml_cffi.parallel.group import Group

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

Hidden = npt.NDArray[np.float32]


def queues_of(stages: Sequence[Stage]) -> list[StageQueue]:
    """Return a queue for each stage. Stages that share devices share the thread that waits for these."""
    threads: dict[Group, DeviceThread] = {}
    for stage in stages:
        if stage.group not in threads:
            threads[stage.group] = DeviceThread()
    return [StageQueue(stage, i, len(threads), threads[stage.group]) for i, stage in enumerate(stages)]


class DeviceThread(Closing):
    """Thread that waits for the devices of one or several stages, which compute what is ready in a given order."""

    def __init__(self) -> None:
        self._thread = _thread("stage")
        self._ready: PriorityQueue[tuple[tuple[int, ...], Callable[[], object]]] = PriorityQueue()

    def submit(self, order: tuple[int, ...], work: Callable[[], object]) -> None:
        """Call ``work`` when it is the first in order of what is ready. No other work has the same ``order``."""
        self._ready.put((order, work))
        self._thread.submit(self._call_first)

    def _call_first(self) -> None:
        self._ready.get_nowait()[1]()

    def finish(self) -> None:
        """Wait for all work that was submitted."""
        self._thread.submit(bool).result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


class StageQueue(Closing):
    """Queue of the batches in flight at one stage.

    One thread writes the inputs of a batch while another waits for the devices, which compute the previous batch. The
    devices therefore never wait for the first thread.

    Parameters
    ----------
    stage, number
        The stage, and its number.
    n_devices
        Number of devices, or of groups of them, that have stages. As many batches pass one stage of a device after one
        another, then the device's next stage: its other batches then need not wait for the first ones.
    thread
        The thread that waits for the devices; closed with this object.
    """

    def __init__(self, stage: Stage, number: int, n_devices: int, thread: DeviceThread) -> None:
        self.stage, self._number, self._n_devices = stage, number, n_devices
        self._writer, self._thread = _thread("inputs"), thread
        self.read: list[Future[Any] | None] = [None] * N_SLOTS
        """For each slot of host memory a future that is done once nothing uses its inputs and its result any more."""
        self.computed_after: list[Future[Any] | None] = [None] * N_SLOTS
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
        slot, order = i % N_SLOTS, (i // self._n_devices, self._number, i)
        read, link_is_free = self.read[slot], self.computed_after[slot]

        def write() -> StageProgram:
            try:
                _wait(read)
                program = self.stage.prepare(batch, slot)
                program.write_start(batch, None if x is None else x.result())
                _wait(link_is_free)
                self._thread.submit(order, partial(_compute, program, result, copied=copied))
            except BaseException as error:
                result.set_exception(error)
                raise
            return program

        return self._writer.submit(write), result

    def finish(self) -> None:
        """Wait for all batches in flight at this stage, and clear the results.

        A batch may have failed at a later stage already: then its result is no sign that this stage is done with it.
        """
        self._writer.submit(bool).result()  # it passes its batches on to the other thread
        self._thread.finish()
        self.read, self.computed_after = [None] * N_SLOTS, [None] * N_SLOTS

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


def _compute(program: StageProgram, result: Future[Hidden], *, copied: bool) -> None:
    try:
        program.program.compute()
        found: Hidden = program.program.result()
    except BaseException as error:
        result.set_exception(error)
    else:
        result.set_result(found.copy() if copied else found)
