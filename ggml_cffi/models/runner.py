"""Runs a model's graph: tokens and what they may look at in, logits or hidden states out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ggml_cffi._handle import Closing
from ggml_cffi.backend import Backend
from ggml_cffi.context import Context
from ggml_cffi.enums import Type
from ggml_cffi.errors import ClosedError
from ggml_cffi.graph import Graph
from ggml_cffi.models.architecture import Architecture, Inputs
from ggml_cffi.models.weights import Progress, Weights
from ggml_cffi.scheduler import Scheduler
from ggml_cffi.tensor import Tensor

KV_STEP = 256  # attention looks at a multiple of this many cache rows, so that one graph serves many tokens


@dataclass(frozen=True)
class Batch:
    """Tokens to compute in one run."""

    tokens: npt.NDArray[np.int32]
    """Ids, ``(n,)``."""
    positions: npt.NDArray[np.int32]
    """Positions in their texts, ``(n,)``."""
    rows: npt.NDArray[np.int64]
    """Cache rows for their keys and values, ``(n,)``."""
    mask: npt.NDArray[np.float16]
    """What they may look at, ``(n, n_kv)``."""
    wanted: npt.NDArray[np.int32]
    """Those of them whose results are wanted, ``(n_out,)``."""
    near: npt.NDArray[np.float16] | None = None
    """As ``mask``, for layers with a sliding window."""


@dataclass
class _Run(Closing):
    """A graph that is allocated in the scheduler, and replayed for as long as its sizes fit."""

    key: tuple[int, int, int]
    context: Context
    inputs: Inputs
    graph: Graph
    result: Tensor

    def close(self) -> None:
        self.graph.close()
        self.context.close()


class Runner(Closing):
    """Weights, cache and scheduler of one model, and the graph that was run last.

    One call at a time: whoever shares a runner between threads holds a lock around each.

    Parameters
    ----------
    architecture
        The model.
    backends
        The preferred first, the CPU last.
    n_rows
        Rows of the KV cache.
    n_batch
        Most tokens of one run.
    kv_dtype
        Type of keys and values in the cache.
    """

    def __init__(
        self,
        architecture: Architecture,
        backends: list[Backend],
        n_rows: int,
        n_batch: int,
        kv_dtype: Type = Type.F16,
        progress: Progress | None = None,
    ) -> None:
        self.architecture, self.n_batch = architecture, n_batch
        self.n_rows = -(-n_rows // KV_STEP) * KV_STEP
        """Rows of the cache: a multiple of :data:`KV_STEP`."""
        self._run: _Run | None = None
        self._scheduler: Scheduler | None = None
        self.weights = Weights(architecture, backends, self.n_rows, kv_dtype, progress)
        try:
            self._scheduler = Scheduler(backends)
            self._reserve()
        except BaseException:
            self.close()
            raise

    @property
    def closed(self) -> bool:
        """Whether the model is closed."""
        return self._scheduler is None

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler; it holds the graph of the last run."""
        if self._scheduler is None:
            raise ClosedError("this model is closed")
        return self._scheduler

    def n_kv(self, end: int) -> int:
        """How many cache rows a run looks at whose last row in use is before ``end``."""
        return min(-(-max(end, 1) // KV_STEP) * KV_STEP, self.n_rows)

    def run(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Logits ``(n_out, n_vocab)`` of the tokens of ``batch`` that are wanted."""
        run = self._prepared((len(batch.tokens), batch.mask.shape[1], len(batch.wanted)))
        inputs = run.inputs
        inputs.tokens.set(batch.tokens)
        inputs.positions.set(batch.positions)
        inputs.rows.set(batch.rows)
        inputs.mask.set(batch.mask)
        if inputs.wanted.is_allocated:  # it is no part of a graph in which all are wanted
            inputs.wanted.set(batch.wanted)
        if inputs.near is not None:
            inputs.near.set(batch.near if batch.near is not None else batch.mask)
        self.scheduler.compute(run.graph)
        result: npt.NDArray[np.float32] = run.result.numpy()
        return result

    def _prepared(self, key: tuple[int, int, int]) -> _Run:
        """The graph for ``n`` tokens, ``n_kv`` cache rows and ``n_out`` results, allocated; the last one is kept."""
        scheduler = self.scheduler
        if self._run is not None and self._run.key == key:
            return self._run
        self._drop_run()
        run = self._build(key)
        try:
            scheduler.alloc(run.graph)
        except BaseException:
            run.close()
            raise
        self._run = run
        return run

    def _build(self, key: tuple[int, int, int]) -> _Run:
        n, n_kv, n_out = key
        architecture, context = self.architecture, Context()

        def given(kind: Type, shape: tuple[int, ...], name: str) -> Any:
            return context.new_tensor(kind, shape, name=name)

        inputs = Inputs(
            tokens=given(Type.I32, (n,), "tokens"),
            positions=given(Type.I32, (n,), "positions"),
            rows=given(Type.I64, (n,), "rows"),
            mask=given(Type.F16, (n, n_kv), "mask"),
            wanted=given(Type.I32, (n_out,), "wanted"),
            near=given(Type.F16, (n, n_kv), "near") if architecture.window else None,
        )
        hidden = architecture.hidden(self.weights.tensors, self.weights.cache, inputs)
        result = architecture.logits(self.weights.tensors, hidden)
        result.name = "logits"
        # Token ids go where the embeddings are.
        self.scheduler.unplace()
        self.scheduler.place(inputs.tokens, self.scheduler.backends[-1])
        return _Run(key, context, inputs, Graph(result), result)

    def _reserve(self) -> None:
        """Make room for the largest prompt batch now, so that too little memory is found while loading."""
        with self._build((self.n_batch, self.n_rows, 1)) as run:
            sizes = self.scheduler.reserve(run.graph)
        for share in self.weights.shares:
            share.compute_bytes = sizes[share.backend]

    def _drop_run(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            self.scheduler.reset()
            run.close()

    def close(self) -> None:
        """Free weights, caches and scheduler."""
        if self._scheduler is not None:
            self._drop_run()
            self._scheduler.close()
            self._scheduler = None
        self.weights.close()
