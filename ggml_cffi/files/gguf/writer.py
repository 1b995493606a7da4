"""Writing GGUF files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from ggml_cffi.files.gguf.layout import Progress, planned, write_planned


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
    """Write a GGUF file, or several if it would be too large.

    Data goes to the disk piece by piece. The file has its name only once it is complete: until then it is written
    beside the target, and removed if anything is raised.

    Parameters
    ----------
    path
        The file.
    metadata
        Key to value. A ``str`` is a STRING, a ``bool`` a BOOL, an ``int`` the first of UINT32, INT32, UINT64 and INT64
        that holds it, a ``float`` a FLOAT32; a list an ARRAY of these, with INT32 before UINT32. Numpy's scalars and
        arrays keep their types, and :class:`GGUFValue` has any. ``GGUFFile.fields`` is a file's metadata as it is.
    tensors
        Name to values, in the order in which they are written: an array (or what numpy and DLPack can read), a tensor
        of another file (whose bytes are copied), or a :class:`LazyTensor`; or a pair of one of the first two and the
        type to store it in, cast or quantized. ``float64`` arrays become F32 unless a pair says otherwise.
    alignment
        Each tensor starts at a multiple of this, a power of two; default what ``metadata`` says, else 32.
    max_bytes
        Most bytes of a file; one that holds a single tensor may be larger. What is more goes to files of its own: for
        ``model.gguf`` they are ``model-00001-of-00003.gguf`` and so on, to be opened by the first.
    overwrite
        Whether to replace a file that exists.
    progress
        Called with bytes written and bytes in all.

    Returns
    -------
    tuple of str
        The files.

    Raises
    ------
    TypeError, ValueError
        If names, shapes, types or values cannot be in a GGUF file. The message names the key or the tensor.
    FileExistsError
        If the file exists and ``overwrite`` is false.
    OSError
        If it cannot be written.

    Examples
    --------
    >>> write_gguf("w.gguf", {"general.architecture": "mine"}, {"w": (np.ones((4, 32)), "q8_0")})  # doctest: +SKIP
    """
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    return write_planned(
        os.fspath(path),
        metadata,
        [planned(name, source) for name, source in pairs],
        alignment=alignment,
        max_bytes=max_bytes,
        overwrite=overwrite,
        progress=progress,
    )
