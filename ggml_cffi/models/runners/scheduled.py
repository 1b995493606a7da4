"""A runner that leaves to a scheduler what runs where: for layers on the CPU, on remote devices, on any mixture."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ggml_cffi import c
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.context import Context
from ggml_cffi.core.handle import Closing
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.core.transfer import pinned
from ggml_cffi.enums import Type
from ggml_cffi.errors import GgmlError
from ggml_cffi.models.architectures.base import Architecture
from ggml_cffi.models.runners.base import KV_STEP, Batch, Logits, WholeRunner
from ggml_cffi.models.runners.inputs import Feed
from ggml_cffi.models.runners.weights import Progress, Weights
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.scheduler import Scheduler

_KEPT = 4  # graphs
_PINNED = 16 << 20  # bytes of a result that are read through pinned memory


class _Run(Closing):
    """A graph that is replayed wherever its sizes fit."""

    def __init__(self, context: Context, feed: Feed, result: Tensor) -> None:
        self.context, self.feed, self.result = context, feed, result
        self.graph = Graph(result)
        self._out: npt.NDArray[np.float32] | None = None
        self._backend: Backend | None = None
        self._get: tuple[Any, ...] = ()

    def attach(self, scheduler: Scheduler) -> None:
        """Make ready to read the result: few rows come through memory that a GPU writes by itself."""
        if self._backend is not None:
            return
        backend = scheduler.backend_of(self.result)
        if not backend.device.is_cpu and self.result.nbytes <= _PINNED:
            self._backend = backend
            self._out = pinned(self.result.shape, device=backend.device)
            self._get = (backend.ptr, self.result.ptr, c.ffi.from_buffer(self._out), 0, self.result.nbytes)

    def read(self, scheduler: Scheduler) -> npt.NDArray[np.float32]:
        """Compute, and the result."""
        if self._out is None or self._backend is None:
            scheduler.compute(self.graph)
            result: npt.NDArray[np.float32] = self.result.numpy()
            return result
        scheduler.compute_async(self.graph)
        # As Tensor.get_async, without what it checks each time: what was checked when the graph was allocated.
        with self._backend.lock:
            c.ggml_backend_tensor_get_async(*self._get)
        scheduler.synchronize()
        return self._out

    def close(self) -> None:
        self.graph.close()
        self.context.close()


def logits(context: Context, weights: Weights, n: int, n_kv: int, n_out: int) -> tuple[Feed, Tensor]:
    """The graph for ``n`` tokens, ``n_kv`` cache rows and ``n_out`` results: its inputs, and the logits."""
    architecture, backends = weights.architecture, [share.backend for share in weights.placement]
    window = architecture.window > 0
    feed = Feed(context, backends, weights.where, weights.first, n, n_kv, n_out, window=window)
    hidden = architecture.hidden(weights.tensors, weights.cache, feed.inputs)
    result = architecture.logits(weights.tensors, hidden)
    result.name = "logits"
    return feed, result


class ScheduledRunner(WholeRunner):
    """Weights, cache and scheduler of one model, and the graphs that were run last.

    Parameters
    ----------
    architecture, backends, n_ctx, n_batch, kv_dtype, progress, where
        As for :class:`~ggml_cffi.models.runners.base.WholeRunner`.
    op_offload
        Let GPUs compute large batches with weights that are in host memory.
    compute_bytes
        Bytes of intermediate results on each backend, where they are known. The CPU alone then takes them when it
        needs them; GPUs take them now, so that too little memory is found while loading.
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
        op_offload: bool = True,
        compute_bytes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(architecture, backends, n_ctx, n_batch, kv_dtype, progress, where)
        self._runs: OrderedDict[tuple[int, int, int], _Run] = OrderedDict()
        if all(backend.device.is_cpu for backend in backends):
            # The first of them need not look at cache rows of the last, and a processor has no use for so many.
            self.n_at_once = KV_STEP
        try:
            self._scheduler = Scheduler(backends, op_offload=op_offload)
            if architecture.causal and (compute_bytes is None or len(backends) > 1):
                self._reserve()
            elif compute_bytes is not None:
                self.placement[0].compute_bytes = compute_bytes[0]
        except BaseException:
            self.close()
            raise

    def assignment(self) -> list[tuple[Tensor, Backend]]:
        return self.scheduler.assignment()

    def run(self, batch: Batch) -> Logits:
        if not self.architecture.causal:
            raise GgmlError("this model is an encoder: it has no logits and generates no text; embed() is for it")
        with self.scheduler.lock:  # embeddings are computed with the same scheduler
            return self._compute(batch)

    def _compute(self, batch: Batch) -> Logits:
        run = self._prepared((len(batch.tokens), batch.mask.shape[1], len(batch.wanted)))
        values = vars(batch)
        run.feed.set(values if batch.near is not None else values | {"near": batch.mask})
        return run.read(self.scheduler)

    def _prepared(self, key: tuple[int, int, int]) -> _Run:
        """The graph for ``n`` tokens, ``n_kv`` cache rows and ``n_out`` results, allocated; the last few are kept."""
        scheduler = self.scheduler
        run = self._runs.get(key)
        if run is None:
            run = self._runs[key] = self._build(key)
            if len(self._runs) > _KEPT:
                self._drop(next(iter(self._runs)))
        if scheduler.graph is not run.graph:
            self._runs.move_to_end(key)
            scheduler.alloc(run.graph)
            run.attach(scheduler)
        return run

    def _build(self, key: tuple[int, int, int]) -> _Run:
        context = Context()
        try:
            return _Run(context, *logits(context, self.weights, *key))
        except BaseException:
            context.close()
            raise

    def _reserve(self) -> None:
        """Make room for the largest prompt batch now."""
        with self._build((self.n_batch, self.n_rows, 1)) as run:
            sizes = self.scheduler.reserve(run.graph)
        for share in self.weights.placement:
            share.compute_bytes = sizes[share.backend]

    def _drop(self, key: tuple[int, int, int]) -> None:
        run = self._runs.pop(key)
        if self.scheduler.graph is run.graph:
            self.scheduler.reset()
        run.close()

    def close(self) -> None:
        """Free graphs, weights, caches and scheduler."""
        for key in [*self._runs]:
            self._drop(key)
        super().close()
