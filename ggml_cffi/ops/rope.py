"""Rotary positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.context import Context
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.ops._args import integer, real
from ggml_cffi.ops._check import contiguous_rows, fail, home

__all__ = [
    "RopeMode",
    "rope",
    "rope_ext",
    "rope_ext_inplace",
    "rope_inplace",
    "rope_multi",
    "rope_multi_inplace",
]


class RopeMode(IntEnum):
    """How the rotary positions pair the elements that they rotate, ``n`` of a head.

    The first two take one position for each token, the others (of :func:`rope_multi`) four.
    """

    NORMAL = c.GGML_ROPE_TYPE_NORMAL
    """Neighbours: (0, 1), (2, 3), …"""
    NEOX = c.GGML_ROPE_TYPE_NEOX
    """Halves: (0, n/2), (1, n/2 + 1), …"""
    MROPE = c.GGML_ROPE_TYPE_MROPE
    """Halves; the pairs are cut into sections, each with its own position."""
    IMROPE = c.GGML_ROPE_TYPE_IMROPE
    """Halves; the positions take turns: pairs 0, 3, … the first, 1, 4, … the second, 2, 5, … the third."""
    VISION = c.GGML_ROPE_TYPE_VISION
    """Halves of the whole head, (0, h/2), …; the angles begin anew in each section."""


_ONE = (RopeMode.NORMAL, RopeMode.NEOX)


def _check_sections(op: str, a: Tensor, mode: RopeMode, n_dims: int, sections: Sequence[int]) -> Any:
    if len(sections) != 4:
        raise ValueError(f"{op}: sections must be 4 sizes, not {tuple(sections)}")
    sizes = [integer(op, "sections", n, 0) for n in sections]
    if not any(sizes[:3]) or sum(sizes) > a.ne[0]:
        raise fail(op, f"the sections {tuple(sizes)} must hold 1 to {a.ne[0]} pairs, in the first three", a=a)
    if mode is RopeMode.VISION:
        if 2 * n_dims != a.ne[0]:
            raise fail(op, f"n_dims must be half of the head for vision, not {n_dims}", a=a)
        # Only here do the angles of CPU and GPU agree: GPUs know two sections, and the CPU never restarts an empty one.
        if not sizes[0] or (sizes[0] + sizes[1] < n_dims and (sizes[2] or sizes[3])):
            raise fail(op, f"the first two sections of {tuple(sizes)} must hold {n_dims} pairs for vision", a=a)
    return c.ffi.new("int[4]", sizes)


def _rope(
    op: str,
    function: Callable[..., Any],
    a: Tensor,
    positions: Tensor,
    freq_factors: Tensor | None,
    n_dims: int,
    mode: RopeMode,
    n_ctx_orig: int,
    numbers: tuple[float, ...],
    ctx: Context | None,
    sections: Sequence[int] | None = None,
) -> Tensor:
    ctx = home(op, a, positions, optional=(freq_factors,), ctx=ctx)
    mode = RopeMode(mode)
    if (mode in _ONE) is not (sections is None):
        raise ValueError(f"{op}: {mode.name} is a mode of {'rope_ext' if mode in _ONE else 'rope_multi'}")
    if a.dtype not in (Type.F32, Type.F16) or not contiguous_rows(a):
        raise fail(op, "a must be F32 or F16 with contiguous rows", a=a)
    if a.ne[0] % 2:
        raise fail(op, "the size of a head must be even", a=a)
    n = a.ne[2] if sections is None else 4 * a.ne[2]
    if positions.dtype is not Type.I32 or positions.ne != (n, 1, 1, 1):
        each = "one" if sections is None else "four"
        raise fail(op, f"positions must be I32 of shape ({n},), {each} a token", a=a, positions=positions)
    for name, t in (("positions", positions), ("freq_factors", freq_factors)):
        if t is not None and not t.is_contiguous:
            raise fail(op, f"{name} must be contiguous (use cont)", a=a, t=t)
    n_dims = integer(op, "n_dims", n_dims, -(2**31))
    if n_dims < 2 or n_dims % 2 or n_dims > a.ne[0]:
        raise fail(op, f"n_dims must be even and 2 to the size of a head, not {n_dims}", a=a)
    # The CPU reads a factor for every pair of the head, also for those that are not rotated.
    pairs = a.ne[0] // 2
    if freq_factors is not None and (
        freq_factors.dtype is not Type.F32 or not pairs <= freq_factors.ne[0] == freq_factors.size
    ):
        rule = f"freq_factors must be F32 of one axis with at least {pairs} values"
        raise fail(op, rule, freq_factors=freq_factors)
    n_ctx_orig = integer(op, "n_ctx_orig", n_ctx_orig, 0)
    names = ("freq_base", "freq_scale", "ext_factor", "attn_factor", "beta_fast", "beta_slow")
    base, scale, ext, attn, fast, slow = (real(op, k, x) for k, x in zip(names, numbers, strict=True))
    if not base > 0:
        raise ValueError(f"{op}: freq_base must be above 0, not {base}")
    if ext and not (n_ctx_orig and scale > 0 and fast > 0 and slow > 0 and base != 1):
        raise ValueError(
            f"{op}: ext_factor needs n_ctx_orig, freq_scale, beta_fast and beta_slow above 0, and another freq_base "
            "than 1"
        )
    factors = freq_factors.ptr if freq_factors is not None else c.NULL
    cuts = () if sections is None else (_check_sections(op, a, mode, n_dims, sections),)
    return ctx.build(
        function,
        a.ndim,
        a.ptr,
        positions.ptr,
        factors,
        n_dims,
        *cuts,
        mode,
        n_ctx_orig,
        base,
        scale,
        ext,
        attn,
        fast,
        slow,
    )


def rope(
    a: Tensor, positions: Tensor, *, n_dims: int, mode: RopeMode = RopeMode.NORMAL, ctx: Context | None = None
) -> Tensor:
    """As :func:`rope_ext` with its defaults: base 10000, nothing scaled. C: ``ggml_rope``."""
    return _rope("rope", _plain(c.ggml_rope), a, positions, None, n_dims, mode, 0, _PLAIN, ctx)


def rope_inplace(
    a: Tensor, positions: Tensor, *, n_dims: int, mode: RopeMode = RopeMode.NORMAL, ctx: Context | None = None
) -> Tensor:
    """As :func:`rope`, written over ``a``. C: ``ggml_rope_inplace``."""
    return _rope("rope_inplace", _plain(c.ggml_rope_inplace), a, positions, None, n_dims, mode, 0, _PLAIN, ctx)


_PLAIN = (10000.0, 1.0, 0.0, 1.0, 0.0, 0.0)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which takes nothing but ``n_dims`` and ``mode``, with the arguments of the others."""
    return lambda ctx, a, positions, _factors, n_dims, mode, *_: function(ctx, a, positions, n_dims, mode)


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
        ``(..., n_tokens, n_heads, head_size)``, F32 or F16, contiguous rows; ``head_size`` is even.
    positions
        ``(n_tokens,)``, I32.
    freq_factors
        ``(head_size / 2,)`` or longer, F32; those from ``n_dims / 2`` on make no difference.
    n_dims
        Elements of a head that are rotated; even.
    mode
        Which elements form a pair: ``RopeMode.NORMAL`` or ``NEOX``.
    n_ctx_orig, ext_factor, attn_factor, beta_fast, beta_slow
        YaRN's parameters; the defaults leave it off. ``attn_factor`` is a factor of the result.

    Returns
    -------
    Tensor
        ``a``'s shape and type.

    Raises
    ------
    ValueError
        If the shapes, types or numbers do not fit.

    C: ``ggml_rope_ext``. Source: Su et al., RoFormer, 2021; Peng et al., YaRN, 2023.
    """
    numbers = (freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow)
    return _rope("rope_ext", c.ggml_rope_ext, a, positions, freq_factors, n_dims, mode, n_ctx_orig, numbers, ctx)


def rope_ext_inplace(
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
    """As :func:`rope_ext`, written over ``a``. C: ``ggml_rope_ext_inplace``."""
    numbers = (freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow)
    op, function = "rope_ext_inplace", c.ggml_rope_ext_inplace
    return _rope(op, function, a, positions, freq_factors, n_dims, mode, n_ctx_orig, numbers, ctx)


def rope_multi(
    a: Tensor,
    positions: Tensor,
    freq_factors: Tensor | None = None,
    *,
    n_dims: int,
    sections: Sequence[int],
    mode: RopeMode = RopeMode.MROPE,
    n_ctx_orig: int = 0,
    freq_base: float = 10000.0,
    freq_scale: float = 1.0,
    ext_factor: float = 0.0,
    attn_factor: float = 1.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    ctx: Context | None = None,
) -> Tensor:
    """As :func:`rope_ext` with four positions for each token, say of time, height and width: M-RoPE.

    ``s = i % sum(sections)`` decides which of the four positions turns pair ``i``: for ``MROPE`` that of the section
    that ``s`` falls into. For ``IMROPE`` position ``s % 3``, or the fourth if ``s >= 3 * sections[s % 3]``. For
    ``VISION`` that of the section too, and the exponent is counted from the section's first pair.

    Parameters
    ----------
    positions
        ``(4 * n_tokens,)``, I32: all the first positions, then all the second, and so on.
    n_dims
        Elements of a head that are rotated; even. Half of the head for ``VISION``, which rotates all of it.
    sections
        Four sizes in pairs. ``VISION`` uses two: together they hold ``head_size / 2``, or the others are 0.
    mode
        ``RopeMode.MROPE``, ``IMROPE`` or ``VISION``.

    Raises
    ------
    ValueError
        If the shapes, types or numbers do not fit.

    C: ``ggml_rope_multi``. Source: Wang et al., Qwen2-VL, 2024.
    """
    numbers = (freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow)
    op, function = "rope_multi", c.ggml_rope_multi
    return _rope(op, function, a, positions, freq_factors, n_dims, mode, n_ctx_orig, numbers, ctx, sections)


def rope_multi_inplace(
    a: Tensor,
    positions: Tensor,
    freq_factors: Tensor | None = None,
    *,
    n_dims: int,
    sections: Sequence[int],
    mode: RopeMode = RopeMode.MROPE,
    n_ctx_orig: int = 0,
    freq_base: float = 10000.0,
    freq_scale: float = 1.0,
    ext_factor: float = 0.0,
    attn_factor: float = 1.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    ctx: Context | None = None,
) -> Tensor:
    """As :func:`rope_multi`, written over ``a``. C: ``ggml_rope_multi_inplace``."""
    numbers = (freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow)
    op, function = "rope_multi_inplace", c.ggml_rope_multi_inplace
    return _rope(op, function, a, positions, freq_factors, n_dims, mode, n_ctx_orig, numbers, ctx, sections)
