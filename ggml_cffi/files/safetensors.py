"""Reader of safetensors files, through the ``safetensors`` library."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ggml_cffi.core.handle import Closing
from ggml_cffi.enums import Type
from ggml_cffi.errors import ClosedError, FormatError, missing_extra
from ggml_cffi.files.sources import StoredTensor

_GGML_TYPES = {
    "F64": Type.F64,
    "F32": Type.F32,
    "F16": Type.F16,
    "BF16": Type.BF16,
    "I64": Type.I64,
    "I32": Type.I32,
    "I16": Type.I16,
    "I8": Type.I8,
}
# Types that numpy has and ggml has not.
_NUMPY_TYPES = {"U8": "<u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "BOOL": "?"}


def from_safetensors(path: str | os.PathLike[str]) -> SafetensorsFile:
    """Open a safetensors file, or the index of several (``model.safetensors.index.json``).

    Parameters
    ----------
    path
        The file. It stays open until the result is closed.

    Returns
    -------
    SafetensorsFile
        Name to tensor. Values are read on demand.

    Raises
    ------
    ImportError
        If the ``safetensors`` library is not installed.
    FileNotFoundError, OSError
        If a file cannot be opened.
    FormatError
        If a file is not a safetensors file, or is cut short.

    Examples
    --------
    >>> with from_safetensors("model.safetensors") as weights:  # doctest: +SKIP
    ...     write_gguf("model.gguf", {"general.architecture": "bert"}, weights)
    """
    return SafetensorsFile(path)


class SafetensorsFile(Closing, Mapping[str, "SafeTensor"]):
    """Tensors of a safetensors file, or of several files with an index; :func:`from_safetensors` opens it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        """Path of the file or index."""
        self.metadata: dict[str, str] = {}
        """Text that the writer of the file stored."""
        self._tensors: dict[str, SafeTensor] = {}
        self._maps: list[mmap.mmap] = []
        try:
            for name in self._files():
                self._open(name)
        except BaseException:
            self.close()
            raise

    def _files(self) -> list[str]:
        if not self.path.endswith(".json"):
            return [self.path]
        import json

        with open(self.path, encoding="utf-8") as file:
            try:
                names = set(json.load(file)["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise FormatError(f"{self.path}: not an index of safetensors files: {error!r}") from None
        return [os.path.join(os.path.dirname(self.path), name) for name in sorted(names)]

    def _open(self, path: str) -> None:
        import json

        # The library checks the header, but does not expose its offsets. The data is mapped here, because the library
        # copies it, and cannot convert bfloat16 to numpy.
        open_file, error = _library()
        with open(path, "rb") as file:
            try:
                self.metadata |= open_file(path, framework="numpy").metadata() or {}
            except error as reason:
                raise FormatError(f"{path}: {reason}") from None
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8))
            self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        header.pop("__metadata__", None)
        if twice := header.keys() & self._tensors.keys():
            raise FormatError(f"{path}: tensor {min(twice)!r} is in another file as well")
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = entry["data_offsets"]
            at = (len(self._maps) - 1, start + first, last - first)
            self._tensors[name] = SafeTensor(self, name, entry["dtype"], tuple(entry["shape"]), at)

    def __getitem__(self, name: str) -> SafeTensor:
        """Return a tensor. Its values are read on demand."""
        try:
            return self._tensors[name]
        except KeyError:
            raise KeyError(f"{self.path} has no tensor {name!r}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"<SafetensorsFile {os.path.basename(self.path)}: {len(self)} tensors>"

    def bytes_at(self, file: int, start: int, n: int) -> npt.NDArray[np.uint8]:
        """Return ``n`` bytes of one of the files, a view of its mapping."""
        if not self._maps:
            raise ClosedError(f"{self.path} is closed")
        return np.frombuffer(self._maps[file], np.uint8, n, start)

    def close(self) -> None:
        """Close the files. A mapping that arrays still use stays until they are gone."""
        maps, self._maps = self._maps, []
        for mapping in maps:
            with contextlib.suppress(BufferError):
                mapping.close()


class SafeTensor(StoredTensor):
    """Tensor of a safetensors file: an array for numpy, or the stored bytes."""

    def __init__(
        self, file: SafetensorsFile, name: str, type_name: str, shape: tuple[int, ...], at: tuple[int, int, int]
    ) -> None:
        self.file = file
        self.type_name = type_name
        """Type of the tensor, by its name in safetensors."""
        self._name, self._shape, self._at = name, shape, at

    @property
    def name(self) -> str:
        """Name of the tensor in the file."""
        return self._name

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the tensor."""
        return self._shape

    @property
    def dtype(self) -> Type:
        """Type in which the tensor is stored.

        Raises
        ------
        TypeError
            If ggml lacks the type.
        """
        if self.type_name not in _GGML_TYPES:
            raise TypeError(f"{self.file.path}: tensor {self.name!r} has type {self.type_name}, which ggml lacks")
        return _GGML_TYPES[self.type_name]

    def raw(self) -> npt.NDArray[np.uint8]:
        """Return the stored bytes, a view of the mapping."""
        return self.file.bytes_at(*self._at)

    def numpy(self) -> npt.NDArray[Any]:
        """Return an array of the tensor's shape: a read-only view of the file; ``float32`` for a BF16 tensor.

        Raises
        ------
        TypeError
            If neither numpy nor ggml has the type.
        """
        if self.type_name in _NUMPY_TYPES:
            return self.raw().view(_NUMPY_TYPES[self.type_name]).reshape(self.shape)
        return super().numpy()

    def __repr__(self) -> str:
        return f"<SafeTensor {self.name} {self.type_name} {self.shape}>"


def _library() -> tuple[Any, type[Exception]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise missing_extra("reading safetensors", "safetensors", "models") from None
    return safe_open, SafetensorError
