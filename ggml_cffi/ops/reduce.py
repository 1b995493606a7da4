"""Sums, means, and the position of the largest element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.context import Context
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.ops._operands import contiguous_rows, op_error, result_context

__all__ = [
    "argmax",
    "cumsum",
    "mean",
    "sum",
    "sum_rows",
]


def _along_rows(op: str, function: Callable[..., Any], a: Tensor, ctx: Context | None) -> Tensor:
    ctx = result_context(op, a, ctx=ctx)
    if a.dtype is not Type.F32 or not contiguous_rows(a):
        raise op_error(op, "a must be F32 with contiguous rows", a=a)
    return ctx.build(function, a.ndim, a.ptr)


def sum(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Sum all elements; the result is a scalar of shape ``()``. F32, contiguous. C: ``ggml_sum``."""
    result_context("sum", a, ctx=ctx)
    if not a.is_contiguous:  # GPUs would read the gaps too
        raise op_error("sum", "a must be F32 and contiguous (use cont)", a=a)
    out = _along_rows("sum", c.ggml_sum, a, ctx)
    return Tensor(out.context, out.ptr, 0)


def sum_rows(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Sum along the last axis, which stays with size 1: ``a.sum(-1, keepdims=True)``. F32, contiguous rows.

    C: ``ggml_sum_rows``.
    """
    return _along_rows("sum_rows", c.ggml_sum_rows, a, ctx)


def mean(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Take the mean along the last axis, which stays with size 1: ``a.mean(-1, keepdims=True)``. F32, contiguous rows.

    C: ``ggml_mean``.
    """
    return _along_rows("mean", c.ggml_mean, a, ctx)


def cumsum(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute cumulative sums along the last axis: ``a.cumsum(-1)``. F32, contiguous rows. C: ``ggml_cumsum``."""
    return _along_rows("cumsum", c.ggml_cumsum, a, ctx)


def argmax(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Return the position of the largest element of each row: ``a.argmax(-1)``, I32.

    Parameters
    ----------
    a
        ``(m, n)`` with ``n`` at least 1, F32, contiguous rows.

    Returns
    -------
    Tensor
        ``(m,)``, I32.

    C: ``ggml_argmax``.
    """
    ctx = result_context("argmax", a, ctx=ctx)
    if a.dtype is not Type.F32 or a.ndim > 2 or not contiguous_rows(a) or not 0 < a.ne[0] < 2**31:
        raise op_error("argmax", "a must be an F32 matrix with contiguous rows that are not empty", a=a)
    return ctx.build(c.ggml_argmax, max(a.ndim - 1, 0), a.ptr)
