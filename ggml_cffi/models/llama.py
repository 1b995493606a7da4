"""The llama architecture: RMS norm, rotary positions, grouped-query attention, SwiGLU.

Source: Touvron et al., LLaMA, 2023. SmolLM2, Llama 2 and 3, Mistral and many others are of this kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import sqrt

from ggml_cffi import dtypes, ops
from ggml_cffi.errors import FormatError
from ggml_cffi.models.architecture import Architecture, Inputs, LayerCache, Metadata
from ggml_cffi.tensor import Tensor


class Llama(Architecture):
    """Llama-like models."""

    name = "llama"

    def read(self, meta: Metadata) -> None:
        self.n_layers = meta.positive("block_count")
        self.n_embd = meta.positive("embedding_length")
        self.n_ff = meta.positive("feed_forward_length")
        self.n_heads = meta.positive("attention.head_count")
        self.n_kv_heads = meta.positive("attention.head_count_kv", self.n_heads)
        self.n_ctx_train = meta.positive("context_length")
        if self.n_heads % self.n_kv_heads:
            raise FormatError(f"{self.file.path}: {self.n_heads} heads are no multiple of {self.n_kv_heads} KV heads")
        self.head_size = meta.positive("attention.key_length", max(self.n_embd // self.n_heads, 1))
        self.v_size = meta.positive("attention.value_length", self.head_size)
        self.kv_sizes = (self.n_kv_heads * self.head_size, self.n_kv_heads * self.v_size)
        self.eps = meta.get("attention.layer_norm_rms_epsilon", float)
        self.n_rot = meta.positive("rope.dimension_count", self.head_size)
        self.rope_base = meta.get("rope.freq_base", float, 10000.0)
        if self.n_rot % 2 or self.n_rot > self.head_size or not self.rope_base > 0 or not self.eps >= 0:
            raise FormatError(f"{self.file.path}: impossible rotary or norm parameters")
        scaling = meta.get("rope.scaling.type", str, "none")
        if scaling not in ("none", "linear"):
            raise FormatError(f"{self.file.path}: rope scaling {scaling!r} is not supported; none and linear are")
        factor = meta.get("rope.scaling.factor", float, 1.0) if scaling == "linear" else 1.0
        self.rope_scale = 1.0 / factor if factor else 1.0
        if meta.get("expert_count", int, 0):
            raise FormatError(f"{self.file.path}: mixtures of experts are not supported yet")
        embeddings = self.info("token_embd.weight").shape
        self.n_vocab = embeddings[0] if len(embeddings) == 2 else 0

    def expected_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        embd, (k, v), q = self.n_embd, self.kv_sizes, self.n_heads * self.head_size
        yield "token_embd.weight", (self.n_vocab, embd)
        for i in range(self.n_layers):
            yield f"blk.{i}.attn_norm.weight", (embd,)
            yield f"blk.{i}.attn_q.weight", (q, embd)
            yield f"blk.{i}.attn_k.weight", (k, embd)
            yield f"blk.{i}.attn_v.weight", (v, embd)
            for name, size in (("attn_q", q), ("attn_k", k), ("attn_v", v)):
                if f"blk.{i}.{name}.bias" in self.file.tensors:
                    yield f"blk.{i}.{name}.bias", (size,)
            yield f"blk.{i}.attn_output.weight", (embd, self.n_heads * self.v_size)
            yield f"blk.{i}.ffn_norm.weight", (embd,)
            yield f"blk.{i}.ffn_gate.weight", (self.n_ff, embd)
            yield f"blk.{i}.ffn_up.weight", (self.n_ff, embd)
            yield f"blk.{i}.ffn_down.weight", (embd, self.n_ff)
        if "rope_freqs.weight" in self.file.tensors:
            yield "rope_freqs.weight", (self.n_rot // 2,)
        yield "output_norm.weight", (embd,)
        yield self.output_tensor, (self.n_vocab, embd)

    def hidden(self, weights: Mapping[str, Tensor], cache: list[LayerCache], inputs: Inputs) -> Tensor:
        x = ops.get_rows(weights["token_embd.weight"], inputs.tokens)
        for i in range(self.n_layers):
            last = i == self.n_layers - 1
            h = ops.mul(ops.rms_norm(x, self.eps), weights[f"blk.{i}.attn_norm.weight"])
            h = self._attention(i, h, weights, cache[i], inputs)
            if last:  # the feed-forward part and the head only for the tokens whose logits are wanted
                h, x = ops.get_rows(h, inputs.wanted), ops.get_rows(x, inputs.wanted)
            x = ops.add(x, h)
            h = ops.mul(ops.rms_norm(x, self.eps), weights[f"blk.{i}.ffn_norm.weight"])
            gate = ops.mul_mat(weights[f"blk.{i}.ffn_gate.weight"], h)
            up = ops.mul_mat(weights[f"blk.{i}.ffn_up.weight"], h)
            x = ops.add(x, ops.mul_mat(weights[f"blk.{i}.ffn_down.weight"], ops.swiglu_split(gate, up)))
            x.name = f"layer {i}"
        return ops.mul(ops.rms_norm(x, self.eps), weights["output_norm.weight"])

    def _attention(self, i: int, x: Tensor, weights: Mapping[str, Tensor], cache: LayerCache, inputs: Inputs) -> Tensor:
        def project(name: str, heads: int) -> Tensor:
            bias = weights.get(f"blk.{i}.{name}.bias")
            return ops.reshape(ops.linear(x, weights[f"blk.{i}.{name}.weight"], bias), (x.shape[0], heads, -1))

        q = self._rope(project("attn_q", self.n_heads), weights, inputs)
        k = self._rope(project("attn_k", self.n_kv_heads), weights, inputs)
        v = project("attn_v", self.n_kv_heads)
        out = ops.flash_attn_ext(
            ops.permute(q, (1, 0, 2)),
            self._cached(cache.k, k, inputs),
            self._cached(cache.v, v, inputs),
            inputs.mask,
            scale=1.0 / sqrt(self.head_size),
        )
        return ops.linear(ops.reshape(out, (x.shape[0], -1)), weights[f"blk.{i}.attn_output.weight"])

    def _rope(self, x: Tensor, weights: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        return ops.rope_ext(
            x,
            inputs.positions,
            weights.get("rope_freqs.weight"),
            n_dims=self.n_rot,
            freq_base=self.rope_base,
            freq_scale=self.rope_scale,
        )

    def _cached(self, cache: Tensor, new: Tensor, inputs: Inputs) -> Tensor:
        """Write ``new`` (n, heads, size) into the cache; what the tokens may look at, as (heads, n_kv, size)."""
        n, heads, size = new.shape
        written = ops.set_rows(cache, ops.reshape(new, (n, heads * size)), inputs.rows)
        row = dtypes.row_size(cache.dtype, heads * size)
        strides = (row, dtypes.row_size(cache.dtype, size), dtypes.type_size(cache.dtype))
        seen = ops.view(written, (inputs.mask.shape[1], heads, size), strides=strides)
        return ops.permute(seen, (1, 0, 2))
