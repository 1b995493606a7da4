"""Order of the elements in rows."""

from __future__ import annotations

from math import ceil

import numpy as np

from ggml_cffi import c
from ggml_cffi.core.context import Context
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import SortOrder, Type
from ggml_cffi.ops._operands import check_result, op_error, result_context
from ggml_cffi.ops._parameters import check_integer

__all__ = [
    "argsort",
    "argsort_top_k",
    "top_k",
]


def _check(op: str, a: Tensor) -> None:
    if a.dtype is not Type.F32 or not a.is_contiguous:
        raise op_error(op, "a must be contiguous F32 (use cont)", a=a)
    n = a.ne[0]
    # ggml's Vulkan code computes the next power of two in single precision, and loses elements if it rounds down.
    if n > 2**31 - 1 or (n > 2**20 and 2 ** ceil(np.log2(np.float32(n)) - np.float32(4e-6)) < n):
        raise op_error(op, f"rows of {n} elements are too long to be sorted", a=a)


def argsort(a: Tensor, order: SortOrder = SortOrder.ASC, *, ctx: Context | None = None) -> Tensor:
    """Return the positions of each row's elements in the order of their values, as ``numpy.argsort`` does. Not stable.

    The result can be the row numbers of :func:`get_rows` and other operations.

    Parameters
    ----------
    a
        Contiguous F32.
    order
        ``SortOrder.ASC`` (the smallest first) or ``DESC``.

    Returns
    -------
    Tensor
        ``a``'s shape, I32.

    Raises
    ------
    ValueError
        If ``a`` is not contiguous F32, or its rows are too long.

    C: ``ggml_argsort``.
    """
    ctx = result_context("argsort", a, ctx=ctx)
    _check("argsort", a)
    check_result("argsort", a.ne)
    return ctx.build(c.ggml_argsort, a.ndim, a.ptr, SortOrder(order))


def argsort_top_k(a: Tensor, k: int, *, ctx: Context | None = None) -> Tensor:
    """Return the positions of the ``k`` largest elements of each row, the largest first.

    The result, a view of a whole :func:`argsort`, can be the row numbers of :func:`get_rows` and other operations.

    Parameters
    ----------
    a
        ``(..., n)``, contiguous F32.
    k
        Number of positions, 1 to ``n``.

    Returns
    -------
    Tensor
        ``(..., k)``, I32.

    Raises
    ------
    ValueError
        If ``a`` is not contiguous F32, or ``k`` is out of range.

    C: ``ggml_argsort_top_k``.
    """
    ctx = result_context("argsort_top_k", a, ctx=ctx)
    _check("argsort_top_k", a)
    k = check_integer("argsort_top_k", "k", k, 1, max(a.ne[0], 1))
    if not a.ne[0]:
        raise op_error("argsort_top_k", "the rows of a are empty", a=a)
    return ctx.build(c.ggml_argsort_top_k, a.ndim, a.ptr, k, n=2)


def top_k(a: Tensor, k: int, *, ctx: Context | None = None) -> Tensor:
    """Return the positions of the ``k`` largest elements of each row, in no order; faster than sorting.

    Parameters and errors as for :func:`argsort_top_k`. The values should be finite: with infinities or NaN, GPUs may
    return wrong positions. So the result cannot be row numbers; that of :func:`argsort_top_k` can.

    C: ``ggml_top_k``.
    """
    ctx = result_context("top_k", a, ctx=ctx)
    _check("top_k", a)
    k = check_integer("top_k", "k", k, 1, max(a.ne[0], 1))
    if not a.ne[0]:
        raise op_error("top_k", "the rows of a are empty", a=a)
    if k == 1:
        # ggml's Vulkan kernel compares bits, so -2 counts as larger than -1.
        return argsort_top_k(a, 1, ctx=ctx)
    return ctx.build(c.ggml_top_k, a.ndim, a.ptr, k)
