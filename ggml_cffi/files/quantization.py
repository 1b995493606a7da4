"""Quantization of arrays, its inverse, and the check of importances."""

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

#: Importances of a tensor's columns, ``(experts, n)``.
Importances = npt.NDArray[np.float32]


def quantize(values: npt.ArrayLike, dtype: Type | str, imatrix: npt.ArrayLike | None = None) -> npt.NDArray[np.uint8]:
    """Quantize ``values``: encode them in the blocks of a quantized (or any other) type.

    Parameters
    ----------
    values
        ``(..., n)``, finite numbers; ``n`` is a whole number of blocks.
    dtype
        The type to quantize to.
    imatrix
        Importance of each column, ``(n,)``, at least 0 and not all 0. Types below 2.5 bits need one.

    Returns
    -------
    numpy.ndarray
        uint8, ``(..., row_size)``: the bytes of each row, as tensors and GGUF files store them.

    Raises
    ------
    TypeError
        If the type does not exist, or the values are not numbers.
    ValueError
        If rows do not fill whole blocks, values are not finite, or the importance matrix is missing or does not fit.

    C: ``ggml_quantize_chunk``.
    """
    element_type = as_type(dtype)
    array = dtypes.as_array(values)
    if not array.ndim:
        raise ValueError("a single number cannot be quantized: give an array with rows")
    n = array.shape[-1]
    row = dtypes.row_size(element_type, n)
    weights = None
    if imatrix is not None:
        weights = check_importances(imatrix, (n,)).reshape(n)
    raw = dtypes.to_bytes(array, element_type, weights)
    return raw.reshape(-1).view(np.uint8).reshape(*array.shape[:-1], row)


def dequantize(
    data: npt.NDArray[np.uint8] | bytes, dtype: Type | str, shape: Sequence[int] | None = None
) -> npt.NDArray[Any]:
    """Decode the bytes that :func:`quantize` returned.

    Parameters
    ----------
    data
        Encoded rows, ``(..., row_size)``, or all bytes together with ``shape``.
    dtype
        Type of the bytes.
    shape
        Shape of the result. Default: ``(..., n)`` from the shape of ``data``.

    Returns
    -------
    numpy.ndarray
        float32, or the type itself if numpy has it.

    Raises
    ------
    TypeError
        If the type does not exist, or ggml cannot decode it.
    ValueError
        If the bytes do not fit the type or the shape.

    C: ``ggml_get_type_traits(type).to_float``.
    """
    element_type = as_type(dtype)
    raw = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.ascontiguousarray(data).view(np.uint8)
    unit, block = dtypes.type_size(element_type), dtypes.block_size(element_type)
    last = raw.shape[-1] if raw.ndim else 0
    if shape is None:
        if last % unit:
            raise ValueError(f"rows of {last} bytes do not fill whole {element_type.name} blocks of {unit} bytes")
        sizes = (*raw.shape[:-1], last // unit * block)
    else:
        sizes = check_shape(shape)
        row = dtypes.row_size(element_type, sizes[-1] if sizes else 1)
        if row * prod(sizes[:-1]) != raw.size:
            raise ValueError(f"{raw.size} bytes are not a {element_type.name} array of shape {sizes}")
    flat = raw.reshape(-1)
    if dtypes.has_numpy(element_type):
        return flat.view(dtypes.numpy_dtype(element_type)).reshape(sizes)
    return dtypes.from_bytes(flat, element_type, prod(sizes)).reshape(sizes)


def check_importances(imatrix: npt.ArrayLike, shape: tuple[int, ...]) -> Importances:
    """Return the importances of a tensor's columns, one row per expert, if they fit the tensor.

    Parameters
    ----------
    imatrix
        ``(n,)``, or ``(experts, n)`` for a tensor of shape ``(experts, rows, n)``; also flat, as llama.cpp stores it.
    shape
        Shape of the tensor, with at least one axis.

    Returns
    -------
    numpy.ndarray
        float32, ``(experts, n)``; a single row if all rows of the tensor share their importances.

    Raises
    ------
    ValueError
        If the number of importances does not fit, or they are not finite, negative, or all 0.
    """
    weights = np.ascontiguousarray(imatrix, np.float32)
    n, experts = shape[-1], shape[-3] if len(shape) > 2 else 1
    if weights.size == n:
        weights = weights.reshape(1, n)
    elif weights.size == n * experts and len(shape) == 3:
        weights = weights.reshape(experts, n)
    else:
        raise ValueError(f"the importance matrix has shape {weights.shape}; a tensor of shape {shape} needs ({n},)")
    if not np.isfinite(weights).all() or (weights < 0).any() or (n and not weights.any(-1).all()):
        raise ValueError("importances must be finite, at least 0 and not all 0")
    return weights
