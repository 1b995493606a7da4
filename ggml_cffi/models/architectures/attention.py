"""Attention over the KV cache: writes of new keys and values, and the results of the tokens.

The tokens of a batch attend to the same KV slots, and a mask hides some of them. With
:attr:`~ggml_cffi.models.architectures.base.Inputs.query_ids` there is one token for each of several ranges of slots
instead: attention then is a batch of ranges, along the first axis of queries, keys and values.
"""

from __future__ import annotations

from ggml_cffi import ops
from ggml_cffi.core import dtypes
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.models.architectures.base import Inputs, KVResult, KVView, LayerCache
from ggml_cffi.ops.matmul import sum_in_f32

#: Queries of a tile of ggml's flash attention on a CPU, and the elements of a vector of the widest instructions.
_TILE, _VECTOR = 64, 16
_TILED = frozenset({Type.F16, Type.F32})


def store(cache: Tensor, new: Tensor, head_size: int, inputs: Inputs, mask: Tensor) -> Tensor:
    """Write ``new`` (n, heads * head_size) into the cache, and return the slots in use as (heads, n_kv, head_size).

    With ranges of slots, the result has a first axis of ranges.
    """
    return _slots_in_use(ops.set_rows(cache, new, inputs.kv_slots), head_size, inputs, mask)


def store_both(both: Tensor, new: Tensor, head_size: int, inputs: Inputs, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Write keys and values ``new`` (2, n, heads * head_size) at once; return for each what :func:`store` returns."""
    written = ops.set_rows(both, new, inputs.kv_slots)
    k, v = (_slots_in_use(written, head_size, inputs, mask, offset) for offset in (0, both.nb[2]))
    return k, v


def _slots_in_use(written: Tensor, head_size: int, inputs: Inputs, mask: Tensor, offset: int = 0) -> Tensor:
    """Return the slots in use of a written cache ``(..., n_ctx, heads * head_size)``, which begins at ``offset``."""
    dtype, slot_bytes = written.dtype, written.nb[1]
    shape: tuple[int, ...] = (mask.shape[-1], written.shape[-1] // head_size, head_size)
    strides: tuple[int, ...] = (slot_bytes, dtypes.row_size(dtype, head_size), dtypes.type_size(dtype))
    if inputs.n_ranges:
        used = ops.view(written, (inputs.n_ranges, *shape), strides=(0, *strides), offset=offset)
        by_head = ops.permute(used, (0, 2, 1, 3))
    else:
        used = ops.view(written, shape, strides=strides, offset=offset)
        by_head = ops.permute(used, (1, 0, 2))
    inputs.kv_views.extend((KVView(used, 2, slot_bytes), KVView(by_head, 1, slot_bytes)))
    return by_head


def store_transposed(cache: Tensor, new: Tensor, head_size: int, inputs: Inputs, mask: Tensor) -> Tensor:
    """Write ``new`` into a cache ``(size, n_ctx)``, and return the slots in use as (heads, head_size, n_kv).

    With ranges of slots, the result has a first axis of ranges.
    """
    (n, size), (_, n_ctx) = new.shape, cache.shape
    # set_rows writes whole rows: here each element is a row, and all `size` blocks use the same row numbers.
    elements = ops.view(new, (size, n, 1), strides=(new.nb[0], new.nb[1], new.nb[0]))
    written = ops.set_rows(ops.reshape(cache, (size, n_ctx, 1), ctx=new.context), elements, inputs.kv_slots)
    shape: tuple[int, ...] = (size // head_size, head_size, mask.shape[-1])
    strides: tuple[int, ...] = (head_size * cache.nb[1], cache.nb[1], cache.nb[0])
    if inputs.n_ranges:
        shape, strides = (inputs.n_ranges, *shape), (0, *strides)
    used = ops.view(written, shape, strides=strides)
    inputs.kv_views.append(KVView(used, 0, cache.nb[0]))
    return used


def attend(
    q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, inputs: Inputs, mask: Tensor, *, scale: float, cap: float = 0.0
) -> Tensor:
    """Return the attention of the queries: for each token the weighted mean of the values.

    Parameters
    ----------
    q
        Queries ``(n, heads, head_size)``, the heads of each token without gaps.
    k, v
        Results of :func:`store` and, if the cache is transposed, :func:`store_transposed`; or of :func:`store_both`.
    cache
        Cache of the layer.
    mask
        Mask of the layer.
    scale
        Factor of the scores.
    cap
        Soft cap of the scores: ``s`` becomes ``cap * tanh(s / cap)``; 0 for none.

    Returns
    -------
    Tensor
        ``(n, heads * v_size)``.
    """
    n, n_heads, head_size = q.shape
    if inputs.query_ids is None:
        out = _results(q, k, v, cache, inputs, mask, scale, cap)
        return ops.reshape(out, (n, -1))
    assert inputs.result_ids is not None
    q = ops.get_rows(ops.view(q, (n, n_heads * head_size), strides=(q.nb[2], q.nb[0])), inputs.query_ids)
    q = ops.reshape(q, (inputs.n_ranges, n_heads, head_size))
    out = _results(q, k, v, cache, inputs, mask, scale, cap)
    return ops.get_rows(ops.reshape(out, (inputs.n_ranges, -1)), inputs.result_ids)


def _results(
    q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, inputs: Inputs, mask: Tensor, scale: float, cap: float
) -> Tensor:
    """Return the contiguous results of queries ``(rows, heads, head_size)``, each row in turn."""
    rows, n_heads, head_size = q.shape
    is_tiled = _is_tiled(q, v, cache, inputs)
    if is_tiled or not cache.v_transposed:
        v = _by_slot(v, cache, inputs) if is_tiled else v
        q = ops.reshape(q, (rows, n_heads, 1, head_size)) if inputs.n_ranges else ops.permute(q, (1, 0, 2))
        return ops.flash_attn_ext(q, k, v, mask, scale=scale, logit_softcap=cap)
    n_kv_heads, n_kv = k.shape[-3], k.shape[-2]
    one_token = rows == max(inputs.n_ranges, 1)
    if one_token:  # the query heads of one KV head are rows of one product, which reads the keys once
        lead = (rows,) if inputs.n_ranges else ()
        q = ops.reshape(q, (*lead, n_heads, 1, head_size))
    else:
        q = ops.permute(q, (1, 0, 2))
    scores = sum_in_f32(ops.mul_mat(k, q))  # scores of some models exceed F16
    made = [scores]
    if one_token:
        made.append(ops.reshape(scores, (*lead, 1, n_heads, n_kv)))
    if cap:
        made.append(ops.scale(made[-1], scale / cap))
        made.append(ops.tanh(made[-1]))
        made.append(ops.scale(made[-1], cap))
    mask = _wide(mask, n_heads if one_token else 1, inputs)
    made.append(ops.soft_max_ext(made[-1], mask, scale=1.0 if cap else scale))
    if one_token:
        made.append(ops.reshape(made[-1], (*lead, n_kv_heads, n_heads // n_kv_heads, n_kv)))
    inputs.kv_results.extend(map(KVResult, made))
    out = ops.mul_mat(v, made[-1])
    return out if one_token else ops.cont(ops.permute(out, (1, 0, 2)))


def tiled_rows(head_size: int, v_size: int, dtype: Type) -> int:
    """Return the fewest tokens for which a CPU's flash attention is exact and faster than two products; 0 if none are.

    For as many rows as a tile has, a CPU sums in F32, and leaves out tiles that the mask hides; for fewer it sums in
    F16. Large heads need more rows to be faster (docs/tested.md).
    """
    return max(_TILE, head_size) if v_size % _VECTOR == 0 and dtype in _TILED else 0


def _is_tiled(q: Tensor, v: Tensor, cache: LayerCache, inputs: Inputs) -> bool:
    """Return whether flash attention is exact and faster than two products of queries ``(rows, heads, head_size)``."""
    rows, _, head_size = q.shape
    fewest = tiled_rows(head_size, v.shape[-2], cache.k.dtype)
    return 0 < fewest <= rows and cache.v_transposed and cache.tiled and not inputs.n_ranges


def _by_slot(v: Tensor, cache: LayerCache, inputs: Inputs) -> Tensor:
    """Return a copy of values ``(heads, head_size, n_kv)`` as ``(heads, n_kv, head_size)``."""
    by_slot = ops.permute(v, (0, 2, 1))
    copied = ops.cont(by_slot)
    inputs.kv_views.append(KVView(by_slot, 1, cache.v.nb[0]))
    inputs.kv_results.append(KVResult(copied, 1))
    return copied


def _wide(mask: Tensor, n_heads: int, inputs: Inputs) -> Tensor:
    """Return a mask in F32, with a row for each head if there is one token: softmax divides the rows among threads."""
    found = inputs.wide_masks.get(mask)
    if found is None:
        found = ops.cast(mask, Type.F32)
        inputs.kv_results.append(KVResult(found))
        if n_heads > 1:
            found = ops.repeat(found, (*mask.shape[:-2], n_heads, mask.shape[-1]))
            inputs.kv_results.append(KVResult(found))
        inputs.wide_masks[mask] = found
    return found
