"""Snapshots of the KV cache: kept sequences, with their keys and values, written to a GGUF file and read back."""

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
from ggml_cffi.models.generation.batcher import Batcher

_PREFIX = "ggml_cffi.kv_cache"
Bytes = npt.NDArray[np.uint8]

#: A kept sequence: its batcher, its slots in the order of its tokens, its token ids.
_Kept = tuple[Batcher, npt.NDArray[np.int64], list[int]]


def save(batchers: Sequence[Batcher], path: str | os.PathLike[str]) -> int:
    """Write the kept sequences of a model's replicas, the latest last, and return the number of their tokens.

    The file is GGUF. For sequence ``i`` it has the token ids ``i.tokens`` ``(n,)``, and for each layer the stored bytes
    of keys and values, ``i.k.LAYER`` and ``i.v.LAYER``, as I8 ``(n, bytes of a token)``.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    kept: list[_Kept] = []
    with ExitStack() as stack:
        for batcher in batchers:
            cache = stack.enter_context(batcher.exclusive())
            kept += [(batcher, cache.slots.slots_of(cache_id), ids) for cache_id, ids in cache.kept.items()]
        metadata = _fingerprint(batchers[0]) | {f"{_PREFIX}.texts": len(kept)}
        write_gguf(path, metadata, _contents(kept))
    return sum(len(ids) for *_, ids in kept)


def load(batcher: Batcher, path: str | os.PathLike[str]) -> int:
    """Read sequences into the cache, keep them there, and return the number of their tokens.

    Raises
    ------
    FormatError
        If :func:`save` did not write the file, or the model or the type of its cache differs.
    ValueError
        If the cache has too few slots.
    """
    with GGUFFile(path) as file, batcher.exclusive() as cache:
        for key, value in _fingerprint(batcher).items():
            found = file.metadata.get(key)
            if found != value:
                raise FormatError(f"{path} is not a snapshot of this KV cache: {key} is {found!r}, not {value!r}")
        sequences = [_tokens(file, i, batcher) for i in range(_count(file))]
        n = sum(len(ids) for ids in sequences)
        if n > len(cache.slots):
            raise ValueError(
                f"{path} holds {n} tokens, and the KV cache has {len(cache.slots)} slots: load the model with a larger "
                f"n_ctx"
            )
        for i, ids in enumerate(sequences):
            cache_id = batcher.allocate(len(ids))
            slots = cache.slots.allocate(cache_id, 0, len(ids))
            try:
                for name, caches, part in _parts(batcher, i):
                    _write(caches, part, slots, _stored(file, name, len(ids)))
            except BaseException:
                cache.slots.release(cache_id)
                raise
            cache.kept[cache_id] = ids
    return n


def _fingerprint(batcher: Batcher) -> dict[str, Any]:
    """Return the metadata that must be equal in a file and in a model."""
    architecture, cache = batcher.runner.architecture, batcher.cache.layers[0][0]
    return {
        "general.architecture": architecture.name,
        f"{_PREFIX}.version": 1,
        f"{_PREFIX}.layers": architecture.n_layers,
        f"{_PREFIX}.key_type": cache.k.dtype.name,
        f"{_PREFIX}.value_type": cache.v.dtype.name,
        f"{_PREFIX}.key_size": architecture.kv_sizes[0],
        f"{_PREFIX}.value_size": architecture.kv_sizes[1],
        f"{_PREFIX}.vocabulary": architecture.n_vocab,
    }


def _count(file: GGUFFile) -> int:
    """Return the number of sequences in a file."""
    count = file.metadata.get(f"{_PREFIX}.texts")
    if not isinstance(count, int) or not 0 <= count <= len(file.tensors):
        raise FormatError(f"{file.path}: {_PREFIX}.texts is {count!r}, not the number of sequences in the file")
    return count


def _tokens(file: GGUFFile, i: int, batcher: Batcher) -> list[int]:
    """Return the token ids of sequence ``i``, checked."""
    if f"{i}.tokens" not in file.tensors:
        raise FormatError(f"{file.path}: sequence {i} has no tokens")
    ids = file.array(f"{i}.tokens")
    n_vocab = batcher.runner.architecture.n_vocab
    if ids.dtype != np.int32 or ids.ndim != 1 or ids.min() < 0 or ids.max() >= n_vocab:
        raise FormatError(f"{file.path}: the tokens of sequence {i} are not ids from 0 to {n_vocab - 1}")
    found: list[int] = ids.tolist()
    return found


def _stored(file: GGUFFile, name: str, n: int) -> Bytes:
    """Return the bytes of a tensor of ``n`` tokens: ``(n, bytes of a token)``."""
    info = file.tensors.get(name)
    if info is None or len(info.shape) != 2 or info.shape[0] != n:
        raise FormatError(f"{file.path}: tensor {name!r} is missing, or does not have {n} rows")
    return file.raw(name).reshape(n, -1)


def _parts(batcher: Batcher, i: int) -> Iterator[tuple[str, list[Sequence[LayerCache]], str]]:
    """Yield for keys and values of each layer the tensor's name in the file, the caches, and ``"k"`` or ``"v"``.

    Caches with the same heads are in one list. Each of several devices has some of the heads, or all heads if there
    are fewer heads than devices.
    """
    for layer, caches in enumerate(batcher.cache.layers):
        for part, size in zip("kv", batcher.runner.architecture.kv_sizes, strict=True):
            divided = sum(_width(cache, part) for cache in caches) == size
            yield f"{i}.{part}.{layer}", [[cache] for cache in caches] if divided else [caches], part


def _width(cache: LayerCache, part: str) -> int:
    """Return the elements of one token's keys or values."""
    return cache.k.shape[1] if part == "k" else cache.v.shape[0 if cache.v_transposed else 1]


def _contents(kept: list[_Kept]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield the tensors of a snapshot."""
    for i, (batcher, slots, ids) in enumerate(kept):
        yield f"{i}.tokens", np.asarray(ids, np.int32)
        for name, caches, part in _parts(batcher, i):
            each = [_gather(cache, part, slots) for cache, *_ in caches]
            yield name, np.concatenate(each, axis=1).view(np.int8)


def _gather(cache: LayerCache, part: str, slots: npt.NDArray[np.int64]) -> Bytes:
    """Return the stored bytes of some slots' keys or values: ``(n, bytes of a token)``."""
    tensor = cache.k if part == "k" else cache.v
    if part == "v" and cache.v_transposed:
        return np.ascontiguousarray(_elements(tensor)[:, slots].swapaxes(0, 1)).reshape(len(slots), -1)
    end = int(slots.max()) + 1
    return tensor.get_bytes(0, end * tensor.nb[1]).reshape(end, -1)[slots]


def _write(caches: list[Sequence[LayerCache]], part: str, slots: npt.NDArray[np.int64], stored: Bytes) -> None:
    """Write the bytes that :func:`_gather` read, divided among the caches as the heads are."""
    sizes = [row_size((cache.k if part == "k" else cache.v).dtype, _width(cache, part)) for cache, *_ in caches]
    if stored.shape[1] != sum(sizes):
        raise FormatError(f"a token's keys or values take {sum(sizes)} bytes, not {stored.shape[1]}")
    for same, end, size in zip(caches, accumulate(sizes), sizes, strict=True):
        for cache in same:
            _scatter(cache, part, slots, stored[:, end - size : end])


def _scatter(cache: LayerCache, part: str, slots: npt.NDArray[np.int64], stored: Bytes) -> None:
    """Write the bytes of some slots' keys or values into one cache."""
    tensor = cache.k if part == "k" else cache.v
    if part == "v" and cache.v_transposed:
        elements = _elements(tensor)
        elements[:, slots] = stored.reshape(len(slots), -1, elements.shape[2]).swapaxes(0, 1)
        tensor.set_bytes(elements)
        return
    for first, last in _contiguous(slots):
        start = int(slots[first]) * tensor.nb[1]
        tensor.set_bytes(np.ascontiguousarray(stored[first:last]), start)


def _elements(tensor: Tensor) -> Bytes:
    """Return the bytes of a transposed cache ``(size, n_ctx)`` as ``(size, n_ctx, bytes of an element)``."""
    size, n_ctx = tensor.shape
    return tensor.get_bytes().reshape(size, n_ctx, type_size(tensor.dtype))


def _contiguous(slots: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Return the index ranges of ``slots`` in which each slot follows the one before."""
    edges = [0, *(np.flatnonzero(np.diff(slots) != 1) + 1).tolist(), len(slots)]
    return pairwise(edges)
