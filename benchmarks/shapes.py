"""Model files of real shapes with random weights, for measurements of speed. Their answers mean nothing.

    python -m benchmarks.shapes 8B OUT.gguf [--type q8_0] [--vocabulary FROM.gguf]
    python -m benchmarks.shapes vocabulary OUT.gguf --vocabulary FROM.gguf

``--vocabulary`` copies the tokenizer and the chat template of another file, so that the server can serve the model. The
shape ``vocabulary`` writes these alone: a small file to take to another machine, for ``--vocabulary`` there.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import ggml_cffi as ggml
from ggml_cffi.core.dtypes import as_type, row_size
from ggml_cffi.files.sources import RawTensor


@dataclass(frozen=True)
class Shape:
    """A model of the llama architecture."""

    n_layers: int
    n_embd: int
    n_ff: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    n_vocab: int = 32000


SHAPES = {
    "tiny": Shape(2, 256, 512, 4, 2, 64, 512),
    "135M": Shape(30, 576, 1536, 9, 3, 64, 49152),
    "1B": Shape(16, 2048, 8192, 32, 8, 64),
    "8B": Shape(32, 4096, 14336, 32, 8, 128),
    "70B": Shape(80, 8192, 28672, 64, 8, 128),
}


_TOKENS = "tokenizer.ggml.tokens"


def tensors(s: Shape) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors, in the order of the file."""
    q, kv = s.n_heads * s.head_size, s.n_kv_heads * s.head_size
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (s.n_vocab, s.n_embd)}
    for i in range(s.n_layers):
        found |= {
            f"blk.{i}.attn_norm.weight": (s.n_embd,),
            f"blk.{i}.attn_q.weight": (q, s.n_embd),
            f"blk.{i}.attn_k.weight": (kv, s.n_embd),
            f"blk.{i}.attn_v.weight": (kv, s.n_embd),
            f"blk.{i}.attn_output.weight": (s.n_embd, q),
            f"blk.{i}.ffn_norm.weight": (s.n_embd,),
            f"blk.{i}.ffn_gate.weight": (s.n_ff, s.n_embd),
            f"blk.{i}.ffn_up.weight": (s.n_ff, s.n_embd),
            f"blk.{i}.ffn_down.weight": (s.n_embd, s.n_ff),
        }
    return found | {"output_norm.weight": (s.n_embd,), "output.weight": (s.n_vocab, s.n_embd)}


def metadata(s: Shape) -> dict[str, Any]:
    """Return the metadata of the file."""
    return {
        "general.architecture": "llama",
        "llama.block_count": s.n_layers,
        "llama.embedding_length": s.n_embd,
        "llama.feed_forward_length": s.n_ff,
        "llama.attention.head_count": s.n_heads,
        "llama.attention.head_count_kv": s.n_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.context_length": 8192,
        "llama.rope.dimension_count": s.head_size,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": s.n_vocab,
        "tokenizer.ggml.model": "no_vocab",
    }


def vocabulary_of(path: Path) -> dict[str, Any]:
    """Return the metadata of a file's tokenizer: tokens, merges, special tokens, chat template.

    Raises
    ------
    ValueError
        If the file has no vocabulary.
    """
    with ggml.GGUFFile(path) as file:
        found = {key: value for key, value in file.fields.items() if key.startswith("tokenizer.")}
    if _TOKENS not in found:
        raise ValueError(f"{path} has no vocabulary: name another file for --vocabulary")
    return found


def write_vocabulary(path: Path, vocabulary: Mapping[str, Any]) -> None:
    """Write a GGUF file of a vocabulary alone."""
    ggml.write_gguf(path, {"general.architecture": "llama", **vocabulary}, {})


def write(path: Path, model: Shape, dtype_name: str, vocabulary: Mapping[str, Any] | None = None) -> None:
    """Write a GGUF file, which repeats the bytes of one block of random weights.

    The model has as many tokens as ``vocabulary``, the result of :func:`vocabulary_of`; without it, the file has none.
    """
    if vocabulary is not None:
        model = replace(model, n_vocab=len(vocabulary[_TOKENS].value))
    dtype = as_type(dtype_name)
    shapes = tensors(model)
    rng = np.random.default_rng(0)
    block = ggml.quantize((rng.standard_normal((64, 4096)) / 64).astype(np.float32), dtype)
    pattern = np.frombuffer(block, np.uint8)
    made: dict[tuple[int, ...], Any] = {}  # tensors of one shape are the same
    for shape in set(shapes.values()):
        if len(shape) == 1:
            made[shape] = np.ones(shape, np.float32)
        else:
            made[shape] = RawTensor(np.resize(pattern, row_size(dtype, shape[1]) * shape[0]), dtype, shape)
    more = {} if vocabulary is None else dict(vocabulary)
    ggml.write_gguf(path, metadata(model) | more, {name: made[shape] for name, shape in shapes.items()})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=[*SHAPES, "vocabulary"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", default="q8_0")
    parser.add_argument("--vocabulary", type=Path, metavar="FROM.gguf", help="file with the tokenizer to copy")
    args = parser.parse_args()
    vocabulary = None if args.vocabulary is None else vocabulary_of(args.vocabulary)
    if args.shape in SHAPES:
        write(args.out, SHAPES[args.shape], args.type, vocabulary)
    elif vocabulary is None:
        parser.error("the shape 'vocabulary' needs --vocabulary FROM.gguf")
    else:
        write_vocabulary(args.out, vocabulary)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
