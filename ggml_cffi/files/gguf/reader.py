"""GGUF model files: metadata and tensors, memory-mapped, in one file or split over several."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ggml_cffi.core.handle import Closing
from ggml_cffi.enums import Type
from ggml_cffi.errors import ClosedError, FormatError
from ggml_cffi.files.gguf.header import Header, TensorInfo, read_header
from ggml_cffi.files.gguf.values import GGUFValue
from ggml_cffi.files.sources import StoredTensor

__all__ = ["GGUFFile", "GGUFTensor", "GGUFValue", "TensorInfo"]

#: Keys that say which part of a split model a file is, how many parts there are, and how many tensors in all.
SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
SPLIT_KEYS = frozenset({SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS})
#: The most parts that :data:`SPLIT_COUNT`, 16 bits in every file, can tell of.
MAX_PARTS = 2**16 - 1
_SAME = {"general.architecture", "general.name"}
_PART_NAME = re.compile(r"(.*)-(\d{5,})-of-(\d{5,})\.gguf", re.DOTALL)


def part_path(prefix: str, part: int, count: int) -> str:
    """The file of one part, counted from 0, of a model that is split over ``count`` files."""
    return f"{prefix}-{part + 1:05d}-of-{count:05d}.gguf"


class GGUFFile(Closing):
    """A GGUF file, opened for reading.

    Where a model is split over several files (``-00001-of-00003.gguf``), open the first: the others are found beside
    it, and :attr:`tensors` has those of all.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    FileNotFoundError, OSError
        If it cannot be opened.
    FormatError
        If it is not GGUF, or cut short, or declares what cannot be; if it is another part of a split model than the
        first, or another part is missing or belongs to another model. The message names the file.

    Examples
    --------
    >>> with GGUFFile("model.gguf") as f:  # doctest: +SKIP
    ...     f.metadata["general.architecture"], f.tensors["output.weight"].shape
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        """Where the file is, of several the first."""
        maps: list[mmap.mmap] = []
        try:
            first = _open(self.path, 0, maps)
            self.paths = tuple(_part_paths(self.path, first))
            """The files: more than one where a model is split."""
            tensors = first.tensors
            for part in range(1, len(self.paths)):
                tensors |= _other_part(self.paths, part, first, tensors, maps)
            if len(self.paths) > 1 and (n := _number(first, SPLIT_TENSORS, self.path)) != len(tensors):
                raise FormatError(f"{self.path}: the {len(self.paths)} parts have {len(tensors)} tensors, not {n}")
        except BaseException:
            _close(maps)
            raise
        self._maps: tuple[mmap.mmap, ...] | None = tuple(maps)
        self.version = first.version
        """Version of the format."""
        self.fields: Mapping[str, GGUFValue] = MappingProxyType(first.fields)
        """Key to value with its type in the file, as :func:`write_gguf` takes them."""
        self.metadata: Mapping[str, Any] = MappingProxyType({key: v.plain() for key, v in first.fields.items()})
        """Key to value: str, bool, int, float, list of str, or numpy array."""
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        """Name to :class:`TensorInfo`, in the file's order."""

    @property
    def maps(self) -> tuple[mmap.mmap, ...]:
        """The whole files, memory-mapped and read-only, in the order of :attr:`paths`.

        Raises
        ------
        ClosedError
            If the file is closed.
        """
        if self._maps is None:
            raise ClosedError(f"{self.path} is closed")
        return self._maps

    def map_of(self, info: TensorInfo) -> mmap.mmap:
        """The mapping that a tensor is in; ``info.offset`` counts from its start."""
        return self.maps[info.part]

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor, a view of the mapping (shape ``(nbytes,)``, read-only)."""
        info = self._info(name)
        return np.frombuffer(self.map_of(info), np.uint8, info.nbytes, info.offset)

    def array(self, name: str) -> npt.NDArray[Any]:
        """A tensor as an array of its shape; decoded to ``float32`` if numpy has no such type.

        Raises
        ------
        KeyError
            If the file has no such tensor.
        """
        return self[name].numpy()

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
        maps, self._maps = self._maps, None
        _close(maps or ())

    def __repr__(self) -> str:
        return f"<GGUFFile {os.path.basename(self.path)}: {len(self.tensors)} tensors>"


def _open(path: str, part: int, maps: list[mmap.mmap]) -> Header:
    """Map one file, add the mapping to ``maps``, and read its header."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:  # which cannot be mapped
            raise FormatError(f"{path}: 0 bytes are too few for a GGUF file")
        maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return read_header(maps[-1], path, part)


def _close(maps: Iterable[mmap.mmap]) -> None:
    for mapping in maps:
        with contextlib.suppress(BufferError):  # whoever still looks at it holds it
            mapping.close()


def _number(header: Header, key: str, path: str) -> int:
    """The integer that ``key`` has in the header of ``path``."""
    value = header.fields[key].value if key in header.fields else None
    if not isinstance(value, int) or isinstance(value, bool):
        raise FormatError(f"{path}: {key} is {value!r}; a part of a split model has a number there")
    return value


def _part_paths(path: str, first: Header) -> list[str]:
    """The files of the model that ``path`` is the first part of."""
    count = _number(first, SPLIT_COUNT, path) if SPLIT_COUNT in first.fields else 1
    if count <= 1:
        return [path]
    part = _number(first, SPLIT_NO, path)
    match = _PART_NAME.fullmatch(path)
    if match is None or count > MAX_PARTS or (int(match[2]) - 1, int(match[3])) != (part, count):
        name = part_path("", part, count)
        raise FormatError(f"{path} is part {part + 1} of {count}; the others are found by a name that ends in {name}")
    if part:
        first_path = part_path(match[1], 0, count)
        raise FormatError(f"{path} is part {part + 1} of {count}: open the first part, {first_path}")
    return [part_path(match[1], i, count) for i in range(count)]


def _other_part(
    paths: Sequence[str], part: int, first: Header, known: Mapping[str, TensorInfo], maps: list[mmap.mmap]
) -> dict[str, TensorInfo]:
    """The tensors of another part than the first, once it is sure that it belongs to the first."""
    path, model = paths[part], paths[0]
    try:
        header = _open(path, part, maps)
    except FileNotFoundError:
        raise FormatError(f"{path} is missing: it is part {part + 1} of the model in {model}") from None
    n_tensors = _number(first, SPLIT_TENSORS, model)
    for key, want in ((SPLIT_NO, part), (SPLIT_COUNT, len(paths)), (SPLIT_TENSORS, n_tensors)):
        if (got := _number(header, key, path)) != want:
            raise FormatError(f"{path} is no part of the model in {model}: its {key} is {got}, not {want}")
    for key in _SAME & header.fields.keys():  # most writers put them into the first part only
        if key not in first.fields or header.fields[key].value != first.fields[key].value:
            raise FormatError(f"{path} is no part of the model in {model}: its {key} is another")
    if twice := known.keys() & header.tensors.keys():
        raise FormatError(f"{path}: tensor {min(twice)!r} is in another part as well")
    return header.tensors


class GGUFTensor(StoredTensor):
    """A tensor of a GGUF file: an array for numpy, or the bytes as they are stored."""

    def __init__(self, file: GGUFFile, info: TensorInfo) -> None:
        self.file = file
        self.info = info

    @property
    def name(self) -> str:
        """Its name in the file."""
        return self.info.name

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
