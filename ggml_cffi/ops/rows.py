"""Rows by number."""

from __future__ import annotations

import numpy as np

from ggml_cffi import c
from ggml_cffi.context import Context
from ggml_cffi.dtypes import is_quantized
from ggml_cffi.enums import Type
from ggml_cffi.ops._check import FLOATS, check_result, contiguous_rows, fail, home
from ggml_cffi.tensor import Tensor


def _limit(op: str, rows: Tensor, n: int) -> None:
    """Have the values of ``rows`` stay below ``n``: ggml ends the process on others, or writes out of bounds."""
    if not n and rows.size:
        raise fail(op, "a has no rows", rows=rows)
    if not rows.is_leaf or rows.ptr.view_src:
        raise fail(op, "row numbers must be an input tensor, not computed: nothing could check them", rows=rows)
    limits = rows.context.limits
    limits[rows.ptr] = min(n, limits.get(rows.ptr, n))
    if rows.is_allocated:
        rows.check_limit(np.ascontiguousarray(rows.numpy()).reshape(-1).view(np.uint8))


def get_rows(a: Tensor, rows: Tensor, *, ctx: Context | None = None) -> Tensor:
    """``a[rows]``, decoded to F32 if quantized or half precision.

    Parameters
    ----------
    a
        ``(n, k)``, any type; or with leading axes that ``rows`` has too.
    rows
        ``(m,)``, I32, an input. Values must be 0 to ``n - 1``: they are checked when they are set.

    Returns
    -------
    Tensor
        ``(m, k)``, F32 (I32 if ``a`` is).

    Raises
    ------
    ValueError
        If the shapes or types do not fit, or ``rows`` holds values out of range already.

    C: ``ggml_get_rows``.
    """
    ctx = home("get_rows", a, rows, ctx=ctx)
    an, rn = a.ne, rows.ne
    if rows.dtype is not Type.I32:
        raise fail("get_rows", "rows must be I32", a=a, rows=rows)
    if an[2] != rn[1] or an[3] != rn[2] or rn[3] != 1:
        raise fail("get_rows", "the leading sizes of a and rows differ", a=a, rows=rows)
    if a.dtype in (Type.I8, Type.I16, Type.I64, Type.F64) or not contiguous_rows(a):
        raise fail("get_rows", "a must be a float, quantized or I32 tensor with contiguous rows", a=a, rows=rows)
    _limit("get_rows", rows, an[1])
    check_result("get_rows", (an[0], *rn[:3]))
    return ctx.build(c.ggml_get_rows, max(rows.ndim + 1, a.ndim), a.ptr, rows.ptr)


def set_rows(a: Tensor, b: Tensor, rows: Tensor, *, ctx: Context | None = None) -> Tensor:
    """``a[rows] = b``: writes rows of ``a`` in place, cast to its type, and returns a view of it.

    Parameters
    ----------
    a
        ``(n, k)`` or with leading axes, any type that can be quantized to.
    b
        ``(m, k)`` with ``a``'s leading axes, F32, contiguous rows.
    rows
        ``(m,)``, or with leading axes that divide ``b``'s; I64 or I32, an input. Values must be 0 to ``n - 1``: they
        are checked when they are set.

    Raises
    ------
    ValueError
        If the shapes or types do not fit, or ``rows`` holds values out of range already.

    C: ``ggml_set_rows``.
    """
    ctx = home("set_rows", a, b, rows, ctx=ctx)
    an, bn, rn = a.ne, b.ne, rows.ne
    if an[0] != bn[0] or an[2:] != bn[2:]:
        raise fail("set_rows", "a and b differ in more than their number of rows", a=a, b=b, rows=rows)
    if bn[1] != rn[0] or not rn[1] or not rn[2] or bn[2] % rn[1] or bn[3] % rn[2] or rn[3] != 1:
        raise fail("set_rows", "one row number per row of b is needed", a=a, b=b, rows=rows)
    if rows.dtype not in (Type.I64, Type.I32) or b.dtype is not Type.F32:
        raise fail("set_rows", "b must be F32 and rows I64 or I32", a=a, b=b, rows=rows)
    kind = a.dtype
    if kind not in FLOATS and not (is_quantized(kind) and c.ggml_get_type_traits_cpu(kind).from_float):
        raise fail("set_rows", f"ggml cannot convert rows to {kind.name}", a=a, b=b, rows=rows)
    if not (contiguous_rows(a) and contiguous_rows(b)):
        raise fail("set_rows", "a and b must have contiguous rows", a=a, b=b, rows=rows)
    _limit("set_rows", rows, an[1])
    return ctx.build(c.ggml_set_rows, a.ndim, a.ptr, b.ptr, rows.ptr)
