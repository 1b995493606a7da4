"""A runner for models that are on GPUs whole: each has some layers, and passes on what comes out of them.

No scheduler takes part. Each GPU computes a graph of its own, which begins with reading its inputs from host memory and
ends with writing its result there: one piece of work to hand over for a token, and no copy from device to device.

Prompts of several batches are in flight (pipeline parallelism): while one GPU computes its layers of a batch, the one
before is at the next batch. That takes no memory on the GPUs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from functools import partial
from itertools import groupby, pairwise, zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ggml_cffi.core.backend import Backend
from ggml_cffi.core.op_sets import VIEWS
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.core.transfer import HostBlock
from ggml_cffi.enums import Type
from ggml_cffi.models.architectures.base import Architecture
from ggml_cffi.models.runners.base import Batch, Logits, WholeRunner
from ggml_cffi.models.runners.stage import Layers, Stage, key_of
from ggml_cffi.models.runners.weights import Progress, Weights
from ggml_cffi.parallel.group import Group
from ggml_cffi.parallel.program import ParallelProgram
from ggml_cffi.parallel.rank import DIRECT
from ggml_cffi.scheduler.scheduler import Scheduler

if TYPE_CHECKING:
    from concurrent.futures import Future

_TOGETHER = 16  # batches of a prompt that are computed without a look around: few enough to be stopped soon

Hidden = npt.NDArray[np.float32]


def stages_of(weights: Weights) -> list[tuple[int, range]]:
    """The backend, by its number, of each stage, and its layers; none if a scheduler is needed.

    It is, where the CPU or a remote device takes part, and for encoders.
    """
    used = dict.fromkeys([weights.first, *weights.where, weights.head])
    backends = [share.backend for share in weights.placement]
    if not weights.architecture.causal or not all(_reads_host_memory(backends[i]) for i in used):
        return []
    found, start = [], 0
    for i, layers in groupby(weights.where):
        n = len(list(layers))
        found.append((i, range(start, start + n)))
        start += n
    numbers = [i for i, _ in found]
    ends = weights.first == numbers[0] and weights.head == numbers[-1]
    return found if ends and len(set(numbers)) == len(numbers) else []


def _reads_host_memory(backend: Backend) -> bool:
    if backend.device.is_cpu:
        return False
    with HostBlock(1, [backend.device]) as block:
        return backend.device in block.buffers


def _finish(stages: Iterable[Stage], *, if_free: bool = False) -> None:
    for stage in stages:
        stage.finish(if_free=if_free)


def layers_of(weights: Weights, layers: range) -> Layers:
    """Layers that one device has."""
    return Layers(weights.architecture, layers, [weights.tensors], [weights.cache])


class StagedRunner(WholeRunner):
    """Stages that run one after another, in flight where there are several batches.

    Batches that are given together are made while those before are computed, also where there is one stage.

    Parameters
    ----------
    architecture, backends, n_ctx, n_batch, kv_dtype, progress, where
        As for :class:`~ggml_cffi.models.runners.base.WholeRunner`.
    in_flight
        Whether the stages of several batches are computed at the same time.

    Raises
    ------
    ValueError
        If a scheduler is needed; see :func:`stages_of`.
    """

    def __init__(
        self,
        architecture: Architecture,
        backends: list[Backend],
        n_ctx: int,
        n_batch: int,
        kv_dtype: Type = Type.F16,
        progress: Progress | None = None,
        *,
        where: Sequence[int] | None = None,
        in_flight: bool = True,
    ) -> None:
        super().__init__(architecture, backends, n_ctx, n_batch, kv_dtype, progress, where)
        self.stages: list[Stage] = []
        self._flows: list[_Flow] = []
        try:
            found = stages_of(self.weights)
            if not found:
                raise ValueError("the model is not on GPUs whole")
            for i, layers in found:
                stage = Stage(layers_of(self.weights, layers), Group([backends[i]]))
                self.stages.append(stage)
                (self.placement[i].compute_bytes,) = stage.reserve(n_batch, self.n_rows)
            if in_flight or len(found) == 1:
                self.n_in_flight, self.n_together = len(found), _TOGETHER
                self._flows = [_Flow(stage) for stage in self.stages]
            self._scheduler = Scheduler(backends)
        except BaseException:
            self.close()
            raise

    def assignment(self) -> list[tuple[Tensor, Backend]]:
        self.check_open()
        return [(t, backend) for s in self.stages for t, backend in s.assignment() if t.op not in VIEWS]

    def run(self, batch: Batch) -> Logits:
        self.check_open()
        programs = [stage.program(key_of(batch)) for stage in self.stages]  # now: making a graph takes locks
        small = len(batch.tokens) * self.architecture.n_embd * 4 <= DIRECT
        if small and len(programs) > 1 and all(program.landing is not None for program in programs[:-1]):
            return self._run_watching(batch)
        return self._run_waiting(batch)

    def _run_waiting(self, batch: Batch) -> Logits:
        """Each stage when the device of the one before is done."""
        x: Hidden | None = None
        for stage, after in zip_longest(self.stages, self.stages[1:]):
            # While it computes, the next one gets its inputs.
            x = stage.run(batch, x, meanwhile=None if after is None else partial(after.prepare, batch))
        assert x is not None
        return x

    def _run_watching(self, batch: Batch) -> Logits:
        """Each stage when what the one before has computed is seen to be there; its device is waited for after that."""
        x: Hidden | None = None
        try:
            for stage, after in pairwise(self.stages):
                # The next one's device is this thread's then: it is given up before another is waited for.
                x = stage.hand_over(batch, x, partial(after.prepare_ahead, batch), partial(_finish, (after, stage)))
            return self.stages[-1].run(batch, x, meanwhile=partial(_finish, self.stages[:-1], if_free=True))
        finally:
            _finish(reversed(self.stages))  # the last first: it may have recorded something, and be locked

    def run_all(self, batches: Iterable[Batch]) -> Generator[Logits, None, None]:
        if not self._flows:
            yield from map(self.run, batches)
            return
        self.check_open()
        going: deque[Future[Hidden]] = deque()
        try:
            for i, batch in enumerate(batches):
                going.append(self._start(batch, i % 2))
                if len(going) > len(self.stages):
                    yield going.popleft().result()
            while going:
                yield going.popleft().result()
        finally:
            for future in going:  # its weights may be freed next
                future.exception()
            for flow in self._flows:
                flow.rest()

    def _start(self, batch: Batch, slot: int) -> Future[Hidden]:
        """Have every stage compute a batch, each when the one before has."""
        x: Future[Hidden] | None = None
        before: _Flow | None = None
        for flow in self._flows:
            written, x = flow.start(batch, slot, x, copied=flow is self._flows[-1])
            if before is not None:
                before.read[slot] = written
            before = flow
        assert before is not None
        assert x is not None
        before.read[slot] = x
        return x

    def close(self) -> None:
        """Free weights, caches and graphs."""
        for flow in self._flows:
            flow.close()
        self._flows = []
        for stage in self.stages:
            stage.close()
        super().close()


class _Flow:
    """Batches through one stage. A thread writes the inputs of one, while another has the device compute the one before
    it: so that the device never waits for the first.
    """

    def __init__(self, stage: Stage) -> None:
        from concurrent.futures import ThreadPoolExecutor  # slow to import

        self._stage = stage
        self._writer, self._runner = (
            ThreadPoolExecutor(1, thread_name_prefix=f"ggml_cffi {name}") for name in ("inputs", "stage")
        )
        self.read: list[Future[Any] | None] = [None, None]
        """For each slot, what is done once its last result has been read."""

    def start(
        self, batch: Batch, slot: int, x: Future[Hidden] | None, *, copied: bool
    ) -> tuple[Future[ParallelProgram], Future[Hidden]]:
        """Write the inputs of ``batch``, once the stage before has given ``x``, and compute it.

        Returns
        -------
        tuple
            What is done when ``x`` has been read; the result, which lies in the slot unless it is to be ``copied``.
        """
        written = self._writer.submit(self._write, batch, slot, x, self.read[slot])
        return written, self._runner.submit(_compute, written, copied=copied)

    def _write(self, batch: Batch, slot: int, x: Future[Hidden] | None, read: Future[Any] | None) -> ParallelProgram:
        if read is not None:
            read.exception()  # its own caller hears of it
        program = self._stage.prepare(batch, slot)
        program.puts[0][...] = batch.tokens if x is None else x.result()
        return program

    def rest(self) -> None:
        """Forget the results; nothing is under way."""
        self.read = [None, None]

    def close(self) -> None:
        """End the threads."""
        self._writer.shutdown()
        self._runner.shutdown()


def _compute(written: Future[ParallelProgram], *, copied: bool) -> Hidden:
    program = written.result()
    program.compute()
    return program.result().copy() if copied else program.result()
