"""Operations of DeepSeek's models: the lightning indexer, and hyper-connections between layers."""

from __future__ import annotations

from ggml_cffi import c
from ggml_cffi.c import library
from ggml_cffi.core.context import Context
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.ops._operands import check_result, contiguous_rows, need_axes, need_rows, op_error, result_context
from ggml_cffi.ops._parameters import INT_MAX, check_integer, check_real

__all__ = [
    "dsv4_hc_comb",
    "dsv4_hc_post",
    "dsv4_hc_pre",
    "dsv4_hc_pre_gated",
    "lightning_indexer",
]

_STREAMS = 4  # the only number of hyper-connection streams that ggml's dsv4_hc_comb supports
_MIXES = (2 + _STREAMS) * _STREAMS


def lightning_indexer(q: Tensor, k: Tensor, weights: Tensor, mask: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Score each key for each token, over all heads: ``sum_h weights[t, h] * relu(q[t, h] @ k[n]) + mask[t, n]``.

    Parameters
    ----------
    q
        ``(n_tokens, n_heads, head_size)``, F32 with contiguous rows. All operands may have a leading axis of sequences.
    k
        ``(n_kv, 1, head_size)``, float or quantized, contiguous rows.
    weights
        ``(n_tokens, n_heads)``; with sequences ``(n_seqs, 1, n_tokens, n_heads)``. F32 with contiguous rows.
    mask
        ``(n_tokens, n_kv)``; with sequences ``(n, 1, n_tokens, n_kv)``, where ``n`` divides ``n_seqs``; sequence
        ``s`` uses mask ``s % n``. F16 with contiguous rows.

    Returns
    -------
    Tensor
        ``(n_tokens, n_kv)``, with sequences ``(n_seqs, 1, n_tokens, n_kv)``, F32.

    Raises
    ------
    ValueError
        If shapes, types or layouts do not fit.

    C: ``ggml_lightning_indexer``. Source: DeepSeek-AI, DeepSeek-V3.2, 2025.
    """
    op = "lightning_indexer"
    ctx = result_context(op, q, k, weights, mask, ctx=ctx)
    operands = {"q": q, "k": k, "weights": weights, "mask": mask}
    batched = q.ndim == 4
    need_axes(op, 4 if batched else 3, q=q, k=k)
    need_axes(op, 4 if batched else 2, weights=weights, mask=mask)
    need_rows(op, q=q, weights=weights)
    if k.dtype is not Type.F32 and not c.ggml_get_type_traits(k.dtype).to_float:
        raise op_error(op, "k must be float or quantized", **operands)
    if mask.dtype is not Type.F16 or not contiguous_rows(mask) or not contiguous_rows(k):
        raise op_error(op, "mask must be F16, and the rows of mask and k contiguous (use cont)", **operands)
    head_size, heads, tokens, n_seqs = q.ne
    n_kv = k.ne[2]
    if k.ne != (head_size, 1, n_kv, n_seqs) or weights.ne != (heads, tokens, 1, n_seqs):
        raise op_error(op, "k and weights do not fit q", **operands)
    if mask.ne[:3] != (n_kv, tokens, 1) or not mask.ne[3] or n_seqs % mask.ne[3]:
        raise op_error(op, "mask does not fit q and k", **operands)
    if max(head_size, heads, tokens, n_kv, n_seqs) > INT_MAX:
        raise op_error(op, "there is a size of more than 2**31 - 1", **operands)
    check_result(op, (n_kv, tokens, 1, n_seqs))
    return ctx.build(c.ggml_lightning_indexer, 4 if batched else 2, q.ptr, k.ptr, weights.ptr, mask.ptr)


def dsv4_hc_comb(
    mixes: Tensor, scale: Tensor, base: Tensor, *, eps: float = 1e-6, n_iter: int = 20, ctx: Context | None = None
) -> Tensor:
    """Compute the 4 x 4 weights of hyper-connections, from the streams before a layer to those after it, for each
    token.

    The last 16 elements of ``mixes * scale[2] + base`` are four rows, one for each stream before the layer. Each row
    becomes ``softmax(row) + eps``. Then columns and rows in turn are divided by their sums plus ``eps``: the columns
    ``n_iter`` times, the rows ``n_iter - 1`` times.

    Parameters
    ----------
    mixes
        ``(n_tokens, 24)``, F32.
    scale
        ``(3,)`` or longer, F32. Only the third element is used.
    base
        ``(24,)``, F32.
    eps
        Added to each weight and sum.
    n_iter
        At least 1.

    Returns
    -------
    Tensor
        ``(n_tokens, 4, 4)``, F32: axes of the streams before and after the layer.

    Raises
    ------
    ValueError
        If shapes, types or parameters do not fit.

    C: ``ggml_dsv4_hc_comb``. Source: Xie et al., mHC: Manifold-Constrained Hyper-Connections, 2025.
    """
    op = "dsv4_hc_comb"
    ctx = result_context(op, mixes, scale, base, ctx=ctx)
    _need_f32(op, mixes=mixes, scale=scale, base=base)
    if mixes.ndim != 2 or mixes.ne[0] != _MIXES or base.shape != (_MIXES,):
        raise op_error(op, f"mixes must be of shape (n_tokens, {_MIXES}) and base ({_MIXES},)", mixes=mixes, base=base)
    if scale.ndim != 1 or scale.ne[0] < 3:
        raise op_error(op, "scale must be a vector of at least 3", scale=scale)
    eps, n_iter = check_real(op, "eps", eps, lowest=0.0), check_integer(op, "n_iter", n_iter, 1)
    check_result(op, (_STREAMS, _STREAMS, mixes.ne[1]))
    return ctx.build(c.ggml_dsv4_hc_comb, 3, mixes.ptr, scale.ptr, base.ptr, eps, n_iter)


def dsv4_hc_pre(x: Tensor, weights: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute the input of a layer with hyper-connections: ``out[t] = weights[t] @ x[t]``.

    Parameters
    ----------
    x
        ``(n_tokens, n_streams, n_embd)``, F32.
    weights
        ``(n_tokens, n_streams)``, F32.

    Returns
    -------
    Tensor
        ``(n_tokens, n_embd)``, F32.

    Raises
    ------
    ValueError
        If shapes or types do not fit.

    C: ``ggml_dsv4_hc_pre``. Source: Xie et al., mHC: Manifold-Constrained Hyper-Connections, 2025.
    """
    op = "dsv4_hc_pre"
    ctx = result_context(op, x, weights, ctx=ctx)
    _need_f32(op, x=x, weights=weights)
    if x.ndim != 3 or not x.ne[1] or weights.shape != x.shape[:2]:
        raise op_error(
            op, "x and weights do not fit (n_tokens, n_streams, n_embd) and (n_tokens, n_streams)", x=x, w=weights
        )
    return ctx.build(c.ggml_dsv4_hc_pre, 2, x.ptr, weights.ptr)


def dsv4_hc_pre_gated(x: Tensor, gate: Tensor, scale: float = 1.0, *, ctx: Context | None = None) -> Tensor:
    """Compute the input of a layer with gated hyper-connections: ``scale * sum_s(x[t, s] * sigmoid(gate[t, s]))``.

    Parameters
    ----------
    x
        ``(n_tokens, n_streams, n_embd)``, F32.
    gate
        The shape and type of ``x``.

    Returns
    -------
    Tensor
        ``(n_tokens, n_embd)``, F32.

    Raises
    ------
    ValueError
        If shapes or types do not fit.

    It needs ggml 0.25.3. C: ``ggml_dsv4_hc_pre_gated``.
    """
    op = "dsv4_hc_pre_gated"
    ctx = result_context(op, x, gate, ctx=ctx)
    _need_f32(op, x=x, gate=gate)
    if x.ndim != 3 or not x.ne[1] or gate.shape != x.shape:
        raise op_error(op, "x and gate must both be (n_tokens, n_streams, n_embd)", x=x, gate=gate)
    return ctx.build(c.ggml_dsv4_hc_pre_gated, 2, x.ptr, gate.ptr, check_real(op, "scale", scale))


def dsv4_hc_post(
    x: Tensor, residual: Tensor, post: Tensor, comb: Tensor | None = None, *, ctx: Context | None = None
) -> Tensor:
    """Compute the streams after a layer with hyper-connections: ``out[t] = outer(post[t], x[t]) + comb[t].T @
    residual[t]``.

    Parameters
    ----------
    x
        ``(n_tokens, n_embd)``, F32: the output of the layer.
    residual
        ``(n_tokens, n_streams, n_embd)``, F32: the streams before the layer.
    post
        ``(n_tokens, n_streams)``, F32.
    comb
        ``(n_tokens, n_streams, n_streams)``, F32: axes of the streams before and after the layer. Without it
        the streams are not mixed, which needs ggml 0.25.3.

    Returns
    -------
    Tensor
        ``(n_tokens, n_streams, n_embd)``, F32.

    Raises
    ------
    ValueError
        If shapes or types do not fit.

    C: ``ggml_dsv4_hc_post``. Source: Xie et al., mHC: Manifold-Constrained Hyper-Connections, 2025.
    """
    op = "dsv4_hc_post"
    ctx = result_context(op, x, residual, post, optional=(comb,), ctx=ctx)
    _need_f32(op, x=x, residual=residual, post=post)
    n_embd, streams, tokens, _ = residual.ne
    if residual.ndim != 3 or not streams or x.shape != (tokens, n_embd):
        rule = "x must be (n_tokens, n_embd), and residual (n_tokens, n_streams, n_embd)"
        raise op_error(op, rule, x=x, residual=residual)
    if post.shape != (tokens, streams) or (comb is not None and comb.shape != (tokens, streams, streams)):
        raise op_error(op, "post and comb do not fit residual", residual=residual, post=post, comb=comb)
    if comb is None:
        library.require("ggml_dsv4_hc_pre_gated", "dsv4_hc_post without comb")
        mixing = c.NULL
    else:
        _need_f32(op, comb=comb)
        mixing = comb.ptr
    return ctx.build(c.ggml_dsv4_hc_post, 3, x.ptr, residual.ptr, post.ptr, mixing)


def _need_f32(op: str, **operands: Tensor) -> None:
    for name, t in operands.items():
        if t.dtype is not Type.F32:
            raise op_error(op, f"{name} must be F32", **operands)
