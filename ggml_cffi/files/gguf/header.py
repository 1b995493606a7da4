"""The header of a GGUF file.

It is parsed here and not by ggml's reader, which accepts impossible shapes and ends the process on some files. Nothing
is believed before it was checked against the size of the file.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ggml_cffi.core import dtypes
from ggml_cffi.enums import GGUFType, Type
from ggml_cffi.errors import FormatError
from ggml_cffi.files.gguf.values import MAX_NESTING, SCALARS, GGUFValue

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file."""

    name: str
    dtype: Type
    shape: tuple[int, ...]
    """Sizes in numpy's order."""
    offset: int
    """Byte in the file where the data starts."""
    nbytes: int
    part: int = 0
    """Which file it is in, where a model is split over several: an index into :attr:`GGUFFile.paths`."""


class Header(NamedTuple):
    """What stands before the data."""

    version: int
    fields: dict[str, GGUFValue]
    tensors: dict[str, TensorInfo]


def read_header(data: mmap.mmap, path: str, part: int = 0) -> Header:
    """The header of the file that ``data`` maps.

    Raises
    ------
    FormatError
        If it is not GGUF, or cut short, or declares what cannot be.
    """
    return _Reader(data, path, part).header()


class _Reader:
    """Reads the header from a buffer, never past its end."""

    def __init__(self, data: mmap.mmap, path: str, part: int) -> None:
        self.data, self.path, self.part, self.at, self.size = data, path, part, 0, len(data)

    def fail(self, what: str) -> FormatError:
        return FormatError(f"{self.path}: {what}")

    def take(self, n: int) -> int:
        """Step over ``n`` bytes; where they start."""
        start = self.at
        if n > self.size - start:
            raise self.fail(f"cut short: {n} more bytes are declared at byte {start} of {self.size}")
        self.at = start + n
        return start

    def number(self, code: str) -> int:
        """One unsigned integer, by its struct code."""
        value: int = struct.unpack_from(code, self.data, self.take(struct.calcsize(code)))[0]
        return value

    def string(self) -> str:
        n = self.number("<Q")
        start = self.take(n)
        return self.data[start : start + n].decode("utf-8", "surrogateescape")

    def header(self) -> Header:
        if self.size < 24:
            raise self.fail(f"{self.size} bytes are too few for a GGUF file")
        if self.data[self.take(4) : 4] != MAGIC:
            raise self.fail("not a GGUF file")
        version = self.number("<I")
        if version not in VERSIONS:
            big = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
            raise self.fail(f"GGUF version {version} is not supported{big}; versions 2 and 3 are")
        n_tensors, n_pairs = self.number("<Q"), self.number("<Q")
        # The shortest possible entries: counts beyond this are lies, found before any loop.
        if n_tensors > self.size // 24 or n_pairs > self.size // 13:
            raise self.fail(f"{n_tensors} tensors and {n_pairs} keys do not fit a file of {self.size} bytes")
        fields: dict[str, GGUFValue] = {}
        for _ in range(n_pairs):
            key = self.string()
            if key in fields:
                raise self.fail(f"key {key!r} occurs twice")
            fields[key] = self.value(self.number("<I"))
        return Header(version, fields, self.tensor_infos(n_tensors, fields))

    def value(self, kind: int) -> GGUFValue:
        if kind == GGUFType.STRING:
            return GGUFValue(self.string(), GGUFType.STRING)
        if kind == GGUFType.ARRAY:
            return self.array(0)
        return GGUFValue(self.scalars(kind, 1)[0].item(), GGUFType(kind))

    def scalars(self, kind: int, n: int) -> npt.NDArray[Any]:
        dtype = SCALARS.get(kind)  # type: ignore[call-overload]
        if dtype is None:
            raise self.fail(f"value type {kind} at byte {self.at - 4} does not exist")
        start = self.take(n * dtype.itemsize)
        if dtype.kind == "b":  # a bool of another value than 0 and 1 would be no bool to numpy
            truth: npt.NDArray[Any] = np.frombuffer(self.data, np.uint8, n, start) != 0
            return truth
        return np.frombuffer(self.data, dtype, n, start).copy()

    def array(self, depth: int) -> GGUFValue:
        kind, n = self.number("<I"), self.number("<Q")
        if kind == GGUFType.STRING:
            if n > (self.size - self.at) // 8:
                raise self.fail(f"an array of {n} strings does not fit the file")
            return GGUFValue(self.strings(n), GGUFType.ARRAY, GGUFType.STRING)
        if kind == GGUFType.ARRAY:
            if depth >= MAX_NESTING or n > (self.size - self.at) // 12:
                raise self.fail("arrays are nested too deep, or do not fit the file")
            return GGUFValue([self.array(depth + 1) for _ in range(n)], GGUFType.ARRAY, GGUFType.ARRAY)
        return GGUFValue(self.scalars(kind, n), GGUFType.ARRAY, GGUFType(kind))

    def strings(self, n: int) -> list[str]:
        # A vocabulary has 10**5 of them: this loop is written for speed.
        data, size, at = self.data, self.size, self.at
        length = struct.Struct("<Q").unpack_from
        found = []
        for _ in range(n):
            start = at + 8
            at = start + length(data, at)[0] if start <= size else size + 1
            if at > size:
                raise self.fail("cut short inside an array of strings")
            found.append(data[start:at].decode("utf-8", "surrogateescape"))
        self.at = at
        return found

    def tensor_infos(self, n: int, fields: dict[str, GGUFValue]) -> dict[str, TensorInfo]:
        alignment = fields["general.alignment"].value if "general.alignment" in fields else DEFAULT_ALIGNMENT
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.fail(f"general.alignment is {alignment!r}, not a power of two")
        found: list[tuple[str, Type, tuple[int, ...], int]] = []
        for _ in range(n):
            name, ndim = self.string(), self.number("<I")
            if ndim > 4:
                raise self.fail(f"tensor {name!r} has {ndim} axes; ggml has at most 4")
            ne = struct.unpack_from(f"<{ndim}Q", self.data, self.take(8 * ndim))
            kind, offset = self.number("<I"), self.number("<Q")
            try:
                dtype = Type(kind)
            except ValueError:
                raise self.fail(f"tensor {name!r} has type {kind}, which ggml does not have") from None
            if offset % alignment:
                raise self.fail(f"tensor {name!r} starts at {offset}, not at a multiple of {alignment}")
            found.append((name, dtype, ne[::-1], offset))
        base = -(-self.at // alignment) * alignment
        return self.checked(found, base)

    def checked(self, found: list[tuple[str, Type, tuple[int, ...], int]], base: int) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for name, dtype, shape, offset in found:
            if name in tensors:
                raise self.fail(f"tensor {name!r} occurs twice")
            if not all(shape):
                raise self.fail(f"tensor {name!r} has no elements: shape {shape}")
            try:
                row = dtypes.row_size(dtype, shape[-1] if shape else 1)
            except ValueError as error:
                raise self.fail(f"tensor {name!r}: {error}") from None
            nbytes = row * prod(shape[:-1])
            if base + offset + nbytes > self.size:
                raise self.fail(f"cut short: tensor {name!r} {dtype.name} {shape} reaches beyond the end of the file")
            tensors[name] = TensorInfo(name, dtype, shape, base + offset, nbytes, self.part)
        return tensors
