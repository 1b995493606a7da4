"""The llama architecture in numpy, float64: the reference for the models' numbers."""

from __future__ import annotations

import numpy as np

import ggml_cffi as ggml


class Reference:
    """A GGUF model of the llama architecture, weights decoded to float64."""

    def __init__(self, path):
        with ggml.GGUFFile(path) as f:
            self.meta = dict(f.metadata)
            self.w = {name: f.array(name).astype(np.float64) for name in f.tensors}
        get = lambda key, default=None: self.meta.get(f"llama.{key}", default)  # noqa: E731
        self.n_layers, self.n_heads = get("block_count"), get("attention.head_count")
        self.n_kv = get("attention.head_count_kv", self.n_heads)
        self.eps, self.base = get("attention.layer_norm_rms_epsilon"), get("rope.freq_base", 10000.0)
        self.n_rot = get("rope.dimension_count")
        self.scale = 1 / get("rope.scaling.factor", 1.0)

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.w[name]

    def rope(self, x):
        half = np.arange(self.n_rot // 2)
        factors = self.w.get("rope_freqs.weight", 1.0)
        angle = np.arange(len(x))[:, None] * self.scale * self.base ** (-2 * half / self.n_rot) / factors
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        out, n = x.copy(), self.n_rot
        out[..., 0:n:2] = x[..., 0:n:2] * cos - x[..., 1:n:2] * sin
        out[..., 1:n:2] = x[..., 0:n:2] * sin + x[..., 1:n:2] * cos
        return out

    def heads(self, x, i, name, n):
        y = x @ self.w[f"blk.{i}.{name}.weight"].T + self.w.get(f"blk.{i}.{name}.bias", 0.0)
        return y.reshape(len(x), n, -1)

    def forward(self, tokens):
        """Logits (n, n_vocab)."""
        w, n = self.w, len(tokens)
        x = w["token_embd.weight"][tokens]
        mask = np.where(np.tri(n, dtype=bool), 0.0, -np.inf)
        group = self.n_heads // self.n_kv
        for i in range(self.n_layers):
            h = self.norm(x, f"blk.{i}.attn_norm.weight")
            q, k = self.rope(self.heads(h, i, "attn_q", self.n_heads)), self.rope(self.heads(h, i, "attn_k", self.n_kv))
            v = self.heads(h, i, "attn_v", self.n_kv)
            s = np.einsum("qhd,khd->hqk", q, np.repeat(k, group, 1)) / np.sqrt(q.shape[-1]) + mask
            p = np.exp(s - s.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            o = np.einsum("hqk,khd->qhd", p, np.repeat(v, group, 1)).reshape(n, -1)
            x = x + o @ w[f"blk.{i}.attn_output.weight"].T
            h = self.norm(x, f"blk.{i}.ffn_norm.weight")
            gate = h @ w[f"blk.{i}.ffn_gate.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w[f"blk.{i}.ffn_up.weight"].T)) @ w[f"blk.{i}.ffn_down.weight"].T
        return self.norm(x, "output_norm.weight") @ w.get("output.weight", w["token_embd.weight"]).T


def random_model(path, rng, *, dtype=ggml.F32, tied=False, biases=False, n_heads=4, n_kv=2, **changes):
    """A small model with random weights, 3 layers, grouped-query attention."""
    import gguf_writer

    n_embd, head, n_ff, n_vocab = 64, 32, 96, 50
    meta = {
        "general.architecture": "llama",
        "llama.block_count": 3,
        "llama.embedding_length": n_embd,
        "llama.feed_forward_length": n_ff,
        "llama.attention.head_count": n_heads,
        "llama.attention.head_count_kv": n_kv,
        "llama.attention.key_length": head,
        "llama.attention.value_length": head,
        "llama.context_length": 512,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": head,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "no_vocab",
    } | changes
    w = lambda *shape: (dtype, rng.standard_normal(shape) / np.sqrt(shape[-1]))  # noqa: E731
    tensors = {"token_embd.weight": w(n_vocab, n_embd), "output_norm.weight": (ggml.F32, rng.uniform(0.5, 1.5, n_embd))}
    if not tied:
        tensors["output.weight"] = w(n_vocab, n_embd)
    for i in range(3):
        tensors |= {
            f"blk.{i}.attn_norm.weight": (ggml.F32, rng.uniform(0.5, 1.5, n_embd)),
            f"blk.{i}.attn_q.weight": w(n_heads * head, n_embd),
            f"blk.{i}.attn_k.weight": w(n_kv * head, n_embd),
            f"blk.{i}.attn_v.weight": w(n_kv * head, n_embd),
            f"blk.{i}.attn_output.weight": w(n_embd, n_heads * head),
            f"blk.{i}.ffn_norm.weight": (ggml.F32, rng.uniform(0.5, 1.5, n_embd)),
            f"blk.{i}.ffn_gate.weight": w(n_ff, n_embd),
            f"blk.{i}.ffn_up.weight": w(n_ff, n_embd),
            f"blk.{i}.ffn_down.weight": w(n_embd, n_ff),
        }
        if biases:
            for name, size in (("attn_q", n_heads * head), ("attn_k", n_kv * head), ("attn_v", n_kv * head)):
                tensors[f"blk.{i}.{name}.bias"] = (ggml.F32, rng.standard_normal(size))
    return gguf_writer.write(path, meta, tensors)
