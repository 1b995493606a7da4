"""Registry of the architectures, and the context length of a model."""

from __future__ import annotations

from typing import Any

from ggml_cffi.errors import FormatError
from ggml_cffi.files.gguf.reader import GGUFFile
from ggml_cffi.models.architectures.base import Architecture
from ggml_cffi.models.architectures.bert import Bert
from ggml_cffi.models.architectures.gemma3 import Gemma3
from ggml_cffi.models.architectures.llama import Llama
from ggml_cffi.models.architectures.qwen2 import Qwen2
from ggml_cffi.models.architectures.qwen3 import Qwen3

#: Architectures by their name in GGUF. A new architecture is one file in this folder and one line here.
ARCHITECTURES: dict[str, type[Architecture]] = {
    "bert": Bert,
    "gemma3": Gemma3,
    "llama": Llama,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
}

_DEFAULT_CTX = 4096


def architecture_of(file: GGUFFile) -> Architecture:
    """Return the architecture of a model file, after checks of its metadata and tensors.

    Raises
    ------
    FormatError
        If the architecture is unknown, or the file lacks a key or a tensor.
    """
    name: Any = file.metadata.get("general.architecture")
    cls = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if cls is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise FormatError(f"{file.path}: architecture {name!r} is not supported; {known} are")
    return cls(file)


def context_of(architecture: Architecture, n_ctx: int | None) -> int:
    """Return the context length to use: ``n_ctx``, by default the length in training, at most 4096.

    Raises
    ------
    ValueError
        If ``n_ctx`` is larger than the length in training, or not positive.
    """
    limit = architecture.n_ctx_train
    if n_ctx is not None and not 1 <= n_ctx <= limit:
        raise ValueError(f"n_ctx must be 1 to {limit}, the context that the model was trained for, not {n_ctx}")
    return n_ctx or min(limit, _DEFAULT_CTX)
