"""Reader of importance matrices that ``llama-imatrix`` writes."""

from __future__ import annotations

import os

import numpy as np

from ggml_cffi.errors import FormatError
from ggml_cffi.files.gguf.reader import GGUFFile
from ggml_cffi.files.quantization import Importances


def read_imatrix(path: str | os.PathLike[str]) -> dict[str, Importances]:
    """Read an importance matrix that ``llama-imatrix`` wrote as GGUF.

    Returns
    -------
    dict
        Name of a tensor to its importances, ``(experts, n)``.

    Raises
    ------
    FormatError
        If the file is no importance matrix in GGUF. ``llama-imatrix`` converts the format of its older versions.
    """
    found = {}
    with GGUFFile(path) as file:
        for name in file.tensors:
            stem = name.removesuffix(".in_sum2")
            if stem == name:
                continue
            if f"{stem}.counts" not in file.tensors:
                raise FormatError(f"{file.path}: tensor {name!r} has no counts")
            sums = np.asarray(file[name], np.float32)
            counts = np.asarray(file[f"{stem}.counts"], np.float32).reshape(-1, 1)
            sums = sums.reshape(-1, sums.shape[-1])
            if len(counts) != len(sums):
                raise FormatError(f"{file.path}: tensor {name!r} has {len(sums)} rows and {len(counts)} counts")
            # If an expert got no tokens, its columns have equal importances.
            found[stem] = np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1))
    if not found:
        raise FormatError(f"{file.path} is no importance matrix: it has no tensors named *.in_sum2")
    return found
