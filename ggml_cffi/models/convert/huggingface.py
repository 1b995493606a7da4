"""Source of a conversion (a Hugging Face folder), and the description of a model family."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggml_cffi.core import dtypes
from ggml_cffi.enums import Type
from ggml_cffi.errors import FormatError
from ggml_cffi.files.safetensors import SafetensorsFile, from_safetensors

#: GGUF metadata: key to value.
Metadata = dict[str, Any]


class HuggingFaceFolder:
    """Folder of a Hugging Face model.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or no ``config.json`` in it.
    FormatError
        If ``config.json`` is not JSON.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        config = self.json("config.json")
        if config is None:
            raise FileNotFoundError(f"{self.folder} has no config.json: give the folder of a Hugging Face model")
        self.config: dict[str, Any] = config

    def json(self, name: str) -> Any:
        """Return the content of a JSON file; None if the folder has no such file."""
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FormatError(f"{path} is not JSON: {error}") from None

    def positive_int(self, key: str) -> int:
        """Return a positive integer from ``config.json``."""
        value = self.config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise FormatError(f"{self.folder / 'config.json'}: {key!r} is {value!r}, not a positive number")
        return value

    def require(self, key: str, *allowed: Any) -> None:
        """Raise FormatError unless a setting of ``config.json`` has one of the allowed values. None stands for a
        missing setting.
        """
        value = self.config.get(key)
        if value not in allowed:
            known = ", ".join(repr(a) for a in allowed if a is not None)
            raise FormatError(f"{self.folder / 'config.json'}: {key} {value!r} is not supported; {known} is")

    def weights(self) -> SafetensorsFile:
        """Open the tensors, by name.

        Raises
        ------
        FileNotFoundError
            If the folder has no safetensors file.
        FormatError
            If a file is not valid.
        """
        for name in ("model.safetensors.index.json", "model.safetensors"):
            if (self.folder / name).is_file():
                return from_safetensors(self.folder / name)
        raise FileNotFoundError(f"{self.folder} has no model.safetensors")


@dataclass(frozen=True)
class ModelFamily:
    """Description of a model family, with the rules to convert its tensors and metadata."""

    architecture: str
    """``general.architecture``."""
    names: Mapping[str, str]
    """Tensor names of the model to those of GGUF, without ``.weight`` and ``.bias``; ``{}`` is the layer."""
    ignored: re.Pattern[str]
    """Names of the tensors that the architecture does not use."""
    metadata: Callable[[HuggingFaceFolder], Metadata]
    """Function that returns sizes and vocabulary."""
    prefix: str = ""
    """Prefix that tensor names have in some models of the family."""
    always_f32: frozenset[str] = frozenset()
    """GGUF names of tables that stay F32 for every chosen type."""

    def rename(self, name: str) -> str | None:
        """Return the name of a tensor in GGUF; None if the tensor is ignored.

        Raises
        ------
        FormatError
            If the name is unknown: a model without one of its tensors would give wrong answers.
        """
        short = name.removeprefix(self.prefix)
        if self.ignored.match(short):
            return None
        stem, _, kind = short.rpartition(".")
        layer = re.search(r"\.(\d+)\.", stem)
        known = self.names.get(stem if layer is None else stem.replace(layer[0], ".{}.", 1))
        kind = {"gamma": "weight", "beta": "bias"}.get(kind, kind)
        if known is None or kind not in ("weight", "bias"):
            raise FormatError(f"tensor {name!r} has no place in the architecture {self.architecture!r}")
        return f"{known.format(layer and layer[1])}.{kind}"

    def type_of(self, name: str, shape: tuple[int, ...], chosen: Type) -> Type:
        """Return the type to store a tensor in: ``chosen`` for matrices, F32 for vectors and small tables."""
        if len(shape) < 2 or name in self.always_f32:
            return Type.F32
        return Type.F16 if shape[-1] % dtypes.block_size(chosen) else chosen
