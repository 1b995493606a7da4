"""Values of a GGUF header: the GGUF type of a Python value, and its encoding."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ggml_cffi.enums import GGUFType

SCALAR_DTYPES: dict[GGUFType, np.dtype[Any]] = {
    GGUFType.UINT8: np.dtype("<u1"),
    GGUFType.INT8: np.dtype("<i1"),
    GGUFType.UINT16: np.dtype("<u2"),
    GGUFType.INT16: np.dtype("<i2"),
    GGUFType.UINT32: np.dtype("<u4"),
    GGUFType.INT32: np.dtype("<i4"),
    GGUFType.FLOAT32: np.dtype("<f4"),
    GGUFType.BOOL: np.dtype("?"),
    GGUFType.UINT64: np.dtype("<u8"),
    GGUFType.INT64: np.dtype("<i8"),
    GGUFType.FLOAT64: np.dtype("<f8"),
}
_NUMPY_TYPES = {dtype: value_type for value_type, dtype in SCALAR_DTYPES.items()} | {np.dtype("<f2"): GGUFType.FLOAT32}

#: Limit of the levels of arrays inside arrays, for reading and writing.
MAX_NESTING = 8

# A Python integer gets the first of these types that holds it. The order differs for arrays, as in llama.cpp's files.
_SINGLE_INTEGERS = (GGUFType.UINT32, GGUFType.INT32, GGUFType.UINT64, GGUFType.INT64)
_ARRAY_INTEGERS = (GGUFType.INT32, GGUFType.UINT32, GGUFType.INT64, GGUFType.UINT64)


@dataclass(frozen=True, eq=False)
class GGUFValue:
    """Value of a GGUF header with the type that it has in the file.

    Examples
    --------
    >>> GGUFValue(1, GGUFType.UINT8)
    GGUFValue(value=1, type=<GGUFType.UINT8: 0>, sub_type=None)
    >>> words = GGUFValue([], GGUFType.ARRAY, GGUFType.STRING)
    """

    value: Any
    """str, bool, int, float; for an array a list of str, a numpy array, or a list of :class:`GGUFValue`."""
    type: GGUFType
    """GGUF type of the value."""
    sub_type: GGUFType | None = None
    """GGUF type of the elements, if the value is an array."""

    def plain(self) -> Any:
        """Return the value without its type: str, bool, int, float, list of str, numpy array, or list of these."""
        if self.sub_type is GGUFType.ARRAY:
            return [item.plain() for item in self.value]
        return self.value


def as_gguf_value(item: Any) -> GGUFValue:
    """Return ``item`` with the GGUF type in which it is written.

    Raises
    ------
    TypeError, ValueError
        If GGUF has no type for the value.
    """
    if isinstance(item, GGUFValue):
        return item
    if isinstance(item, np.generic) or (isinstance(item, np.ndarray) and not item.ndim):
        if item.dtype.kind in "UOS":
            return as_gguf_value(item.item())
        return GGUFValue(item.item(), _from_numpy(item.dtype))
    if isinstance(item, bool):
        return GGUFValue(item, GGUFType.BOOL)
    if isinstance(item, int):
        return GGUFValue(item, _smallest_type(item, item, _SINGLE_INTEGERS))
    if isinstance(item, float):
        return GGUFValue(item, GGUFType.FLOAT32)
    if isinstance(item, str | bytes):
        return GGUFValue(item, GGUFType.STRING)
    if isinstance(item, np.ndarray) and item.ndim == 1 and item.dtype.kind not in "UOS":
        return GGUFValue(item, GGUFType.ARRAY, _from_numpy(item.dtype))
    if isinstance(item, Sequence | np.ndarray):
        return GGUFValue(item, GGUFType.ARRAY, _element_type(item))
    raise TypeError(f"GGUF has no type for {type(item).__name__}")


def _from_numpy(dtype: np.dtype[Any]) -> GGUFType:
    value_type = _NUMPY_TYPES.get(dtype.newbyteorder("<"))
    if value_type is None:
        raise TypeError(f"GGUF has no type for numpy's {dtype}")
    return value_type


def _element_type(items: Any) -> GGUFType:
    value_types = {_family(item) for item in items}
    if not value_types:
        raise ValueError("an empty list has no type: give an array, or GGUFValue([], GGUFType.ARRAY, element type)")
    if value_types <= {int, float} and float in value_types:
        return GGUFType.FLOAT32
    if len(value_types) > 1:
        raise TypeError("the elements of an array must all be of one type")
    value_type = value_types.pop()
    if value_type is int:
        return _smallest_type(min(items), max(items), _ARRAY_INTEGERS)
    return {str: GGUFType.STRING, bool: GGUFType.BOOL, float: GGUFType.FLOAT32}.get(value_type, GGUFType.ARRAY)


def _family(item: Any) -> type:
    families: tuple[tuple[type, Any], ...] = (
        (str, str | bytes),
        (bool, bool | np.bool_),
        (int, int | np.integer),
        (float, float | np.floating),
        (list, GGUFValue | Sequence | np.ndarray),
    )
    for family, types in families:
        if isinstance(item, types):
            return family
    raise TypeError(f"GGUF has no type for {type(item).__name__}")


def _smallest_type(low: int, high: int, value_types: Sequence[GGUFType]) -> GGUFType:
    for value_type in value_types:
        info = np.iinfo(SCALAR_DTYPES[value_type])
        if info.min <= low and high <= info.max:
            return value_type
    raise ValueError(f"{high if high >= 2**63 else low} needs more than 64 bits")


def encode_string(text: str | bytes) -> bytes:
    """Encode a string with its length, as a header stores it."""
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def encode_value(item: GGUFValue) -> bytes:
    """Encode the type and the value as a header stores them.

    Raises
    ------
    TypeError, ValueError
        If the type cannot hold the value.
    """
    value_type = GGUFType(item.type)
    return struct.pack("<I", value_type) + _encoded(item.value, value_type, item.sub_type)


def _encoded(value: Any, value_type: GGUFType, sub_type: GGUFType | None, depth: int = 0) -> bytes:
    if value_type is GGUFType.STRING:
        if not isinstance(value, str | bytes):
            raise TypeError(f"a STRING is a str, not {type(value).__name__}")
        return encode_string(value)
    if value_type is not GGUFType.ARRAY:
        if np.ndim(value):
            raise TypeError(f"a {value_type.name} is one number, not {type(value).__name__}")
        return _numbers([value], value_type).tobytes()
    if sub_type is None:
        raise TypeError("an ARRAY needs the type of its elements: GGUFValue(value, GGUFType.ARRAY, element type)")
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
        raise TypeError(f"an ARRAY is a list or array, not {type(value).__name__}")
    sub_type = GGUFType(sub_type)
    head = struct.pack("<IQ", sub_type, len(value))
    if sub_type is GGUFType.STRING:
        return head + b"".join(_encoded(text, sub_type, None) for text in value)
    if sub_type is GGUFType.ARRAY:
        if depth >= MAX_NESTING:
            raise ValueError(f"arrays are nested deeper than {MAX_NESTING} levels")
        inner = [as_gguf_value(part) for part in value]
        if any(part.type is not GGUFType.ARRAY for part in inner):
            raise TypeError("an ARRAY of ARRAY has lists or arrays as elements")
        return head + b"".join(_encoded(part.value, part.type, part.sub_type, depth + 1) for part in inner)
    return head + _numbers(value, sub_type).tobytes()


def _numbers(values: Any, value_type: GGUFType) -> npt.NDArray[Any]:
    """Return ``values`` (one axis) as numbers of the given type; raise if one of them cannot be stored in it."""
    want = SCALAR_DTYPES[value_type]
    if isinstance(values, np.ndarray):
        if values.dtype == want and values.ndim == 1:
            return values
        family = {"b": bool, "i": int, "u": int, "f": float}.get(values.dtype.kind)
    else:
        found = {_family(value) for value in values}
        family = found.pop() if len(found) == 1 else float if found <= {int, float} else None
    allowed = {"b": (bool,), "f": (int, float)}.get(want.kind, (int,))
    if np.ndim(values) != 1 or (len(values) and family not in allowed):
        raise TypeError(f"{value_type.name} cannot hold {values!r:.60}")
    if family is int and want.kind != "f" and len(values):
        info, low, high = np.iinfo(want), min(values), max(values)
        if low < info.min or high > info.max:
            raise ValueError(f"{low if low < info.min else high} does not fit {value_type.name}")
    if want.kind != "f":
        return np.asarray(values, want)
    try:
        exact = np.asarray(values, np.float64)
        with np.errstate(over="ignore"):
            made = exact.astype(want)
    except OverflowError as error:
        raise ValueError(f"{value_type.name}: {error}") from None
    if not np.array_equal(np.isinf(made), np.isinf(exact)):
        raise ValueError(f"a number is too large for {value_type.name}: give it as np.float64 to store 64 bits")
    return made
