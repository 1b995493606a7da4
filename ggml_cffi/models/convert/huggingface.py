"""What a conversion is made of: a Hugging Face folder, and what one family of models needs."""

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

#: Key to value, as GGUF's metadata.
Metadata = dict[str, Any]


class Source:
    """A Hugging Face folder.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or no ``config.json`` in it.
    FormatError
        If that is not JSON.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        config = self.json("config.json")
        if config is None:
            raise FileNotFoundError(f"{self.folder} has no config.json: a folder of a Hugging Face model is needed")
        self.config: dict[str, Any] = config

    def json(self, name: str) -> Any:
        """The content of a JSON file, None if there is no such file."""
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FormatError(f"{path} is not JSON: {error}") from None

    def size(self, key: str) -> int:
        """A positive integer from ``config.json``."""
        value = self.config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise FormatError(f"{self.folder / 'config.json'}: {key!r} is {value!r}, not a positive number")
        return value

    def must(self, key: str, *allowed: Any) -> None:
        """Refuse a setting of ``config.json`` that GGUF cannot say. None among the allowed means that it may lack."""
        value = self.config.get(key)
        if value not in allowed:
            known = ", ".join(repr(a) for a in allowed if a is not None)
            raise FormatError(f"{self.folder / 'config.json'}: {key} {value!r} is not supported; {known} is")

    def weights(self) -> SafetensorsFile:
        """The tensors, by name.

        Raises
        ------
        FileNotFoundError
            If there are none.
        FormatError
            If they are not in safetensors files.
        """
        for name in ("model.safetensors.index.json", "model.safetensors"):
            if (self.folder / name).is_file():
                return from_safetensors(self.folder / name)
        raise FileNotFoundError(f"{self.folder} has no model.safetensors")


@dataclass(frozen=True)
class Family:
    """How one family of models is converted."""

    architecture: str
    """``general.architecture``."""
    names: Mapping[str, str]
    """The model's names of tensors to GGUF's, without ``.weight`` and ``.bias``; ``{}`` is the layer."""
    dropped: re.Pattern[str]
    """Tensors that are of no use."""
    metadata: Callable[[Source], Metadata]
    """Sizes and vocabulary."""
    prefix: str = ""
    """What names begin with in some models of the family."""
    exact: frozenset[str] = frozenset()
    """GGUF names of tables that stay F32 whatever type is chosen."""

    def rename(self, name: str) -> str | None:
        """GGUF's name of a tensor; None if it is dropped.

        Raises
        ------
        FormatError
            If the name is unknown: a model is not converted in part.
        """
        short = name.removeprefix(self.prefix)
        if self.dropped.match(short):
            return None
        stem, _, kind = short.rpartition(".")
        layer = re.search(r"\.(\d+)\.", stem)
        known = self.names.get(stem if layer is None else stem.replace(layer[0], ".{}.", 1))
        kind = {"gamma": "weight", "beta": "bias"}.get(kind, kind)
        if known is None or kind not in ("weight", "bias"):
            raise FormatError(f"tensor {name!r} has no place in the architecture {self.architecture!r}")
        return f"{known.format(layer and layer[1])}.{kind}"

    def type_of(self, name: str, shape: tuple[int, ...], chosen: Type) -> Type:
        """The type to store a tensor in: matrices as chosen, vectors and small tables exact."""
        if len(shape) < 2 or name in self.exact:
            return Type.F32
        return Type.F16 if shape[-1] % dtypes.block_size(chosen) else chosen
