"""Reader of GGUF files: metadata and tensors, memory-mapped, of a model in one file or several."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ggml_cffi.core import dtypes
from ggml_cffi.core.handle import Closing
from ggml_cffi.enums import Type
from ggml_cffi.errors import ClosedError, FormatError
from ggml_cffi.files.gguf.header import Header, TensorInfo, read_header
from ggml_cffi.files.gguf.parts import SPLIT_TENSORS, check_part, integer_field, part_paths
from ggml_cffi.files.gguf.remote import is_url, remote_header
from ggml_cffi.files.gguf.values import GGUFValue
from ggml_cffi.files.sources import StoredTensor


class GGUFFile(Closing):
    """GGUF file, open for reading.

    If a model is split over several files (``-00001-of-00003.gguf``), open the first. The others must be in the same
    folder; :attr:`tensors` then holds the tensors of all files.

    Parameters
    ----------
    path
        The file.
    header_only
        True if metadata and descriptions of tensors are enough. The data of tensors may then be missing
        (:attr:`missing_bytes`), and ``path`` may be a URL, of which only the header is read, by HTTP range requests.

    Raises
    ------
    FileNotFoundError, OSError
        If the file cannot be opened, or its server cannot be reached.
    FormatError
        If the file is not GGUF, is cut short, or declares impossible shapes or sizes; if it is not the first part of a
        split model, or another part is missing or belongs to another model. The message names the file, and the number
        of missing bytes.
    ValueError
        If ``path`` is a URL, and ``header_only`` is False.

    Examples
    --------
    >>> with GGUFFile("model.gguf") as f:  # doctest: +SKIP
    ...     f.metadata["general.architecture"], f.tensors["output.weight"].shape
    """

    def __init__(self, path: str | os.PathLike[str], *, header_only: bool = False) -> None:
        self.path = os.fspath(path)
        """Path of the file; of several files, the first."""
        if is_url(self.path) and not header_only:
            raise ValueError(f"{self.path} is a URL, of which only the header can be read: download the file first")
        maps: list[mmap.mmap] = []
        try:
            first, size = _open(self.path, 0, maps, header_only)
            self.paths = tuple(part_paths(self.path, first))
            """Paths of all files: more than one if the model is split."""
            sizes, missing, tensors = [size], first.missing_bytes, first.tensors
            for part in range(1, len(self.paths)):
                header, size = _open_part(self.paths, part, first, tensors, maps, header_only)
                sizes.append(size)
                missing += header.missing_bytes
                tensors |= header.tensors
            if len(self.paths) > 1 and (n := integer_field(first, SPLIT_TENSORS, self.path)) != len(tensors):
                raise FormatError(f"{self.path}: the {len(self.paths)} parts have {len(tensors)} tensors, not {n}")
        except BaseException:
            _close(maps)
            raise
        self._maps: tuple[mmap.mmap, ...] | None = tuple(maps)
        self.version = first.version
        """Version of the format."""
        self.file_bytes: tuple[int, ...] = tuple(sizes)
        """Bytes of each file."""
        self.missing_bytes: int = missing
        """Bytes of tensors that are not in the files: 0 unless the file was opened with ``header_only``."""
        self.fields: Mapping[str, GGUFValue] = MappingProxyType(first.fields)
        """Key to value with its type in the file, as :func:`write_gguf` accepts it."""
        self.metadata: Mapping[str, Any] = MappingProxyType({key: v.plain() for key, v in first.fields.items()})
        """Key to value: str, bool, int, float, list of str, or numpy array."""
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        """Name to :class:`TensorInfo`, in the file's order."""

    @property
    def maps(self) -> tuple[mmap.mmap, ...]:
        """Whole files, memory-mapped and read-only, in the order of :attr:`paths`.

        Raises
        ------
        ClosedError
            If the file is closed.
        """
        if self._maps is None:
            raise ClosedError(f"{self.path} is closed")
        return self._maps

    def map_of(self, info: TensorInfo) -> mmap.mmap:
        """Return the mapping that holds a tensor; ``info.offset`` counts from its start.

        Raises
        ------
        FormatError
            If the file lacks the tensor's data.
        """
        if is_url(self.path) or info.offset + info.nbytes > self.file_bytes[info.part]:
            raise FormatError(f"{self.paths[info.part]}: the data of tensor {info.name!r} is missing")
        return self.maps[info.part]

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """Return the bytes of a tensor, a view of the mapping (shape ``(nbytes,)``, read-only)."""
        info = self._info(name)
        return np.frombuffer(self.map_of(info), np.uint8, info.nbytes, info.offset)

    def array(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor as an array of its shape, decoded to ``float32`` if numpy has no such type.

        Raises
        ------
        KeyError
            If the file has no such tensor.
        """
        return self[name].numpy()

    def __getitem__(self, name: str) -> GGUFTensor:
        """Return a tensor. Its values are read on demand.

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
        """Close the file. A mapping that arrays or buffers still use stays until they are gone."""
        maps, self._maps = self._maps, None
        _close(maps or ())

    def __repr__(self) -> str:
        return f"<GGUFFile {os.path.basename(self.path)}: {len(self.tensors)} tensors>"


def _open(path: str, part: int, maps: list[mmap.mmap], header_only: bool) -> tuple[Header, int]:
    """Return the header of one file and the file's bytes. Add the mapping of a local file to ``maps``."""
    if is_url(path):
        return remote_header(path, part)
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:  # an empty file cannot be mapped
            raise FormatError(f"{path}: 0 bytes are too few for a GGUF file")
        maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return read_header(maps[-1], path, part, header_only=header_only), len(maps[-1])


def _close(maps: Iterable[mmap.mmap]) -> None:
    for mapping in maps:
        with contextlib.suppress(BufferError):  # an array still uses the mapping
            mapping.close()


def _open_part(
    paths: Sequence[str],
    part: int,
    first: Header,
    known: Mapping[str, TensorInfo],
    maps: list[mmap.mmap],
    header_only: bool,
) -> tuple[Header, int]:
    """Open another part than the first, check that it belongs to the model, and return its header and its bytes."""
    try:
        header, size = _open(paths[part], part, maps, header_only)
    except FileNotFoundError:
        raise FormatError(f"{paths[part]} is missing: it is part {part + 1} of the model in {paths[0]}") from None
    check_part(header, part, paths, first, known)
    return header, size


class GGUFTensor(StoredTensor):
    """Tensor of a GGUF file: an array for numpy, or the stored bytes."""

    def __init__(self, file: GGUFFile, info: TensorInfo) -> None:
        self.file = file
        self.info = info

    @property
    def name(self) -> str:
        """Name of the tensor in the file."""
        return self.info.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes in numpy's order."""
        return self.info.shape

    @property
    def dtype(self) -> Type:
        """Type in which the tensor is stored."""
        return self.info.dtype

    def numpy(self) -> npt.NDArray[Any]:
        """Return an array of the tensor's shape; see :meth:`StoredTensor.numpy`.

        Raises
        ------
        FormatError
            If the loaded ggml does not have the type.
        """
        try:
            dtypes.check_known(self.dtype)
        except TypeError as error:
            raise FormatError(f"{self.file.path}: tensor {self.name!r}: {error}") from None
        return super().numpy()

    def raw(self) -> npt.NDArray[np.uint8]:
        """Return the stored bytes; see :meth:`GGUFFile.raw`."""
        return self.file.raw(self.info.name)
