"""Normalizations along the last axis, or over groups of channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.context import Context
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.ops._args import GROUPS, integer, real
from ggml_cffi.ops._check import contiguous_rows, fail, home

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


def _along_rows(op: str, function: Callable[..., Any], a: Tensor, eps: float, ctx: Context | None) -> Tensor:
    ctx = home(op, a, ctx=ctx)
    if a.dtype is not Type.F32 or not contiguous_rows(a):
        raise fail(op, "a must be F32 with contiguous rows", a=a)
    eps = real(op, "eps", eps, lowest=0.0)
    return ctx.build(function, a.ndim, a.ptr, eps)


def _rms(op: str, function: Callable[..., Any], a: Tensor, eps: float, ctx: Context | None) -> Tensor:
    if isinstance(a, Tensor) and max(a.ne[1:]) > GROUPS:
        raise fail(op, f"axes before the last must have at most {GROUPS} (reshape them into several)", a=a)
    return _along_rows(op, function, a, eps, ctx)


def rms_norm(a: Tensor, eps: float = 1e-6, *, ctx: Context | None = None) -> Tensor:
    """``a / sqrt(mean(a**2) + eps)`` along the last axis.

    Parameters
    ----------
    a
        F32 with contiguous rows; at most 65535 along each axis before the last.
    eps
        Added to the mean; at least 0.

    Returns
    -------
    Tensor
        ``a``'s shape, F32.

    Raises
    ------
    ValueError
        If ``a`` or ``eps`` is not so.

    C: ``ggml_rms_norm``. Source: Zhang & Sennrich, Root Mean Square Layer Normalization, 2019.
    """
    return _rms("rms_norm", c.ggml_rms_norm, a, eps, ctx)


def rms_norm_inplace(a: Tensor, eps: float = 1e-6, *, ctx: Context | None = None) -> Tensor:
    """As :func:`rms_norm`, written over ``a``. C: ``ggml_rms_norm_inplace``."""
    return _rms("rms_norm_inplace", c.ggml_rms_norm_inplace, a, eps, ctx)


def norm(a: Tensor, eps: float = 1e-5, *, ctx: Context | None = None) -> Tensor:
    """``(a - mean(a)) / sqrt(var(a) + eps)`` along the last axis. F32, contiguous rows; ``eps`` at least 0.

    C: ``ggml_norm``. Source: Ba et al., Layer Normalization, 2016.
    """
    return _along_rows("norm", c.ggml_norm, a, eps, ctx)


def norm_inplace(a: Tensor, eps: float = 1e-5, *, ctx: Context | None = None) -> Tensor:
    """As :func:`norm`, written over ``a``. C: ``ggml_norm_inplace``."""
    return _along_rows("norm_inplace", c.ggml_norm_inplace, a, eps, ctx)


def l2_norm(a: Tensor, eps: float = 1e-12, *, ctx: Context | None = None) -> Tensor:
    """``a / max(sqrt(sum(a**2)), eps)`` along the last axis. F32, contiguous rows; ``eps`` at least 0.

    C: ``ggml_l2_norm``.
    """
    return _along_rows("l2_norm", c.ggml_l2_norm, a, eps, ctx)


def l2_norm_inplace(a: Tensor, eps: float = 1e-12, *, ctx: Context | None = None) -> Tensor:
    """As :func:`l2_norm`, written over ``a``. C: ``ggml_l2_norm_inplace``."""
    return _along_rows("l2_norm_inplace", c.ggml_l2_norm_inplace, a, eps, ctx)


def _groups(op: str, function: Callable[..., Any], a: Tensor, n_groups: int, eps: float, ctx: Context | None) -> Tensor:
    ctx = home(op, a, ctx=ctx)
    if a.dtype is not Type.F32 or not contiguous_rows(a):
        raise fail(op, "a must be F32 with contiguous rows", a=a)
    n_groups = integer(op, "n_groups", n_groups, 1)
    # A smaller last group is another one on GPUs than on the CPU, and reaches outside the tensor there.
    if a.ne[2] % n_groups:
        raise fail(op, f"the {a.ne[2]} channels cannot be cut into {n_groups} equal groups", a=a)
    if n_groups * a.ne[3] > GROUPS:
        raise fail(op, f"there are more than {GROUPS} groups", a=a)
    return ctx.build(function, a.ndim, a.ptr, n_groups, real(op, "eps", eps, lowest=0.0))


def group_norm(a: Tensor, n_groups: int, eps: float = 1e-5, *, ctx: Context | None = None) -> Tensor:
    """``(a - mean(a)) / sqrt(var(a) + eps)`` of each group of channels.

    Parameters
    ----------
    a
        ``(..., channels, height, width)``, F32 with contiguous rows.
    n_groups
        Divides the channels. All groups of a batch are at most 65535.
    eps
        Added to the variance; at least 0.

    Returns
    -------
    Tensor
        ``a``'s shape, F32.

    Raises
    ------
    ValueError
        If type, groups or ``eps`` are not so.

    C: ``ggml_group_norm``. Source: Wu & He, Group Normalization, 2018.
    """
    return _groups("group_norm", c.ggml_group_norm, a, n_groups, eps, ctx)


def group_norm_inplace(a: Tensor, n_groups: int, eps: float = 1e-5, *, ctx: Context | None = None) -> Tensor:
    """As :func:`group_norm`, written over ``a``. C: ``ggml_group_norm_inplace``."""
    return _groups("group_norm_inplace", c.ggml_group_norm_inplace, a, n_groups, eps, ctx)
