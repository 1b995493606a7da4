"""Header of a GGUF file.

ggml's own reader accepts impossible shapes, and ends the process on some files. So the header is parsed here, and every
count and size is checked against the size of the file before use. The start of a file is enough.
"""

from __future__ import annotations

import mmap
import struct
from bisect import bisect_right
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ggml_cffi.core import dtypes
from ggml_cffi.enums import GGUFType, Type
from ggml_cffi.errors import FormatError
from ggml_cffi.files.gguf.values import MAX_NESTING, SCALAR_DTYPES, GGUFValue

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
_LARGEST_FILE = 2**63  # bytes
_TYPE_NUMBERS = frozenset(Type)


@dataclass(frozen=True)
class TensorInfo:
    """Description of one tensor of a file."""

    name: str
    dtype: Type
    """Type of the elements. A type that ggml does not have has a name such as ``TYPE_99``; its data cannot be read."""
    shape: tuple[int, ...]
    """Sizes in numpy's order."""
    offset: int
    """Position of the data in the file, in bytes."""
    nbytes: int
    part: int = 0
    """Index into :attr:`GGUFFile.paths` of the file that holds the tensor."""


class Header(NamedTuple):
    """Content of a file before the data of its tensors."""

    version: int
    fields: dict[str, GGUFValue]
    tensors: dict[str, TensorInfo]
    missing_bytes: int
    """Bytes of the tensors' data beyond the end of the file."""


class HeaderIncompleteError(FormatError):
    """The header is longer than the bytes that were given, which are only the start of the file."""


def read_header(
    data: mmap.mmap | bytes, path: str, part: int = 0, *, size: int | None = None, header_only: bool = False
) -> Header:
    """Read the header of a file.

    Parameters
    ----------
    data
        The file, or its start.
    size
        Bytes of the whole file; default those of ``data``.
    header_only
        True if the data of the tensors may be missing.

    Raises
    ------
    HeaderIncompleteError
        If ``data`` ends before the header does, and the file is larger.
    FormatError
        If the file is not GGUF, is cut short, or declares impossible shapes or sizes.
    """
    return _Reader(data, path, part, len(data) if size is None else size, header_only).header()


class _Reader:
    """Parser of a header. It never reads past the end of the data."""

    def __init__(self, data: mmap.mmap | bytes, path: str, part: int, size: int, header_only: bool) -> None:
        self.data, self.path, self.part, self.at, self.size = data, path, part, 0, size
        self.header_only = header_only

    def error(self, problem: str) -> FormatError:
        return FormatError(f"{self.path}: {problem}")

    def take(self, n: int) -> int:
        """Step over ``n`` bytes, and return the position of the first."""
        start = self.at
        if n > len(self.data) - start:
            self.check_size(start, n)
        self.at = start + n
        return start

    def check_size(self, start: int, n: int) -> None:
        """Raise the error for ``n`` bytes at ``start`` that are beyond the end of the data."""
        if n > self.size - start:
            raise self.error(f"cut short: {n} more bytes are declared at byte {start} of {self.size}")
        raise HeaderIncompleteError(f"{self.path}: the header is longer than {len(self.data)} bytes")

    def number(self, code: str) -> int:
        """Read one unsigned integer, by its struct code."""
        value: int = struct.unpack_from(code, self.data, self.take(struct.calcsize(code)))[0]
        return value

    def string(self) -> str:
        n = self.number("<Q")
        start = self.take(n)
        return self.data[start : start + n].decode("utf-8", "surrogateescape")

    def header(self) -> Header:
        if self.size < 24:
            raise self.error(f"{self.size} bytes are too few for a GGUF file")
        if self.data[self.take(4) : 4] != MAGIC:
            raise self.error("not a GGUF file")
        version = self.number("<I")
        if version not in VERSIONS:
            big = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
            raise self.error(f"GGUF version {version} is not supported{big}; versions 2 and 3 are")
        n_tensors, n_pairs = self.number("<Q"), self.number("<Q")
        # An entry has at least 24 or 13 bytes: impossible counts are refused before a loop runs that often.
        if n_tensors > self.size // 24 or n_pairs > self.size // 13:
            raise self.error(f"{n_tensors} tensors and {n_pairs} keys do not fit a file of {self.size} bytes")
        fields: dict[str, GGUFValue] = {}
        for _ in range(n_pairs):
            key = self.string()
            if key in fields:
                raise self.error(f"key {key!r} occurs twice")
            fields[key] = self.value(self.number("<I"))
        return Header(version, fields, *self.tensor_infos(n_tensors, fields))

    def value(self, value_type: int) -> GGUFValue:
        if value_type == GGUFType.STRING:
            return GGUFValue(self.string(), GGUFType.STRING)
        if value_type == GGUFType.ARRAY:
            return self.array(0)
        return GGUFValue(self.scalars(value_type, 1)[0].item(), GGUFType(value_type))

    def scalars(self, value_type: int, n: int) -> npt.NDArray[Any]:
        dtype = SCALAR_DTYPES.get(value_type)  # type: ignore[call-overload]
        if dtype is None:
            raise self.error(f"value type {value_type} at byte {self.at - 4} does not exist")
        start = self.take(n * dtype.itemsize)
        if dtype.kind == "b":  # numpy's bool must be 0 or 1; a file may hold other bytes
            truth: npt.NDArray[Any] = np.frombuffer(self.data, np.uint8, n, start) != 0
            return truth
        return np.frombuffer(self.data, dtype, n, start).copy()

    def array(self, depth: int) -> GGUFValue:
        value_type, n = self.number("<I"), self.number("<Q")
        if value_type == GGUFType.STRING:
            if n > (self.size - self.at) // 8:
                raise self.error(f"an array of {n} strings does not fit the file")
            return GGUFValue(self.strings(n), GGUFType.ARRAY, GGUFType.STRING)
        if value_type == GGUFType.ARRAY:
            if depth >= MAX_NESTING or n > (self.size - self.at) // 12:
                raise self.error("arrays are nested too deeply, or do not fit the file")
            return GGUFValue([self.array(depth + 1) for _ in range(n)], GGUFType.ARRAY, GGUFType.ARRAY)
        return GGUFValue(self.scalars(value_type, n), GGUFType.ARRAY, GGUFType(value_type))

    def strings(self, n: int) -> list[str]:
        # A vocabulary has 10**5 strings: the loop avoids method calls.
        data, size, at = self.data, len(self.data), self.at
        begin = at
        length = struct.Struct("<Q").unpack_from
        found = []
        for _ in range(n):
            start = at + 8
            at = start + length(data, at)[0] if start <= size else start
            if at > size:
                self.check_size(begin, at - begin)
            found.append(data[start:at].decode("utf-8", "surrogateescape"))
        self.at = at
        return found

    def tensor_infos(self, n: int, fields: dict[str, GGUFValue]) -> tuple[dict[str, TensorInfo], int]:
        alignment = fields["general.alignment"].value if "general.alignment" in fields else DEFAULT_ALIGNMENT
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.error(f"general.alignment is {alignment!r}, not a power of two")
        found: list[tuple[str, Type, tuple[int, ...], int]] = []
        for _ in range(n):
            name, ndim = self.string(), self.number("<I")
            if ndim > 4:
                raise self.error(f"tensor {name!r} has {ndim} axes; ggml has at most 4")
            ne = struct.unpack_from(f"<{ndim}Q", self.data, self.take(8 * ndim))
            type_number, offset = self.number("<I"), self.number("<Q")
            dtype = Type(type_number) if type_number in _TYPE_NUMBERS else dtypes.unknown_type(type_number)
            if offset % alignment:
                raise self.error(f"tensor {name!r} starts at {offset}, not at a multiple of {alignment}")
            found.append((name, dtype, ne[::-1], offset))
        base = -(-self.at // alignment) * alignment
        return self.checked(found, base)

    def checked(
        self, found: list[tuple[str, Type, tuple[int, ...], int]], base: int
    ) -> tuple[dict[str, TensorInfo], int]:
        """Return the tensors, and the bytes of their data beyond the end of the file."""
        tensors: dict[str, TensorInfo] = {}
        ends = [*sorted(offset for *_, offset in found), self.size - base]
        end = self.size
        for name, dtype, shape, offset in found:
            if name in tensors:
                raise self.error(f"tensor {name!r} occurs twice")
            if not all(shape):
                raise self.error(f"tensor {name!r} has no elements: shape {shape}")
            if dtypes.is_known(dtype):
                try:
                    row = dtypes.row_size(dtype, shape[-1] if shape else 1)
                except ValueError as error:
                    raise self.error(f"tensor {name!r}: {error}") from None
                nbytes = row * prod(shape[:-1])
            else:  # up to the next tensor
                nbytes = max(ends[bisect_right(ends, offset, hi=len(found))] - offset, 1)
            end = max(end, base + offset + nbytes)
            tensors[name] = TensorInfo(name, dtype, shape, base + offset, nbytes, self.part)
        missing = end - self.size
        if missing and (not self.header_only or end >= _LARGEST_FILE):
            t = next(t for t in tensors.values() if t.offset + t.nbytes > self.size)
            raise self.error(
                f"cut short: {missing:,} bytes are missing: tensor {t.name!r} {t.dtype.name} {t.shape} reaches beyond "
                "the end of the file"
            )
        return tensors, missing
