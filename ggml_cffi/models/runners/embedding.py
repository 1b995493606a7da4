"""Embeddings: token ids of texts in, one vector for each text out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ggml_cffi import ops
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.context import Context
from ggml_cffi.core.handle import Closing
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.errors import ClosedError
from ggml_cffi.models.architectures.base import Architecture, LayerCache
from ggml_cffi.models.runners.inputs import Feed
from ggml_cffi.models.runners.weights import Weights
from ggml_cffi.models.tokenizers.tokenizer import check_tokens
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.scheduler import Scheduler

#: How a text's vector comes from its tokens': their mean, the first one's, or the last one's.
POOLINGS = ("mean", "cls", "last")

_STEP = 16  # numbers of tokens and of texts are rounded up at least to multiples of this
_KEPT = 8  # graphs


@dataclass
class _Run(Closing):
    """A graph for so many tokens of so many texts."""

    context: Context
    feed: Feed
    pool: Tensor
    """Each text's weights for the tokens, F32 ``(n_texts, n)``."""
    graph: Graph
    vectors: Tensor
    """The result, F32 ``(n_texts, n_embd)``."""

    def close(self) -> None:
        self.graph.close()
        self.context.close()


class Embedder(Closing):
    """Embeds texts with a model's weights, several of them in one run.

    The texts of a run lie one after another, and the mask keeps them apart. Models that generate text embed as well;
    the keys and values go through a cache of its own, so that texts that are being generated are not disturbed.

    Parameters
    ----------
    architecture, weights
        The model.
    scheduler
        What computes. It may hold graphs of others between two calls.
    n_ctx
        Most tokens of a text. Longer ones are cut, and so are those beyond what the architecture calls its
        :attr:`~Architecture.longest_text`.
    n_batch
        Most tokens computed at once; a text is never divided, so that there may be up to ``n_ctx``.
    context
        Makes the contexts of graphs.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: Weights,
        scheduler: Scheduler,
        n_ctx: int,
        n_batch: int,
        *,
        context: Callable[[], Context] = Context,
    ) -> None:
        self.architecture, self.weights, self.scheduler = architecture, weights, scheduler
        self.max_tokens = min(n_ctx, architecture.longest_text or n_ctx)
        """Tokens after which a text is cut."""
        self._new_context = context
        self._capacity = max(n_batch, self.max_tokens)
        self._runs: dict[tuple[int, int], _Run] = {}
        self._cache: list[LayerCache] = []
        self._cache_context: Context | None = None
        self._closed = False

    def embed(
        self, texts: Iterable[Iterable[int]], *, pooling: str | None = None, normalize: bool = True
    ) -> npt.NDArray[np.float32]:
        """One vector for each text.

        Parameters
        ----------
        texts
            Token ids of each text, with the tokens that begin and end it. An encoder's text that is too long keeps its
            last token, which is its end, as sentence-transformers does.
        pooling
            ``mean``, ``cls`` or ``last``; default what the model was trained with.
        normalize
            Whether the vectors get length 1, so that their dot products are cosines.

        Returns
        -------
        numpy.ndarray
            float32, ``(n_texts, n_embd)``, in the order of the texts.

        Raises
        ------
        ValueError, TypeError
            If a text has no tokens or what is no token of the vocabulary, or there is no such pooling.
        ClosedError
            If this is closed.
        """
        chosen = self.architecture.pooling if pooling is None else pooling
        if chosen not in POOLINGS:
            raise ValueError(f"pooling {pooling!r} is not known; {', '.join(POOLINGS)} are")
        cut = [self._cut(ids, i) for i, ids in enumerate(texts)]
        found = [np.empty((0, self.architecture.n_embd), np.float32)]
        found += [self._compute(batch, chosen) for batch in batches(cut, self._capacity)]
        vectors = np.concatenate(found)
        if normalize:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        return vectors

    def reserve(self) -> dict[Backend, int]:
        """Make room for the largest batch now, so that too little memory is found early.

        Returns
        -------
        dict
            Bytes of intermediate results on each backend.

        Raises
        ------
        OutOfMemoryError
            If a device has not enough.
        """
        with self.scheduler.lock, self._build(self._capacity, 1) as run:
            return self.scheduler.reserve(run.graph)

    def reserve_size(self) -> dict[Backend, int]:
        """What :meth:`reserve` would return, without taking it."""
        with self.scheduler.lock, self._build(self._capacity, 1) as run:
            return self.scheduler.reserve_size(run.graph)

    def _cut(self, tokens: Iterable[int], i: int) -> list[int]:
        ids = check_tokens(tokens, self.architecture.n_vocab)
        if not ids:
            raise ValueError(f"text {i} has no tokens: there is nothing to embed")
        if len(ids) <= self.max_tokens:
            return ids
        if self.architecture.causal:
            return ids[: self.max_tokens]
        return [*ids[: self.max_tokens - 1], ids[-1]]

    def _compute(self, texts: Sequence[list[int]], pooling: str) -> npt.NDArray[np.float32]:
        """The vectors of texts that fit one run."""
        n, n_texts = sum(map(len, texts)), len(texts)
        # Few graphs for all batches; one text alone is a query, and has graphs of its own.
        n_slots = n_texts if n_texts == 1 else min(_up(n_texts), self._capacity)
        with self.scheduler.lock:
            if self._closed:
                raise ClosedError("this model is closed")
            run = self._prepared(min(_up(n), self._capacity), n_slots)
            self._set(run, texts, pooling)
            self.scheduler.compute(run.graph)
            vectors: npt.NDArray[np.float32] = run.vectors.numpy()[:n_texts]
        return vectors

    def _set(self, run: _Run, texts: Sequence[list[int]], pooling: str) -> None:
        (n_slots, n), n_texts = run.pool.shape, len(texts)
        lengths = np.array([len(ids) for ids in texts])
        ends = lengths.cumsum()
        starts, total = ends - lengths, int(ends[-1])
        # Tokens that only fill up are a text of their own, so that each of them has something to look at.
        owner = np.repeat(np.arange(n_texts + 1), [*lengths, n - total])
        order = np.arange(n)
        seen = owner[:, None] == owner
        if self.architecture.causal:
            seen &= order <= order[:, None]
        weight = np.zeros((n_slots, n), np.float32)
        if pooling == "mean":
            weight[owner[:total], order[:total]] = 1 / lengths[owner[:total]]
        else:
            weight[np.arange(n_texts), starts if pooling == "cls" else ends - 1] = 1
        values = {
            "tokens": np.concatenate([*texts, np.zeros(n - total, np.int32)]),
            "positions": np.where(order < total, order - np.append(starts, 0)[owner], 0),
            "rows": order,
            "wanted": order,
            "mask": _mask(seen),
        }
        if self.architecture.window:
            values["near"] = _mask(seen & (order > order[:, None] - self.architecture.window))
        run.feed.set(values)
        run.pool.set(weight)

    def _prepared(self, n: int, n_slots: int) -> _Run:
        """The graph for so many tokens and texts, allocated; the last few are kept."""
        run = self._runs.pop((n, n_slots), None) or self._build(n, n_slots)
        self._runs[n, n_slots] = run
        if len(self._runs) > _KEPT:
            self._drop(next(iter(self._runs)))
        if self.scheduler.graph is not run.graph:
            self.scheduler.alloc(run.graph)
        return run

    def _build(self, n: int, n_slots: int) -> _Run:
        if self.architecture.causal:
            self._make_cache(n)
        weights, backends, context = self.weights, self.scheduler.backends, self._new_context()
        try:
            windowed = self.architecture.window > 0
            feed = Feed(context, backends, weights.where, weights.first, n, n, n, window=windowed)
            hidden = self.architecture.hidden(weights.tensors, self._cache, feed.inputs)
            pool = context.new_tensor(Type.F32, (n_slots, n), name="pool")
            context.alloc(backends[weights.where[-1]].buffer_type, [pool])
            vectors = ops.mul_mat(ops.cont(ops.transpose(hidden)), pool)
            vectors.name = "embeddings"
            return _Run(context, feed, pool, Graph(vectors), vectors)
        except BaseException:
            context.close()
            raise

    def _make_cache(self, n: int) -> None:
        """Have at least ``n`` rows for keys and values, each layer's on its device."""
        if self._cache and self._cache[0].k.shape[0] >= n:
            return
        self._drop_all()
        context = self._cache_context = Context()
        for layer, target in enumerate(self.weights.where):
            k, v = (
                context.new_tensor(Type.F32, (n, size), name=f"embedding_{name}.{layer}")
                for name, size in zip("kv", self.architecture.kv_sizes, strict=True)
            )
            context.alloc(self.weights.placement[target].backend.buffer_type, [k, v])
            self._cache.append(LayerCache(k, v))

    def _drop(self, key: tuple[int, int]) -> None:
        run = self._runs.pop(key)
        if self.scheduler.graph is run.graph:
            self.scheduler.reset()
        run.close()

    def _drop_all(self) -> None:
        for key in [*self._runs]:
            self._drop(key)
        self._cache.clear()
        context, self._cache_context = self._cache_context, None
        if context is not None:
            context.close()

    def close(self) -> None:
        """Give up graphs and cache. Weights and scheduler stay their owner's."""
        with self.scheduler.lock:
            self._closed = True
            self._drop_all()


def embed_everywhere(
    embedders: Sequence[Embedder], texts: Sequence[Iterable[int]], *, pooling: str | None, normalize: bool
) -> npt.NDArray[np.float32]:
    """As :meth:`Embedder.embed`, by several devices at the same time: each has a part of the texts."""
    n = len(embedders)
    if n == 1 or len(texts) < 2:
        return embedders[0].embed(texts, pooling=pooling, normalize=normalize)
    from concurrent.futures import ThreadPoolExecutor  # slow to import

    starts = [len(texts) * i // n for i in range(n + 1)]
    with ThreadPoolExecutor(n) as pool:
        going = [
            pool.submit(embedder.embed, texts[start:end], pooling=pooling, normalize=normalize)
            for embedder, (start, end) in zip(embedders, pairwise(starts), strict=True)
        ]
        return np.concatenate([future.result() for future in going])


def batches(texts: Sequence[list[int]], capacity: int) -> Iterator[Sequence[list[int]]]:
    """The texts in runs of at most ``capacity`` tokens together, in their order."""
    start = total = 0
    for i, ids in enumerate(texts):
        if total + len(ids) > capacity and i > start:
            yield texts[start:i]
            start, total = i, 0
        total += len(ids)
    if start < len(texts):
        yield texts[start:]


def _up(n: int) -> int:
    """``n`` rounded up by a quarter at most, or to 16: few different sizes, and none of few tokens.

    For 2 to 8 columns ggml's Vulkan backend has products of their own, which the driver compiles for seconds.
    """
    step = max(1 << n.bit_length() >> 3, _STEP)
    return -(-n // step) * step


def _mask(seen: npt.NDArray[np.bool_]) -> npt.NDArray[np.float16]:
    return np.where(seen, np.float16(0), np.float16(-np.inf))
