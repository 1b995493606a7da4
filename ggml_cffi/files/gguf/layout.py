"""What stands where in a GGUF file, and in which of several."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt

from ggml_cffi.core import dtypes
from ggml_cffi.enums import GGUFType, Type
from ggml_cffi.files.atomic_write import write_files
from ggml_cffi.files.encode import stored_bytes
from ggml_cffi.files.gguf.header import DEFAULT_ALIGNMENT, MAGIC, VERSIONS
from ggml_cffi.files.gguf.reader import MAX_PARTS, SPLIT_COUNT, SPLIT_KEYS, SPLIT_NO, SPLIT_TENSORS, part_path
from ggml_cffi.files.gguf.values import GGUFValue, as_value, encode, encode_string
from ggml_cffi.files.sources import LazyTensor, StoredTensor, readable, stored_type

if TYPE_CHECKING:
    from concurrent.futures import Executor  # slow to import

#: Called with bytes done and bytes in all.
Progress = Callable[[int, int], None]

_ALIGNMENT = "general.alignment"
_MAX_NAME = 63  # bytes; ggml's tensors have 64 with the zero at the end
_MAX_KEY = 2**16 - 1


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

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
                raise TypeError(f"{self.dtype.name} is a format inside ggml's products; no tensor has it")
            self.nbytes  # noqa: B018 - raises where rows are no whole blocks
        except (TypeError, ValueError) as error:
            _fail("tensor", self.name, error)

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return dtypes.row_size(self.dtype, self.shape[-1] if self.shape else 1) * prod(self.shape[:-1])

    def pieces(self, pool: Executor | None, ahead: int) -> Iterator[npt.NDArray[np.uint8]]:
        """Its bytes, in order."""
        try:
            source = self.source
            if isinstance(source, LazyTensor):
                source = readable(source.values())
                if source.shape != self.shape:
                    raise ValueError(f"its function returned shape {source.shape}, not {self.shape}")
            yield from stored_bytes(source, self.dtype, self.imatrix, pool, ahead)
        except (TypeError, ValueError) as error:
            _fail("tensor", self.name, error)


def planned(name: str, source: Any) -> Planned:
    """How a tensor is to be written.

    Raises
    ------
    TypeError, ValueError
        If it cannot be.
    """
    values, dtype = source if isinstance(source, tuple) and len(source) == 2 else (source, None)
    try:
        if isinstance(values, LazyTensor):
            if dtype is not None:
                raise TypeError("a LazyTensor has its type itself")
            return Planned(name, values.dtype, values.shape, values)
        if callable(values) and not hasattr(values, "__array__"):
            raise TypeError("a function needs a shape and a type: LazyTensor(shape, dtype, function)")
        found = readable(values)
        kind = dtypes.as_type(dtype) if dtype is not None else stored_type(found)
    except (TypeError, ValueError) as error:
        _fail("tensor", name, error)
    return Planned(name, kind, found.shape, found)


def write_planned(
    path: str,
    metadata: Mapping[str, Any],
    tensors: Sequence[Planned],
    *,
    alignment: int | None = None,
    max_bytes: int | None = None,
    overwrite: bool = True,
    progress: Progress | None = None,
    pool: Executor | None = None,
    ahead: int = 0,
) -> tuple[str, ...]:
    """As :func:`write_gguf`, with types chosen and threads to convert in."""
    names = Counter(t.name for t in tensors)
    if names and names.most_common(1)[0][1] > 1:
        raise ValueError(f"tensor {names.most_common(1)[0][0]!r} occurs twice")
    fields = {key: value for key, value in metadata.items() if key not in SPLIT_KEYS}
    align = _alignment(fields, alignment)
    if align != DEFAULT_ALIGNMENT or _ALIGNMENT in fields:
        fields[_ALIGNMENT] = GGUFValue(align, GGUFType.UINT32)
    own = {_ALIGNMENT: fields[_ALIGNMENT]} if _ALIGNMENT in fields else {}  # of every other part
    parts = [list(tensors)]
    if max_bytes is not None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, not {max_bytes}")
        if len(_head(fields, tensors, align)) + _padded_size(tensors, align) > max_bytes:
            parts = _divide(tensors, fields, own, align, max_bytes)
    n = len(parts)
    paths = [path] if n == 1 else [part_path(path.removesuffix(".gguf"), i, n) for i in range(n)]
    heads = []
    for i, part in enumerate(parts):
        split = _split_fields(i, n, len(tensors)) if n > 1 else {}
        heads.append(_head((own if i else fields) | split, part, align))
    total, done = sum(t.nbytes for t in tensors), 0

    def write(i: int, file: BinaryIO) -> None:
        nonlocal done
        file.write(heads[i])
        for tensor in parts[i]:
            written = 0
            for piece in tensor.pieces(pool, ahead):
                file.write(piece.data)
                written += piece.size
                if progress:
                    progress(done + written, total)
            done += written
            file.write(bytes(-written % align))

    write_files(paths, write, overwrite=overwrite)
    return tuple(paths)


def _alignment(fields: Mapping[str, Any], alignment: int | None) -> int:
    if alignment is None:
        given = fields.get(_ALIGNMENT, DEFAULT_ALIGNMENT)
        alignment = given.value if isinstance(given, GGUFValue) else given
    if not isinstance(alignment, int | np.integer) or not 0 < alignment < 2**32 or alignment & (alignment - 1):
        raise ValueError(f"alignment must be a power of two (below 2**32), not {alignment!r}")
    return int(alignment)


def _split_fields(part: int, count: int, n_tensors: int) -> dict[str, GGUFValue]:
    return {
        SPLIT_NO: GGUFValue(part, GGUFType.UINT16),
        SPLIT_COUNT: GGUFValue(count, GGUFType.UINT16),
        SPLIT_TENSORS: GGUFValue(n_tensors, GGUFType.INT32),
    }


def _head(fields: Mapping[str, Any], tensors: Sequence[Planned], align: int) -> bytes:
    """All that stands before the data, padded."""
    made = [MAGIC, struct.pack("<IQQ", max(VERSIONS), len(tensors), len(fields))]
    made += [_pair(key, value) for key, value in fields.items()]
    offset = 0
    for t in tensors:
        made.append(_info(t, offset))
        offset += t.nbytes + -t.nbytes % align
    head = b"".join(made)
    return head + bytes(-len(head) % align)


def _pair(key: str, value: Any) -> bytes:
    _check_name(key, "metadata key", _MAX_KEY)
    try:
        return encode_string(key) + encode(as_value(value))
    except (TypeError, ValueError) as error:
        _fail("metadata", key, error)


def _info(t: Planned, offset: int) -> bytes:
    ne = t.shape[::-1]
    return encode_string(t.name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, t.dtype, offset)


def _padded_size(tensors: Sequence[Planned], align: int) -> int:
    return sum(t.nbytes + -t.nbytes % align for t in tensors)


def _divide(
    tensors: Sequence[Planned], fields: Mapping[str, Any], own: Mapping[str, Any], align: int, max_bytes: int
) -> list[list[Planned]]:
    """Tensors by file, in their order, so that no file of several has more than ``max_bytes``."""
    split = _split_fields(0, 0, 0)
    empty = [len(_head(dict(each) | split, (), 1)) for each in (fields, own)]  # bytes of a header without tensors
    parts: list[list[Planned]] = [[]]
    info = data = 0
    for t in tensors:
        info_more, data_more = len(_info(t, 0)), _padded_size([t], align)
        head = empty[len(parts) > 1] + info + info_more
        if parts[-1] and head + -head % align + data + data_more > max_bytes:
            parts.append([])
            info = data = 0
        parts[-1].append(t)
        info, data = info + info_more, data + data_more
    if len(parts) > MAX_PARTS:
        raise ValueError(f"{len(parts)} files of {max_bytes} bytes are too many; there can be {MAX_PARTS}")
    return parts


def _check_name(name: str, what: str, most: int) -> None:
    if not isinstance(name, str):
        raise TypeError(f"a {what} is a str, not {type(name).__name__}")
    n = len(name.encode("utf-8", "surrogateescape"))
    if not 0 < n <= most or "\0" in name:
        raise ValueError(f"{what} {name!r} has {n} bytes; 1 to {most} are allowed, none of them zero")


def _fail(what: str, name: str, error: Exception) -> NoReturn:
    """Raise ``error`` with the name of what it is about."""
    kind = TypeError if isinstance(error, TypeError) else ValueError
    raise kind(f"{what} {name!r}: {error}") from error
