"""Parts of a model that is split over several GGUF files: their names, their keys, and the checks that they fit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ggml_cffi.enums import GGUFType
from ggml_cffi.errors import FormatError
from ggml_cffi.files.gguf.header import Header, TensorInfo
from ggml_cffi.files.gguf.remote import is_url
from ggml_cffi.files.gguf.values import GGUFValue

#: Keys of a part: its number, the number of parts, and the number of tensors in all parts.
SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
SPLIT_KEYS = frozenset({SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS})
#: Largest value of :data:`SPLIT_COUNT`, which has 16 bits in a file.
MAX_PARTS = 2**16 - 1
_SHARED_KEYS = {"general.architecture", "general.name"}
_PART_NAME = re.compile(r"(.*)-(\d{5,})-of-(\d{5,})\.gguf", re.DOTALL)


def part_path(prefix: str, part: int, count: int) -> str:
    """Return the file name of one part, counted from 0, of a model that is split over ``count`` files."""
    return f"{prefix}-{part + 1:05d}-of-{count:05d}.gguf"


def part_paths(path: str, first: Header) -> list[str]:
    """Return the files of the model of which ``path``, with the header ``first``, is the first part.

    The query of a URL (``?download=true``) is the same for all parts.

    Raises
    ------
    FormatError
        If ``path`` is another part than the first, or its name does not lead to the names of the others.
    """
    count = integer_field(first, SPLIT_COUNT, path) if SPLIT_COUNT in first.fields else 1
    if count <= 1:
        return [path]
    part = integer_field(first, SPLIT_NO, path)
    name, mark, query = path.partition("?") if is_url(path) else (path, "", "")
    match = _PART_NAME.fullmatch(name)
    if match is None or count > MAX_PARTS or (int(match[2]) - 1, int(match[3])) != (part, count):
        name = part_path("", part, count)
        raise FormatError(
            f"{path} is part {part + 1} of {count}: its name must end in {name}, so that the others can be found"
        )
    if part:
        first_path = part_path(match[1], 0, count) + mark + query
        raise FormatError(f"{path} is part {part + 1} of {count}: open the first part, {first_path}")
    return [part_path(match[1], i, count) + mark + query for i in range(count)]


def check_part(header: Header, part: int, paths: Sequence[str], first: Header, known: Mapping[str, TensorInfo]) -> None:
    """Raise FormatError unless ``header`` is that of another part of the same model.

    Parameters
    ----------
    header, part
        Header of ``paths[part]``.
    paths, first
        Files of the model, and the header of the first.
    known
        Tensors of the parts before this one.
    """
    path, model = paths[part], paths[0]
    n_tensors = integer_field(first, SPLIT_TENSORS, model)
    for key, want in ((SPLIT_NO, part), (SPLIT_COUNT, len(paths)), (SPLIT_TENSORS, n_tensors)):
        if (got := integer_field(header, key, path)) != want:
            raise FormatError(f"{path} is no part of the model in {model}: its {key} is {got}, not {want}")
    for key in _SHARED_KEYS & header.fields.keys():  # most writers put them into the first part only
        if key not in first.fields or header.fields[key].value != first.fields[key].value:
            raise FormatError(f"{path} is no part of the model in {model}: the two differ in {key}")
    if twice := known.keys() & header.tensors.keys():
        raise FormatError(f"{path}: tensor {min(twice)!r} is in another part as well")


def integer_field(header: Header, key: str, path: str) -> int:
    """Return the integer under ``key`` in the header of ``path``; raise FormatError if there is none."""
    value = header.fields[key].value if key in header.fields else None
    if not isinstance(value, int) or isinstance(value, bool):
        raise FormatError(f"{path}: {key} is {value!r}; a part of a split model needs a number there")
    return value


def split_fields(part: int, count: int, n_tensors: int) -> dict[str, GGUFValue]:
    """Return the metadata of one part, with the types that llama.cpp expects."""
    return {
        SPLIT_NO: GGUFValue(part, GGUFType.UINT16),
        SPLIT_COUNT: GGUFValue(count, GGUFType.UINT16),
        SPLIT_TENSORS: GGUFValue(n_tensors, GGUFType.INT32),
    }
