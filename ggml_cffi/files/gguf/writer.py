"""Writer of GGUF files: in chunks, atomically, and over several files if one would be too large."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from ggml_cffi.core.progress import Progress
from ggml_cffi.enums import GGUFType
from ggml_cffi.files.atomic_write import write_files
from ggml_cffi.files.gguf.header import DEFAULT_ALIGNMENT
from ggml_cffi.files.gguf.layout import (
    ALIGNMENT,
    PlannedTensor,
    check_alignment,
    divide,
    header_bytes,
    padded_size,
    plan_tensor,
)
from ggml_cffi.files.gguf.parts import SPLIT_KEYS, part_path, split_fields
from ggml_cffi.files.gguf.values import GGUFValue

if TYPE_CHECKING:
    from concurrent.futures import Executor  # slow to import


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
    *,
    alignment: int | None = None,
    max_bytes: int | None = None,
    overwrite: bool = True,
    progress: Progress | None = None,
) -> tuple[str, ...]:
    """Write a GGUF file, or several if one would be too large.

    Tensors are written in chunks, so the data is never in memory as a whole. The write is atomic: a temporary file
    beside the target gets the target's name when it is complete, and is removed if an exception is raised.

    Parameters
    ----------
    path
        The file.
    metadata
        Key to value. A ``str`` is written as STRING, a ``bool`` as BOOL, a ``float`` as FLOAT32, and an ``int`` as the
        first of UINT32, INT32, UINT64 and INT64 that holds it. A list is an ARRAY of these, with INT32 before UINT32.
        Numpy's scalars and arrays keep their types. A :class:`GGUFValue` states its type; ``GGUFFile.fields`` has the
        metadata of a file in this form.
    tensors
        Name to values, in the order of the file. Values are an array (or an object that numpy or DLPack can read), a
        tensor of another file (its bytes are copied), or a :class:`LazyTensor`. A pair of an
        array or such a tensor with a type casts or quantizes the values. ``float64`` arrays become F32 unless a pair
        has another type.
    alignment
        Each tensor starts at a multiple of this power of two. Default: that of ``metadata``, else 32.
    max_bytes
        Limit of the size of a file; a file with a single tensor may be larger. A larger model is split: the files of
        ``model.gguf`` are then ``model-00001-of-00003.gguf`` and so on. Open the first of them.
    overwrite
        True to replace a file that exists.
    progress
        Called with the bytes written so far and the bytes in all.

    Returns
    -------
    tuple of str
        Paths of the files.

    Raises
    ------
    TypeError, ValueError
        If a GGUF file cannot hold a name, shape, type or value. The message names the key or the tensor.
    FileExistsError
        If the file exists and ``overwrite`` is false.
    OSError
        If the file cannot be written.

    Examples
    --------
    >>> write_gguf("w.gguf", {"general.architecture": "mine"}, {"w": (np.ones((4, 32)), "q8_0")})  # doctest: +SKIP
    """
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    return write_tensors(
        os.fspath(path),
        metadata,
        [plan_tensor(name, source) for name, source in pairs],
        alignment=alignment,
        max_bytes=max_bytes,
        overwrite=overwrite,
        progress=progress,
    )


def write_tensors(
    path: str,
    metadata: Mapping[str, Any],
    tensors: Sequence[PlannedTensor],
    *,
    alignment: int | None = None,
    max_bytes: int | None = None,
    overwrite: bool = True,
    progress: Progress | None = None,
    pool: Executor | None = None,
    ahead: int = 0,
) -> tuple[str, ...]:
    """Write planned tensors, as :func:`write_gguf` does; convert them in ``pool``, up to ``ahead`` chunks ahead."""
    names = Counter(t.name for t in tensors)
    if names and names.most_common(1)[0][1] > 1:
        raise ValueError(f"tensor {names.most_common(1)[0][0]!r} occurs twice")
    fields = {key: value for key, value in metadata.items() if key not in SPLIT_KEYS}
    align = check_alignment(fields, alignment)
    if align != DEFAULT_ALIGNMENT or ALIGNMENT in fields:
        fields[ALIGNMENT] = GGUFValue(align, GGUFType.UINT32)
    part_fields = {ALIGNMENT: fields[ALIGNMENT]} if ALIGNMENT in fields else {}  # metadata of the other parts
    parts = [list(tensors)]
    if max_bytes is not None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, not {max_bytes}")
        if len(header_bytes(fields, tensors, align)) + padded_size(tensors, align) > max_bytes:
            parts = divide(tensors, fields, part_fields, align, max_bytes)
    n = len(parts)
    paths = [path] if n == 1 else [part_path(path.removesuffix(".gguf"), i, n) for i in range(n)]
    heads = []
    for i, part in enumerate(parts):
        split = split_fields(i, n, len(tensors)) if n > 1 else {}
        heads.append(header_bytes((part_fields if i else fields) | split, part, align))
    total, done = sum(t.nbytes for t in tensors), 0

    def write(i: int, file: BinaryIO) -> None:
        nonlocal done
        file.write(heads[i])
        for tensor in parts[i]:
            written = 0
            for chunk in tensor.chunks(pool, ahead):
                file.write(chunk.data)
                written += chunk.size
                if progress:
                    progress(done + written, total)
            done += written
            file.write(bytes(-written % align))

    write_files(paths, write, overwrite=overwrite)
    return tuple(paths)
