"""Attention and rotary positions."""

from __future__ import annotations

from enum import IntEnum

from ggml_cffi import c
from ggml_cffi.context import Context
from ggml_cffi.enums import Prec, Type
from ggml_cffi.ops._check import contiguous_rows, fail, home
from ggml_cffi.tensor import Tensor


class RopeMode(IntEnum):
    """How :func:`rope_ext` pairs the elements that it rotates."""

    NORMAL = c.GGML_ROPE_TYPE_NORMAL
    """Neighbours: (0, 1), (2, 3), …"""
    NEOX = c.GGML_ROPE_TYPE_NEOX
    """Halves: (0, n/2), (1, n/2 + 1), …"""


def rope_ext(
    a: Tensor,
    positions: Tensor,
    freq_factors: Tensor | None = None,
    *,
    n_dims: int,
    mode: RopeMode = RopeMode.NORMAL,
    n_ctx_orig: int = 0,
    freq_base: float = 10000.0,
    freq_scale: float = 1.0,
    ext_factor: float = 0.0,
    attn_factor: float = 1.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    ctx: Context | None = None,
) -> Tensor:
    """Rotate pairs of elements by an angle that grows with the position: rotary position embedding.

    Pair ``i`` at position ``p`` turns by ``p * freq_scale * freq_base**(-2 i / n_dims) / freq_factors[i]``.

    Parameters
    ----------
    a
        ``(..., n_tokens, n_heads, head_size)``, F32 or F16, contiguous rows.
    positions
        ``(n_tokens,)``, I32.
    freq_factors
        ``(n_dims / 2,)`` or longer, F32.
    n_dims
        Elements of a head that are rotated; even.
    mode
        Which elements form a pair.
    n_ctx_orig, ext_factor, attn_factor, beta_fast, beta_slow
        YaRN's parameters; the defaults leave it off.

    Raises
    ------
    ValueError
        If the shapes, types or ``n_dims`` do not fit.

    C: ``ggml_rope_ext``. Source: Su et al., RoFormer, 2021; Peng et al., YaRN, 2023.
    """
    ctx = home("rope_ext", a, positions, freq_factors, ctx=ctx)
    mode = RopeMode(mode)
    if a.dtype not in (Type.F32, Type.F16) or not contiguous_rows(a):
        raise fail("rope_ext", "a must be F32 or F16 with contiguous rows", a=a)
    if positions.dtype is not Type.I32 or positions.ne != (a.ne[2], 1, 1, 1):
        raise fail("rope_ext", f"positions must be I32 of shape ({a.ne[2]},), one a token", a=a, positions=positions)
    for name, t in (("positions", positions), ("freq_factors", freq_factors)):
        if t is not None and not t.is_contiguous:
            raise fail("rope_ext", f"{name} must be contiguous (use cont)", a=a, t=t)
    if not isinstance(n_dims, int) or n_dims < 2 or n_dims % 2 or n_dims > a.ne[0]:
        raise fail("rope_ext", f"n_dims must be even and 2 to the size of a head, not {n_dims}", a=a)
    if freq_factors is not None and (freq_factors.dtype is not Type.F32 or freq_factors.ne[0] < n_dims // 2):
        raise fail(
            "rope_ext", f"freq_factors must be F32 with at least {n_dims // 2} values", freq_factors=freq_factors
        )
    if not freq_base > 0:
        raise ValueError(f"rope_ext: freq_base must be above 0, not {freq_base}")
    if not 0 <= n_ctx_orig < 2**31:
        raise ValueError(f"rope_ext: n_ctx_orig must be 0 to 2**31 - 1, not {n_ctx_orig}")
    return ctx.build(
        c.ggml_rope_ext,
        a.ndim,
        a.ptr,
        positions.ptr,
        freq_factors.ptr if freq_factors is not None else c.NULL,
        n_dims,
        mode,
        n_ctx_orig,
        freq_base,
        freq_scale,
        ext_factor,
        attn_factor,
        beta_fast,
        beta_slow,
    )


def soft_max_ext(
    a: Tensor, mask: Tensor | None = None, *, scale: float = 1.0, max_bias: float = 0.0, ctx: Context | None = None
) -> Tensor:
    """``softmax(scale * a + mask)`` along the last axis.

    Parameters
    ----------
    a
        Contiguous F32.
    mask
        F32 or F16, contiguous; its last size is ``a``'s, the one before at least ``a``'s, leading ones divide ``a``'s.
    scale
        Factor of ``a``.
    max_bias
        Largest slope of ALiBi, which needs a mask; 0 for none.

    Raises
    ------
    ValueError
        If shapes or types do not fit.

    C: ``ggml_soft_max_ext``.
    """
    ctx = home("soft_max_ext", a, mask, ctx=ctx)
    if a.dtype is not Type.F32 or not a.is_contiguous:
        raise fail("soft_max_ext", "a must be contiguous F32", a=a)
    if mask is not None:
        an, mn = a.ne, mask.ne
        if mask.dtype not in (Type.F32, Type.F16) or not mask.is_contiguous:
            raise fail("soft_max_ext", "the mask must be contiguous F32 or F16", a=a, mask=mask)
        if mn[0] != an[0] or mn[1] < an[1] or not mn[2] or not mn[3] or an[2] % mn[2] or an[3] % mn[3]:
            raise fail("soft_max_ext", "the mask does not fit a", a=a, mask=mask)
    elif max_bias > 0:
        raise ValueError("soft_max_ext: max_bias needs a mask")
    return ctx.build(c.ggml_soft_max_ext, a.ndim, a.ptr, mask.ptr if mask is not None else c.NULL, scale, max_bias)


def flash_attn_ext(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    max_bias: float = 0.0,
    logit_softcap: float = 0.0,
    ctx: Context | None = None,
) -> Tensor:
    """Attention ``softmax(scale * q @ k.T + mask) @ v`` in one pass, without storing the scores.

    Parameters
    ----------
    q
        ``(..., n_heads, n_tokens, head_size)``, F32.
    k
        ``(..., n_kv_heads, n_kv, head_size)``; ``n_kv_heads`` divides ``n_heads``. Float or quantized.
    v
        ``(..., n_kv_heads, n_kv, v_size)``, of any such type.
    mask
        ``(..., n_tokens or more, n_kv)``, contiguous F16: 0 where a token may look, ``-inf`` where not.
    scale
        Usually ``1 / sqrt(head_size)``.
    max_bias
        Largest slope of ALiBi, which needs a mask.
    logit_softcap
        Scores become ``cap * tanh(score / cap)``; 0 for none.

    Returns
    -------
    Tensor
        ``(..., n_tokens, n_heads, v_size)``, F32: heads and tokens have changed places.

    Raises
    ------
    ValueError
        If shapes or types do not fit.

    C: ``ggml_flash_attn_ext`` with F32 accumulation. Source: Dao et al., FlashAttention, 2022.
    """
    ctx = home("flash_attn_ext", q, k, v, mask, ctx=ctx)
    qn, kn, vn = q.ne, k.ne, v.ne
    if q.dtype is not Type.F32 or not (contiguous_rows(q) and contiguous_rows(k) and contiguous_rows(v)):
        raise fail("flash_attn_ext", "q must be F32, and the rows of q, k and v contiguous", q=q, k=k, v=v)
    if k.dtype in _NO_KV or v.dtype in _NO_KV:
        raise fail("flash_attn_ext", "k and v must be float or quantized", q=q, k=k, v=v)
    if not qn[0]:
        raise fail("flash_attn_ext", "the heads have no elements", q=q, k=k, v=v)
    if qn[0] != kn[0] or kn[1] != vn[1] or kn[2] != vn[2]:
        raise fail("flash_attn_ext", "q, k and v differ in head size, length or heads", q=q, k=k, v=v)
    if not kn[2] or qn[2] % kn[2] or not qn[3] == kn[3] == vn[3]:
        raise fail("flash_attn_ext", "the heads of k must divide those of q", q=q, k=k, v=v)
    if k.nb[0] > k.nb[1]:
        raise fail("flash_attn_ext", "k must not be transposed", q=q, k=k, v=v)
    if mask is not None:
        mn = mask.ne
        if mask.dtype is not Type.F16 or not mask.is_contiguous:
            raise fail("flash_attn_ext", "the mask must be contiguous F16", q=q, k=k, mask=mask)
        if mn[0] != kn[1] or mn[1] < qn[1] or not mn[2] or not mn[3] or qn[2] % mn[2] or qn[3] % mn[3]:
            raise fail("flash_attn_ext", "the mask does not fit q and k", q=q, k=k, mask=mask)
    elif max_bias > 0:
        raise ValueError("flash_attn_ext: max_bias needs a mask")
    out = ctx.build(
        c.ggml_flash_attn_ext,
        q.ndim,
        q.ptr,
        k.ptr,
        v.ptr,
        mask.ptr if mask is not None else c.NULL,
        scale,
        max_bias,
        logit_softcap,
    )
    c.ggml_flash_attn_ext_set_prec(out.ptr, Prec.F32)
    return out


_NO_KV = frozenset({Type.I8, Type.I16, Type.I32, Type.I64, Type.F64})
