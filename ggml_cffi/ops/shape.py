"""Shapes and views, copies and casts. A view shares the memory of its source."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ggml_cffi import c
from ggml_cffi.core.context import Context
from ggml_cffi.core.dtypes import INTERNAL, as_type, block_size, is_quantized, type_size
from ggml_cffi.core.shapes import check_shape, ne_of
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.ops._operands import check_result, contiguous_rows, encodes, op_error, result_context

__all__ = [
    "cast",
    "concat",
    "cont",
    "diag",
    "permute",
    "repeat",
    "reshape",
    "transpose",
    "view",
]


def reshape(a: Tensor, shape: Sequence[int] | Tensor, *, ctx: Context | None = None) -> Tensor:
    """Return a view of ``a`` with another shape, and the elements in the same order.

    Parameters
    ----------
    shape
        Sizes, of which one may be -1; or a tensor with the shape.

    Raises
    ------
    ValueError
        If ``a`` is not contiguous or the number of elements differs.

    C: ``ggml_reshape``, ``ggml_reshape_1d``, ``ggml_reshape_2d``, ``ggml_reshape_3d``, ``ggml_reshape_4d``.
    """
    ctx = result_context("reshape", a, ctx=ctx)
    shape = shape.shape if isinstance(shape, Tensor) else tuple(shape)
    sizes = list(shape)
    if sizes.count(-1) == 1:
        rest = prod(n for n in sizes if n != -1)
        sizes[sizes.index(-1)] = a.size // rest if rest else 0
    sizes = list(check_shape(sizes))
    if prod(sizes) != a.size:
        raise op_error("reshape", f"{tuple(shape)} has a different number of elements", a=a)
    if not a.is_contiguous:
        raise op_error("reshape", "a must be contiguous (use cont)", a=a)
    ne = ne_of(sizes)
    if ne[0] % block_size(a.dtype):
        raise op_error("reshape", f"rows of {ne[0]} do not fill whole blocks of {a.dtype.name}", a=a)
    return ctx.build(c.ggml_reshape_4d, len(sizes), a.ptr, *ne)


def _plain(t: Tensor) -> Tensor:
    """Give a contiguous tensor the strides of a new tensor, and return ``t``.

    The stride of an axis with one element has no meaning, and ``ggml_is_contiguous`` ignores it. Some kernels do not:
    they assume that rows are ``nb[1]`` bytes apart.
    """
    p = t.ptr
    if c.ggml_is_contiguous(p):
        p.nb[0] = c.ggml_type_size(p.type)
        p.nb[1] = c.ggml_row_size(p.type, p.ne[0])
        p.nb[2] = p.nb[1] * p.ne[1]
        p.nb[3] = p.nb[2] * p.ne[2]
    return t


def permute(a: Tensor, axes: Sequence[int], *, ctx: Context | None = None) -> Tensor:
    """Return a view of ``a`` with its axes in another order, as ``numpy.transpose(a, axes)`` does.

    Raises
    ------
    ValueError
        If ``axes`` is not a permutation of all axes.

    C: ``ggml_permute``.
    """
    ctx = result_context("permute", a, ctx=ctx)
    n = a.ndim
    order = [axis + n if axis < 0 else axis for axis in axes]
    if sorted(order) != list(range(n)):
        raise op_error("permute", f"{tuple(axes)} is not a permutation of the {n} axes", a=a)
    if is_quantized(a.dtype) and n and order[-1] != n - 1:
        raise op_error("permute", "the last axis of a quantized tensor holds its blocks and must stay last", a=a)
    to = [0, 1, 2, 3]
    for i, axis in enumerate(order):
        to[n - 1 - axis] = n - 1 - i
    result = ctx.build(c.ggml_permute, n, a.ptr, *to)
    if max(*a.ne, *a.nb) >= 2**31:  # ggml truncates sizes and strides to 32 bits
        for i, axis in enumerate(to):
            result.ptr.ne[axis], result.ptr.nb[axis] = a.ne[i], a.nb[i]
    return _plain(result)


def transpose(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Return a view of ``a`` with its last two axes swapped.

    Raises
    ------
    ValueError
        If ``a`` has fewer than two axes.

    C: ``ggml_transpose``.
    """
    ctx = result_context("transpose", a, ctx=ctx)
    if a.ndim < 2:
        raise op_error("transpose", "a must have at least two axes", a=a)
    if is_quantized(a.dtype):
        raise op_error("transpose", "the last axis of a quantized tensor holds its blocks and must stay last", a=a)
    return _plain(ctx.build(c.ggml_transpose, a.ndim, a.ptr))


def view(
    a: Tensor,
    shape: Sequence[int],
    *,
    strides: Sequence[int] | None = None,
    offset: int = 0,
    ctx: Context | None = None,
) -> Tensor:
    """Return a view of a part of ``a`` by shape, strides and offset, as ``numpy.ndarray(shape, buffer=a, ...)`` does.

    Parameters
    ----------
    shape
        Sizes.
    strides
        Bytes from one element to the next along each axis; the last axis is contiguous. Default: without gaps.
    offset
        Bytes from the start of ``a`` to the first element.

    Raises
    ------
    ValueError
        If the view reaches outside ``a``, does not start at an element, or its last axis is not contiguous.

    C: ``ggml_view_1d``, ``ggml_view_2d``, ``ggml_view_3d``, ``ggml_view_4d``, ``ggml_view_tensor``.
    """
    ctx = result_context("view", a, ctx=ctx)
    sizes = check_shape(shape)
    ne, unit, block = ne_of(sizes), type_size(a.dtype), block_size(a.dtype)
    if ne[0] % block:
        raise op_error("view", f"rows of {ne[0]} do not fill whole blocks of {a.dtype.name}", a=a)
    nb = [unit, ne[0] // block * unit, 0, 0]
    nb[2], nb[3] = nb[1] * ne[1], nb[1] * ne[1] * ne[2]
    if strides is not None:
        if len(strides) != len(sizes) or any(not 0 <= s < 2**62 for s in strides):
            raise op_error("view", f"strides {tuple(strides)} do not fit shape {sizes}", a=a)
        given = list(reversed(strides))
        if given and given[0] != unit and ne[0] > block:
            raise op_error("view", f"the last axis must be contiguous, with a stride of {unit}, not {given[0]}", a=a)
        if any(s % unit for s in given):
            raise op_error("view", f"strides {tuple(strides)} are not multiples of {unit} bytes", a=a)
        nb[1 : len(given)] = given[1:]
        for i in range(max(len(given), 1), 4):
            nb[i] = nb[i - 1] * ne[i - 1] if i > 1 else nb[1]
    last = 0 if 0 in ne else (ne[0] // block) * unit + sum((n - 1) * s for n, s in zip(ne[1:], nb[1:], strict=True))
    if offset < 0 or offset % unit or offset + last > a.nbytes:
        raise op_error("view", f"bytes {offset} to {offset + last} are not elements of a ({a.nbytes} bytes)", a=a)
    pointer = a.ptr
    root = pointer.view_src or pointer
    dense = ne[0] // block * unit * prod(ne[1:])
    if dense + offset + (pointer.view_offs if pointer.view_src else 0) > c.ggml_nbytes(root):
        raise op_error("view", f"a view of {dense} bytes is larger than its source: strides must not overlap", a=a)
    return _plain(ctx.build(c.ggml_view_4d, len(sizes), a.ptr, *ne, *nb[1:], offset))


def cont(a: Tensor, shape: Sequence[int] | None = None, *, ctx: Context | None = None) -> Tensor:
    """Copy ``a`` to contiguous memory, as ``numpy.ascontiguousarray`` does.

    Parameters
    ----------
    a
        F32, F16, BF16 or I32; quantized if it is contiguous already.
    shape
        Shape of the copy, with the elements in the same order. Default: that of ``a``.

    Raises
    ------
    ValueError
        If ``a`` is of another type, or the number of elements differs.

    C: ``ggml_cont``, ``ggml_cont_1d``, ``ggml_cont_2d``, ``ggml_cont_3d``, ``ggml_cont_4d``.
    """
    ctx = result_context("cont", a, ctx=ctx)
    if a.dtype not in (Type.F32, Type.F16, Type.BF16, Type.I32) and not (is_quantized(a.dtype) and a.is_contiguous):
        raise op_error("cont", "only F32, F16, BF16 and I32 can be made contiguous", a=a)
    if shape is None:
        return ctx.build(c.ggml_cont, a.ndim, a.ptr)
    sizes = check_shape(shape)
    ne = ne_of(sizes)
    if prod(sizes) != a.size:
        raise op_error("cont", f"{sizes} has a different number of elements", a=a)
    if ne[0] % block_size(a.dtype):
        raise op_error("cont", f"rows of {ne[0]} do not fill whole blocks of {a.dtype.name}", a=a)
    return ctx.build(c.ggml_cont_4d, len(sizes), a.ptr, *ne)


def diag(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Create matrices with the rows of ``a`` on their diagonals, as ``numpy.diag`` does with a vector.

    Parameters
    ----------
    a
        ``(n,)`` or ``(..., 1, n)``, F32, contiguous rows.

    Returns
    -------
    Tensor
        ``(..., n, n)``, F32.

    Raises
    ------
    ValueError
        If ``a`` does not fit.

    C: ``ggml_diag``.
    """
    ctx = result_context("diag", a, ctx=ctx)
    if a.dtype is not Type.F32 or not contiguous_rows(a):
        raise op_error("diag", "a must be F32 with contiguous rows", a=a)
    n, rows, *leading = a.ne
    if rows != 1:
        raise op_error("diag", "the axis before the last must have size 1", a=a)
    check_result("diag", (n, n, *leading))
    return ctx.build(c.ggml_diag, max(a.ndim, 2), a.ptr)


def cast(a: Tensor, dtype: Type | str, *, ctx: Context | None = None) -> Tensor:
    """Copy ``a`` to another float or quantized type.

    Raises
    ------
    ValueError
        If ggml has no such conversion.

    C: ``ggml_cast``.
    """
    ctx = result_context("cast", a, ctx=ctx)
    to = as_type(dtype)
    if not a.size:
        raise op_error("cast", "a has no elements", a=a)
    floats = (Type.F32, Type.F16, Type.BF16)
    if a.dtype not in floats and not (is_quantized(a.dtype) and to is Type.F32):
        raise op_error("cast", f"ggml has no conversion to {to.name}", a=a)
    if to in INTERNAL:
        raise op_error("cast", f"{to.name} is an internal format of ggml's matrix products", a=a)
    if to not in floats and not (encodes(to) and a.dtype is Type.F32 and a.is_contiguous):
        raise op_error("cast", f"ggml has no conversion to {to.name}", a=a)
    if is_quantized(a.dtype) and a.size >= 2**32:  # the CPU counts with 32 bits
        raise op_error("cast", "a has 2**32 elements or more", a=a)
    if a.ne[0] % block_size(to):
        raise op_error("cast", f"rows of {a.ne[0]} do not fill whole blocks of {to.name}", a=a)
    return ctx.build(c.ggml_cast, a.ndim, a.ptr, to)


_REPEATED = frozenset({Type.F32, Type.F16, Type.BF16, Type.I16, Type.I32})


def repeat(a: Tensor, shape: Sequence[int] | Tensor, *, ctx: Context | None = None) -> Tensor:
    """Repeat ``a`` along its axes up to ``shape``, as ``numpy.tile`` does.

    Parameters
    ----------
    a
        F32, F16, BF16, I16 or I32 with contiguous rows.
    shape
        Sizes that are multiples of those of ``a``, with additional axes first; or a tensor with the shape.

    Raises
    ------
    ValueError
        If ``shape`` is not a multiple of ``a``'s, or the type does not fit.

    C: ``ggml_repeat``, ``ggml_repeat_4d``.
    """
    ctx = result_context("repeat", a, ctx=ctx)
    sizes = check_shape(shape.shape if isinstance(shape, Tensor) else shape)
    ne = ne_of(sizes)
    if len(sizes) < a.ndim or not all(n and m % n == 0 for m, n in zip(ne, a.ne, strict=True)):
        raise op_error("repeat", f"{sizes} is not a multiple of a's shape", a=a)
    if a.dtype not in _REPEATED or a.nb[0] != type_size(a.dtype):
        raise op_error("repeat", "a must be F32, F16, BF16, I16 or I32 with contiguous rows", a=a)
    check_result("repeat", ne, a.dtype)
    return ctx.build(c.ggml_repeat_4d, len(sizes), a.ptr, *ne)


def concat(a: Tensor, b: Tensor, axis: int = 0, *, ctx: Context | None = None) -> Tensor:
    """Join ``a`` and ``b`` along ``axis``, as ``numpy.concatenate`` does.

    Parameters
    ----------
    a, b
        Tensors of one type, with equal sizes along all axes but ``axis``.
    axis
        Axis to join, counted from the end if negative.

    Raises
    ------
    ValueError
        If types or shapes differ, or the axis does not exist.

    C: ``ggml_concat``.
    """
    ctx = result_context("concat", a, b, ctx=ctx)
    n = a.ndim
    if b.ndim != n or not -n <= axis < n:
        raise op_error("concat", f"a and b must have the same number of axes, and axis {axis}", a=a, b=b)
    dim = n - 1 - axis % n
    if a.dtype is not b.dtype:
        raise op_error("concat", "a and b must be of one type", a=a, b=b)
    if any(x != y for i, (x, y) in enumerate(zip(a.ne, b.ne, strict=True)) if i != dim):
        raise op_error("concat", f"a and b differ in more than axis {axis}", a=a, b=b)
    check_result("concat", tuple(x + b.ne[i] if i == dim else x for i, x in enumerate(a.ne)), a.dtype)
    return ctx.build(c.ggml_concat, n, a.ptr, b.ptr, dim)
