"""A llama of one layer with random weights and a vocabulary of bytes: models with any template and metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import ggml_cffi as ggml
from ggml_cffi.models.tokenizers.byte_level_bpe import byte_letters

#: Special tokens after the 256 bytes; their ids are 256, 257, ...
SPECIALS = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
BOS, EOS, START, END = range(256, 260)


def byte_level_model(
    path: Path,
    template: str | None = None,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
    *,
    specials: tuple[str, ...] = SPECIALS,
    without: tuple[str, ...] = (),
) -> Path:
    """Write the model, with other metadata and tensors if given, and without the keys ``without``."""
    tokens = [byte_letters()[byte] for byte in range(256)] + list(specials)
    meta = {
        "general.architecture": "llama",
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.block_count": 1,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": 32,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([1] * 256 + [3] * len(specials), np.int32),
        "tokenizer.ggml.merges": ggml.GGUFValue([], ggml.GGUFType.ARRAY, ggml.GGUFType.STRING),
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
    }
    if template is not None:
        meta["tokenizer.chat_template"] = template
    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray[Any, Any]:
        return (rng.standard_normal(shape) * 0.1).astype(np.float32)

    ones = np.ones(64, np.float32)
    weights = {"token_embd.weight": matrix(len(tokens), 64), "output.weight": matrix(len(tokens), 64)}
    weights |= dict.fromkeys(("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"), ones)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        weights[f"blk.0.{name}.weight"] = matrix(64, 64)
    meta = {key: value for key, value in (meta | (metadata or {})).items() if key not in without}
    ggml.write_gguf(path, meta, weights | (tensors or {}))
    return path
