"""GGUF model files: metadata and tensors, memory-mapped.

The header is parsed here and not by ggml's reader, which accepts impossible shapes and ends the process on some files.
Nothing is believed before it was checked against the size of the file.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ggml_cffi import dtypes
from ggml_cffi._handle import Closing
from ggml_cffi.enums import GGUFType, Type
from ggml_cffi.errors import ClosedError, FormatError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_NESTING = 8

_SCALARS = {
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


class GGUFFile(Closing):
    """A GGUF file, opened for reading.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    FileNotFoundError, OSError
        If it cannot be opened.
    FormatError
        If it is not GGUF, or cut short, or declares what cannot be.

    Examples
    --------
    >>> with GGUFFile("model.gguf") as f:  # doctest: +SKIP
    ...     f.metadata["general.architecture"], f.tensors["output.weight"].shape
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        """Where the file is."""
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise FormatError(f"{path}: {size} bytes are too few for a GGUF file")
            self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            reader = _Reader(self._map, self.path)
            self.version, metadata, tensors = reader.header()
        except BaseException:
            self.close()
            raise
        self.metadata: Mapping[str, Any] = MappingProxyType(metadata)
        """Key to value: str, bool, int, float, list of str, or numpy array."""
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        """Name to :class:`TensorInfo`, in the file's order."""

    @property
    def map(self) -> mmap.mmap:
        """The whole file, memory-mapped and read-only.

        Raises
        ------
        ClosedError
            If the file is closed.
        """
        if self._map is None:
            raise ClosedError(f"{self.path} is closed")
        return self._map

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor, a view of the mapping (shape ``(nbytes,)``, read-only)."""
        info = self._info(name)
        return np.frombuffer(self.map, np.uint8, info.nbytes, info.offset)

    def array(self, name: str) -> npt.NDArray[Any]:
        """A tensor as an array of its shape; decoded to ``float32`` if numpy has no such type.

        Raises
        ------
        KeyError
            If the file has no such tensor.
        """
        info, raw = self._info(name), self.raw(name)
        if dtypes.has_numpy(info.dtype):
            return raw.view(dtypes.numpy_dtype(info.dtype)).reshape(info.shape)
        return dtypes.from_bytes(raw, info.dtype, prod(info.shape)).reshape(info.shape)

    def __getitem__(self, name: str) -> GGUFTensor:
        """A tensor with its values, which are read when they are asked for.

        Raises
        ------
        KeyError
            If the file has no such tensor.
        """
        return GGUFTensor(self, self._info(name))

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise KeyError(f"{self.path} has no tensor {name!r}") from None

    def close(self) -> None:
        """Close the file. Memory that arrays or buffers still use stays mapped until they are gone."""
        mapping, self._map = getattr(self, "_map", None), None
        if mapping is not None:
            with contextlib.suppress(BufferError):  # whoever still looks at it holds it
                mapping.close()

    def __repr__(self) -> str:
        return f"<GGUFFile {os.path.basename(self.path)}: {len(self.tensors)} tensors>"


class GGUFTensor:
    """A tensor of a GGUF file: an array for numpy, or the bytes as they are stored."""

    def __init__(self, file: GGUFFile, info: TensorInfo) -> None:
        self.file = file
        self.info = info

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes in numpy's order."""
        return self.info.shape

    @property
    def dtype(self) -> Type:
        """Type in which it is stored."""
        return self.info.dtype

    def raw(self) -> npt.NDArray[np.uint8]:
        """The stored bytes; see :meth:`GGUFFile.raw`."""
        return self.file.raw(self.info.name)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.asarray(self.file.array(self.info.name), dtype)

    def __repr__(self) -> str:
        return f"<GGUFTensor {self.info.name} {self.dtype.name} {self.shape}>"


class _Reader:
    """Reads the header from a buffer, never past its end."""

    def __init__(self, data: mmap.mmap, path: str) -> None:
        self.data, self.path, self.at, self.size = data, path, 0, len(data)

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

    def header(self) -> tuple[int, dict[str, Any], dict[str, TensorInfo]]:
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
        metadata: dict[str, Any] = {}
        for _ in range(n_pairs):
            key = self.string()
            if key in metadata:
                raise self.fail(f"key {key!r} occurs twice")
            metadata[key] = self.value(self.number("<I"))
        return version, metadata, self.tensor_infos(n_tensors, metadata)

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == GGUFType.STRING:
            return self.string()
        if kind == GGUFType.ARRAY:
            return self.array(depth)
        return self.scalars(kind, 1)[0].item()

    def scalars(self, kind: int, n: int) -> npt.NDArray[Any]:
        dtype = _SCALARS.get(kind)  # type: ignore[call-overload]
        if dtype is None:
            raise self.fail(f"value type {kind} at byte {self.at - 4} does not exist")
        start = self.take(n * dtype.itemsize)
        if dtype.kind == "b":  # a bool of another value than 0 and 1 would be no bool to numpy
            truth: npt.NDArray[Any] = np.frombuffer(self.data, np.uint8, n, start) != 0
            return truth
        return np.frombuffer(self.data, dtype, n, start).copy()

    def array(self, depth: int) -> Any:
        kind, n = self.number("<I"), self.number("<Q")
        if kind == GGUFType.STRING:
            if n > (self.size - self.at) // 8:
                raise self.fail(f"an array of {n} strings does not fit the file")
            return self.strings(n)
        if kind == GGUFType.ARRAY:
            if depth >= _MAX_NESTING or n > (self.size - self.at) // 12:
                raise self.fail("arrays are nested too deep, or do not fit the file")
            return [self.array(depth + 1) for _ in range(n)]
        return self.scalars(kind, n)

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

    def tensor_infos(self, n: int, metadata: dict[str, Any]) -> dict[str, TensorInfo]:
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
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
            tensors[name] = TensorInfo(name, dtype, shape, base + offset, nbytes)
        return tensors
