"""Sorting rows, by number."""

from __future__ import annotations

from math import ceil

import numpy as np

from ggml_cffi import c
from ggml_cffi.core.context import Context
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import SortOrder, Type
from ggml_cffi.ops._args import integer
from ggml_cffi.ops._check import check_result, fail, home

__all__ = [
    "argsort",
    "argsort_top_k",
    "top_k",
]


def _check(op: str, a: Tensor) -> None:
    if a.dtype is not Type.F32 or not a.is_contiguous:
        raise fail(op, "a must be contiguous F32 (use cont)", a=a)
    n = a.ne[0]
    # ggml's Vulkan code finds the next power of two in single precision, and loses elements where that is rounded.
    if n > 2**31 - 1 or (n > 2**20 and 2 ** ceil(np.log2(np.float32(n)) - np.float32(4e-6)) < n):
        raise fail(op, f"rows of {n} cannot be sorted", a=a)


def argsort(a: Tensor, order: SortOrder = SortOrder.ASC, *, ctx: Context | None = None) -> Tensor:
    """The numbers of the elements of each row in the order of their values, as ``numpy.argsort``. Not stable.

    The result may serve as row numbers of :func:`get_rows` and others.

    Parameters
    ----------
    a
        Contiguous F32.
    order
        ``SortOrder.ASC``, the smallest first, or ``DESC``.

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
    ctx = home("argsort", a, ctx=ctx)
    _check("argsort", a)
    check_result("argsort", a.ne)
    return ctx.build(c.ggml_argsort, a.ndim, a.ptr, SortOrder(order))


def argsort_top_k(a: Tensor, k: int, *, ctx: Context | None = None) -> Tensor:
    """The numbers of the ``k`` largest elements of each row, the largest first: a view of a whole :func:`argsort`.

    The result may serve as row numbers of :func:`get_rows` and others.

    Parameters
    ----------
    a
        ``(..., n)``, contiguous F32.
    k
        1 to ``n``.

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
    ctx = home("argsort_top_k", a, ctx=ctx)
    _check("argsort_top_k", a)
    k = integer("argsort_top_k", "k", k, 1, max(a.ne[0], 1))
    if not a.ne[0]:
        raise fail("argsort_top_k", "the rows of a are empty", a=a)
    return ctx.build(c.ggml_argsort_top_k, a.ndim, a.ptr, k, n=2)


def top_k(a: Tensor, k: int, *, ctx: Context | None = None) -> Tensor:
    """The numbers of the ``k`` largest elements of each row, in no order; faster than sorting.

    Parameters and errors as :func:`argsort_top_k`. The values should be numbers: with infinities or NaN among them
    GPUs may name others. So the result cannot serve as row numbers; that of :func:`argsort_top_k` can.

    C: ``ggml_top_k``.
    """
    ctx = home("top_k", a, ctx=ctx)
    _check("top_k", a)
    k = integer("top_k", "k", k, 1, max(a.ne[0], 1))
    if not a.ne[0]:
        raise fail("top_k", "the rows of a are empty", a=a)
    if k == 1:
        # ggml's Vulkan kernel compares bits here, by which -2 is larger than -1.
        return argsort_top_k(a, 1, ctx=ctx)
    return ctx.build(c.ggml_top_k, a.ndim, a.ptr, k)
