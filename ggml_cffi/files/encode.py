"""Tensors of one type as the bytes of another, piece by piece, so that memory stays small whatever their size."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ggml_cffi.core import dtypes
from ggml_cffi.enums import Type
from ggml_cffi.files.sources import StoredTensor

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future  # slow to import

#: Elements that are converted at a time: small beside a model, large beside the cost of a call.
CHUNK = 1 << 18
#: Bytes that are copied at a time.
COPY = 16 << 20

Bytes = npt.NDArray[np.uint8]


def stored_bytes(
    source: StoredTensor | npt.NDArray[Any],
    dtype: Type,
    imatrix: npt.ArrayLike | None = None,
    pool: Executor | None = None,
    ahead: int = 0,
) -> Iterator[Bytes]:
    """The bytes of ``source`` in the layout of ``dtype``, in order: whole rows, a few at a time.

    Parameters
    ----------
    source
        ``(..., n)``.
    dtype
        The type to store: a copy where it is the one it has, else cast or quantized.
    imatrix
        How much each column matters, as :func:`quantize` takes it: ``(n,)``, or ``(experts, n)`` for a source of
        shape ``(experts, rows, n)``.
    pool, ahead
        Threads to convert in, and how many pieces they may be ahead of the consumer.

    Raises
    ------
    TypeError, ValueError
        If the values cannot be stored as ``dtype``.
    """
    shape = source.shape
    n, n_rows = (shape[-1] if shape else 1), prod(shape[:-1])
    weights = None if imatrix is None else importances(imatrix, shape)
    if isinstance(source, StoredTensor):
        if source.dtype is dtype:
            raw = source.raw()
            return (raw[at : at + COPY] for at in range(0, raw.size, COPY))
        rows = _stored_rows(source, n_rows, n)
    else:
        flat = source.reshape(n_rows, n)
        rows = lambda start, stop: flat[start:stop]  # noqa: E731
    step = max(CHUNK // max(n, 1), 1)
    per_expert = n_rows // len(weights) if weights is not None and len(weights) else max(n_rows, 1)

    def convert(start: int, stop: int) -> Bytes:
        which = None if weights is None else weights[start // per_expert]
        return _converted(rows(start, stop), dtype, which)

    # A piece has rows of one expert only: each has importances of its own.
    bounds = (
        (start, min(start + step, first + per_expert))
        for first in range(0, n_rows, per_expert)
        for start in range(first, first + per_expert, step)
    )
    return _ordered(convert, bounds, pool, ahead)


def importances(imatrix: npt.ArrayLike, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """``imatrix`` as ``(experts, n)`` for a tensor of ``shape``, checked; one row if the tensor has no experts.

    Raises
    ------
    ValueError
        If it does not fit, or has numbers that are no importances.
    """
    weights = np.ascontiguousarray(imatrix, np.float32)
    n, experts = shape[-1], shape[-3] if len(shape) > 2 else 1
    if weights.size == n:
        weights = weights.reshape(1, n)
    elif weights.size == n * experts and len(shape) == 3:
        weights = weights.reshape(experts, n)
    else:
        raise ValueError(f"the importance matrix has shape {weights.shape}; a tensor of shape {shape} needs ({n},)")
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any(-1).all():
        raise ValueError("importances must be finite, at least 0 and not all 0")
    return weights


def _stored_rows(source: StoredTensor, n_rows: int, n: int) -> Callable[[int, int], npt.NDArray[Any]]:
    kind = source.dtype
    raw = source.raw().reshape(n_rows, dtypes.row_size(kind, n))
    if dtypes.has_numpy(kind):
        return lambda start, stop: raw[start:stop].view(dtypes.numpy_dtype(kind))
    return lambda start, stop: dtypes.from_bytes(raw[start:stop], kind, (stop - start) * n).reshape(stop - start, n)


def _converted(rows: npt.NDArray[Any], dtype: Type, weights: npt.NDArray[np.float32] | None) -> Bytes:
    with np.errstate(over="ignore"):
        made = dtypes.to_bytes(rows, dtype, weights)
    if made.dtype.kind == "f" and rows.dtype.kind == "f" and made.itemsize < rows.itemsize:
        lost = np.isinf(made) & np.isfinite(rows)
        if lost.any():
            raise ValueError(f"{rows[lost].max():g} is too large for {dtype.name}")
    return made.reshape(-1).view(np.uint8)


def _ordered(
    convert: Callable[[int, int], Bytes], bounds: Iterator[tuple[int, int]], pool: Executor | None, ahead: int
) -> Iterator[Bytes]:
    waiting: deque[Future[Bytes]] = deque()
    try:
        for start, stop in bounds:
            if pool is None:
                yield convert(start, stop)
                continue
            waiting.append(pool.submit(convert, start, stop))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
