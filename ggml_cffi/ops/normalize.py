"""Normalizations along the last axis, or over groups of channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.context import Context
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.ops._operands import contiguous_rows, op_error, result_context
from ggml_cffi.ops._parameters import MAX_GROUPS, check_integer, check_real

__all__ = [
    "group_norm",
    "group_norm_inplace",
    "l2_norm",
    "l2_norm_inplace",
    "norm",
    "norm_inplace",
    "rms_norm",
    "rms_norm_inplace",
]


def _along_rows(
    op: str, function: Callable[..., Any], a: Tensor, eps: float, ctx: Context | None, *, gaps: bool = False
) -> Tensor:
    """Build an operation on rows, whose elements may have ``gaps`` between them."""
    ctx = result_context(op, a, ctx=ctx)
    if a.dtype is not Type.F32 or not (gaps or contiguous_rows(a)):
        raise op_error(op, "a must be F32" + " with contiguous rows" * (not gaps), a=a)
    eps = check_real(op, "eps", eps, lowest=0.0)
    return ctx.build(function, a.ndim, a.ptr, eps)


def _rms(op: str, function: Callable[..., Any], a: Tensor, eps: float, ctx: Context | None) -> Tensor:
    if isinstance(a, Tensor) and max(a.ne[1:]) > MAX_GROUPS:
        raise op_error(op, f"sizes before the last must be at most {MAX_GROUPS} (reshape to more axes)", a=a)
    return _along_rows(op, function, a, eps, ctx)


def rms_norm(a: Tensor, eps: float = 1e-6, *, ctx: Context | None = None) -> Tensor:
    """Normalize by the root mean square along the last axis: ``a / sqrt(mean(a**2) + eps)``.

    Parameters
    ----------
    a
        F32 with contiguous rows; sizes before the last are at most 65535.
    eps
        Added to the mean; at least 0.

    Returns
    -------
    Tensor
        ``a``'s shape, F32.

    Raises
    ------
    ValueError
        If ``a`` or ``eps`` does not fit.

    C: ``ggml_rms_norm``. Source: Zhang & Sennrich, Root Mean Square Layer Normalization, 2019.
    """
    return _rms("rms_norm", c.ggml_rms_norm, a, eps, ctx)


def rms_norm_inplace(a: Tensor, eps: float = 1e-6, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`rms_norm` in place: write the result over ``a``. C: ``ggml_rms_norm_inplace``."""
    return _rms("rms_norm_inplace", c.ggml_rms_norm_inplace, a, eps, ctx)


def norm(a: Tensor, eps: float = 1e-5, *, ctx: Context | None = None) -> Tensor:
    """Normalize by mean and variance along the last axis: ``(a - mean(a)) / sqrt(var(a) + eps)``. F32; ``eps`` at least
    0.

    C: ``ggml_norm``. Source: Ba et al., Layer Normalization, 2016.
    """
    return _along_rows("norm", c.ggml_norm, a, eps, ctx, gaps=True)


def norm_inplace(a: Tensor, eps: float = 1e-5, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`norm` in place: write the result over ``a``. C: ``ggml_norm_inplace``."""
    return _along_rows("norm_inplace", c.ggml_norm_inplace, a, eps, ctx)


def l2_norm(a: Tensor, eps: float = 1e-12, *, ctx: Context | None = None) -> Tensor:
    """Normalize by the length along the last axis: ``a / max(sqrt(sum(a**2)), eps)``. F32; ``eps`` at least 0.

    C: ``ggml_l2_norm``.
    """
    return _along_rows("l2_norm", c.ggml_l2_norm, a, eps, ctx, gaps=True)


def l2_norm_inplace(a: Tensor, eps: float = 1e-12, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`l2_norm` in place: write the result over ``a``. C: ``ggml_l2_norm_inplace``."""
    return _along_rows("l2_norm_inplace", c.ggml_l2_norm_inplace, a, eps, ctx)


def _groups(op: str, function: Callable[..., Any], a: Tensor, n_groups: int, eps: float, ctx: Context | None) -> Tensor:
    ctx = result_context(op, a, ctx=ctx)
    if a.dtype is not Type.F32 or not contiguous_rows(a):
        raise op_error(op, "a must be F32 with contiguous rows", a=a)
    n_groups = check_integer(op, "n_groups", n_groups, 1)
    # GPUs and CPU differ in a smaller last group, and GPUs would read outside the tensor.
    if a.ne[2] % n_groups:
        raise op_error(op, f"{a.ne[2]} channels do not divide into {n_groups} equal groups", a=a)
    if n_groups * a.ne[3] > MAX_GROUPS:
        raise op_error(op, f"there are more than {MAX_GROUPS} groups", a=a)
    return ctx.build(function, a.ndim, a.ptr, n_groups, check_real(op, "eps", eps, lowest=0.0))


def group_norm(a: Tensor, n_groups: int, eps: float = 1e-5, *, ctx: Context | None = None) -> Tensor:
    """Normalize each group of channels by its mean and variance: ``(a - mean(a)) / sqrt(var(a) + eps)``.

    Parameters
    ----------
    a
        ``(..., channels, height, width)``, F32 with contiguous rows.
    n_groups
        Number of groups; divides the channels. A batch has at most 65535 groups in all.
    eps
        Added to the variance; at least 0.

    Returns
    -------
    Tensor
        ``a``'s shape, F32.

    Raises
    ------
    ValueError
        If type, groups or ``eps`` do not fit.

    C: ``ggml_group_norm``. Source: Wu & He, Group Normalization, 2018.
    """
    return _groups("group_norm", c.ggml_group_norm, a, n_groups, eps, ctx)


def group_norm_inplace(a: Tensor, n_groups: int, eps: float = 1e-5, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`group_norm` in place: write the result over ``a``. C: ``ggml_group_norm_inplace``."""
    return _groups("group_norm_inplace", c.ggml_group_norm_inplace, a, n_groups, eps, ctx)
