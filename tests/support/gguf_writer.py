"""Writer of small GGUF files for tests, valid and invalid."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ggml_cffi.core import dtypes
from ggml_cffi.enums import GGUFType, Type

_PACK = {
    GGUFType.UINT8: "<B",
    GGUFType.INT8: "<b",
    GGUFType.UINT16: "<H",
    GGUFType.INT16: "<h",
    GGUFType.UINT32: "<I",
    GGUFType.INT32: "<i",
    GGUFType.FLOAT32: "<f",
    GGUFType.BOOL: "<?",
    GGUFType.UINT64: "<Q",
    GGUFType.INT64: "<q",
    GGUFType.FLOAT64: "<d",
}


def string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def value(kind: GGUFType, item: Any) -> bytes:
    if kind is GGUFType.STRING:
        return string(item)
    if kind is GGUFType.ARRAY:
        inner, items = item
        return struct.pack("<IQ", inner, len(items)) + b"".join(value(inner, i) for i in items)
    return struct.pack(_PACK[kind], item)


def guess(item: Any) -> tuple[GGUFType, Any]:
    """Return the GGUF type of a Python value, and the value; a ``(kind, item)`` pair states its type."""
    match item:
        case (GGUFType(), _):
            return item
        case bool():
            return GGUFType.BOOL, item
        case int():
            return GGUFType.UINT32, item
        case float():
            return GGUFType.FLOAT32, item
        case str():
            return GGUFType.STRING, item
        case [str(), *_]:
            return GGUFType.ARRAY, (GGUFType.STRING, item)
        case [int(), *_]:
            return GGUFType.ARRAY, (GGUFType.INT32, item)
    raise TypeError(item)


def write(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[Type, np.ndarray]],
    *,
    version: int = 3,
    alignment: int = 32,
) -> Path:
    """Write a GGUF file; tensors are (type, values) pairs."""
    head = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(metadata))]
    for key, item in metadata.items():
        kind, plain = guess(item)
        head += [string(key), struct.pack("<I", kind), value(kind, plain)]
    data = bytearray()
    for name, (dtype, values) in tensors.items():
        shape = values.shape[::-1]
        head += [string(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, dtype, len(data))]
        data += dtypes.to_bytes(values, dtype).tobytes()
        data += bytes(-len(data) % alignment)
    raw = b"".join(head)
    path.write_bytes(raw + bytes(-len(raw) % alignment) + data)
    return path
