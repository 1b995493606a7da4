"""Opening a model: which architecture a file has, and the backends of the devices that were asked for."""

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

#: Architectures by their name in GGUF. A new one is one more file, and a line here.
ARCHITECTURES: dict[str, type[Architecture]] = {cls.name: cls for cls in (Bert, Gemma3, Llama, Qwen2, Qwen3)}

_DEFAULT_CTX = 4096


def architecture_of(file: GGUFFile) -> Architecture:
    """The architecture of a model file, checked.

    Raises
    ------
    FormatError
        If it is none that is known, or the file lacks something.
    """
    name: Any = file.metadata.get("general.architecture")
    cls = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if cls is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise FormatError(f"{file.path}: architecture {name!r} is not supported; {known} are")
    return cls(file)


def context_of(architecture: Architecture, n_ctx: int | None) -> int:
    """The context to use: ``n_ctx``, by default what the model was trained for, at most 4096.

    Raises
    ------
    ValueError
        If it is larger than what the model was trained for, or not positive.
    """
    limit = architecture.n_ctx_train
    if n_ctx is not None and not 1 <= n_ctx <= limit:
        raise ValueError(f"n_ctx must be 1 to {limit}, the context that the model was trained for, not {n_ctx}")
    return n_ctx or min(limit, _DEFAULT_CTX)
