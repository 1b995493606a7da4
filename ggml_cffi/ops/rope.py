"""Rotary position embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

from ggml_cffi import c
from ggml_cffi.c import library
from ggml_cffi.core.context import Context
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.ops._operands import contiguous_rows, op_error, result_context
from ggml_cffi.ops._parameters import check_integer, check_real

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
    """Pairs of elements that a rotation turns together, among the ``n`` rotated elements of a head.

    The first two modes need one position per token, the others (of :func:`rope_multi`) four.
    """

    NORMAL = c.GGML_ROPE_TYPE_NORMAL
    """Adjacent elements: (0, 1), (2, 3), …"""
    NEOX = c.GGML_ROPE_TYPE_NEOX
    """Elements of the two halves: (0, n/2), (1, n/2 + 1), …"""
    MROPE = c.GGML_ROPE_TYPE_MROPE
    """Elements of the two halves; the pairs are divided into sections, each with its own position."""
    IMROPE = c.GGML_ROPE_TYPE_IMROPE
    """Elements of the two halves; positions alternate: pairs 0, 3, … use the first, 1, 4, … the second, 2, 5, … the
    third."""
    VISION = c.GGML_ROPE_TYPE_VISION
    """Elements of the two halves of the whole head, (0, h/2), …; the angles restart in each section."""


_ONE_POSITION = (RopeMode.NORMAL, RopeMode.NEOX)


def _check_sections(op: str, a: Tensor, mode: RopeMode, n_dims: int, sections: Sequence[int]) -> Any:
    if len(sections) != 4:
        raise ValueError(f"{op}: sections must be 4 sizes, not {tuple(sections)}")
    sizes = [check_integer(op, "sections", n, 0) for n in sections]
    if not any(sizes[:3]) or sum(sizes) > a.ne[0]:
        raise op_error(op, f"the sections {tuple(sizes)} must hold 1 to {a.ne[0]} pairs, some in the first three", a=a)
    if mode is RopeMode.VISION:
        if 2 * n_dims != a.ne[0]:
            raise op_error(op, f"n_dims must be half of the head for VISION, not {n_dims}", a=a)
        # In other cases CPU and GPU differ: GPUs support two sections, and the CPU never restarts an empty section.
        if not sizes[0] or (sizes[0] + sizes[1] < n_dims and (sizes[2] or sizes[3])):
            raise op_error(op, f"the first two sections of {tuple(sizes)} must hold {n_dims} pairs for VISION", a=a)
    return c.ffi.new("int[4]", sizes)


def build_rope(
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
    *,
    offset: int = 0,
) -> Tensor:
    """Check the operands and parameters of a rotation, and build its node with ``function``."""
    ctx = result_context(op, a, positions, optional=(freq_factors,), ctx=ctx)
    mode = RopeMode(mode)
    if (mode in _ONE_POSITION) is not (sections is None):
        raise ValueError(f"{op}: {mode.name} is a mode of {'rope_ext' if mode in _ONE_POSITION else 'rope_multi'}")
    _check_positions(op, a, positions, freq_factors, 1 if sections is None else 4)
    n_dims = check_integer(op, "n_dims", n_dims, -(2**31))
    if n_dims < 2 or n_dims % 2 or n_dims > a.ne[0]:
        raise op_error(op, f"n_dims must be even and 2 to the size of a head, not {n_dims}", a=a)
    offset = _check_offset(op, a, n_dims, mode, offset)
    if freq_factors is not None:
        _check_factors(op, a, freq_factors)
    n_ctx_orig = check_integer(op, "n_ctx_orig", n_ctx_orig, 0)
    checked = _check_numbers(op, n_ctx_orig, numbers)
    factors = freq_factors.ptr if freq_factors is not None else c.NULL
    sizes = () if sections is None else (_check_sections(op, a, mode, n_dims, sections),)
    out = ctx.build(function, a.ndim, a.ptr, positions.ptr, factors, n_dims, *sizes, mode, n_ctx_orig, *checked)
    if offset:
        c.ggml_rope_set_offset(out.ptr, offset)
    return out


def _check_offset(op: str, a: Tensor, n_dims: int, mode: RopeMode, offset: int) -> int:
    offset = check_integer(op, "offset", offset, 0)
    if offset:
        library.require("ggml_rope_set_offset", f"{op} with an offset")
        if mode is RopeMode.VISION:
            raise ValueError(f"{op}: the mode VISION rotates the whole head, so it has no offset")
        if offset % 2 or offset + n_dims > a.ne[0]:
            raise op_error(op, f"offset must be even and at most the head's size less n_dims, not {offset}", a=a)
    return offset


def _check_positions(op: str, a: Tensor, positions: Tensor, freq_factors: Tensor | None, per_token: int) -> None:
    if a.dtype not in (Type.F32, Type.F16) or not contiguous_rows(a):
        raise op_error(op, "a must be F32 or F16 with contiguous rows", a=a)
    if a.ne[0] % 2:
        raise op_error(op, "the size of a head must be even", a=a)
    n = per_token * a.ne[2]
    if positions.dtype is not Type.I32 or positions.ne != (n, 1, 1, 1):
        rule = f"positions must be I32 of shape ({n},), {'one' if per_token == 1 else 'four'} per token"
        raise op_error(op, rule, a=a, positions=positions)
    for name, t in (("positions", positions), ("freq_factors", freq_factors)):
        if t is not None and not t.is_contiguous:
            raise op_error(op, f"{name} must be contiguous (use cont)", a=a, t=t)


def _check_factors(op: str, a: Tensor, freq_factors: Tensor) -> None:
    # The CPU reads a factor for every pair of the head, also for pairs that are not rotated.
    pairs = a.ne[0] // 2
    if freq_factors.dtype is not Type.F32 or not pairs <= freq_factors.ne[0] == freq_factors.size:
        rule = f"freq_factors must be F32 of one axis with at least {pairs} values"
        raise op_error(op, rule, freq_factors=freq_factors)


def _check_numbers(op: str, n_ctx_orig: int, numbers: tuple[float, ...]) -> tuple[float, ...]:
    names = ("freq_base", "freq_scale", "ext_factor", "attn_factor", "beta_fast", "beta_slow")
    checked = tuple(check_real(op, name, x) for name, x in zip(names, numbers, strict=True))
    base, scale, ext, _, fast, slow = checked
    if not base > 0:
        raise ValueError(f"{op}: freq_base must be above 0, not {base}")
    if ext and not (n_ctx_orig and scale > 0 and fast > 0 and slow > 0 and base != 1):
        raise ValueError(
            f"{op}: ext_factor needs n_ctx_orig, freq_scale, beta_fast and beta_slow above 0, and a freq_base other "
            "than 1"
        )
    return checked


def rope(
    a: Tensor, positions: Tensor, *, n_dims: int, mode: RopeMode = RopeMode.NORMAL, ctx: Context | None = None
) -> Tensor:
    """Rotate as :func:`rope_ext` does with its defaults: base 10000, no scaling. C: ``ggml_rope``."""
    return build_rope("rope", _with_defaults(c.ggml_rope), a, positions, None, n_dims, mode, 0, _DEFAULTS, ctx)


def rope_inplace(
    a: Tensor, positions: Tensor, *, n_dims: int, mode: RopeMode = RopeMode.NORMAL, ctx: Context | None = None
) -> Tensor:
    """Compute :func:`rope` in place: write the result over ``a``. C: ``ggml_rope_inplace``."""
    return build_rope(
        "rope_inplace", _with_defaults(c.ggml_rope_inplace), a, positions, None, n_dims, mode, 0, _DEFAULTS, ctx
    )


_DEFAULTS = (10000.0, 1.0, 0.0, 1.0, 0.0, 0.0)


def _with_defaults(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adapt ``function``, which takes ``n_dims`` and ``mode`` only, to the arguments of the other builders."""
    return lambda ctx, a, positions, _factors, n_dims, mode, *_: function(ctx, a, positions, n_dims, mode)


def rope_ext(
    a: Tensor,
    positions: Tensor,
    freq_factors: Tensor | None = None,
    *,
    n_dims: int,
    offset: int = 0,
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
        ``(head_size / 2,)`` or longer, F32; values from ``n_dims / 2`` on have no effect.
    n_dims
        Number of rotated elements of a head; even.
    offset
        First rotated element of a head; even. An offset needs ggml 0.25.3.
    mode
        Elements that form a pair: ``RopeMode.NORMAL`` or ``NEOX``.
    n_ctx_orig, ext_factor, attn_factor, beta_fast, beta_slow
        Parameters of YaRN, which the defaults disable. ``attn_factor`` is a factor of the result.

    Returns
    -------
    Tensor
        ``a``'s shape and type.

    Raises
    ------
    ValueError
        If the shapes, types or numbers do not fit.

    C: ``ggml_rope_ext``, ``ggml_rope_set_offset``. Source: Su et al., RoFormer, 2021; Peng et al., YaRN, 2023.
    """
    numbers = (freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow)
    return build_rope(
        "rope_ext", c.ggml_rope_ext, a, positions, freq_factors, n_dims, mode, n_ctx_orig, numbers, ctx, offset=offset
    )


def rope_ext_inplace(
    a: Tensor,
    positions: Tensor,
    freq_factors: Tensor | None = None,
    *,
    n_dims: int,
    offset: int = 0,
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
    """Compute :func:`rope_ext` in place: write the result over ``a``. C: ``ggml_rope_ext_inplace``."""
    numbers = (freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow)
    op, function = "rope_ext_inplace", c.ggml_rope_ext_inplace
    return build_rope(op, function, a, positions, freq_factors, n_dims, mode, n_ctx_orig, numbers, ctx, offset=offset)


def rope_multi(
    a: Tensor,
    positions: Tensor,
    freq_factors: Tensor | None = None,
    *,
    n_dims: int,
    offset: int = 0,
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
    """Rotate as :func:`rope_ext` does, with four positions per token, such as time, height and width: M-RoPE.

    ``s = i % sum(sections)`` selects the position of pair ``i``. For ``MROPE`` it is the position of the section that
    contains ``s``. For ``IMROPE`` it is position ``s % 3``, or the fourth if ``s >= 3 * sections[s % 3]``. For
    ``VISION`` it is the position of the section, and the exponent counts from the first pair of the section.

    Parameters
    ----------
    positions
        ``(4 * n_tokens,)``, I32: the first positions of all tokens, then the second, and so on.
    n_dims
        Number of rotated elements of a head; even. Half of the head for ``VISION``, which rotates the whole head.
    offset
        First rotated element of a head; even. An offset needs ggml 0.25.3.
    sections
        Four sizes, in pairs. ``VISION`` uses two: they sum to ``head_size / 2``, or the other two are 0.
    mode
        ``RopeMode.MROPE``, ``IMROPE`` or ``VISION``.

    Raises
    ------
    ValueError
        If the shapes, types or numbers do not fit.

    C: ``ggml_rope_multi``, ``ggml_rope_set_offset``. Source: Wang et al., Qwen2-VL, 2024.
    """
    numbers = (freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow)
    op, function = "rope_multi", c.ggml_rope_multi
    return build_rope(
        op, function, a, positions, freq_factors, n_dims, mode, n_ctx_orig, numbers, ctx, sections, offset=offset
    )


def rope_multi_inplace(
    a: Tensor,
    positions: Tensor,
    freq_factors: Tensor | None = None,
    *,
    n_dims: int,
    offset: int = 0,
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
    """Compute :func:`rope_multi` in place: write the result over ``a``. C: ``ggml_rope_multi_inplace``."""
    numbers = (freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow)
    op, function = "rope_multi_inplace", c.ggml_rope_multi_inplace
    return build_rope(
        op, function, a, positions, freq_factors, n_dims, mode, n_ctx_orig, numbers, ctx, sections, offset=offset
    )
