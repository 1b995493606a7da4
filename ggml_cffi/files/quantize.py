"""Quantization of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ggml_cffi.core import dtypes
from ggml_cffi.core.dtypes import as_type
from ggml_cffi.core.shapes import check_shape
from ggml_cffi.enums import Type


def quantize(values: npt.ArrayLike, dtype: Type | str, imatrix: npt.ArrayLike | None = None) -> npt.NDArray[np.uint8]:
    """``values`` in the blocks of a quantized (or any other) type.

    Parameters
    ----------
    values
        ``(..., n)``, finite numbers; ``n`` is a whole number of blocks.
    dtype
        The type to quantize to.
    imatrix
        ``(n,)``: how much each column matters, at least 0 and not all 0. Types below 2.5 bits need one.

    Returns
    -------
    numpy.ndarray
        uint8, ``(..., row_size)``: the bytes of each row, as tensors and GGUF files have them.

    Raises
    ------
    TypeError
        If there is no such type, or values that are no numbers.
    ValueError
        If rows are no whole blocks, values are not finite, or the importance matrix is missing or does not fit.

    C: ``ggml_quantize_chunk``.
    """
    kind = as_type(dtype)
    array = np.asarray(values)
    if not array.ndim:
        raise ValueError("a single number cannot be quantized: rows are needed")
    n = array.shape[-1]
    row = dtypes.row_size(kind, n)
    weights = None
    if imatrix is not None:
        weights = np.ascontiguousarray(imatrix, np.float32)
        if weights.shape != (n,):
            raise ValueError(f"the importance matrix has shape {weights.shape}; one weight for each of {n} columns")
        if not np.isfinite(weights).all() or (weights < 0).any() or (n and not weights.any()):
            raise ValueError("importances must be finite, at least 0 and not all 0")
    raw = dtypes.to_bytes(array, kind, weights)
    return raw.reshape(-1).view(np.uint8).reshape(*array.shape[:-1], row)


def dequantize(
    data: npt.NDArray[np.uint8] | bytes, dtype: Type | str, shape: Sequence[int] | None = None
) -> npt.NDArray[Any]:
    """The values that :func:`quantize` stored.

    Parameters
    ----------
    data
        The bytes; from :func:`quantize`, ``(..., row_size)``.
    dtype
        Their type.
    shape
        Shape of the result; default ``(..., n)`` by the shape of ``data``.

    Returns
    -------
    numpy.ndarray
        float32, or numpy's own type where it has one.

    Raises
    ------
    TypeError
        If there is no such type, or ggml cannot decode it.
    ValueError
        If the bytes do not fit the type or the shape.

    C: ``ggml_get_type_traits(type).to_float``.
    """
    kind = as_type(dtype)
    raw = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.ascontiguousarray(data).view(np.uint8)
    unit, block = dtypes.type_size(kind), dtypes.block_size(kind)
    last = raw.shape[-1] if raw.ndim else 0
    if shape is None:
        if last % unit:
            raise ValueError(f"rows of {last} bytes are no whole {kind.name} blocks of {unit} bytes")
        sizes = (*raw.shape[:-1], last // unit * block)
    else:
        sizes = check_shape(shape)
        row = dtypes.row_size(kind, sizes[-1] if sizes else 1)
        if row * prod(sizes[:-1]) != raw.size:
            raise ValueError(f"{raw.size} bytes are not a {kind.name} array of shape {sizes}")
    flat = raw.reshape(-1)
    if dtypes.has_numpy(kind):
        return flat.view(dtypes.numpy_dtype(kind)).reshape(sizes)
    return dtypes.from_bytes(flat, kind, prod(sizes)).reshape(sizes)
