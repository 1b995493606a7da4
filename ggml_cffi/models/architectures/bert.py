"""BERT, an encoder for embeddings: each token attends to the whole text.

Source: Devlin et al., BERT, 2018; pooling as in Reimers and Gurevych, Sentence-BERT, 2019.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import sqrt

from ggml_cffi import ops
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.errors import FormatError
from ggml_cffi.models.architectures.base import Architecture, Inputs, LayerCache, Metadata

#: Key of a converted model for the number of tokens at which sentence-transformers cuts a text. GGUF defines none.
MAX_SEQUENCE_LENGTH = "sentence_transformers.max_seq_length"


class Bert(Architecture):
    """BERT and the sentence encoders made from it (all-MiniLM, bge, e5 and others)."""

    name = "bert"
    causal = False

    def read(self, meta: Metadata) -> None:
        self.n_layers = meta.positive_int("block_count")
        self.n_embd = meta.positive_int("embedding_length")
        self.n_ff = meta.positive_int("feed_forward_length")
        self.n_heads = meta.positive_int("attention.head_count")
        self.n_ctx_train = meta.positive_int("context_length")
        self.kv_sizes = (0, 0)
        self.eps = meta.get("attention.layer_norm_epsilon", float)
        if self.n_embd % self.n_heads or not self.eps >= 0:
            raise FormatError(
                f"{self.file.path}: {self.n_heads} heads for {self.n_embd} elements, or a norm's epsilon of "
                f"{self.eps}, are impossible"
            )
        longest = self.file.metadata.get(MAX_SEQUENCE_LENGTH, 0)
        if not isinstance(longest, int) or longest < 0:
            raise FormatError(f"{self.file.path}: {MAX_SEQUENCE_LENGTH!r} is {longest!r}, not a number of tokens")
        self.max_sequence_length = longest
        (self.n_vocab, _), (self.n_types, _) = self._table("token_embd.weight"), self._table("token_types.weight")

    harmless_keys = Architecture.harmless_keys | {
        "token_type_count",  # the table of types has as many rows
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "rope.freq_base",
    }

    def is_ignored(self, tensor: str) -> bool:
        return tensor.startswith("cls.")  # the head of a classifier, after the embedding

    def _table(self, name: str) -> tuple[int, ...]:
        shape = self.tensor_info(name).shape
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
        # Type 1 marks the second text of a pair, which tasks other than embedding use.
        first = inputs.tokens.context.constant([0], "i32")
        x = ops.get_rows(weights["token_embd.weight"], inputs.tokens)
        x = ops.add(x, ops.get_rows(weights["position_embd.weight"], inputs.positions))
        x = ops.add(x, ops.get_rows(weights["token_types.weight"], first))
        return self._norm("token_embd_norm", x, weights)

    def build_layers(
        self,
        layers: Iterable[int],
        x: Tensor,
        weights: Mapping[str, Tensor],
        cache: Sequence[LayerCache],
        inputs: Inputs,
    ) -> Tensor:
        for i in layers:
            h = self._attention(i, x, weights, inputs.for_layer(i).mask)
            if i == self.n_layers - 1 and inputs.output_ids.shape != inputs.positions.shape:
                h, x = ops.get_rows(h, inputs.output_ids), ops.get_rows(x, inputs.output_ids)
            x = self._norm(f"blk.{i}.attn_output_norm", ops.add(x, h), weights)
            h = ops.gelu_erf(_linear(f"blk.{i}.ffn_up", x, weights))
            h = _linear(f"blk.{i}.ffn_down", h, weights)
            x = self._norm(f"blk.{i}.layer_output_norm", ops.add(x, h), weights)
            x.name = f"layer {i}"
        return x

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
