"""Rows by number.

Row numbers must be known to be in range, since ggml ends the process on others, or reads and writes out of bounds: they
are inputs, checked when they are set, or what argsort or argmax found.
"""

from __future__ import annotations

import numpy as np

from ggml_cffi import c
from ggml_cffi.core.context import Context
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Op, Type
from ggml_cffi.ops._args import GROUPS, encodes
from ggml_cffi.ops._check import FLOATS, check_result, check_separate, contiguous_rows, fail, home

__all__ = [
    "add_id",
    "get_rows",
    "set_rows",
]


#: What leaves the values as they are, or some of them out.
_SAME = frozenset({Op.VIEW, Op.RESHAPE, Op.PERMUTE, Op.TRANSPOSE, Op.CONT})
#: What finds places in the rows of its operand. Not TOP_K: on GPUs it names places beyond the row where there is NaN.
_FOUND = frozenset({Op.ARGSORT, Op.ARGMAX})


def _found_among(rows: Tensor) -> int | None:
    """The length of the rows in which argsort or argmax found the places ``rows``; None if they are not from there."""
    pointer = rows.ptr
    while pointer.op in _SAME:
        pointer = pointer.src[0]
    return int(pointer.src[0].ne[0]) if pointer.op in _FOUND else None


def _limit(op: str, rows: Tensor, n: int, what: str = "rows") -> None:
    """Have the values of ``rows`` stay below ``n``: ggml ends the process on others, or writes out of bounds."""
    if not n and rows.size:
        raise fail(op, f"a has no {what}", rows=rows)
    found = _found_among(rows)
    if found is not None:
        if found > n:
            raise fail(op, f"places in rows of {found} are beyond the {n} {what}", rows=rows)
        return
    root, _ = rows.place()
    if root.op != Op.NONE or rows.ptr.op not in _SAME | {Op.NONE}:
        raise fail(
            op,
            "row numbers must be an input tensor or a view of one, not computed (but by argsort or argmax): nothing "
            "could check them",
            rows=rows,
        )
    # All values of the input behind a view are kept below n, whatever part of it the view shows. The context that holds
    # the input remembers: in one that lives longer, another tensor could come to lie at the same address.
    owner = next(ctx for ctx in rows.context.reachable() if ctx.holds(root))
    owner.limits[root] = min(n, owner.limits.get(root, n))
    if rows.is_allocated and owner.readable:
        whole = Tensor(rows.context, root, 4)
        whole.check_limit(np.ascontiguousarray(whole.numpy()).reshape(-1).view(np.uint8))


def get_rows(a: Tensor, rows: Tensor, *, ctx: Context | None = None) -> Tensor:
    """``a[rows]``, decoded to F32 if quantized or half precision.

    Parameters
    ----------
    a
        ``(n, k)``, any type; or with leading axes that ``rows`` has too.
    rows
        ``(m,)``, I32, an input or from argsort or argmax. Values must be 0 to ``n - 1``: they are checked when they
        are set.

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
        ``(m, k)`` with ``a``'s leading axes, F32 or F16, contiguous rows.
    rows
        ``(m,)``, or with leading axes that divide ``b``'s; I64 or I32, an input or from argsort or argmax. Values
        must be 0 to ``n - 1``: they are checked when they are set.

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
    if rows.dtype not in (Type.I64, Type.I32) or b.dtype not in (Type.F32, Type.F16):
        raise fail("set_rows", "b must be F32 or F16, and rows I64 or I32", a=a, b=b, rows=rows)
    kind = a.dtype
    if kind not in FLOATS and not encodes(kind):
        raise fail("set_rows", f"ggml cannot convert rows to {kind.name}", a=a, b=b, rows=rows)
    if not (contiguous_rows(a) and contiguous_rows(b)):
        raise fail("set_rows", "a and b must have contiguous rows", a=a, b=b, rows=rows)
    check_separate("set_rows", a)
    _limit("set_rows", rows, an[1])
    return ctx.build(c.ggml_set_rows, a.ndim, a.ptr, b.ptr, rows.ptr)


def add_id(a: Tensor, b: Tensor, ids: Tensor, *, ctx: Context | None = None) -> Tensor:
    """``a[t, e] + b[ids[t, e]]``: to each row of ``a`` the row of ``b`` that ``ids`` names, say an expert's bias.

    Parameters
    ----------
    a
        ``(n_tokens, n_used, k)``, F32, contiguous rows.
    b
        ``(n, k)``, F32, contiguous rows.
    ids
        ``(n_tokens, n_used)``, I32 with contiguous rows, an input or from argsort or argmax. Values must be 0 to
        ``n - 1``: they are checked when they are set.

    Returns
    -------
    Tensor
        ``a``'s shape, F32.

    Raises
    ------
    ValueError
        If the shapes or types do not fit, or ``ids`` holds values out of range already.

    C: ``ggml_add_id``.
    """
    ctx = home("add_id", a, b, ids, ctx=ctx)
    if a.dtype is not Type.F32 or b.dtype is not Type.F32 or ids.dtype is not Type.I32:
        raise fail("add_id", "a and b must be F32 and ids I32", a=a, b=b, ids=ids)
    an, bn = a.ne, b.ne
    if an[0] != bn[0] or ids.ne != (an[1], an[2], 1, 1) or an[3] != 1 or bn[2:] != (1, 1):
        raise fail("add_id", "ids must name a row of b for each row of a", a=a, b=b, ids=ids)
    if not (contiguous_rows(a) and contiguous_rows(b) and contiguous_rows(ids)):
        raise fail("add_id", "the rows of a, b and ids must be contiguous (use cont)", a=a, b=b, ids=ids)
    if an[1] > GROUPS or an[2] > GROUPS:
        raise fail("add_id", f"a has more than {GROUPS} tokens, or rows for each", a=a, b=b, ids=ids)
    _limit("add_id", ids, bn[1])
    return ctx.build(c.ggml_add_id, a.ndim, a.ptr, b.ptr, ids.ptr)
