"""Embeddings: token ids of texts in, one vector for each text out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ggml_cffi import ops
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.context import Context
from ggml_cffi.core.handle import Closing
from ggml_cffi.core.lru import LRU
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.errors import ClosedError
from ggml_cffi.models.architectures.base import Architecture, LayerCache
from ggml_cffi.models.runners.inputs import GraphInputs
from ggml_cffi.models.runners.weights import Weights
from ggml_cffi.models.tokenizers.tokenizer import check_tokens
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.scheduler import Scheduler

#: Ways to get a text's vector from those of its tokens: their mean, the first, or the last.
POOLINGS = ("mean", "cls", "last")

_STEP = 16  # numbers of tokens and of texts are rounded up to multiples of this at least
_GRAPHS = 8  # largest number of kept graphs


class _EmbeddingGraph(Closing):
    """The graph for a number of tokens and a number of texts."""

    def __init__(
        self, scheduler: Scheduler, context: Context, inputs: GraphInputs, pool: Tensor, vectors: Tensor
    ) -> None:
        self.scheduler, self.context, self.inputs = scheduler, context, inputs
        self.pool = pool
        """Weights of the tokens in each text's vector, F32 ``(n_texts, n)``."""
        self.vectors = vectors
        """The result, F32 ``(n_texts, n_embd)``."""
        self.graph = Graph(vectors)

    def close(self) -> None:
        """Free the graph."""
        if self.scheduler.graph is self.graph:
            self.scheduler.reset()
        self.graph.close()
        self.context.close()


class Embedder(Closing):
    """Embedder of texts with a model's weights, several texts in one run.

    The texts of a run follow one another, and the mask separates them. Models that generate text can embed as well.
    Their keys and values go to a cache of the embedder, which leaves the sequences in the KV cache unchanged.

    Parameters
    ----------
    architecture, weights
        The model, with whole weights.
    scheduler
        The scheduler of the model. Other code may use it between two calls.
    n_ctx
        Largest number of tokens of a text. Longer texts are truncated, also those longer than the architecture's
        :attr:`~Architecture.max_sequence_length`.
    n_batch
        Largest number of tokens in one run. A text is never divided, so a run may have up to ``n_ctx`` tokens.
    alone
        True for runs of one text each, so that a vector does not depend on the texts beside it.
    context
        A function that returns the context of a new graph.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: Weights,
        scheduler: Scheduler,
        n_ctx: int,
        n_batch: int,
        *,
        alone: bool = False,
        context: Callable[[], Context] = Context,
    ) -> None:
        self.architecture, self.weights, self.scheduler = architecture, weights, scheduler
        self.max_tokens = min(n_ctx, architecture.max_sequence_length or n_ctx)
        """Largest number of tokens of a text; the rest is truncated."""
        self._alone, self._new_context = alone, context
        self._capacity = max(n_batch, self.max_tokens)
        self._graphs: LRU[tuple[int, int], _EmbeddingGraph] = LRU(_GRAPHS)
        self._cache: list[LayerCache] = []
        self._cache_context: Context | None = None
        self._closed = False

    def embed(
        self, texts: Iterable[Iterable[int]], *, pooling: str | None = None, normalize: bool = True
    ) -> npt.NDArray[np.float32]:
        """Return one vector for each text.

        Parameters
        ----------
        texts
            Token ids of each text, with the tokens that begin and end it. If a text for an encoder is too long, its
            last token (the end token) is kept, as in sentence-transformers.
        pooling
            ``mean``, ``cls`` or ``last``; default the one of the model's training.
        normalize
            True for vectors of length 1, whose dot products are cosines.

        Returns
        -------
        numpy.ndarray
            float32, ``(n_texts, n_embd)``, in the order of the texts.

        Raises
        ------
        ValueError, TypeError
            If a text has no tokens, or a token that is not in the vocabulary, or there is no such pooling.
        ClosedError
            If this embedder is closed.
        """
        chosen = self.architecture.pooling if pooling is None else pooling
        if chosen not in POOLINGS:
            raise ValueError(f"pooling {pooling!r} does not exist: use one of {', '.join(POOLINGS)}")
        truncated = [self._truncate(ids, i) for i, ids in enumerate(texts)]
        found = [np.empty((0, self.architecture.n_embd), np.float32)]
        runs = ([ids] for ids in truncated) if self._alone else batches(truncated, self._capacity)
        found += [self._compute(run, chosen) for run in runs]
        vectors = np.concatenate(found)
        if normalize:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        return vectors

    def reserve(self) -> dict[Backend, int]:
        """Allocate memory for the largest batch now, so that loading fails if there is too little.

        Returns
        -------
        dict
            Bytes of intermediate tensors on each backend.

        Raises
        ------
        OutOfMemoryError
            If a device has too little memory.
        """
        with self.scheduler.lock, self._build(self._capacity, 1) as largest:
            return self.scheduler.reserve(largest.graph)

    def reserve_size(self) -> dict[Backend, int]:
        """Return the bytes that :meth:`reserve` would allocate, without allocating them."""
        with self.scheduler.lock, self._build(self._capacity, 1) as largest:
            return self.scheduler.reserve_size(largest.graph)

    def _truncate(self, tokens: Iterable[int], i: int) -> list[int]:
        ids = check_tokens(tokens, self.architecture.n_vocab)
        if not ids:
            raise ValueError(f"text {i} has no tokens: there is nothing to embed")
        if len(ids) <= self.max_tokens:
            return ids
        if self.architecture.causal:
            return ids[: self.max_tokens]
        return [*ids[: self.max_tokens - 1], ids[-1]]

    def _compute(self, texts: Sequence[list[int]], pooling: str) -> npt.NDArray[np.float32]:
        """Return the vectors of texts that fit one run."""
        n, n_texts = sum(map(len, texts)), len(texts)
        # Rounded sizes keep the number of graphs small. A single text is often a query, and has graphs of its own.
        n_rows = n_texts if n_texts == 1 else min(_round_up(n_texts), self._capacity)
        with self.scheduler.lock:
            if self._closed:
                raise ClosedError("this model is closed")
            graph = self._allocated(min(_round_up(n), self._capacity), n_rows)
            self._set(graph, texts, pooling)
            self.scheduler.compute(graph.graph)
            vectors: npt.NDArray[np.float32] = graph.vectors.numpy()[:n_texts]
        return vectors

    def _set(self, graph: _EmbeddingGraph, texts: Sequence[list[int]], pooling: str) -> None:
        """Write the inputs of a graph."""
        (n_rows, n), n_texts = graph.pool.shape, len(texts)
        lengths = np.array([len(ids) for ids in texts])
        ends = lengths.cumsum()
        starts, total = ends - lengths, int(ends[-1])
        # Padding tokens form a text of their own, so that no row of the mask is empty.
        owner = np.repeat(np.arange(n_texts + 1), [*lengths, n - total])
        order = np.arange(n)
        seen = owner[:, None] == owner
        if self.architecture.causal:
            seen &= order <= order[:, None]
        weight = np.zeros((n_rows, n), np.float32)
        if pooling == "mean":
            weight[owner[:total], order[:total]] = 1 / lengths[owner[:total]]
        else:
            weight[np.arange(n_texts), starts if pooling == "cls" else ends - 1] = 1
        values = {
            "tokens": np.concatenate([*texts, np.zeros(n - total, np.int32)]),
            "positions": np.where(order < total, order - np.append(starts, 0)[owner], 0),
            "kv_slots": order,
            "output_ids": order,
            "mask": _mask(seen),
        }
        if self.architecture.window:
            values["window_mask"] = _mask(seen & (order > order[:, None] - self.architecture.window))
        graph.inputs.set(values)
        graph.pool.set(weight)

    def _allocated(self, n: int, n_rows: int) -> _EmbeddingGraph:
        """Return the graph for these numbers of tokens and texts, allocated. The last few graphs are kept."""
        found = self._graphs.get((n, n_rows), lambda: self._build(n, n_rows))
        if self.scheduler.graph is not found.graph:
            self.scheduler.alloc(found.graph)
        return found

    def _build(self, n: int, n_rows: int) -> _EmbeddingGraph:
        if self.architecture.causal:
            self._make_cache(n)
        weights, backends, context = self.weights, self.scheduler.backends, self._new_context()
        devices = weights.layer_devices
        try:
            windowed = self.architecture.window > 0
            inputs = GraphInputs(context, backends, devices, weights.embedding_devices[0], n, n, n, window=windowed)
            hidden = self.architecture.hidden(weights.tensors, self._cache, inputs.inputs)
            pool = context.new_tensor(Type.F32, (n_rows, n), name="pool")
            context.alloc(backends[devices[-1]].buffer_type, [pool])
            vectors = ops.mul_mat(ops.cont(ops.transpose(hidden)), pool)
            vectors.name = "embeddings"
            return _EmbeddingGraph(self.scheduler, context, inputs, pool, vectors)
        except BaseException:
            context.close()
            raise

    def _make_cache(self, n: int) -> None:
        """Make the cache larger if it has fewer than ``n`` slots. Each layer's cache is on the layer's device."""
        if self._cache and self._cache[0].k.shape[0] >= n:
            return
        self._free()
        context = self._cache_context = Context()
        for layer, device in enumerate(self.weights.layer_devices):
            k, v = (
                context.new_tensor(Type.F32, (n, size), name=f"embedding_{name}.{layer}")
                for name, size in zip("kv", self.architecture.kv_sizes, strict=True)
            )
            context.alloc(self.weights.backends[device].buffer_type, [k, v])
            self._cache.append(LayerCache(k, v))

    def _free(self) -> None:
        """Free the graphs, and the cache that they use."""
        self._graphs.clear()
        self._cache.clear()
        context, self._cache_context = self._cache_context, None
        if context is not None:
            context.close()

    def close(self) -> None:
        """Free graphs and cache. Weights and scheduler stay open."""
        with self.scheduler.lock:
            self._closed = True
            self._free()


def embed_on_replicas(
    embedders: Sequence[Embedder], texts: Sequence[Iterable[int]], *, pooling: str | None, normalize: bool
) -> npt.NDArray[np.float32]:
    """Return one vector for each text, as :meth:`Embedder.embed` does; each embedder computes a part of the texts."""
    n = len(embedders)
    if n == 1 or len(texts) < 2:
        return embedders[0].embed(texts, pooling=pooling, normalize=normalize)
    from concurrent.futures import ThreadPoolExecutor  # slow to import

    starts = [len(texts) * i // n for i in range(n + 1)]
    with ThreadPoolExecutor(n) as pool:
        futures = [
            pool.submit(embedder.embed, texts[start:end], pooling=pooling, normalize=normalize)
            for embedder, (start, end) in zip(embedders, pairwise(starts), strict=True)
        ]
        return np.concatenate([future.result() for future in futures])


def batches(texts: Sequence[list[int]], capacity: int) -> Iterator[Sequence[list[int]]]:
    """Yield the texts in order, in groups that have at most ``capacity`` tokens together."""
    start = total = 0
    for i, ids in enumerate(texts):
        if total + len(ids) > capacity and i > start:
            yield texts[start:i]
            start, total = i, 0
        total += len(ids)
    if start < len(texts):
        yield texts[start:]


def _round_up(n: int) -> int:
    """Return ``n`` rounded up by at most a quarter, and to at least 16, which gives few different sizes.

    For 2 to 8 columns ggml's Vulkan backend has special products, which the driver compiles for seconds.
    """
    step = max(1 << n.bit_length() >> 3, _STEP)
    return -(-n // step) * step


def _mask(seen: npt.NDArray[np.bool_]) -> npt.NDArray[np.float16]:
    return np.where(seen, np.float16(0), np.float16(-np.inf))
