"""Llama-like decoders: RMS norms, rotary positions, grouped-query attention and a gated feed-forward part.

A layer consists of two parts. :meth:`Decoder.attention` and :meth:`Decoder.feed_forward` map normalized tokens to a
contribution, which :meth:`Decoder.add` adds to the tokens. A part takes its number of heads or of feed-forward columns
from its weights. Each of several devices can therefore compute a shard of a part. An all-reduce sums the contributions
of the devices before they are added to the tokens.

The nodes are built in an order in which ggml's Vulkan backend fuses them: norm and weight; norm, weight, rotation and
the write to the cache; a product with one row and the additions after it. CUDA runs nodes one after another, so one
node rotates queries and keys there, and one writes keys and values (:attr:`LayerCache.both`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm, sqrt
from typing import ClassVar

from ggml_cffi import c, ops
from ggml_cffi.core.context import Context
from ggml_cffi.core.dtypes import block_size
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.errors import FormatError
from ggml_cffi.models.architectures.attention import attend, store, store_both, store_transposed, tiled_rows
from ggml_cffi.models.architectures.base import (
    Architecture,
    Inputs,
    LayerCache,
    Metadata,
    TensorParallelSpec,
    joined_name,
)
from ggml_cffi.ops import RopeMode
from ggml_cffi.parallel.shard import COLUMNS, ROWS, ShardSpec, split_evenly

_PROBED_SLOTS = 256  # KV slots of the attention about which devices are asked


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of queries and keys, with the parameters of :func:`~ggml_cffi.ops.rope_ext`."""

    mode: RopeMode
    n_dims: int
    freq_base: float
    freq_scale: float = 1.0
    n_ctx_orig: int = 0
    ext_factor: float = 0.0
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    @classmethod
    def read(cls, meta: Metadata, mode: RopeMode, head_size: int) -> Rope:
        """Return the rotary parameters of a model file.

        Raises
        ------
        FormatError
            If a number is impossible, or the type of scaling is unknown.
        """
        scaling = meta.get("rope.scaling.type", str, "linear")
        if scaling not in ("none", "linear", "yarn"):
            raise FormatError(f"{meta.file.path}: rope scaling {scaling!r} is not supported; none, linear and yarn are")
        old = meta.nonnegative("rope.scale_linear", 0.0)  # the key's name until 2023
        factor = meta.nonnegative("rope.scaling.factor", old)
        factor = 0.0 if scaling == "none" else factor
        rope = cls(
            mode,
            n_dims=meta.positive_int("rope.dimension_count", head_size),
            freq_base=meta.nonnegative("rope.freq_base", 10000.0),
            freq_scale=1.0 / factor if factor else 1.0,
            attn_factor=meta.nonnegative("rope.scaling.attn_factor", 1.0),
        )
        if scaling == "yarn":
            rope = replace(
                rope,
                n_ctx_orig=meta.positive_int(
                    "rope.scaling.original_context_length", meta.positive_int("context_length")
                ),
                ext_factor=meta.nonnegative("rope.scaling.yarn_ext_factor", 1.0),
                beta_fast=meta.nonnegative("rope.scaling.yarn_beta_fast", 32.0),
                beta_slow=meta.nonnegative("rope.scaling.yarn_beta_slow", 1.0),
            )
        if (
            rope.n_dims % 2
            or rope.n_dims > head_size
            or not rope.freq_base
            or (rope.ext_factor and not (rope.freq_base != 1 and rope.beta_fast and rope.beta_slow))
        ):
            raise FormatError(f"{meta.file.path}: impossible rotary parameters: {rope} for heads of {head_size}")
        return rope

    def __call__(self, x: Tensor, positions: Tensor, freq_factors: Tensor | None, *, in_place: bool = False) -> Tensor:
        """Rotate ``x`` ``(n, heads, head_size)``, each token by its position."""
        function = ops.rope_ext_inplace if in_place else ops.rope_ext
        return function(x, positions, freq_factors, **vars(self))


class Decoder(Architecture):
    """Base class of llama-like models. A subclass states its differences from llama."""

    rope_mode: ClassVar[RopeMode] = RopeMode.NORMAL
    """Elements of a head that form a pair of the rotation."""
    head_norms: ClassVar[bool] = False
    """True if each head of queries and keys is normalized."""
    post_norms: ClassVar[bool] = False
    """True if the contribution of each part is normalized before it is added to the tokens."""

    joined = (("attn_q", "attn_k", "attn_v"),)
    joined_on_cpu = (("ffn_gate", "ffn_up"),)
    harmless_keys = Architecture.harmless_keys | {
        "rope.scaling.yarn_ext_factor",  # read if the scaling is YaRN
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
    }

    n_heads: int
    """Number of query heads."""
    n_kv_heads: int
    """Number of key heads and of value heads; divides :attr:`n_heads`."""
    n_ff: int
    """Number of columns of the feed-forward part."""
    head_size: int
    """Number of elements of a query or key head."""
    v_size: int
    """Number of elements of a value head."""
    attention_cap: float = 0.0
    """Soft cap of the scores: ``s`` becomes ``cap * tanh(s / cap)``; 0 for none."""

    def read(self, meta: Metadata) -> None:
        self.n_layers = meta.positive_int("block_count")
        self.n_embd = meta.positive_int("embedding_length")
        self.n_ff = meta.positive_int("feed_forward_length")
        self.n_heads = meta.positive_int("attention.head_count")
        self.n_kv_heads = meta.positive_int("attention.head_count_kv", self.n_heads)
        self.n_ctx_train = meta.positive_int("context_length")
        if self.n_heads % self.n_kv_heads:
            raise FormatError(
                f"{self.file.path}: {self.n_heads} query heads are not a multiple of {self.n_kv_heads} KV heads"
            )
        self.head_size = meta.positive_int("attention.key_length", max(self.n_embd // self.n_heads, 1))
        self.v_size = meta.positive_int("attention.value_length", self.head_size)
        self.kv_sizes = (self.n_kv_heads * self.head_size, self.n_kv_heads * self.v_size)
        self.eps = meta.nonnegative("attention.layer_norm_rms_epsilon")
        self.scale = meta.nonnegative("attention.scale", 0.0) or 1.0 / sqrt(self.head_size)
        self.rope = Rope.read(meta, self.rope_mode, self.head_size)
        embeddings = self.tensor_info("token_embd.weight").shape
        self.n_vocab = embeddings[0] if len(embeddings) == 2 else 0

    def expected_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        embd, (k, v), q = self.n_embd, self.kv_sizes, self.n_heads * self.head_size
        yield "token_embd.weight", (self.n_vocab, embd)
        for i in range(self.n_layers):
            yield f"blk.{i}.attn_norm.weight", (embd,)
            for name, size in (("attn_q", q), ("attn_k", k), ("attn_v", v)):
                yield f"blk.{i}.{name}.weight", (size, embd)
                if f"blk.{i}.{name}.bias" in self.file.tensors:
                    yield f"blk.{i}.{name}.bias", (size,)
            if self.head_norms:
                yield f"blk.{i}.attn_q_norm.weight", (self.head_size,)
                yield f"blk.{i}.attn_k_norm.weight", (self.head_size,)
            yield f"blk.{i}.attn_output.weight", (embd, self.n_heads * self.v_size)
            yield f"blk.{i}.ffn_norm.weight", (embd,)
            yield f"blk.{i}.ffn_gate.weight", (self.n_ff, embd)
            yield f"blk.{i}.ffn_up.weight", (self.n_ff, embd)
            yield f"blk.{i}.ffn_down.weight", (embd, self.n_ff)
            if self.post_norms:
                yield f"blk.{i}.post_attention_norm.weight", (embd,)
                yield f"blk.{i}.post_ffw_norm.weight", (embd,)
        if "rope_freqs.weight" in self.file.tensors:
            yield "rope_freqs.weight", (self.rope.n_dims // 2,)
        yield "output_norm.weight", (embd,)
        yield self.output_tensor, (self.n_vocab, embd)

    def build_layers(
        self,
        layers: Iterable[int],
        x: Tensor,
        weights: Mapping[str, Tensor],
        cache: Sequence[LayerCache],
        inputs: Inputs,
    ) -> Tensor:
        for i in layers:
            part = self.attention(
                i, self.norm(f"blk.{i}.attn_norm", x, weights), weights, cache[i], inputs.for_layer(i)
            )
            if i == self.n_layers - 1 and inputs.output_ids.shape != inputs.positions.shape:
                # After the last attention, only the tokens with an output matter.
                part, x = ops.get_rows(part, inputs.output_ids), ops.get_rows(x, inputs.output_ids)
            x = self.add("attention", part, x, f"blk.{i}.post_attention_norm", weights, inputs)
            part = self.feed_forward(i, self.norm(f"blk.{i}.ffn_norm", x, weights), weights)
            x = self.add("feed_forward", part, x, f"blk.{i}.post_ffw_norm", weights, inputs)
            x.name = f"layer {i}"
        return x

    def final_norm(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return self.norm("output_norm", x, weights)

    def tensor_parallel(self, n: int, *, whole_attention: bool = False) -> TensorParallelSpec:
        """Divide the KV heads, with their query heads, and the feed-forward columns among ``n`` devices.

        With fewer KV heads than devices, each device computes the whole attention.
        """
        shards: dict[str, ShardSpec] = {"output.weight": ROWS}
        columns = self.n_heads // self.n_kv_heads * self.v_size  # columns of attn_output for one KV head
        whole = lcm(self._block("attn_output"), columns) // columns  # KV heads that fill whole quantization blocks
        heads: tuple[int, ...] = ()
        if not whole_attention and -(-self.n_kv_heads // whole) >= n:
            heads = split_evenly(self.n_kv_heads, n, whole=whole)
            shards |= {f"*.attn_{x}.{kind}": ROWS.of(*heads) for x in "qkv" for kind in ("weight", "bias")}
            shards["*.attn_output.weight"] = COLUMNS.of(*heads)
        what = f"{self.file.path}: the feed-forward part"
        parts = split_evenly(self.n_ff // self._block("ffn_down"), n, what)
        shards |= {"*.ffn_gate.weight": ROWS.of(*parts), "*.ffn_up.weight": ROWS.of(*parts)}
        shards["*.ffn_down.weight"] = COLUMNS.of(*parts)
        return TensorParallelSpec(shards, frozenset(["attention", "feed_forward"] if heads else ["feed_forward"]))

    def _block(self, name: str) -> int:
        """Return the number of columns of a weight that must stay together on one device in every layer."""
        return lcm(*(block_size(self.tensor_info(f"blk.{i}.{name}.weight").dtype) for i in range(self.n_layers)))

    def flash_attention(self, context: Context, dtype: Type) -> Tensor:
        q = context.new_tensor(Type.F32, (self.n_heads, 1, self.head_size))
        k, v = (context.new_tensor(dtype, (self.n_kv_heads, _PROBED_SLOTS, n)) for n in (self.head_size, self.v_size))
        mask = context.new_tensor(Type.F16, (1, _PROBED_SLOTS))
        return ops.flash_attn_ext(q, k, v, mask, scale=self.scale, logit_softcap=self.attention_cap)

    def tiled_rows(self, dtype: Type) -> int:
        return tiled_rows(self.head_size, self.v_size, dtype)

    def embed(self, weights: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        return ops.get_rows(weights["token_embd.weight"], inputs.tokens)

    def norm(self, name: str, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Divide ``x`` by the root mean square of its last axis, and multiply it by the weight of that name."""
        return ops.mul(ops.rms_norm(x, self.eps), weights[f"{name}.weight"])

    def add(
        self,
        part: str,
        contribution: Tensor,
        x: Tensor,
        post_norm: str,
        weights: Mapping[str, Tensor],
        inputs: Inputs,
    ) -> Tensor:
        """Add the contribution of a part of a layer to the tokens ``x``, normalized first in some architectures."""
        if self.post_norms:
            return ops.add(x, self.norm(post_norm, inputs.all_reduced(part, contribution), weights))
        return inputs.all_reduced(part, contribution, x)

    def is_local(self, i: int) -> bool:
        """Return True if layer ``i`` attends to the last :attr:`window` tokens only."""
        return False

    def layer_rope(self, i: int) -> Rope:
        """Return the rotary embedding of layer ``i``."""
        return self.rope

    def attention(self, i: int, h: Tensor, weights: Mapping[str, Tensor], cache: LayerCache, inputs: Inputs) -> Tensor:
        """Compute the contribution of the attention of layer ``i`` to the tokens.

        Parameters
        ----------
        h
            Normalized tokens, ``(n, n_embd)``.
        weights
            Weights of the layer. They may be a shard: rows of ``attn_q``, ``attn_k`` and ``attn_v``, and columns of
            ``attn_output``, for some of the heads. The result is then the contribution of these heads.
        cache
            Cache of the layer, for the same heads.

        Returns
        -------
        Tensor
            ``(n, n_embd)``.

        Raises
        ------
        ValueError
            If the layer has a sliding window, but ``inputs`` has no mask for it.
        """
        n = h.shape[0]
        mask = inputs.window_mask if self.is_local(i) else inputs.mask
        if mask is None:
            raise ValueError(f"layer {i} has a sliding window of {self.window} tokens: set inputs.window_mask")
        if cache.both is not None:
            q, k, v = self._stored_at_once(i, h, weights, cache.both, inputs, mask)
        else:
            q, k, v = self._products(i, self.joined[0], h, weights)
            q = self._rotated(i, "attn_q", q, weights, inputs)
            k = self._rotated(i, "attn_k", k, weights, inputs)
            # Backends fuse rotation, view and write to the cache into one step, but not with a reshape.
            k = store(cache.k, ops.view(k, (n, k.shape[1] * k.shape[2])), self.head_size, inputs, mask)
            v = (store_transposed if cache.v_transposed else store)(cache.v, v, self.v_size, inputs, mask)
        out = attend(q, k, v, cache, inputs, mask, scale=self.scale, cap=self.attention_cap)
        return ops.mul_mat(weights[f"blk.{i}.attn_output.weight"], out)

    def feed_forward(self, i: int, h: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Compute the contribution of the feed-forward part of layer ``i`` to the tokens.

        Parameters
        ----------
        h
            Normalized tokens, ``(n, n_embd)``.
        weights
            Weights of the layer. They may be a shard: some rows of ``ffn_gate`` and ``ffn_up``, and the same columns of
            ``ffn_down``. The result is then the contribution of these columns.

        Returns
        -------
        Tensor
            ``(n, n_embd)``.
        """
        gate, up = self._products(i, self.joined_on_cpu[0], h, weights)
        return ops.mul_mat(weights[f"blk.{i}.ffn_down.weight"], self.gated(gate, up))

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """Apply the gated linear unit of the feed-forward part."""
        return ops.swiglu_split(gate, up)

    def writes_at_once(self, layer: int, weights: Mapping[str, Tensor]) -> bool:
        """See :meth:`Architecture.writes_at_once`: one product has queries, keys and values, and heads no norm."""
        return (
            not self.head_norms
            and self.head_size == self.v_size
            and joined_name(layer, self.joined[0], "weight") in weights
        )

    def _stored_at_once(
        self, i: int, h: Tensor, weights: Mapping[str, Tensor], both: Tensor, inputs: Inputs, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, and the keys and values in use, after writing new ones into the cache ``both``.

        One node rotates queries and keys in their product, and one writes keys and values.
        """
        whole = self._product(joined_name(i, self.joined[0], "{}"), h, weights)
        n, size = h.shape[0], both.shape[-1]
        step, row = self.head_size * whole.nb[0], whole.nb[1]
        n_q, n_k = whole.shape[1] // self.head_size - 2 * (size // self.head_size), size // self.head_size
        heads = ops.view(whole, (n, n_q + n_k, self.head_size), strides=(row, step, whole.nb[0]))
        turned = self.layer_rope(i)(heads, inputs.positions, weights.get("rope_freqs.weight"), in_place=True)
        q = ops.view(turned, (n, n_q, self.head_size), strides=(row, step, whole.nb[0]))
        # The values lie behind what the rotation covers, in the memory of the product: ops.view refuses that.
        place = size, n, 2, row, n_k * step, n_q * step
        new = turned.context.build(c.ggml_view_3d, 3, turned.ptr, *place)
        return q, *store_both(both, new, self.head_size, inputs, mask)

    def _products(self, i: int, names: tuple[str, ...], h: Tensor, weights: Mapping[str, Tensor]) -> list[Tensor]:
        """Multiply ``h`` by each of some weights of layer ``i``, at once by the first ones if they are joined.

        Returns
        -------
        list of Tensor
            For each name ``(n, rows)``, F32. The rows of a tensor may have gaps between them.
        """
        n_joined = next((k for k in range(len(names), 1, -1) if joined_name(i, names[:k], "weight") in weights), 1)
        whole = self._product(joined_name(i, names[:n_joined], "{}"), h, weights)
        found, offset = [], 0
        for name in names[:n_joined]:
            size = weights[f"blk.{i}.{name}.weight"].shape[0]
            strides = (whole.nb[1], whole.nb[0])
            found.append(
                whole if n_joined == 1 else ops.view(whole, (h.shape[0], size), strides=strides, offset=offset)
            )
            offset += size * whole.nb[0]
        return found + [self._product(f"blk.{i}.{name}.{{}}", h, weights) for name in names[n_joined:]]

    def _product(self, name: str, h: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return ops.linear(h, weights[name.format("weight")], weights.get(name.format("bias")))

    def _rotated(self, i: int, name: str, x: Tensor, weights: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        """Return the rotated queries or keys ``(n, heads, head_size)`` of ``x``, ``(n, heads * head_size)``."""
        shape = (x.shape[0], x.shape[1] // self.head_size, self.head_size)
        x = ops.view(x, shape, strides=(x.nb[1], self.head_size * x.nb[0], x.nb[0]))
        if self.head_norms:
            x = self.norm(f"blk.{i}.{name}_norm", x, weights)
        return self.layer_rope(i)(x, inputs.positions, weights.get("rope_freqs.weight"))
