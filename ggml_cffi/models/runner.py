"""Runs a model's graph: token ids at positions in, logits out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ggml_cffi._handle import Closing
from ggml_cffi.backend import Backend
from ggml_cffi.context import Context
from ggml_cffi.enums import Type
from ggml_cffi.errors import ClosedError, GgmlError
from ggml_cffi.graph import Graph
from ggml_cffi.models.architecture import Architecture, Inputs
from ggml_cffi.models.weights import Progress, Weights
from ggml_cffi.scheduler import Scheduler
from ggml_cffi.tensor import Tensor

_FEW_TOKENS = 8  # ggml's Vulkan backend has products of their own for up to so many columns
_KV_STEP = 256  # attention looks at a multiple of this many cache rows, so that one graph serves many tokens


@dataclass
class _Run(Closing):
    """A graph that is allocated in the scheduler, and replayed for as long as its sizes fit."""

    key: tuple[int, int, int]
    context: Context
    inputs: Inputs
    graph: Graph
    logits: Tensor

    def close(self) -> None:
        self.graph.close()
        self.context.close()


def _mask(seen: npt.NDArray[np.bool_]) -> npt.NDArray[np.float16]:
    return np.where(seen, np.float16(0), np.float16(-np.inf))


class Runner(Closing):
    """Weights, caches and scheduler of one model, and the graph that was run last.

    The cache holds one sequence. Whoever computes into it takes a turn with :meth:`begin`; a turn ends when the next
    one begins, so that two callers cannot mix their tokens.
    """

    def __init__(
        self,
        architecture: Architecture,
        backends: list[Backend],
        n_ctx: int,
        n_batch: int,
        progress: Progress | None,
    ) -> None:
        self.architecture, self.n_batch = architecture, n_batch
        self._gpu = not backends[0].device.is_cpu
        self._rows = -(-n_ctx // _KV_STEP) * _KV_STEP
        self._lock = threading.Lock()
        self._turn = 0
        self._run: _Run | None = None
        self._scheduler: Scheduler | None = None
        self.weights = Weights(architecture, backends, self._rows, progress=progress)
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

    def begin(self) -> int:
        """Take a turn: an empty cache, and a number for :meth:`feed` and :meth:`step`."""
        with self._lock:
            self._turn += 1
            return self._turn

    def batches(self, ids: list[int]) -> Iterator[tuple[list[int], int]]:
        """``ids`` in parts of about equal size, at most ``n_batch`` each, with their positions.

        A few tokens go one by one where there is a GPU: every small batch size is a set of shaders of its own, which
        the driver compiles for seconds; those for one token are needed anyway.
        """
        n = len(ids)
        parts = n if self._gpu and n <= _FEW_TOKENS else -(-n // self.n_batch)
        edges = [n * i // parts for i in range(parts + 1)]
        for start, end in pairwise(edges):
            yield ids[start:end], start

    def feed(self, turn: int, ids: list[int]) -> npt.NDArray[np.float32]:
        """Compute ``ids`` from the start of the cache; the last one's logits ``(n_vocab,)``."""
        logits = np.empty((1, 0), np.float32)
        for batch, start in self.batches(ids):
            logits = self.step(turn, batch, start, 1)
        last: npt.NDArray[np.float32] = logits[0]
        return last

    def step(self, turn: int, ids: list[int], at: int, n_out: int) -> npt.NDArray[np.float32]:
        """One run over ``ids`` at positions from ``at``; logits of the last ``n_out``: ``(n_out, n_vocab)``."""
        with self._lock:
            self.scheduler  # noqa: B018 - raises when closed
            if turn != self._turn:
                raise GgmlError("another forward or generate call has used this model's cache meanwhile")
            n = len(ids)
            n_kv = min(-(-(at + n) // _KV_STEP) * _KV_STEP, self._rows)
            run = self._prepared((n, n_kv, n_out))
            positions = np.arange(at, at + n)
            inputs = run.inputs
            back = positions[:, None] - np.arange(n_kv)  # how far back each row of the cache is
            inputs.tokens.set(np.asarray(ids, np.int32))
            inputs.positions.set(positions.astype(np.int32))
            inputs.rows.set(positions)
            if inputs.mask.is_allocated:  # what the graph does not use has no memory
                inputs.mask.set(_mask(back >= 0))
            if inputs.near is not None and inputs.near.is_allocated:
                inputs.near.set(_mask((back >= 0) & (back < self.architecture.window)))
            if inputs.wanted.is_allocated:
                inputs.wanted.set(np.arange(n - n_out, n, dtype=np.int32))
            self.scheduler.compute(run.graph)
            logits: npt.NDArray[np.float32] = run.logits.numpy()
            return logits

    def _prepared(self, key: tuple[int, int, int]) -> _Run:
        """The graph for ``n`` tokens, ``n_kv`` cache rows and ``n_out`` logits, allocated; the last one is kept."""
        if self._run is not None and self._run.key == key:
            return self._run
        self._drop_run()
        run = self._build(key)
        try:
            self.scheduler.alloc(run.graph)
        except BaseException:
            run.close()
            raise
        self._run = run
        return run

    def _build(self, key: tuple[int, int, int]) -> _Run:
        n, n_kv, n_out = key
        context = Context()
        inputs = Inputs(
            tokens=context.new_tensor(Type.I32, (n,), name="tokens"),
            positions=context.new_tensor(Type.I32, (n,), name="positions"),
            rows=context.new_tensor(Type.I64, (n,), name="rows"),
            mask=context.new_tensor(Type.F16, (n, n_kv), name="mask"),
            wanted=context.new_tensor(Type.I32, (n_out,), name="wanted"),
            near=context.new_tensor(Type.F16, (n, n_kv), name="near") if self.architecture.window else None,
        )
        hidden = self.architecture.hidden(self.weights.tensors, self.weights.cache, inputs)
        logits = self.architecture.logits(self.weights.tensors, hidden)
        logits.name = "logits"
        # Token ids go where the embeddings are.
        self.scheduler.unplace()
        self.scheduler.place(inputs.tokens, self.scheduler.backends[-1])
        return _Run(key, context, inputs, Graph(logits), logits)

    def _reserve(self) -> None:
        """Make room for the largest prompt batch now, so that too little memory is found while loading."""
        with self._build((self.n_batch, self._rows, 1)) as run:
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
        with self._lock:
            self._turn += 1
            if self._scheduler is not None:
                self._drop_run()
                self._scheduler.close()
                self._scheduler = None
            self.weights.close()
