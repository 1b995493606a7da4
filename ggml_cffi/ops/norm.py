"""Normalizations along the last axis."""

from __future__ import annotations

from ggml_cffi import c
from ggml_cffi.context import Context
from ggml_cffi.enums import Type
from ggml_cffi.ops._check import contiguous_rows, fail, home
from ggml_cffi.tensor import Tensor


def _check(op: str, a: Tensor, eps: float) -> None:
    if a.dtype is not Type.F32 or not contiguous_rows(a):
        raise fail(op, "a must be F32 with contiguous rows", a=a)
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be at least 0, not {eps}")


def rms_norm(a: Tensor, eps: float = 1e-6, *, ctx: Context | None = None) -> Tensor:
    """``a / sqrt(mean(a**2) + eps)`` along the last axis.

    Parameters
    ----------
    a
        F32 with contiguous rows.
    eps
        Added to the mean; at least 0.

    Raises
    ------
    ValueError
        If ``a`` or ``eps`` is not so.

    C: ``ggml_rms_norm``. Source: Zhang & Sennrich, Root Mean Square Layer Normalization, 2019.
    """
    ctx = home("rms_norm", a, ctx=ctx)
    _check("rms_norm", a, eps)
    return ctx.build(c.ggml_rms_norm, a.ndim, a.ptr, float(eps))


def norm(a: Tensor, eps: float = 1e-5, *, ctx: Context | None = None) -> Tensor:
    """``(a - mean(a)) / sqrt(var(a) + eps)`` along the last axis. Operands and errors as :func:`rms_norm`.

    C: ``ggml_norm``. Source: Ba et al., Layer Normalization, 2016.
    """
    ctx = home("norm", a, ctx=ctx)
    _check("norm", a, eps)
    return ctx.build(c.ggml_norm, a.ndim, a.ptr, float(eps))
