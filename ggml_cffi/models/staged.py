"""A runner for models that are on GPUs whole: each has some layers, and passes on what comes out of them.

No scheduler takes part. Each GPU computes a graph of its own, which begins with reading its inputs from host memory and
ends with writing its result there: one piece of work to hand over for a token, and no copy from device to device.

Prompts of several batches are in flight (pipeline parallelism): while one GPU computes its layers of a batch, the one
before is at the next batch. That takes no memory on the GPUs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby, zip_longest
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ggml_cffi._feasible import VIEWS
from ggml_cffi.backend import Backend
from ggml_cffi.enums import Type
from ggml_cffi.models.architecture import Architecture
from ggml_cffi.models.runner import Batch, Logits, WholeRunner
from ggml_cffi.models.stage import Layers, Stage, key_of
from ggml_cffi.models.weights import Progress, Weights
from ggml_cffi.parallel.group import Group
from ggml_cffi.scheduler import Scheduler
from ggml_cffi.tensor import Tensor
from ggml_cffi.transfer import HostBlock

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

_TOGETHER = 16  # batches of a prompt that are computed without a look around: few enough to be stopped soon

Hidden = npt.NDArray[np.float32]


def stages_of(weights: Weights) -> list[tuple[int, range]]:
    """The backend, by its number, of each stage, and its layers; none if a scheduler is needed.

    It is, where the CPU or a remote device takes part, and for encoders.
    """
    used = dict.fromkeys([weights.first, *weights.where, weights.head])
    backends = [share.backend for share in weights.shares]
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


def layers_of(weights: Weights, layers: range) -> Layers:
    """Layers that one device has."""
    return Layers(weights.architecture, layers, [weights.tensors], [weights.cache])


class StagedRunner(WholeRunner):
    """Stages that run one after another, in flight where there are several batches.

    Batches that are given together are made while those before are computed, also where there is one stage.

    Parameters
    ----------
    architecture, backends, n_ctx, n_batch, kv_dtype, progress, where
        As for :class:`~ggml_cffi.models.runner.WholeRunner`.
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
        self._pools: list[ThreadPoolExecutor] = []
        try:
            found = stages_of(self.weights)
            if not found:
                raise ValueError("the model is not on GPUs whole")
            for i, layers in found:
                stage = Stage(layers_of(self.weights, layers), Group([backends[i]]))
                self.stages.append(stage)
                (self.shares[i].compute_bytes,) = stage.reserve(n_batch, self.n_rows)
            if in_flight or len(found) == 1:
                from concurrent.futures import ThreadPoolExecutor  # slow to import

                self.n_in_flight, self.n_together = len(found), _TOGETHER
                self._pools = [ThreadPoolExecutor(1, thread_name_prefix="ggml_cffi stage") for _ in found]
            self._scheduler = Scheduler(backends)
        except BaseException:
            self.close()
            raise

    def assignment(self) -> list[tuple[Tensor, Backend]]:
        self.check_open()
        return [(t, backend) for s in self.stages for t, backend in s.assignment() if t.op not in VIEWS]

    def run(self, batch: Batch) -> Logits:
        self.check_open()
        x: Hidden | None = None
        for stage in self.stages:  # before any computes: making a graph takes locks
            stage.program(key_of(batch))
        for stage, after in zip_longest(self.stages, self.stages[1:]):
            # While it computes, the next one gets its inputs.
            x = stage.run(batch, x, meanwhile=None if after is None else partial(after.prepare, batch))
        assert x is not None
        return x

    def run_all(self, batches: Iterable[Batch]) -> Generator[Logits, None, None]:
        if not self._pools:
            yield from map(self.run, batches)
            return
        self.check_open()
        going: deque[Future[Hidden]] = deque()
        try:
            for batch in batches:
                going.append(self._start(batch))
                if len(going) > len(self.stages):
                    yield going.popleft().result()
            while going:
                yield going.popleft().result()
        finally:
            for future in going:  # its weights may be freed next
                with suppress(Exception):
                    future.result()

    def _start(self, batch: Batch) -> Future[Hidden]:
        """Have every stage compute a batch, each when the one before has."""
        before: Future[Hidden] | None = None
        for stage, pool in zip(self.stages, self._pools, strict=True):
            before = pool.submit(_follow, stage, batch, before)
        assert before is not None
        return before

    def close(self) -> None:
        """Free weights, caches and graphs."""
        for pool in self._pools:
            pool.shutdown()
        self._pools = []
        for stage in self.stages:
            stage.close()
        super().close()


def _follow(stage: Stage, batch: Batch, before: Future[Hidden] | None) -> Hidden:
    stage.prepare(batch)
    # A copy: the stage goes on with the next batch while this one's result is on its way.
    return stage.run(batch, None if before is None else before.result()).copy()
