"""Element types of ggml and their counterparts in numpy.

The types themselves are the members of :class:`ggml_cffi.enums.Type` (``ggml_cffi.F16`` and so on). Types without a
numpy counterpart (BF16 and the quantized ones) are numpy ``float32`` on the Python side.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ggml_cffi import c
from ggml_cffi.core.text import nearest
from ggml_cffi.enums import Type

_NUMPY: dict[Type, np.dtype[Any]] = {
    Type.F32: np.dtype(np.float32),
    Type.F16: np.dtype(np.float16),
    Type.F64: np.dtype(np.float64),
    Type.I8: np.dtype(np.int8),
    Type.I16: np.dtype(np.int16),
    Type.I32: np.dtype(np.int32),
    Type.I64: np.dtype(np.int64),
}
_FROM_NUMPY = {dtype: ggml for ggml, dtype in _NUMPY.items()}

#: Intermediate formats of the dot products, which ``ggml_quantize_chunk`` rejects.
INTERNAL = frozenset({Type.Q8_1, Type.Q8_K})

#: Largest magnitude to quantize: ggml sums squares in single precision, and ends the process on overflow.
_LARGEST = 1e15

INTEGERS = frozenset({Type.I8, Type.I16, Type.I32, Type.I64})


def as_type(dtype: Type | int | str | npt.DTypeLike) -> Type:
    """Return the ggml type that ``dtype`` names: a :class:`Type`, its number or name (``"q4_k"``), or a numpy dtype.

    Raises
    ------
    TypeError
        If ggml has no such type.
    """
    if isinstance(dtype, Type):
        return dtype
    try:
        if isinstance(dtype, int) and not isinstance(dtype, bool):
            return Type(dtype)
        if isinstance(dtype, str) and dtype.upper() in Type.__members__:
            return Type[dtype.upper()]
        return _FROM_NUMPY[np.dtype(cast(Any, dtype)).newbyteorder("=")]
    except (ValueError, KeyError, TypeError):
        known = [t.name for t in Type]
        hint = nearest(dtype, known) if isinstance(dtype, str) else ""
        raise TypeError(f"ggml has no element type for {dtype!r}{hint}; it has {', '.join(known)}") from None


def as_array(values: Any) -> npt.NDArray[Any]:
    """Return ``values`` (anything that numpy takes, or host memory by DLPack) as an array, if possible without a copy.

    ``bfloat16`` numbers, which numpy lacks, become ``float32``. A PyTorch tensor that requires gradients gives its
    values.

    Raises
    ------
    TypeError
        If they are not numbers, or not in host memory.
    """
    array, is_bfloat16 = read_array(values)
    return decode_bfloat16(array) if is_bfloat16 else array


def read_array(values: Any) -> tuple[npt.NDArray[Any], bool]:
    """Return ``values`` as :func:`as_array` does; ``bfloat16`` numbers as their bits in ``uint16``, and True."""
    if isinstance(values, np.ndarray) and values.dtype.kind != "V":
        return values, False
    if getattr(values, "requires_grad", False):
        values = values.detach()  # PyTorch exports no tensor that requires gradients
    is_bfloat16 = str(getattr(values, "dtype", "")).endswith("bfloat16")
    if (
        hasattr(values, "__dlpack__")
        and not isinstance(values, np.ndarray)
        and (is_bfloat16 or not hasattr(values, "__array__"))
    ):
        from ggml_cffi.core.dlpack import read  # imports ctypes

        try:
            return read(values)
        except (BufferError, RuntimeError) as error:
            raise TypeError(f"{type(values).__name__} cannot be read by numpy: {error}") from error
    array = np.asarray(values)
    if is_bfloat16:
        return array.view(np.uint16), True
    if array.dtype.kind not in "fiub":
        raise TypeError(f"numbers are needed, not {type(values).__name__} ({array.dtype})")
    return array, False


def decode_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Return the ``bfloat16`` numbers with these bits as ``float32``, which holds them exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def as_viewed(array: npt.NDArray[Any], dtype: npt.DTypeLike | None) -> npt.NDArray[Any]:
    """Return ``array`` for numpy's ``copy=False``.

    Raises
    ------
    ValueError
        If ``dtype`` is another type than the array's, which needs a copy.
    """
    if dtype is not None and np.dtype(dtype) != array.dtype:
        raise ValueError(f"values of {array.dtype} cannot be viewed as {np.dtype(dtype)} without a copy")
    return array


def numpy_dtype(dtype: Type) -> np.dtype[Any]:
    """Return the numpy dtype of values of ``dtype`` in Python: ``float32`` where numpy has no counterpart."""
    return _NUMPY.get(dtype, _NUMPY[Type.F32])


def has_numpy(dtype: Type) -> bool:
    """Return whether tensors of ``dtype`` have the same bytes as a numpy array."""
    return dtype in _NUMPY


def unknown_type(number: int) -> Type:
    """Return a stand-in for a type that no supported ggml has: it has a number and a name, and nothing else works."""
    found = int.__new__(Type, number)
    found._name_, found._value_ = f"TYPE_{number}", number
    return found


@cache
def is_known(dtype: Type) -> bool:
    """Return whether the loaded ggml has a type."""
    return dtype.name in Type.__members__ and 0 <= dtype < c.GGML_TYPE_COUNT


def check_known(dtype: Type) -> None:
    """Raise ``TypeError`` unless the loaded ggml has a type."""
    if not is_known(dtype):
        raise TypeError(f"the loaded ggml does not have the type {int(dtype)} ({dtype.name})")


@cache
def block_size(dtype: Type) -> int:
    """Return the elements per block: 1 for plain types, 32 or 256 for most quantized ones. C: ``ggml_blck_size``."""
    check_known(dtype)
    return c.ggml_blck_size(dtype)


@cache
def type_size(dtype: Type) -> int:
    """Return the bytes per block. C: ``ggml_type_size``."""
    check_known(dtype)
    return c.ggml_type_size(dtype)


@cache
def is_quantized(dtype: Type) -> bool:
    """Return whether values are stored in blocks with shared scales. C: ``ggml_is_quantized``."""
    check_known(dtype)
    return bool(c.ggml_is_quantized(dtype))


def row_size(dtype: Type, n: int) -> int:
    """Return the bytes of a row of ``n`` elements.

    Raises
    ------
    ValueError
        If ``n`` is not a whole number of blocks.
    """
    block = block_size(dtype)
    if n % block:
        raise ValueError(f"{dtype.name} stores blocks of {block} elements: {n} is not a whole number of blocks")
    return n // block * type_size(dtype)


def to_bytes(array: npt.NDArray[Any], dtype: Type, imatrix: npt.NDArray[np.float32] | None = None) -> npt.NDArray[Any]:
    """Return ``array`` as C-ordered data in the layout of ``dtype``: cast, or quantized row by row.

    Integers must fit. Floats are not converted to integers. ``imatrix`` has one weight for each column.

    Raises
    ------
    TypeError, ValueError
        If the values cannot be stored as ``dtype``.
    """
    check_known(dtype)
    want = numpy_dtype(dtype)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"cannot store numpy {array.dtype} as {dtype.name}: numbers are needed")
    if dtype in INTEGERS:
        if array.dtype.kind == "f":
            raise TypeError(f"cannot store {array.dtype} as {dtype.name}: round it to integers first")
        info = np.iinfo(want)
        if array.size and array.dtype != want and (array.min() < info.min or array.max() > info.max):
            raise ValueError(f"values from {array.min()} to {array.max()} do not fit {dtype.name}")
    if dtype in INTERNAL:
        raise TypeError(f"{dtype.name} is an internal format of ggml's matrix products: no tensor can have it")
    plain = np.ascontiguousarray(array, dtype=want)
    if has_numpy(dtype):
        return plain
    n = plain.shape[-1] if plain.ndim else 1
    out = np.empty(row_size(dtype, n) * (plain.size // max(n, 1)), np.uint8)
    if plain.size == 0:
        return out
    source, target = c.ffi.from_buffer("float *", plain), c.ffi.from_buffer("uint8_t *", out)
    if dtype == Type.BF16:
        c.ggml_fp32_to_bf16_row(source, c.ffi.cast("ggml_bf16_t *", target), plain.size)
        return out
    if imatrix is None and c.ggml_quantize_requires_imatrix(dtype):
        raise ValueError(f"{dtype.name} needs an importance matrix: quantize(values, dtype, imatrix) takes one")
    if not np.abs(plain).max() <= _LARGEST:  # false for NaN too
        raise ValueError(f"values that are not finite, or beyond {_LARGEST:g}, cannot be quantized to {dtype.name}")
    weights = c.NULL if imatrix is None else c.ffi.from_buffer("float *", imatrix)
    c.ggml_quantize_chunk(dtype, source, target, 0, plain.size // n, n, weights)
    return out


def from_bytes(data: npt.NDArray[np.uint8], dtype: Type, n: int) -> npt.NDArray[np.float32]:
    """Return ``n`` values of a type without numpy counterpart, decoded to ``float32`` (shape ``(n,)``)."""
    check_known(dtype)
    out = np.empty(n, np.float32)
    if n:
        decode = c.ggml_get_type_traits(dtype).to_float
        if not decode:
            raise TypeError(f"ggml cannot decode {dtype.name}")
        decode(c.ffi.from_buffer(data), c.ffi.from_buffer("float *", out), n)
    return out
