"""Llama-like architectures in numpy with float64: the reference for the numbers of models."""

from __future__ import annotations

import numpy as np

import ggml_cffi as ggml

#: Head size of the small models, which determines the other sizes.
HEAD = 32


class Reference:
    """A GGUF model of one of these architectures, with weights decoded to float64."""

    def __init__(self, path):
        with ggml.GGUFFile(path) as f:
            self.meta = dict(f.metadata)
            self.w = {name: f.array(name).astype(np.float64) for name in f.tensors}
        self.name = self.meta["general.architecture"]
        get = lambda key, default=None: self.meta.get(f"{self.name}.{key}", default)  # noqa: E731
        self.n_layers, self.n_embd = get("block_count"), get("embedding_length")
        self.n_heads = get("attention.head_count")
        self.n_kv = get("attention.head_count_kv", self.n_heads)
        self.head = get("attention.key_length", self.n_embd // self.n_heads)
        self.eps = get("attention.layer_norm_rms_epsilon")
        self.n_rot = get("rope.dimension_count", self.head)
        self.base, self.near_base = get("rope.freq_base", 10000.0), get("rope.freq_base_swa", 10000.0)
        scaling = get("rope.scaling.type")
        self.factor = 1.0 if scaling == "none" else get("rope.scaling.factor", 1.0)
        self.yarn_ctx = get("rope.scaling.original_context_length") if scaling == "yarn" else None
        self.yarn_turns = get("rope.scaling.yarn_beta_fast", 32.0), get("rope.scaling.yarn_beta_slow", 1.0)
        self.size = get("rope.scaling.attn_factor", 1.0)
        self.root = self.n_embd // self.n_heads if (self.name, self.n_layers) == ("gemma3", 62) else self.head
        self.scale = get("attention.scale", 1 / np.sqrt(self.root))
        self.window, self.period = get("attention.sliding_window", 0), get("attention.sliding_window_pattern", 6)
        self.score_cap, self.logit_cap = get("attn_logit_softcapping", 0.0), get("final_logit_softcapping", 0.0)

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.w[name]

    def local(self, i):
        if isinstance(self.period, int):
            return self.window > 0 and (i + 1) % self.period != 0
        return self.window > 0 and bool(self.period[i])

    def angles(self, n, local):
        """Return the angle of each pair at each position, ``(n, pairs)``, and the factor of rotated elements."""
        pair = np.arange(self.n_rot // 2)
        turn = (self.near_base if local else self.base) ** (-2 * pair / self.n_rot) / self.w.get("rope_freqs.weight", 1)
        if local:
            return np.arange(n)[:, None] * turn, 1.0
        if self.yarn_ctx is None:
            return np.arange(n)[:, None] * turn / self.factor, self.size
        # YaRN keeps the frequency of fast pairs and lowers that of slow pairs.
        low, high = (
            self.n_rot * np.log(self.yarn_ctx / (turns * 2 * np.pi)) / (2 * np.log(self.base))
            for turns in self.yarn_turns
        )
        low, high = max(np.floor(low), 0), min(np.ceil(high), self.n_rot - 1)
        slow = np.clip((pair - low) / max(high - low, 1e-3), 0, 1)
        turn = turn * (1 - slow) + turn / self.factor * slow
        return np.arange(n)[:, None] * turn, (1 + 0.1 * np.log(self.factor)) * self.size

    def rope(self, x, local=False):
        angle, size = self.angles(len(x), local)
        cos, sin = size * np.cos(angle)[:, None], size * np.sin(angle)[:, None]
        out, n = x.copy(), self.n_rot
        neighbours = slice(0, n, 2), slice(1, n, 2)
        halves = slice(0, n // 2), slice(n // 2, n)
        a, b = neighbours if self.name == "llama" else halves
        out[..., a] = x[..., a] * cos - x[..., b] * sin
        out[..., b] = x[..., a] * sin + x[..., b] * cos
        return out

    def heads(self, x, i, name, n):
        y = x @ self.w[f"blk.{i}.{name}.weight"].T + self.w.get(f"blk.{i}.{name}.bias", 0.0)
        y = y.reshape(len(x), n, -1)
        return self.norm(y, f"blk.{i}.{name}_norm.weight") if f"blk.{i}.{name}_norm.weight" in self.w else y

    def attention(self, x, i):
        n, group, local = len(x), self.n_heads // self.n_kv, self.local(i)
        q = self.rope(self.heads(x, i, "attn_q", self.n_heads), local)
        k = self.rope(self.heads(x, i, "attn_k", self.n_kv), local)
        v = self.heads(x, i, "attn_v", self.n_kv)
        s = np.einsum("qhd,khd->hqk", q, np.repeat(k, group, 1)) * self.scale
        if self.score_cap:
            s = self.score_cap * np.tanh(s / self.score_cap)
        back = np.arange(n)[:, None] - np.arange(n)
        s = np.where((back >= 0) & (back < (self.window if local else n)), s, -np.inf)
        p = np.exp(s - s.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        o = np.einsum("hqk,khd->qhd", p, np.repeat(v, group, 1)).reshape(n, -1)
        return o @ self.w[f"blk.{i}.attn_output.weight"].T

    def feed_forward(self, x, i):
        gate, up = (x @ self.w[f"blk.{i}.{name}.weight"].T for name in ("ffn_gate", "ffn_up"))
        if self.name == "gemma3":
            gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        else:
            gate = gate / (1 + np.exp(-gate))
        return (gate * up) @ self.w[f"blk.{i}.ffn_down.weight"].T

    def forward(self, tokens, last=False):
        """Compute the logits ``(n, n_vocab)``; with ``last``, ``(1, n_vocab)``."""
        x = self.w["token_embd.weight"][tokens]
        gemma = self.name == "gemma3"
        if gemma:
            x = x * np.sqrt(self.n_embd)
        for i in range(self.n_layers):
            h = self.attention(self.norm(x, f"blk.{i}.attn_norm.weight"), i)
            x = x + (self.norm(h, f"blk.{i}.post_attention_norm.weight") if gemma else h)
            h = self.feed_forward(self.norm(x, f"blk.{i}.ffn_norm.weight"), i)
            x = x + (self.norm(h, f"blk.{i}.post_ffw_norm.weight") if gemma else h)
        x = self.norm(x[-1:] if last else x, "output_norm.weight")
        logits = x @ self.w.get("output.weight", self.w["token_embd.weight"]).T
        return self.logit_cap * np.tanh(logits / self.logit_cap) if self.logit_cap else logits

    def greedy(self, tokens, n):
        """Generate ``n`` tokens after ``tokens``; return them, and the margin of each over the next best."""
        chosen, margins = [], []
        for _ in range(n):
            logits = self.forward([*tokens, *chosen], last=True)[0]
            best = np.argsort(logits)[::-1][:2]
            chosen.append(int(best[0]))
            margins.append(round(float(logits[best[0]] - logits[best[1]]), 4))
        return chosen, margins


def random_model(
    path,
    rng,
    *,
    name="llama",
    dtype=ggml.F32,
    tied=False,
    biases=False,
    n_layers=3,
    n_heads=4,
    n_kv=2,
    head=None,
    n_vocab=50,
    more=None,
    order=None,
    **changes,
):
    """Write a small model with random weights and grouped-query attention.

    ``more`` adds or replaces tensors, F32 or a pair of type and values. ``changes`` changes the metadata. A key that
    begins with a dot gets the name of the architecture as a prefix. ``head`` is the size of a head, :data:`HEAD` if it
    is None. CUDA has flash attention from 64 on: keys and values in quantized types need it. ``order`` sorts the names
    of the tensors.
    """
    from tests.support import gguf_writer

    head = head or HEAD
    n_embd, n_ff = 64, 96
    meta = {
        "general.architecture": name,
        f"{name}.block_count": n_layers,
        f"{name}.embedding_length": n_embd,
        f"{name}.feed_forward_length": n_ff,
        f"{name}.attention.head_count": n_heads,
        f"{name}.attention.head_count_kv": n_kv,
        f"{name}.attention.key_length": head,
        f"{name}.attention.value_length": head,
        f"{name}.context_length": 512,
        f"{name}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{name}.rope.dimension_count": head,
        f"{name}.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "no_vocab",
    } | {name + key if key.startswith(".") else key: value for key, value in changes.items()}
    w = lambda *shape: (dtype, rng.standard_normal(shape) / np.sqrt(shape[-1]))  # noqa: E731
    scale = lambda n: (ggml.F32, rng.uniform(0.5, 1.5, n))  # noqa: E731
    tensors = {"token_embd.weight": w(n_vocab, n_embd), "output_norm.weight": scale(n_embd)}
    if not tied:
        tensors["output.weight"] = w(n_vocab, n_embd)
    for i in range(n_layers):
        tensors |= {
            f"blk.{i}.attn_norm.weight": scale(n_embd),
            f"blk.{i}.attn_q.weight": w(n_heads * head, n_embd),
            f"blk.{i}.attn_k.weight": w(n_kv * head, n_embd),
            f"blk.{i}.attn_v.weight": w(n_kv * head, n_embd),
            f"blk.{i}.attn_output.weight": w(n_embd, n_heads * head),
            f"blk.{i}.ffn_norm.weight": scale(n_embd),
            f"blk.{i}.ffn_gate.weight": w(n_ff, n_embd),
            f"blk.{i}.ffn_up.weight": w(n_ff, n_embd),
            f"blk.{i}.ffn_down.weight": w(n_embd, n_ff),
        }
        if biases:
            for part, size in (("attn_q", n_heads * head), ("attn_k", n_kv * head), ("attn_v", n_kv * head)):
                tensors[f"blk.{i}.{part}.bias"] = (ggml.F32, rng.standard_normal(size))
        if name in ("qwen3", "gemma3"):
            tensors |= {f"blk.{i}.{part}_norm.weight": scale(head) for part in ("attn_q", "attn_k")}
        if name == "gemma3":
            tensors |= {f"blk.{i}.{part}_norm.weight": scale(n_embd) for part in ("post_attention", "post_ffw")}
    for key, value in (more or {}).items():
        tensors[key] = value if isinstance(value, tuple) else (ggml.F32, np.asarray(value))
    names = tensors if order is None else order(tensors)
    return gguf_writer.write(path, meta, {name: tensors[name] for name in names})
