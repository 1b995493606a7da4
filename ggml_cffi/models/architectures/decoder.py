"""What llama-like decoders share: RMS norms, rotary positions, grouped-query attention, a gated feed-forward part.

A layer is built from parts that can be used one by one: :meth:`Decoder.attention` and :meth:`Decoder.feed_forward` go
from normalized tokens to what is added to them, :meth:`Decoder.add` adds it. The parts take their number of heads and
of feed-forward columns from the weights that they are given, so that several devices can each compute a slice of a
part, whose results are summed before they are added.

The order of the nodes is one that ggml's Vulkan backend fuses: norm and weight; norm, weight, rotation and the write to
the cache; a product with one row and the additions after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm, sqrt
from typing import ClassVar

from ggml_cffi import ops
from ggml_cffi.core import dtypes
from ggml_cffi.core.dtypes import block_size
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.errors import FormatError
from ggml_cffi.files.gguf.reader import GGUFFile
from ggml_cffi.models.architectures.base import Architecture, Inputs, LayerCache, Metadata, TensorParallelSpec
from ggml_cffi.ops import RopeMode
from ggml_cffi.parallel.shard import COLUMNS, ROWS, ShardSpec, split_evenly


@dataclass(frozen=True)
class Rope:
    """How queries and keys are rotated; :func:`~ggml_cffi.ops.rope_ext` says what the numbers mean."""

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
        """What a model file says.

        Raises
        ------
        FormatError
            If the numbers are impossible, or the scaling is of an unknown kind.
        """
        scaling = meta.get("rope.scaling.type", str, "linear")
        if scaling not in ("none", "linear", "yarn"):
            raise FormatError(f"{meta.file.path}: rope scaling {scaling!r} is not supported; none, linear and yarn are")
        factor = meta.at_least_0("rope.scaling.factor", 0.0) if scaling != "none" else 0.0
        rope = cls(
            mode,
            n_dims=meta.positive("rope.dimension_count", head_size),
            freq_base=meta.at_least_0("rope.freq_base", 10000.0),
            freq_scale=1.0 / factor if factor else 1.0,
        )
        if scaling == "yarn":
            rope = replace(
                rope,
                n_ctx_orig=meta.positive("rope.scaling.original_context_length", meta.positive("context_length")),
                ext_factor=meta.at_least_0("rope.scaling.yarn_ext_factor", 1.0),
                attn_factor=meta.at_least_0("rope.scaling.attn_factor", 1.0),
                beta_fast=meta.at_least_0("rope.scaling.yarn_beta_fast", 32.0),
                beta_slow=meta.at_least_0("rope.scaling.yarn_beta_slow", 1.0),
            )
        if (
            rope.n_dims % 2
            or rope.n_dims > head_size
            or not rope.freq_base
            or (rope.ext_factor and not (rope.freq_base != 1 and rope.beta_fast and rope.beta_slow))
        ):
            raise FormatError(f"{meta.file.path}: impossible rotary parameters: {rope} for heads of {head_size}")
        return rope

    def __call__(self, x: Tensor, positions: Tensor, freq_factors: Tensor | None) -> Tensor:
        """``x`` ``(n, heads, head_size)``, each token rotated by its position."""
        return ops.rope_ext(x, positions, freq_factors, **vars(self))


class Decoder(Architecture):
    """Llama-like models. A subclass says in what it differs from llama.

    Raises
    ------
    FormatError
        Also if the file has tensors that the graph does not use: leaving them out would give wrong answers.
    """

    rope_mode: ClassVar[RopeMode] = RopeMode.NORMAL
    """Which elements of a head are rotated together."""
    head_norms: ClassVar[bool] = False
    """Whether each head of queries and keys is normalized."""
    post_norms: ClassVar[bool] = False
    """Whether what a part adds to the tokens is normalized."""

    n_heads: int
    """Heads of queries."""
    n_kv_heads: int
    """Heads of keys and of values; divides :attr:`n_heads`."""
    n_ff: int
    """Columns of the feed-forward part."""
    head_size: int
    """Elements of a head of queries or keys."""
    v_size: int
    """Elements of a head of values."""
    attention_cap: float = 0.0
    """Scores ``s`` become ``cap * tanh(s / cap)``; 0 for none."""

    def __init__(self, file: GGUFFile) -> None:
        super().__init__(file)
        unknown = file.tensors.keys() - self.shapes.keys()
        if unknown:
            raise FormatError(
                f"{file.path}: {len(unknown)} tensors are not known to architecture {self.name}, such as "
                f"{min(unknown)!r}: without them the results would be wrong"
            )

    def read(self, meta: Metadata) -> None:
        self.n_layers = meta.positive("block_count")
        self.n_embd = meta.positive("embedding_length")
        self.n_ff = meta.positive("feed_forward_length")
        self.n_heads = meta.positive("attention.head_count")
        self.n_kv_heads = meta.positive("attention.head_count_kv", self.n_heads)
        self.n_ctx_train = meta.positive("context_length")
        if self.n_heads % self.n_kv_heads:
            raise FormatError(f"{self.file.path}: {self.n_heads} heads are no multiple of {self.n_kv_heads} KV heads")
        if meta.get("expert_count", int, 0):
            raise FormatError(f"{self.file.path}: mixtures of experts are not supported yet")
        self.head_size = meta.positive("attention.key_length", max(self.n_embd // self.n_heads, 1))
        self.v_size = meta.positive("attention.value_length", self.head_size)
        self.kv_sizes = (self.n_kv_heads * self.head_size, self.n_kv_heads * self.v_size)
        self.eps = meta.at_least_0("attention.layer_norm_rms_epsilon")
        self.scale = meta.at_least_0("attention.scale", 0.0) or 1.0 / sqrt(self.head_size)
        self.rope = Rope.read(meta, self.rope_mode, self.head_size)
        embeddings = self.info("token_embd.weight").shape
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

    def through(
        self,
        layers: Iterable[int],
        x: Tensor,
        weights: Mapping[str, Tensor],
        cache: Sequence[LayerCache],
        inputs: Inputs,
    ) -> Tensor:
        for i in layers:
            part = self.attention(i, self.norm(f"blk.{i}.attn_norm", x, weights), weights, cache[i], inputs.at(i))
            if i == self.n_layers - 1 and inputs.wanted.shape != inputs.positions.shape:
                # The rest only for the tokens whose results are wanted.
                part, x = ops.get_rows(part, inputs.wanted), ops.get_rows(x, inputs.wanted)
            x = self.add(f"blk.{i}.post_attention_norm", x, inputs.added("attention", part), weights)
            part = self.feed_forward(i, self.norm(f"blk.{i}.ffn_norm", x, weights), weights)
            x = self.add(f"blk.{i}.post_ffw_norm", x, inputs.added("feed_forward", part), weights)
            x.name = f"layer {i}"
        return x

    def finish(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return self.norm("output_norm", x, weights)

    def tensor_parallel(self, n: int, *, whole_attention: bool = False) -> TensorParallelSpec:
        """Each device has some KV heads with their query heads, and columns of the feed-forward part.

        Where there are fewer KV heads than devices, attention is computed by all of them.
        """
        cuts: dict[str, ShardSpec] = {"output.weight": ROWS}
        columns = self.n_heads // self.n_kv_heads * self.v_size  # of attn_output, to a KV head
        whole = lcm(self._block("attn_output"), columns) // columns  # KV heads that make whole blocks
        heads: tuple[int, ...] = ()
        if not whole_attention and -(-self.n_kv_heads // whole) >= n:
            heads = split_evenly(self.n_kv_heads, n, whole=whole)
            cuts |= {f"*.attn_{x}.{kind}": ROWS.of(*heads) for x in "qkv" for kind in ("weight", "bias")}
            cuts["*.attn_output.weight"] = COLUMNS.of(*heads)
        what = f"{self.file.path}: the feed-forward part"
        parts = split_evenly(self.n_ff // self._block("ffn_down"), n, what)
        cuts |= {"*.ffn_gate.weight": ROWS.of(*parts), "*.ffn_up.weight": ROWS.of(*parts)}
        cuts["*.ffn_down.weight"] = COLUMNS.of(*parts)
        return TensorParallelSpec(cuts, frozenset(["attention", "feed_forward"] if heads else ["feed_forward"]))

    def _block(self, name: str) -> int:
        """Columns of a weight that stay together, in all layers."""
        return lcm(*(block_size(self.info(f"blk.{i}.{name}.weight").dtype) for i in range(self.n_layers)))

    def embed(self, weights: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        return ops.get_rows(weights["token_embd.weight"], inputs.tokens)

    def norm(self, name: str, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """``x`` divided by the root of the mean square of its last axis, times the weight of that name."""
        return ops.mul(ops.rms_norm(x, self.eps), weights[f"{name}.weight"])

    def add(self, post_norm: str, x: Tensor, part: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Tokens ``x`` and what a part of a layer adds to them, which goes through a norm in some architectures."""
        return ops.add(x, self.norm(post_norm, part, weights) if self.post_norms else part)

    def is_local(self, i: int) -> bool:
        """Whether layer ``i`` looks back at :attr:`window` tokens only."""
        return False

    def layer_rope(self, i: int) -> Rope:
        """How layer ``i`` rotates."""
        return self.rope

    def attention(self, i: int, h: Tensor, weights: Mapping[str, Tensor], cache: LayerCache, inputs: Inputs) -> Tensor:
        """What the attention of layer ``i`` adds to the tokens.

        Parameters
        ----------
        h
            Normalized tokens, ``(n, n_embd)``.
        weights
            Those of the layer; with rows of ``attn_q``, ``attn_k`` and ``attn_v``, and columns of ``attn_output``, for
            some of the heads only, the sum is over these.
        cache
            The layer's, for as many heads.

        Returns
        -------
        Tensor
            ``(n, n_embd)``.

        Raises
        ------
        ValueError
            If the layer has a sliding window, and ``inputs`` no mask for it.
        """
        n = h.shape[0]
        mask = inputs.near if self.is_local(i) else inputs.mask
        if mask is None:
            raise ValueError(f"layer {i} has a sliding window of {self.window} tokens: inputs.near must be given")
        q = self._heads(i, "attn_q", h, weights, inputs)
        k = self._heads(i, "attn_k", h, weights, inputs)
        # A view, not a reshape: from the rotation, over the view, into the cache is one step for the Vulkan backend.
        k = _cached(cache.k, ops.view(k, (n, k.shape[1] * k.shape[2])), self.head_size, inputs.rows, mask)
        v = self._project(i, "attn_v", h, weights)
        q = ops.permute(q, (1, 0, 2))
        if cache.across:
            v = _cached_across(cache.v, v, self.v_size, inputs.rows, mask)
            scores = ops.mul_mat(k, q)
            if self.attention_cap:
                scores = ops.scale(ops.tanh(ops.scale(scores, self.scale / self.attention_cap)), self.attention_cap)
            p = ops.soft_max_ext(scores, mask, scale=1.0 if self.attention_cap else self.scale)
            out = ops.cont(ops.permute(ops.mul_mat(v, p), (1, 0, 2)))
        else:
            v = _cached(cache.v, v, self.v_size, inputs.rows, mask)
            out = ops.flash_attn_ext(q, k, v, mask, scale=self.scale, logit_softcap=self.attention_cap)
        return ops.mul_mat(weights[f"blk.{i}.attn_output.weight"], ops.reshape(out, (n, -1)))

    def feed_forward(self, i: int, h: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """What the feed-forward part of layer ``i`` adds to the tokens.

        Parameters
        ----------
        h
            Normalized tokens, ``(n, n_embd)``.
        weights
            Those of the layer; with some of the rows of ``ffn_gate`` and ``ffn_up``, and the same columns of
            ``ffn_down``, the sum is over these.

        Returns
        -------
        Tensor
            ``(n, n_embd)``.
        """
        gate = ops.mul_mat(weights[f"blk.{i}.ffn_gate.weight"], h)
        up = ops.mul_mat(weights[f"blk.{i}.ffn_up.weight"], h)
        return ops.mul_mat(weights[f"blk.{i}.ffn_down.weight"], self.gated(gate, up))

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """The gated linear unit of the feed-forward part."""
        return ops.swiglu_split(gate, up)

    def _project(self, i: int, name: str, h: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return ops.linear(h, weights[f"blk.{i}.{name}.weight"], weights.get(f"blk.{i}.{name}.bias"))

    def _heads(self, i: int, name: str, h: Tensor, weights: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        """Queries or keys ``(n, heads, head_size)``, rotated."""
        x = ops.reshape(self._project(i, name, h, weights), (h.shape[0], -1, self.head_size))
        if self.head_norms:
            x = self.norm(f"blk.{i}.{name}_norm", x, weights)
        return self.layer_rope(i)(x, inputs.positions, weights.get("rope_freqs.weight"))


def _cached(cache: Tensor, new: Tensor, head_size: int, rows: Tensor, mask: Tensor) -> Tensor:
    """Write ``new`` (n, heads * head_size) into the cache; what the tokens may look at, as (heads, n_kv, head_size)."""
    written = ops.set_rows(cache, new, rows)
    heads = new.shape[1] // head_size
    strides = (cache.nb[1], dtypes.row_size(cache.dtype, head_size), dtypes.type_size(cache.dtype))
    return ops.permute(ops.view(written, (mask.shape[1], heads, head_size), strides=strides), (1, 0, 2))


def _cached_across(cache: Tensor, new: Tensor, head_size: int, rows: Tensor, mask: Tensor) -> Tensor:
    """As :func:`_cached` for a cache ``(size, n_ctx)``: what the tokens may look at, as (heads, head_size, n_kv)."""
    (n, size), (_, n_ctx) = new.shape, cache.shape
    # Each element is a row of its own, and each of `size` blocks of rows takes its elements at the same row numbers.
    elements = ops.view(new, (size, n, 1), strides=(new.nb[0], new.nb[1], new.nb[0]))
    written = ops.set_rows(ops.reshape(cache, (size, n_ctx, 1), ctx=new.context), elements, rows)
    strides = (head_size * cache.nb[1], cache.nb[1], cache.nb[0])
    return ops.view(written, (size // head_size, head_size, mask.shape[1]), strides=strides)
