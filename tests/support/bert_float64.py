"""BERT in numpy with float64, one text at a time: the reference for embeddings."""

from __future__ import annotations

from math import erf

import numpy as np

import ggml_cffi as ggml

_erf = np.vectorize(erf, otypes=[np.float64])


class Reference:
    """A GGUF model of the BERT architecture, with weights decoded to float64."""

    def __init__(self, path):
        with ggml.GGUFFile(path) as f:
            meta = dict(f.metadata)
            self.w = {name: f.array(name).astype(np.float64) for name in f.tensors}
        self.n_layers, self.n_heads = meta["bert.block_count"], meta["bert.attention.head_count"]
        self.eps = meta["bert.attention.layer_norm_epsilon"]

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, name, x):
        x = x - x.mean(-1, keepdims=True)
        x /= np.sqrt((x * x).mean(-1, keepdims=True) + self.eps)
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def hidden(self, tokens):
        """Compute the results of the last layer (n, n_embd)."""
        n, w = len(tokens), self.w
        x = w["token_embd.weight"][list(tokens)] + w["position_embd.weight"][:n] + w["token_types.weight"][0]
        x = self.norm("token_embd_norm", x)
        for i in range(self.n_layers):
            q, k, v = (self.linear(f"blk.{i}.attn_{part}", x).reshape(n, self.n_heads, -1) for part in "qkv")
            s = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
            p = np.exp(s - s.max(-1, keepdims=True))
            o = np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v).reshape(n, -1)
            x = self.norm(f"blk.{i}.attn_output_norm", x + self.linear(f"blk.{i}.attn_output", o))
            h = self.linear(f"blk.{i}.ffn_up", x)
            h = h * (1 + _erf(h / np.sqrt(2))) / 2
            x = self.norm(f"blk.{i}.layer_output_norm", x + self.linear(f"blk.{i}.ffn_down", h))
        return x

    def embed(self, texts, pooling):
        """Compute normalized embeddings (n_texts, n_embd)."""
        pool = {"mean": lambda x: x.mean(0), "cls": lambda x: x[0], "last": lambda x: x[-1]}[pooling]
        vectors = np.array([pool(self.hidden(tokens)) for tokens in texts])
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def random_model(path, rng, *, dtype=ggml.F32, n_embd=64, n_heads=2, n_ff=96, n_layers=3, n_types=2, **changes):
    """Write a small model with random weights, 50 tokens and 40 positions."""
    from tests.support import gguf_writer

    meta = {
        "general.architecture": "bert",
        "bert.block_count": n_layers,
        "bert.embedding_length": n_embd,
        "bert.feed_forward_length": n_ff,
        "bert.attention.head_count": n_heads,
        "bert.attention.layer_norm_epsilon": 1e-12,
        "bert.attention.causal": False,
        "bert.context_length": 40,
        "bert.pooling_type": 1,
        "tokenizer.ggml.model": "no_vocab",
    } | changes
    vector = lambda n, low=-0.5, high=0.5: (ggml.F32, rng.uniform(low, high, n))  # noqa: E731
    tensors = {
        "token_embd.weight": (dtype, rng.standard_normal((50, n_embd))),
        "position_embd.weight": (ggml.F32, rng.standard_normal((40, n_embd))),
        "token_types.weight": (ggml.F32, rng.standard_normal((n_types, n_embd))),
        "token_embd_norm.weight": vector(n_embd, 0.5, 1.5),
        "token_embd_norm.bias": vector(n_embd),
    }
    for i in range(n_layers):
        for name, n_out, n_in in (
            ("attn_q", n_embd, n_embd),
            ("attn_k", n_embd, n_embd),
            ("attn_v", n_embd, n_embd),
            ("attn_output", n_embd, n_embd),
            ("ffn_up", n_ff, n_embd),
            ("ffn_down", n_embd, n_ff),
        ):
            tensors[f"blk.{i}.{name}.weight"] = dtype, rng.standard_normal((n_out, n_in)) / np.sqrt(n_in)
            tensors[f"blk.{i}.{name}.bias"] = vector(n_out)
        for name in ("attn_output_norm", "layer_output_norm"):
            tensors[f"blk.{i}.{name}.weight"] = vector(n_embd, 0.5, 1.5)
            tensors[f"blk.{i}.{name}.bias"] = vector(n_embd)
    return gguf_writer.write(path, meta, tensors)
