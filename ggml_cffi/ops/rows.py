"""Reading, writing and adding rows by number.

With row numbers out of range, ggml ends the process, or reads and writes out of bounds. So row numbers must be inputs,
which are checked when their values are set, or results of argsort or argmax.
"""

from __future__ import annotations

import numpy as np

from ggml_cffi import c
from ggml_cffi.core.context import Context
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Op, Type
from ggml_cffi.ops._operands import (
    FLOATS,
    check_result,
    check_separate,
    contiguous_rows,
    encodes,
    op_error,
    result_context,
)
from ggml_cffi.ops._parameters import MAX_GROUPS

__all__ = [
    "add_id",
    "get_rows",
    "set_rows",
]


#: Operations whose results are values of the operand, unchanged.
_UNCHANGED = frozenset({Op.VIEW, Op.RESHAPE, Op.PERMUTE, Op.TRANSPOSE, Op.CONT})
#: Operations that return positions in the rows of their operand. TOP_K is not safe: with NaN, GPUs return positions
#: beyond the row.
_POSITIONS = frozenset({Op.ARGSORT, Op.ARGMAX})


def _found_among(rows: Tensor) -> int | None:
    """Return the length of the rows in which argsort or argmax found ``rows``; None if ``rows`` has another origin."""
    pointer = rows.ptr
    while pointer.op in _UNCHANGED:
        pointer = pointer.src[0]
    return int(pointer.src[0].ne[0]) if pointer.op in _POSITIONS else None


def limit_row_numbers(op: str, rows: Tensor, n: int, items: str = "rows") -> None:
    """Ensure that the values of ``rows`` stay below ``n``: larger ones would end the process or corrupt memory."""
    if not n and rows.size:
        raise op_error(op, f"a has no {items}", rows=rows)
    found = _found_among(rows)
    if found is not None:
        if found > n:
            raise op_error(op, f"positions in rows of {found} exceed the {n} {items}", rows=rows)
        return
    root = rows.memory_root()
    if root.op != Op.NONE or rows.ptr.op not in _UNCHANGED | {Op.NONE}:
        raise op_error(
            op,
            "row numbers must be an input tensor, a view of one, or a result of argsort or argmax: computed numbers "
            "cannot be checked",
            rows=rows,
        )
    # The limit holds for all values of the input behind a view. The context that holds the input stores the limit: in a
    # context that lives longer, another tensor could later have the same address.
    owner = next(ctx for ctx in rows.context.reachable() if ctx.holds(root))
    known = owner.row_limits.get(root)
    if known is not None and known <= n:
        return  # the values were checked with that limit, and each layer of a model refers to the same input
    owner.row_limits[root] = n
    if rows.is_allocated and owner.readable:
        whole = Tensor(rows.context, root, 4)
        try:
            whole.check_row_numbers(np.ascontiguousarray(whole.numpy()).reshape(-1).view(np.uint8))
        except ValueError:
            del owner.row_limits[root]  # the next use of these values is checked again
            raise


def get_rows(a: Tensor, rows: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Return the rows ``a[rows]``, decoded to F32 if quantized or half precision.

    Parameters
    ----------
    a
        ``(n, k)``, or with the leading axes of ``rows``; any type.
    rows
        ``(m,)``, I32: an input, or a result of argsort or argmax. Values must be 0 to ``n - 1``; an input is checked
        when its values are set.

    Returns
    -------
    Tensor
        ``(m, k)``, F32 (I32 if ``a`` is).

    Raises
    ------
    ValueError
        If the shapes or types do not fit, or ``rows`` already holds values out of range.

    C: ``ggml_get_rows``.
    """
    ctx = result_context("get_rows", a, rows, ctx=ctx)
    an, rn = a.ne, rows.ne
    if rows.dtype is not Type.I32:
        raise op_error("get_rows", "rows must be I32", a=a, rows=rows)
    if an[2] != rn[1] or an[3] != rn[2] or rn[3] != 1:
        raise op_error("get_rows", "the leading sizes of a and rows differ", a=a, rows=rows)
    if a.dtype in (Type.I8, Type.I16, Type.I64, Type.F64) or not contiguous_rows(a):
        raise op_error("get_rows", "a must be a float, quantized or I32 tensor with contiguous rows", a=a, rows=rows)
    limit_row_numbers("get_rows", rows, an[1])
    check_result("get_rows", (an[0], *rn[:3]))
    return ctx.build(c.ggml_get_rows, max(rows.ndim + 1, a.ndim), a.ptr, rows.ptr)


def set_rows(a: Tensor, b: Tensor, rows: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Write rows of ``a`` in place, cast to its type: ``a[rows] = b``. Return a view of ``a``.

    Parameters
    ----------
    a
        ``(n, k)``, or with leading axes; any type that ggml can encode.
    b
        ``(m, k)`` with ``a``'s leading axes, F32 or F16, contiguous rows.
    rows
        ``(m,)``, or with leading axes that divide those of ``b``; I64 or I32: an input, or a result of argsort or
        argmax. Values must be 0 to ``n - 1``; an input is checked when its values are set.

    Raises
    ------
    ValueError
        If the shapes or types do not fit, or ``rows`` already holds values out of range.

    C: ``ggml_set_rows``.
    """
    ctx = result_context("set_rows", a, b, rows, ctx=ctx)
    an, bn, rn = a.ne, b.ne, rows.ne
    if an[0] != bn[0] or an[2:] != bn[2:]:
        raise op_error("set_rows", "a and b differ in more than their number of rows", a=a, b=b, rows=rows)
    if bn[1] != rn[0] or not rn[1] or not rn[2] or bn[2] % rn[1] or bn[3] % rn[2] or rn[3] != 1:
        raise op_error("set_rows", "one row number per row of b is needed", a=a, b=b, rows=rows)
    if rows.dtype not in (Type.I64, Type.I32) or b.dtype not in (Type.F32, Type.F16):
        raise op_error("set_rows", "b must be F32 or F16, and rows I64 or I32", a=a, b=b, rows=rows)
    kind = a.dtype
    if kind not in FLOATS and not encodes(kind):
        raise op_error("set_rows", f"ggml cannot convert rows to {kind.name}", a=a, b=b, rows=rows)
    if not (contiguous_rows(a) and contiguous_rows(b)):
        raise op_error("set_rows", "a and b must have contiguous rows", a=a, b=b, rows=rows)
    check_separate("set_rows", a)
    limit_row_numbers("set_rows", rows, an[1])
    return ctx.build(c.ggml_set_rows, a.ndim, a.ptr, b.ptr, rows.ptr)


def add_id(a: Tensor, b: Tensor, ids: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Add to each row of ``a`` a row of ``b``, such as an expert's bias: ``a[t, e] + b[ids[t, e]]``.

    Parameters
    ----------
    a
        ``(n_tokens, n_used, k)``, F32, contiguous rows.
    b
        ``(n, k)``, F32, contiguous rows.
    ids
        ``(n_tokens, n_used)``, I32 with contiguous rows: an input, or a result of argsort or argmax. Values must be 0
        to ``n - 1``; an input is checked when its values are set.

    Returns
    -------
    Tensor
        ``a``'s shape, F32.

    Raises
    ------
    ValueError
        If the shapes or types do not fit, or ``ids`` already holds values out of range.

    C: ``ggml_add_id``.
    """
    ctx = result_context("add_id", a, b, ids, ctx=ctx)
    if a.dtype is not Type.F32 or b.dtype is not Type.F32 or ids.dtype is not Type.I32:
        raise op_error("add_id", "a and b must be F32 and ids I32", a=a, b=b, ids=ids)
    an, bn = a.ne, b.ne
    if an[0] != bn[0] or ids.ne != (an[1], an[2], 1, 1) or an[3] != 1 or bn[2:] != (1, 1):
        raise op_error("add_id", "ids must name a row of b for each row of a", a=a, b=b, ids=ids)
    if not (contiguous_rows(a) and contiguous_rows(b) and contiguous_rows(ids)):
        raise op_error("add_id", "the rows of a, b and ids must be contiguous (use cont)", a=a, b=b, ids=ids)
    if an[1] > MAX_GROUPS or an[2] > MAX_GROUPS:
        raise op_error("add_id", f"a has more than {MAX_GROUPS} tokens, or rows for each", a=a, b=b, ids=ids)
    limit_row_numbers("add_id", ids, bn[1])
    return ctx.build(c.ggml_add_id, a.ndim, a.ptr, b.ptr, ids.ptr)
