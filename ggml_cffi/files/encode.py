"""Encoding of tensors into the bytes of another type, in chunks, so that memory stays small for any tensor size."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ggml_cffi.core import dtypes
from ggml_cffi.enums import Type
from ggml_cffi.files.quantization import Importances, check_importances
from ggml_cffi.files.sources import StoredTensor

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future  # slow to import

#: Elements per conversion: small compared with a model, large compared with the cost of a call.
_CHUNK_ELEMENTS = 1 << 18
#: Bytes per copy.
_COPY_BYTES = 16 << 20

Bytes = npt.NDArray[np.uint8]


def encode_chunks(
    source: StoredTensor | npt.NDArray[Any],
    dtype: Type,
    imatrix: npt.ArrayLike | None = None,
    pool: Executor | None = None,
    ahead: int = 0,
) -> Iterator[Bytes]:
    """Encode ``source`` as ``dtype``, and return an iterator of chunks of whole rows, in order.

    Parameters
    ----------
    source
        ``(..., n)``.
    dtype
        Type of the bytes. The source is copied if it has this type, else cast or quantized.
    imatrix
        Importance of each column: ``(n,)``, or ``(experts, n)`` for a source of shape ``(experts, rows, n)``.
    pool, ahead
        Thread pool for the conversion, and the number of chunks that it may be ahead of the consumer.

    Raises
    ------
    TypeError, ValueError
        If ``dtype`` cannot hold the values.
    """
    shape = source.shape
    n, n_rows = (shape[-1] if shape else 1), prod(shape[:-1])
    weights = None if imatrix is None else check_importances(imatrix, shape)
    if isinstance(source, StoredTensor):
        if source.dtype is dtype:
            raw = source.raw()
            return (raw[at : at + _COPY_BYTES] for at in range(0, raw.size, _COPY_BYTES))
        rows = _row_reader(source, n_rows, n)
    else:
        flat = source.reshape(n_rows, n)
        rows = lambda start, stop: flat[start:stop]  # noqa: E731
    step = max(_CHUNK_ELEMENTS // max(n, 1), 1)
    per_expert = n_rows // len(weights) if weights is not None and len(weights) else max(n_rows, 1)

    def convert(start: int, stop: int) -> Bytes:
        importances = None if weights is None else weights[start // per_expert]
        return _encode_rows(rows(start, stop), dtype, importances)

    # Experts have different importances, so a chunk has rows of one expert only.
    bounds = (
        (start, min(start + step, first + per_expert))
        for first in range(0, n_rows, per_expert)
        for start in range(first, first + per_expert, step)
    )
    return _in_order(convert, bounds, pool, ahead)


def _row_reader(source: StoredTensor, n_rows: int, n: int) -> Callable[[int, int], npt.NDArray[Any]]:
    element_type = source.dtype
    raw = source.raw().reshape(n_rows, dtypes.row_size(element_type, n))
    if dtypes.has_numpy(element_type):
        return lambda start, stop: raw[start:stop].view(dtypes.numpy_dtype(element_type))
    return lambda start, stop: dtypes.from_bytes(raw[start:stop], element_type, (stop - start) * n).reshape(
        stop - start, n
    )


def _encode_rows(rows: npt.NDArray[Any], dtype: Type, weights: Importances | None) -> Bytes:
    with np.errstate(over="ignore"):
        made = dtypes.to_bytes(rows, dtype, weights)
    if made.dtype.kind == "f" and rows.dtype.kind == "f" and made.itemsize < rows.itemsize:
        lost = np.isinf(made) & np.isfinite(rows)
        if lost.any():
            raise ValueError(f"{rows[lost].max():g} is too large for {dtype.name}")
    return made.reshape(-1).view(np.uint8)


def _in_order(
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
