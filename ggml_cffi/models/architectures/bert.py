"""The BERT architecture: an encoder whose tokens look at their whole text; for embeddings.

Source: Devlin et al., BERT, 2018; pooled as in Reimers and Gurevych, Sentence-BERT, 2019.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import sqrt

from ggml_cffi import ops
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.errors import FormatError, GgmlError
from ggml_cffi.models.architectures.base import Architecture, Inputs, LayerCache, Metadata

#: Where a converted model says after how many tokens sentence-transformers cuts a text. GGUF has no key for it.
LONGEST_TEXT = "sentence_transformers.max_seq_length"


class Bert(Architecture):
    """BERT and the sentence encoders made from it (all-MiniLM, bge, e5 and others)."""

    name = "bert"
    causal = False

    def read(self, meta: Metadata) -> None:
        self.n_layers = meta.positive("block_count")
        self.n_embd = meta.positive("embedding_length")
        self.n_ff = meta.positive("feed_forward_length")
        self.n_heads = meta.positive("attention.head_count")
        self.n_ctx_train = meta.positive("context_length")
        self.kv_sizes = (0, 0)
        self.eps = meta.get("attention.layer_norm_epsilon", float)
        if self.n_embd % self.n_heads or not self.eps >= 0:
            raise FormatError(f"{self.file.path}: {self.n_heads} heads or a norm's epsilon of {self.eps} cannot be")
        if meta.get("attention.causal", bool, False):
            raise FormatError(f"{self.file.path}: a BERT with causal attention is not supported")
        longest = self.file.metadata.get(LONGEST_TEXT, 0)
        if not isinstance(longest, int) or longest < 0:
            raise FormatError(f"{self.file.path}: {LONGEST_TEXT!r} is {longest!r}, not a number of tokens")
        self.longest_text = longest
        (self.n_vocab, _), (self.n_types, _) = self._table("token_embd.weight"), self._table("token_types.weight")

    def _table(self, name: str) -> tuple[int, ...]:
        shape = self.info(name).shape
        return shape if len(shape) == 2 else (0, 0)

    def expected_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        embd = self.n_embd

        def pair(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
            yield f"{name}.weight", shape
            yield f"{name}.bias", shape[:1]

        yield "token_embd.weight", (self.n_vocab, embd)
        yield "position_embd.weight", (self.n_ctx_train, embd)
        yield "token_types.weight", (self.n_types, embd)
        yield from pair("token_embd_norm", embd)
        for i in range(self.n_layers):
            for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
                yield from pair(f"blk.{i}.{name}", embd, embd)
            yield from pair(f"blk.{i}.attn_output_norm", embd)
            yield from pair(f"blk.{i}.ffn_up", self.n_ff, embd)
            yield from pair(f"blk.{i}.ffn_down", embd, self.n_ff)
            yield from pair(f"blk.{i}.layer_output_norm", embd)

    def embed(self, weights: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        # Every token is of type 0: pairs of texts, where the second would be of type 1, are for other tasks.
        first = inputs.tokens.context.constant([0], "i32")
        x = ops.get_rows(weights["token_embd.weight"], inputs.tokens)
        x = ops.add(x, ops.get_rows(weights["position_embd.weight"], inputs.positions))
        x = ops.add(x, ops.get_rows(weights["token_types.weight"], first))
        return self._norm("token_embd_norm", x, weights)

    def through(
        self,
        layers: Iterable[int],
        x: Tensor,
        weights: Mapping[str, Tensor],
        cache: Sequence[LayerCache],
        inputs: Inputs,
    ) -> Tensor:
        for i in layers:
            h = self._attention(i, x, weights, inputs.at(i).mask)
            if i == self.n_layers - 1 and inputs.wanted.shape != inputs.positions.shape:
                h, x = ops.get_rows(h, inputs.wanted), ops.get_rows(x, inputs.wanted)
            x = self._norm(f"blk.{i}.attn_output_norm", ops.add(x, h), weights)
            h = ops.gelu_erf(_linear(f"blk.{i}.ffn_up", x, weights))
            h = _linear(f"blk.{i}.ffn_down", h, weights)
            x = self._norm(f"blk.{i}.layer_output_norm", ops.add(x, h), weights)
            x.name = f"layer {i}"
        return x

    def logits(self, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        raise GgmlError(f"{self.file.path}: an encoder has no logits and generates no text; it is for embeddings")

    def _attention(self, i: int, x: Tensor, weights: Mapping[str, Tensor], mask: Tensor) -> Tensor:
        n, size = x.shape[0], self.n_embd // self.n_heads
        q, k, v = (
            ops.permute(ops.reshape(_linear(f"blk.{i}.attn_{part}", x, weights), (n, self.n_heads, size)), (1, 0, 2))
            for part in "qkv"
        )
        out = ops.flash_attn_ext(q, k, v, mask, scale=1.0 / sqrt(size))
        return _linear(f"blk.{i}.attn_output", ops.reshape(out, (n, self.n_embd)), weights)

    def _norm(self, name: str, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        scaled = ops.mul(ops.norm(x, self.eps), weights[f"{name}.weight"])
        return ops.add(scaled, weights[f"{name}.bias"])


def _linear(name: str, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    return ops.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])
