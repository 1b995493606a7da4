"""Attention: masks, softmax, and the whole of attention in one operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ggml_cffi import c
from ggml_cffi.c import library
from ggml_cffi.core.context import Context
from ggml_cffi.core.dtypes import is_quantized, type_size
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Prec, Type
from ggml_cffi.ops import elementwise, shape
from ggml_cffi.ops._f32 import decoded, is_f32
from ggml_cffi.ops._operands import contiguous_rows, op_error, result_context
from ggml_cffi.ops._parameters import MAX_GROUPS, check_integer, check_real
from ggml_cffi.ops.matmul import mul_mat
from ggml_cffi.ops.unary import tanh

__all__ = [
    "diag_mask_inf",
    "diag_mask_inf_inplace",
    "diag_mask_zero",
    "diag_mask_zero_inplace",
    "flash_attn_ext",
    "soft_max",
    "soft_max_ext",
    "soft_max_ext_inplace",
    "soft_max_inplace",
]


def _check_sinks(op: str, a: Tensor, sinks: Tensor) -> None:
    if sinks.dtype is not Type.F32 or sinks.ne != (a.ne[2], 1, 1, 1) or not sinks.is_contiguous:
        raise op_error(op, f"sinks must be contiguous F32 of shape ({a.ne[2]},), one per head", a=a, sinks=sinks)


def _soft_max(
    op: str,
    function: Callable[..., Any],
    a: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    numbers: tuple[float, float] | None,
    ctx: Context | None,
) -> Tensor:
    ctx = result_context(op, a, optional=(mask, sinks), ctx=ctx)
    if a.dtype is not Type.F32 or not a.is_contiguous:
        raise op_error(op, "a must be contiguous F32", a=a)
    if a.ne[0] > 16384 and a.ne[1] * a.ne[2] * a.ne[3] > MAX_GROUPS:  # GPUs have a separate kernel for long rows
        raise op_error(op, f"there are more than {MAX_GROUPS} rows of more than 16384", a=a)
    if mask is not None:
        an, mn = a.ne, mask.ne
        if mask.dtype not in (Type.F32, Type.F16) or not mask.is_contiguous:
            raise op_error(op, "the mask must be contiguous F32 or F16", a=a, mask=mask)
        if mn[0] != an[0] or mn[1] < an[1] or not mn[2] or not mn[3] or an[2] % mn[2] or an[3] % mn[3]:
            raise op_error(op, "the mask does not fit a", a=a, mask=mask)
    if sinks is not None:
        _check_sinks(op, a, sinks)
    if numbers is None:
        return ctx.build(function, a.ndim, a.ptr)
    scale, max_bias = check_real(op, "scale", numbers[0]), check_real(op, "max_bias", numbers[1], lowest=0.0)
    if max_bias and mask is None:
        raise ValueError(f"{op}: max_bias needs a mask")
    out = ctx.build(function, a.ndim, a.ptr, mask.ptr if mask is not None else c.NULL, scale, max_bias)
    if sinks is not None:
        c.ggml_soft_max_add_sinks(out.ptr, sinks.ptr)
    return out


def soft_max(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute softmax along the last axis: ``exp(a) / exp(a).sum(-1, keepdims=True)``. Contiguous F32.

    C: ``ggml_soft_max``.
    """
    return _soft_max("soft_max", c.ggml_soft_max, a, None, None, None, ctx)


def soft_max_inplace(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`soft_max` in place: write the result over ``a``. C: ``ggml_soft_max_inplace``."""
    return _soft_max("soft_max_inplace", c.ggml_soft_max_inplace, a, None, None, None, ctx)


def soft_max_ext(
    a: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float = 1.0,
    max_bias: float = 0.0,
    ctx: Context | None = None,
) -> Tensor:
    """Compute ``softmax(scale * a + mask)`` along the last axis.

    Parameters
    ----------
    a
        ``(..., n_heads, m, n)``, contiguous F32.
    mask
        F32 or F16, contiguous. Its last size equals that of ``a``, the one before is at least that of ``a``, and
        leading sizes divide those of ``a``.
    sinks
        ``(n_heads,)``, F32: an additional score for each head, which enters the sum but has no column in the result.
    scale
        Factor of ``a``.
    max_bias
        Largest slope of ALiBi, which scales the mask and so needs one; 0 for none.

    Returns
    -------
    Tensor
        ``a``'s shape, F32.

    Raises
    ------
    ValueError
        If shapes, types or numbers do not fit.

    C: ``ggml_soft_max_ext``, ``ggml_soft_max_add_sinks``. Source: Press et al., ALiBi, 2021.
    """
    return _soft_max("soft_max_ext", c.ggml_soft_max_ext, a, mask, sinks, (scale, max_bias), ctx)


def soft_max_ext_inplace(
    a: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float = 1.0,
    max_bias: float = 0.0,
    ctx: Context | None = None,
) -> Tensor:
    """Compute :func:`soft_max_ext` in place: write the result over ``a``. C: ``ggml_soft_max_ext_inplace``."""
    return _soft_max("soft_max_ext_inplace", c.ggml_soft_max_ext_inplace, a, mask, sinks, (scale, max_bias), ctx)


def _mask_diagonal(op: str, function: Callable[..., Any], a: Tensor, n_past: int, ctx: Context | None) -> Tensor:
    ctx = result_context(op, a, ctx=ctx)
    if a.dtype is not Type.F32 or not a.is_contiguous:
        raise op_error(op, "a must be contiguous F32 (use cont)", a=a)
    if a.ne[1] * a.ne[2] * a.ne[3] > MAX_GROUPS:
        raise op_error(op, f"there are more than {MAX_GROUPS} rows", a=a)
    return ctx.build(function, a.ndim, a.ptr, check_integer(op, "n_past", n_past, 0))


def diag_mask_inf(a: Tensor, n_past: int = 0, *, ctx: Context | None = None) -> Tensor:
    """Apply a causal mask: ``-inf`` where ``column > n_past + row``, ``a`` elsewhere.

    Parameters
    ----------
    a
        ``(..., m, n)``, contiguous F32, at most 65535 rows in all.
    n_past
        Columns before the diagonal; at least 0.

    Returns
    -------
    Tensor
        ``a``'s shape, F32.

    Raises
    ------
    ValueError
        If ``a`` is not contiguous F32 or has too many rows, or ``n_past`` is negative.

    C: ``ggml_diag_mask_inf``.
    """
    return _mask_diagonal("diag_mask_inf", c.ggml_diag_mask_inf, a, n_past, ctx)


def diag_mask_inf_inplace(a: Tensor, n_past: int = 0, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`diag_mask_inf` in place: write the result over ``a``. C: ``ggml_diag_mask_inf_inplace``."""
    return _mask_diagonal("diag_mask_inf_inplace", c.ggml_diag_mask_inf_inplace, a, n_past, ctx)


def diag_mask_zero(a: Tensor, n_past: int = 0, *, ctx: Context | None = None) -> Tensor:
    """Apply a causal mask as :func:`diag_mask_inf` does, with 0 in place of ``-inf``. C: ``ggml_diag_mask_zero``."""
    return _mask_diagonal("diag_mask_zero", c.ggml_diag_mask_zero, a, n_past, ctx)


def diag_mask_zero_inplace(a: Tensor, n_past: int = 0, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`diag_mask_zero` in place: write the result over ``a``. C: ``ggml_diag_mask_zero_inplace``."""
    return _mask_diagonal("diag_mask_zero_inplace", c.ggml_diag_mask_zero_inplace, a, n_past, ctx)


def flash_attn_ext(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    max_bias: float = 0.0,
    logit_softcap: float = 0.0,
    prec: Prec = Prec.DEFAULT,
    ctx: Context | None = None,
) -> Tensor:
    """Compute attention ``softmax(scale * q @ k.T + mask) @ v`` in one pass, without storing the scores.

    Parameters
    ----------
    q
        ``(..., n_heads, n_tokens, head_size)``, F32.
    k
        ``(..., n_kv_heads, n_kv, head_size)``; ``n_kv_heads`` divides ``n_heads``. Float or quantized.
    v
        ``(..., n_kv_heads, n_kv, v_size)``, float or quantized.
    mask
        ``(..., n_tokens or more, n_kv)``, contiguous F16: 0 where a token attends to a key, ``-inf`` elsewhere.
    sinks
        ``(n_heads,)``, F32: an additional score for each head, which enters the sum of softmax but has no value.
    scale
        Usually ``1 / sqrt(head_size)``.
    max_bias
        Largest slope of ALiBi, which needs a mask.
    logit_softcap
        Cap of the scores: they become ``cap * tanh(score / cap)``; 0 for none.
    prec
        By default backends round ``q`` to F16, and GPUs also ``k`` and ``v``. ``Prec.F32`` gives the accuracy of F32,
        as in :func:`~ggml_cffi.mul_mat`, unless ``k`` or ``v`` is quantized. Attention then consists of two products
        and a softmax, with the scores in memory. The context may make this the default.

    Returns
    -------
    Tensor
        ``(..., n_tokens, n_heads, v_size)``, F32: the axes of heads and tokens are swapped.

    Raises
    ------
    ValueError
        If shapes or types do not fit.

    C: ``ggml_flash_attn_ext``, ``ggml_prec_set_acc`` (F32; ``ggml_flash_attn_ext_set_prec`` before ggml 0.25.3),
    ``ggml_flash_attn_ext_add_sinks``.
    Source: Dao et al., FlashAttention, 2022; Xiao et al., Attention Sinks, 2023.
    """
    ctx = result_context("flash_attn_ext", q, k, v, optional=(mask, sinks), ctx=ctx)
    qn, kn, vn = q.ne, k.ne, v.ne
    if q.dtype is not Type.F32 or not (contiguous_rows(q) and contiguous_rows(k) and contiguous_rows(v)):
        raise op_error("flash_attn_ext", "q must be F32, and the rows of q, k and v contiguous", q=q, k=k, v=v)
    if k.dtype in _NO_KV or v.dtype in _NO_KV:
        raise op_error("flash_attn_ext", "k and v must be float or quantized", q=q, k=k, v=v)
    if not qn[0]:
        raise op_error("flash_attn_ext", "the heads have no elements", q=q, k=k, v=v)
    if qn[0] != kn[0] or kn[1] != vn[1] or kn[2] != vn[2]:
        raise op_error("flash_attn_ext", "q, k and v differ in head size, length or heads", q=q, k=k, v=v)
    if not kn[2] or qn[2] % kn[2] or not qn[3] == kn[3] == vn[3]:
        raise op_error("flash_attn_ext", "the heads of k must divide those of q", q=q, k=k, v=v)
    if k.nb[0] > k.nb[1]:
        raise op_error("flash_attn_ext", "k must not be transposed", q=q, k=k, v=v)
    # GPUs accept heads of these sizes, and read four elements at a time.
    if not (qn[0] % 8 or vn[0] % 8 or all(map(_rows_in_fours, (q, k, v)))):
        raise op_error(
            "flash_attn_ext", "rows of q, k and v must start at multiples of 4 elements (use cont)", q=q, k=k, v=v
        )
    if mask is not None:
        mn = mask.ne
        if mask.dtype is not Type.F16 or not mask.is_contiguous:
            raise op_error("flash_attn_ext", "the mask must be contiguous F16", q=q, k=k, mask=mask)
        if mn[0] != kn[1] or mn[1] < qn[1] or not mn[2] or not mn[3] or qn[2] % mn[2] or qn[3] % mn[3]:
            raise op_error("flash_attn_ext", "the mask does not fit q and k", q=q, k=k, mask=mask)
    if sinks is not None:
        _check_sinks("flash_attn_ext", q, sinks)
    scale = check_real("flash_attn_ext", "scale", scale)
    max_bias = check_real("flash_attn_ext", "max_bias", max_bias, lowest=0.0)
    logit_softcap = check_real("flash_attn_ext", "logit_softcap", logit_softcap, lowest=0.0)
    if max_bias and mask is None:
        raise ValueError("flash_attn_ext: max_bias needs a mask")
    if is_f32("flash_attn_ext", prec, ctx) and not (is_quantized(k.dtype) or is_quantized(v.dtype)):
        return _attention_f32(q, k, v, mask, sinks, scale, max_bias, logit_softcap, ctx)
    out = ctx.build(
        c.ggml_flash_attn_ext,
        max(q.ndim, 3),
        q.ptr,
        k.ptr,
        v.ptr,
        mask.ptr if mask is not None else c.NULL,
        scale,
        max_bias,
        logit_softcap,
    )
    set_prec = c.ggml_prec_set_acc if library.provides("ggml_prec_set_acc") else c.ggml_flash_attn_ext_set_prec
    set_prec(out.ptr, Prec.F32)
    if sinks is not None:
        c.ggml_flash_attn_ext_add_sinks(out.ptr, sinks.ptr)
    return out


def _attention_f32(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    max_bias: float,
    logit_softcap: float,
    ctx: Context,
) -> Tensor:
    """Compute attention in steps, with products that do not round their operands."""
    scores = mul_mat(decoded(k, ctx), q, prec=Prec.F32, ctx=ctx)
    if logit_softcap:
        scores = elementwise.scale(scores, scale / logit_softcap, ctx=ctx)
        scores = elementwise.scale(tanh(scores, ctx=ctx), logit_softcap, ctx=ctx)
        scale = 1.0
    weights = soft_max_ext(scores, mask, sinks, scale=scale, max_bias=max_bias, ctx=ctx)
    turned = shape.cont(shape.transpose(decoded(v, ctx), ctx=ctx), ctx=ctx)
    out = mul_mat(turned, weights, prec=Prec.F32, ctx=ctx)  # (..., n_heads, n_tokens, v_size)
    n = max(q.ndim, 3)
    out = shape.reshape(out, out.ne[n - 1 :: -1], ctx=ctx)
    return shape.cont(shape.permute(out, (*range(n - 3), n - 2, n - 3, n - 1), ctx=ctx), ctx=ctx)


def _rows_in_fours(t: Tensor) -> bool:
    unit = 1 if is_quantized(t.dtype) else 4 * type_size(t.dtype)
    return all(n == 1 or s % unit == 0 for n, s in zip(t.ne[1:], t.nb[1:], strict=True))


_NO_KV = frozenset({Type.I8, Type.I16, Type.I32, Type.I64, Type.F64})
