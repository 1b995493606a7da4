"""What the KV cache holds, to a file and back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ggml_cffi.core.dtypes import row_size, type_size
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.errors import FormatError
from ggml_cffi.files.gguf.reader import GGUFFile
from ggml_cffi.files.gguf.writer import write_gguf
from ggml_cffi.models.architectures.base import LayerCache
from ggml_cffi.models.generation.batcher import Generator

_KIND = "ggml_cffi.kv_cache"
Bytes = npt.NDArray[np.uint8]

#: Where a text is: the generator that keeps it, the rows of its cache, the tokens.
_Text = tuple[Generator, npt.NDArray[np.int64], list[int]]


def save(generators: Sequence[Generator], path: str | os.PathLike[str]) -> int:
    """Write the texts that are kept in the caches of a model's replicas, the latest last; the number of their tokens.

    A GGUF file: for text ``i`` its tokens ``i.tokens`` ``(n,)``, and for each layer the stored bytes of its keys and
    values, ``i.k.LAYER`` and ``i.v.LAYER``, as I8 ``(n, bytes of a token)``.
    """
    texts: list[_Text] = []
    with ExitStack() as stack:
        for generator in generators:
            stack.enter_context(generator.lock)
            generator.settle()
            texts += [(generator, generator.cells.rows(sequence), ids) for sequence, ids in generator.kept.items()]
        metadata = _description(generators[0]) | {f"{_KIND}.texts": len(texts)}
        write_gguf(path, metadata, _contents(texts))
    return sum(len(ids) for *_, ids in texts)


def load(generator: Generator, path: str | os.PathLike[str]) -> int:
    """Put the texts of a file into the cache, and keep them; the number of their tokens.

    Raises
    ------
    FormatError
        If the file was not written by :func:`save`, or by another model, or with another type of cache.
    ValueError
        If the cache is too small.
    """
    with GGUFFile(path) as file, generator.lock:
        for key, value in _description(generator).items():
            found = file.metadata.get(key)
            if found != value:
                raise FormatError(f"{path}: not this model's cache: {key} is {found!r}, not {value!r}")
        texts = [_tokens(file, i, generator) for i in range(_count(file))]
        n = sum(len(ids) for ids in texts)
        if n > len(generator.cells):
            raise ValueError(f"{path} holds {n} tokens; the cache has room for {len(generator.cells)}")
        for i, ids in enumerate(texts):
            sequence = generator.free_rows(len(ids))
            rows = generator.cells.take(sequence, 0, len(ids))
            try:
                for name, caches, part in _parts(generator, i):
                    _spread(caches, part, rows, _stored(file, name, len(ids)))
            except BaseException:
                generator.cells.drop(sequence)
                raise
            generator.kept[sequence] = ids
    return n


def _description(generator: Generator) -> dict[str, Any]:
    """What must be the same for a cache to make sense."""
    architecture, cache = generator.runner.architecture, generator.runner.caches[0][0]
    return {
        "general.architecture": architecture.name,
        f"{_KIND}.version": 1,
        f"{_KIND}.layers": architecture.n_layers,
        f"{_KIND}.key_type": cache.k.dtype.name,
        f"{_KIND}.value_type": cache.v.dtype.name,
        f"{_KIND}.key_size": architecture.kv_sizes[0],
        f"{_KIND}.value_size": architecture.kv_sizes[1],
        f"{_KIND}.vocabulary": architecture.n_vocab,
    }


def _count(file: GGUFFile) -> int:
    count = file.metadata.get(f"{_KIND}.texts")
    if not isinstance(count, int) or not 0 <= count <= len(file.tensors):
        raise FormatError(f"{file.path}: {_KIND}.texts is {count!r}, not a number of texts")
    return count


def _tokens(file: GGUFFile, i: int, generator: Generator) -> list[int]:
    if f"{i}.tokens" not in file.tensors:
        raise FormatError(f"{file.path}: text {i} has no tokens")
    ids = file.array(f"{i}.tokens")
    n_vocab = generator.runner.architecture.n_vocab
    if ids.dtype != np.int32 or ids.ndim != 1 or ids.min() < 0 or ids.max() >= n_vocab:
        raise FormatError(f"{file.path}: the tokens of text {i} are none of this model")
    found: list[int] = ids.tolist()
    return found


def _stored(file: GGUFFile, name: str, n: int) -> Bytes:
    info = file.tensors.get(name)
    if info is None or len(info.shape) != 2 or info.shape[0] != n:
        raise FormatError(f"{file.path}: {name!r} is missing, or is not of {n} tokens")
    return file.raw(name).reshape(n, -1)


def _parts(generator: Generator, i: int) -> Iterator[tuple[str, list[Sequence[LayerCache]], str]]:
    """Keys and values of each layer: the name in the file, and the caches that hold them, those together that hold
    the same heads. Of several devices each has some heads, or has all where there are fewer heads than devices.
    """
    for layer, caches in enumerate(generator.runner.caches):
        for part, size in zip("kv", generator.runner.architecture.kv_sizes, strict=True):
            cut = sum(_width(cache, part) for cache in caches) == size
            yield f"{i}.{part}.{layer}", [[cache] for cache in caches] if cut else [caches], part


def _width(cache: LayerCache, part: str) -> int:
    """Elements of a token's keys or values."""
    return cache.k.shape[1] if part == "k" else cache.v.shape[0 if cache.across else 1]


def _contents(texts: list[_Text]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    for i, (generator, rows, ids) in enumerate(texts):
        yield f"{i}.tokens", np.asarray(ids, np.int32)
        for name, caches, part in _parts(generator, i):
            each = [_gather(cache, part, rows) for cache, *_ in caches]
            yield name, np.concatenate(each, axis=1).view(np.int8)


def _gather(cache: LayerCache, part: str, rows: npt.NDArray[np.int64]) -> Bytes:
    """The stored bytes of some tokens' keys or values: ``(n, bytes of a token)``."""
    tensor = cache.k if part == "k" else cache.v
    if part == "v" and cache.across:
        return np.ascontiguousarray(_elements(tensor)[:, rows].swapaxes(0, 1)).reshape(len(rows), -1)
    end = int(rows.max()) + 1
    return tensor.get_bytes(0, end * tensor.nb[1]).reshape(end, -1)[rows]


def _spread(caches: list[Sequence[LayerCache]], part: str, rows: npt.NDArray[np.int64], stored: Bytes) -> None:
    """Undo :func:`_gather`, for all caches."""
    sizes = [row_size((cache.k if part == "k" else cache.v).dtype, _width(cache, part)) for cache, *_ in caches]
    if stored.shape[1] != sum(sizes):
        raise FormatError(f"a token's keys or values take {sum(sizes)} bytes, not {stored.shape[1]}")
    for same, end, size in zip(caches, accumulate(sizes), sizes, strict=True):
        for cache in same:
            _scatter(cache, part, rows, stored[:, end - size : end])


def _scatter(cache: LayerCache, part: str, rows: npt.NDArray[np.int64], stored: Bytes) -> None:
    tensor = cache.k if part == "k" else cache.v
    if part == "v" and cache.across:
        whole = _elements(tensor)
        whole[:, rows] = stored.reshape(len(rows), -1, whole.shape[2]).swapaxes(0, 1)
        tensor.set_bytes(whole)
        return
    for first, last in _runs(rows):
        start = int(rows[first]) * tensor.nb[1]
        tensor.set_bytes(np.ascontiguousarray(stored[first:last]), start)


def _elements(tensor: Tensor) -> Bytes:
    """The bytes of a cache ``(size, n_ctx)`` as ``(size, n_ctx, bytes of an element)``."""
    size, n_ctx = tensor.shape
    return tensor.get_bytes().reshape(size, n_ctx, type_size(tensor.dtype))


def _runs(rows: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Pieces of ``rows`` whose numbers follow one another."""
    edges = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    return pairwise(edges)
