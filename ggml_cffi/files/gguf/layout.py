"""Layout of GGUF files: the bytes of a header, offsets of tensors, and the division of tensors over several files."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from ggml_cffi.core import dtypes
from ggml_cffi.enums import Type
from ggml_cffi.files.encode import encode_chunks
from ggml_cffi.files.gguf.header import DEFAULT_ALIGNMENT, MAGIC, VERSIONS
from ggml_cffi.files.gguf.parts import MAX_PARTS, split_fields
from ggml_cffi.files.gguf.values import GGUFValue, as_gguf_value, encode_string, encode_value
from ggml_cffi.files.sources import LazyTensor, StoredTensor, as_source, default_dtype

if TYPE_CHECKING:
    from concurrent.futures import Executor  # slow to import

ALIGNMENT = "general.alignment"
_MAX_NAME = 63  # bytes: ggml has 64, with the zero at the end
_MAX_KEY = 2**16 - 1


@dataclass(frozen=True)
class PlannedTensor:
    """Tensor to be written, with its type in the file."""

    name: str
    dtype: Type
    shape: tuple[int, ...]
    source: StoredTensor | LazyTensor | npt.NDArray[Any]
    imatrix: npt.ArrayLike | None = None

    def __post_init__(self) -> None:
        _check_name(self.name, "tensor name", _MAX_NAME)
        try:
            if len(self.shape) > 4 or not all(self.shape):
                raise ValueError(f"shape {self.shape}; GGUF has up to 4 axes, none of them empty")
            if self.dtype in dtypes.INTERNAL:
                raise TypeError(
                    f"{self.dtype.name} is an internal format of ggml's matrix products: no tensor can have it"
                )
            self.nbytes  # noqa: B018 - raises ValueError unless rows fill whole blocks
        except (TypeError, ValueError) as error:
            _reraise("tensor", self.name, error)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return dtypes.row_size(self.dtype, self.shape[-1] if self.shape else 1) * prod(self.shape[:-1])

    def chunks(self, pool: Executor | None, ahead: int) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield the bytes of the data in order."""
        try:
            source = self.source
            if isinstance(source, LazyTensor):
                source = as_source(source.values())
                if source.shape != self.shape:
                    raise ValueError(f"its function returned shape {source.shape}, not {self.shape}")
            yield from encode_chunks(source, self.dtype, self.imatrix, pool, ahead)
        except (TypeError, ValueError) as error:
            _reraise("tensor", self.name, error)


def plan_tensor(name: str, source: Any) -> PlannedTensor:
    """Return a tensor as it is to be written; the type of its source unless ``source`` is a pair with another.

    Raises
    ------
    TypeError, ValueError
        If GGUF cannot store the tensor. The message names it.
    """
    values, dtype = source if isinstance(source, tuple) and len(source) == 2 else (source, None)
    try:
        if isinstance(values, LazyTensor):
            if dtype is not None:
                raise TypeError("a LazyTensor has a type of its own: give the tensor alone")
            return PlannedTensor(name, values.dtype, values.shape, values)
        if callable(values) and not hasattr(values, "__array__"):
            raise TypeError("a function needs a shape and a type: LazyTensor(shape, dtype, function)")
        found = as_source(values)
        element_type = dtypes.as_type(dtype) if dtype is not None else default_dtype(found)
    except (TypeError, ValueError) as error:
        _reraise("tensor", name, error)
    return PlannedTensor(name, element_type, found.shape, found)


def check_alignment(fields: Mapping[str, Any], alignment: int | None) -> int:
    """Return the alignment to use: ``alignment``, else that of the metadata, else 32; raise ValueError if wrong."""
    if alignment is None:
        given = fields.get(ALIGNMENT, DEFAULT_ALIGNMENT)
        alignment = given.value if isinstance(given, GGUFValue) else given
    if not isinstance(alignment, int | np.integer) or not 0 < alignment < 2**32 or alignment & (alignment - 1):
        raise ValueError(f"alignment must be a power of two (below 2**32), not {alignment!r}")
    return int(alignment)


def header_bytes(fields: Mapping[str, Any], tensors: Sequence[PlannedTensor], align: int) -> bytes:
    """Return all bytes of a file before its data, padded to ``align``."""
    made = [MAGIC, struct.pack("<IQQ", max(VERSIONS), len(tensors), len(fields))]
    made += [_field_bytes(key, value) for key, value in fields.items()]
    offset = 0
    for t in tensors:
        made.append(_info_bytes(t, offset))
        offset += t.nbytes + -t.nbytes % align
    head = b"".join(made)
    return head + bytes(-len(head) % align)


def _field_bytes(key: str, value: Any) -> bytes:
    _check_name(key, "metadata key", _MAX_KEY)
    try:
        return encode_string(key) + encode_value(as_gguf_value(value))
    except (TypeError, ValueError) as error:
        _reraise("metadata", key, error)


def _info_bytes(t: PlannedTensor, offset: int) -> bytes:
    ne = t.shape[::-1]
    return encode_string(t.name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, t.dtype, offset)


def padded_size(tensors: Sequence[PlannedTensor], align: int) -> int:
    """Return the bytes of the data of some tensors, each padded to ``align``."""
    return sum(t.nbytes + -t.nbytes % align for t in tensors)


def divide(
    tensors: Sequence[PlannedTensor],
    fields: Mapping[str, Any],
    part_fields: Mapping[str, Any],
    align: int,
    max_bytes: int,
) -> list[list[PlannedTensor]]:
    """Divide the tensors over files, in order, so that no file with several tensors has more than ``max_bytes``."""
    split = split_fields(0, 0, 0)
    # Sizes of headers without tensors: of the first part, and of the others.
    empty = [len(header_bytes(dict(each) | split, (), 1)) for each in (fields, part_fields)]
    parts: list[list[PlannedTensor]] = [[]]
    info = data = 0
    for t in tensors:
        info_more, data_more = len(_info_bytes(t, 0)), padded_size([t], align)
        head = empty[len(parts) > 1] + info + info_more
        if parts[-1] and head + -head % align + data + data_more > max_bytes:
            parts.append([])
            info = data = 0
        parts[-1].append(t)
        info, data = info + info_more, data + data_more
    if len(parts) > MAX_PARTS:
        raise ValueError(f"{len(parts)} files of {max_bytes} bytes are too many; there can be {MAX_PARTS}")
    return parts


def _check_name(name: str, item: str, limit: int) -> None:
    if not isinstance(name, str):
        raise TypeError(f"a {item} is a str, not {type(name).__name__}")
    n = len(name.encode("utf-8", "surrogateescape"))
    if not 0 < n <= limit or "\0" in name:
        raise ValueError(f"{item} {name!r} has {n} bytes; 1 to {limit} are allowed, none of them zero")


def _reraise(item: str, name: str, error: Exception) -> NoReturn:
    """Raise ``error`` with the name of the item that it is about."""
    error_type = TypeError if isinstance(error, TypeError) else ValueError
    raise error_type(f"{item} {name!r}: {error}") from error
