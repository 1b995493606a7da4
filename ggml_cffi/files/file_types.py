"""llama.cpp's file types: one type for the weights of a file, or a mixture with finer types where errors cost most."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ggml_cffi.core.dtypes import as_type
from ggml_cffi.core.text import nearest
from ggml_cffi.enums import Type
from ggml_cffi.files.gguf.reader import GGUFFile

T = Type

#: ``general.file_type`` of files with one type; of llama.cpp's mixtures of K types the simplest.
FILE_TYPES = {
    T.F32: 0,
    T.F16: 1,
    T.Q4_0: 2,
    T.Q4_1: 3,
    T.Q8_0: 7,
    T.Q5_0: 8,
    T.Q5_1: 9,
    T.Q2_K: 10,
    T.Q3_K: 11,
    T.Q4_K: 14,
    T.Q5_K: 16,
    T.Q6_K: 18,
    T.IQ2_XXS: 19,
    T.IQ2_XS: 20,
    T.IQ3_XXS: 23,
    T.IQ1_S: 24,
    T.IQ4_NL: 25,
    T.IQ3_S: 26,
    T.IQ2_S: 29,
    T.IQ4_XS: 30,
    T.IQ1_M: 31,
    T.BF16: 32,
    T.TQ1_0: 36,
    T.TQ2_0: 37,
    T.MXFP4: 38,
    T.NVFP4: 39,
    T.Q1_0: 40,
    T.Q2_0: 41,
}


@dataclass(frozen=True)
class FileType:
    """A type, or a mixture of types, for the weights of a file."""

    name: str
    dtype: Type
    """Type of most weights."""
    number: int
    """``general.file_type`` of the file."""
    needs_imatrix: bool = False
    """True if weights of the type :attr:`dtype` need importances in this mixture, apart from the embeddings."""

    def finer_types(self, file: GGUFFile) -> dict[str, Type]:
        """Return the weights of a model that this mixture stores in another type than :attr:`dtype`, with that type.

        Values of the attention, its output and the second product of the feed-forward part matter most, in the first
        and last layers more than between them. The rules are those of llama.cpp, apart from its exceptions for Falcon.

        Source: ``llama_tensor_get_type_impl`` in llama.cpp.
        """
        if self.name not in MIXTURES:
            return {}
        model = _Model.of(file)
        found: dict[str, Type | None] = {}
        values = _in_order(name for name in file.tensors if _VALUES.search(name))
        for i, name in enumerate(values):
            found[name] = _type_of_values(self, i, len(values), model)
        for name in file.tensors:
            layer = _layer_of(name)
            if "ffn_down" in name and layer is not None:
                found[name] = _type_of_ffn_down(self, layer, model.n_layers)
            elif "attn_output.weight" in name:
                found[name] = _type_of_attention_output(self, model)
            elif "attn_k.weight" in name and model.n_experts == 8:
                found[name] = T.Q8_0
        return {name: dtype for name, dtype in found.items() if dtype is not None}


#: llama.cpp's mixtures of K types. Other names are those of one type.
MIXTURES = {
    mixture.name: mixture
    for mixture in (
        FileType("Q2_K", T.Q2_K, 10),
        FileType("Q2_K_S", T.Q2_K, 21, needs_imatrix=True),
        FileType("Q3_K_S", T.Q3_K, 11),
        FileType("Q3_K_M", T.Q3_K, 12),
        FileType("Q3_K_L", T.Q3_K, 13),
        FileType("Q4_K_S", T.Q4_K, 14),
        FileType("Q4_K_M", T.Q4_K, 15),
        FileType("Q5_K_S", T.Q5_K, 16),
        FileType("Q5_K_M", T.Q5_K, 17),
    )
}


def file_type_of(dtype: Type | str) -> FileType:
    """Return the file type that ``dtype`` names: a mixture (``"q4_k_m"``), or a type (``"q8_0"``).

    Raises
    ------
    TypeError
        If there is no such type, or weights are not stored in it. The message has the nearest names.
    """
    name = dtype.name if isinstance(dtype, Type) else str(dtype).upper()
    if name in MIXTURES:
        return MIXTURES[name]
    known = [*(t.name.lower() for t in FILE_TYPES), *(m.lower() for m in MIXTURES if m not in T.__members__)]
    listed = f"they can be {', '.join(known)}"
    try:
        element_type = as_type(dtype)
    except TypeError:
        raise TypeError(f"weights have no type {dtype!r}{nearest(name, known)}; {listed}") from None
    if element_type not in FILE_TYPES:
        raise TypeError(f"weights are not stored as {element_type.name}; {listed}")
    return FileType(element_type.name, element_type, FILE_TYPES[element_type])


# ---------------------------------------------------------------------- rules of the mixtures

_LAYER = re.compile(r"blk\.(\d+)\.")
_VALUES = re.compile(r"attn_v\.weight|attn_qkv\.weight|attn_kv_b\.weight")
# Mixtures in which a model with 8 experts, whose attention is small, has finer attention outputs.
_FINER_BESIDE_EXPERTS = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M")


@dataclass(frozen=True)
class _Model:
    """The sizes of a model on which the types of its weights depend."""

    n_layers: int
    n_experts: int
    group: int
    """Query heads for each head of keys and values."""
    is_70b: bool
    """True for the models of 80 layers whose values llama.cpp stores in finer types."""

    @classmethod
    def of(cls, file: GGUFFile) -> _Model:
        name = file.metadata.get("general.architecture", "")

        def size(key: str, default: int) -> int:
            return _first_number(file.metadata.get(f"{name}.{key}"), default)

        layers = {layer for layer in map(_layer_of, file.tensors) if layer is not None}
        n_layers, n_heads = size("block_count", len(layers)), size("attention.head_count", 0)
        n_kv = size("attention.head_count_kv", n_heads)
        is_70b = n_layers == 80 and (name == "qwen2" or (name == "llama" and n_heads != n_kv))
        return cls(n_layers, size("expert_count", 0), n_heads // n_kv if n_kv > 0 else 0, is_70b)


def _first_number(value: Any, default: int) -> int:
    """Return an integer of the metadata, of an array (one for each layer) the first; ``default`` for other values."""
    try:
        return int(value[0] if hasattr(value, "__len__") else value)
    except (TypeError, ValueError, IndexError):
        return default


def _layer_of(name: str) -> int | None:
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def _in_order(names: Iterable[str]) -> list[str]:
    """Return names in the order in which llama.cpp counts tensors: by layer, then by name."""

    def key(name: str) -> tuple[int, str]:
        layer = _layer_of(name)
        return (-1 if layer is None else layer, name)

    return sorted(names, key=key)


def _needs_more_bits(i: int, n: int) -> bool:
    """Return whether the ``i``-th of ``n`` layers is in the first or last eighth, or is every third between them."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _type_of_values(mixture: FileType, i: int, n: int, model: _Model) -> Type | None:
    """Return the type of the ``i``-th of ``n`` weights of values; None for the type of most weights."""
    if model.n_experts == 8:
        return T.Q8_0
    chosen = None
    match mixture.name:
        case "Q2_K":
            chosen = T.Q4_K if model.group >= 4 else T.Q3_K
        case "Q2_K_S" if model.group >= 4:
            chosen = T.Q4_K
        case "Q3_K_M":
            chosen = T.Q5_K if i < 2 else T.Q4_K
        case "Q3_K_L":
            chosen = T.Q5_K
        case "Q4_K_S" if i < 4:
            chosen = T.Q5_K
        case "Q4_K_M" | "Q5_K_M" if _needs_more_bits(i, n):
            chosen = T.Q6_K
    small = (chosen or mixture.dtype) in (T.Q3_K, T.Q4_K)
    return T.Q5_K if model.is_70b and small else chosen


def _type_of_ffn_down(mixture: FileType, layer: int, n: int) -> Type | None:
    """Return the type of the second product of a feed-forward part; None for the type of most weights."""
    match mixture.name:
        case "Q2_K":
            return T.Q3_K
        case "Q2_K_S" if layer < n // 8:
            return T.Q4_K
        case "Q3_K_M":
            return T.Q5_K if layer < n // 16 else T.Q4_K
        case "Q3_K_L":
            return T.Q5_K
        case "Q4_K_S" if layer < n // 8:
            return T.Q5_K
        case "Q4_K_M" | "Q5_K_M" if _needs_more_bits(layer, n):
            return T.Q6_K
    return None


def _type_of_attention_output(mixture: FileType, model: _Model) -> Type | None:
    """Return the type of the weights of an attention's output; None for the type of most weights."""
    if model.n_experts == 8:
        return T.Q5_K if mixture.name in _FINER_BESIDE_EXPERTS else None
    return {"Q2_K": T.Q3_K, "Q3_K_M": T.Q4_K, "Q3_K_L": T.Q5_K}.get(mixture.name)
