"""GGUF files that have only a header: models of any size, without the data of their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

import ggml_cffi as ggml
from ggml_cffi.files.gguf.layout import PlannedTensor, header_bytes

#: Sizes of Llama 3 70B.
LLAMA_70B = {"n_layers": 80, "n_embd": 8192, "n_ff": 28672, "n_vocab": 128256, "n_heads": 64, "n_kv": 8}
_HEAD = 128


def llama_header(
    path: Path,
    *,
    n_layers: int,
    n_embd: int,
    n_ff: int,
    n_vocab: int,
    n_heads: int,
    n_kv: int,
    dtype: ggml.Type = ggml.Q4_K,
    tied: bool = False,
    others: Mapping[str, ggml.Type] | None = None,
) -> Path:
    """Write the header of a llama model. ``others`` has the types of weights by name, such as ``"ffn_down"``."""
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": n_layers,
        "llama.embedding_length": n_embd,
        "llama.feed_forward_length": n_ff,
        "llama.attention.head_count": n_heads,
        "llama.attention.head_count_kv": n_kv,
        "llama.attention.key_length": _HEAD,
        "llama.attention.value_length": _HEAD,
        "llama.context_length": 8192,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": _HEAD,
        "tokenizer.ggml.model": "no_vocab",
    }
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (n_vocab, n_embd),
        "output_norm.weight": (n_embd,),
    }
    if not tied:
        shapes["output.weight"] = (n_vocab, n_embd)
    for i in range(n_layers):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (n_embd,),
            f"blk.{i}.attn_q.weight": (n_heads * _HEAD, n_embd),
            f"blk.{i}.attn_k.weight": (n_kv * _HEAD, n_embd),
            f"blk.{i}.attn_v.weight": (n_kv * _HEAD, n_embd),
            f"blk.{i}.attn_output.weight": (n_embd, n_heads * _HEAD),
            f"blk.{i}.ffn_norm.weight": (n_embd,),
            f"blk.{i}.ffn_gate.weight": (n_ff, n_embd),
            f"blk.{i}.ffn_up.weight": (n_ff, n_embd),
            f"blk.{i}.ffn_down.weight": (n_embd, n_ff),
        }
    others = others or {}
    types = {
        name: ggml.F32 if len(shape) == 1 else others.get(name.split(".")[-2], dtype) for name, shape in shapes.items()
    }
    plans = [PlannedTensor(name, types[name], shape, np.empty(0)) for name, shape in shapes.items()]
    path.write_bytes(header_bytes(metadata, plans, 32))
    return path
