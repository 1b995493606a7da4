"""Shapes and views. Views share the memory of what they are made from."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ggml_cffi import c
from ggml_cffi.core.context import Context
from ggml_cffi.core.dtypes import INTERNAL, as_type, block_size, is_quantized, type_size
from ggml_cffi.core.shapes import check_shape, ne_of
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.ops._args import encodes
from ggml_cffi.ops._check import check_result, contiguous_rows, fail, home

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
    """``a`` with another shape, in the same order of elements. A view.

    Parameters
    ----------
    shape
        Sizes, of which one may be -1, or a tensor of that shape.

    Raises
    ------
    ValueError
        If ``a`` is not contiguous or the number of elements differs.

    C: ``ggml_reshape``, ``ggml_reshape_1d``, ``ggml_reshape_2d``, ``ggml_reshape_3d``, ``ggml_reshape_4d``.
    """
    ctx = home("reshape", a, ctx=ctx)
    shape = shape.shape if isinstance(shape, Tensor) else tuple(shape)
    sizes = list(shape)
    if sizes.count(-1) == 1:
        rest = prod(n for n in sizes if n != -1)
        sizes[sizes.index(-1)] = a.size // rest if rest else 0
    sizes = list(check_shape(sizes))
    if prod(sizes) != a.size:
        raise fail("reshape", f"{tuple(shape)} has another number of elements", a=a)
    if not a.is_contiguous:
        raise fail("reshape", "a must be contiguous (use cont)", a=a)
    ne = ne_of(sizes)
    if ne[0] % block_size(a.dtype):
        raise fail("reshape", f"rows of {ne[0]} are no whole blocks of {a.dtype.name}", a=a)
    return ctx.build(c.ggml_reshape_4d, len(sizes), a.ptr, *ne)


def _plain(t: Tensor) -> Tensor:
    """``t``; if it is contiguous, with the strides of a tensor that was never anything else.

    Where an axis has one element, its stride tells nothing, and ``ggml_is_contiguous`` does not look at it. Some
    kernels do: they take rows to be ``nb[1]`` bytes apart.
    """
    p = t.ptr
    if c.ggml_is_contiguous(p):
        p.nb[0] = c.ggml_type_size(p.type)
        p.nb[1] = c.ggml_row_size(p.type, p.ne[0])
        p.nb[2] = p.nb[1] * p.ne[1]
        p.nb[3] = p.nb[2] * p.ne[2]
    return t


def permute(a: Tensor, axes: Sequence[int], *, ctx: Context | None = None) -> Tensor:
    """``a`` with its axes in another order, as ``numpy.transpose(a, axes)``. A view.

    Raises
    ------
    ValueError
        If ``axes`` is no permutation of all axes.

    C: ``ggml_permute``.
    """
    ctx = home("permute", a, ctx=ctx)
    n = a.ndim
    order = [axis + n if axis < 0 else axis for axis in axes]
    if sorted(order) != list(range(n)):
        raise fail("permute", f"{tuple(axes)} is no permutation of the {n} axes", a=a)
    if is_quantized(a.dtype) and n and order[-1] != n - 1:
        raise fail("permute", "the last axis of a quantized tensor holds its blocks and must stay last", a=a)
    to = [0, 1, 2, 3]
    for i, axis in enumerate(order):
        to[n - 1 - axis] = n - 1 - i
    result = ctx.build(c.ggml_permute, n, a.ptr, *to)
    if max(*a.ne, *a.nb) >= 2**31:  # ggml cuts sizes and strides to 32 bits
        for i, axis in enumerate(to):
            result.ptr.ne[axis], result.ptr.nb[axis] = a.ne[i], a.nb[i]
    return _plain(result)


def transpose(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """``a`` with its last two axes swapped. A view.

    Raises
    ------
    ValueError
        If ``a`` has fewer than two axes.

    C: ``ggml_transpose``.
    """
    ctx = home("transpose", a, ctx=ctx)
    if a.ndim < 2:
        raise fail("transpose", "a must have at least two axes", a=a)
    if is_quantized(a.dtype):
        raise fail("transpose", "the last axis of a quantized tensor holds its blocks and must stay last", a=a)
    return _plain(ctx.build(c.ggml_transpose, a.ndim, a.ptr))


def view(
    a: Tensor,
    shape: Sequence[int],
    *,
    strides: Sequence[int] | None = None,
    offset: int = 0,
    ctx: Context | None = None,
) -> Tensor:
    """A part of ``a``, by shape, strides and offset, as ``numpy.ndarray(shape, buffer=a, ...)``.

    Parameters
    ----------
    shape
        Sizes.
    strides
        Bytes from one element to the next along each axis; the last axis is contiguous. Default: no gaps.
    offset
        Bytes from the start of ``a`` to the first element.

    Raises
    ------
    ValueError
        If the view would reach outside ``a``, does not start at an element, or its last axis is not contiguous.

    C: ``ggml_view_1d``, ``ggml_view_2d``, ``ggml_view_3d``, ``ggml_view_4d``, ``ggml_view_tensor``.
    """
    ctx = home("view", a, ctx=ctx)
    sizes = check_shape(shape)
    ne, unit, block = ne_of(sizes), type_size(a.dtype), block_size(a.dtype)
    if ne[0] % block:
        raise fail("view", f"rows of {ne[0]} are no whole blocks of {a.dtype.name}", a=a)
    nb = [unit, ne[0] // block * unit, 0, 0]
    nb[2], nb[3] = nb[1] * ne[1], nb[1] * ne[1] * ne[2]
    if strides is not None:
        if len(strides) != len(sizes) or any(not 0 <= s < 2**62 for s in strides):
            raise fail("view", f"strides {tuple(strides)} do not fit shape {sizes}", a=a)
        given = list(reversed(strides))
        if given and given[0] != unit and ne[0] > block:
            raise fail("view", f"the last axis must be contiguous: its stride is {unit} bytes, not {given[0]}", a=a)
        if any(s % unit for s in given):
            raise fail("view", f"strides {tuple(strides)} are no multiples of {unit} bytes", a=a)
        nb[1 : len(given)] = given[1:]
        for i in range(max(len(given), 1), 4):
            nb[i] = nb[i - 1] * ne[i - 1] if i > 1 else nb[1]
    last = 0 if 0 in ne else (ne[0] // block) * unit + sum((n - 1) * s for n, s in zip(ne[1:], nb[1:], strict=True))
    if offset < 0 or offset % unit or offset + last > a.nbytes:
        raise fail("view", f"bytes {offset} to {offset + last} are not elements of a, which has {a.nbytes} bytes", a=a)
    pointer = a.ptr
    root = pointer.view_src or pointer
    dense = ne[0] // block * unit * prod(ne[1:])
    if dense + offset + (pointer.view_offs if pointer.view_src else 0) > c.ggml_nbytes(root):
        raise fail("view", f"a view of {dense} bytes is larger than what it looks at: strides cannot overlap", a=a)
    return _plain(ctx.build(c.ggml_view_4d, len(sizes), a.ptr, *ne, *nb[1:], offset))


def cont(a: Tensor, shape: Sequence[int] | None = None, *, ctx: Context | None = None) -> Tensor:
    """A contiguous copy of ``a``, as ``numpy.ascontiguousarray``.

    Parameters
    ----------
    a
        F32, F16, BF16 or I32; quantized if it is contiguous already.
    shape
        Another shape for the copy, with the elements in the same order.

    Raises
    ------
    ValueError
        If ``a`` is of another type, or the number of elements differs.

    C: ``ggml_cont``, ``ggml_cont_1d``, ``ggml_cont_2d``, ``ggml_cont_3d``, ``ggml_cont_4d``.
    """
    ctx = home("cont", a, ctx=ctx)
    if a.dtype not in (Type.F32, Type.F16, Type.BF16, Type.I32) and not (is_quantized(a.dtype) and a.is_contiguous):
        raise fail("cont", "only F32, F16, BF16 and I32 can be made contiguous", a=a)
    if shape is None:
        return ctx.build(c.ggml_cont, a.ndim, a.ptr)
    sizes = check_shape(shape)
    ne = ne_of(sizes)
    if prod(sizes) != a.size:
        raise fail("cont", f"{sizes} has another number of elements", a=a)
    if ne[0] % block_size(a.dtype):
        raise fail("cont", f"rows of {ne[0]} are no whole blocks of {a.dtype.name}", a=a)
    return ctx.build(c.ggml_cont_4d, len(sizes), a.ptr, *ne)


def diag(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Matrices with the rows of ``a`` on their diagonals, as ``numpy.diag`` makes of a vector.

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
        If ``a`` is not so.

    C: ``ggml_diag``.
    """
    ctx = home("diag", a, ctx=ctx)
    if a.dtype is not Type.F32 or not contiguous_rows(a):
        raise fail("diag", "a must be F32 with contiguous rows", a=a)
    n, rows, *leading = a.ne
    if rows != 1:
        raise fail("diag", "the axis before the last must have size 1", a=a)
    check_result("diag", (n, n, *leading))
    return ctx.build(c.ggml_diag, max(a.ndim, 2), a.ptr)


def cast(a: Tensor, dtype: Type | str, *, ctx: Context | None = None) -> Tensor:
    """A copy of ``a`` with another float or quantized type.

    Raises
    ------
    ValueError
        If ggml has no such conversion.

    C: ``ggml_cast``.
    """
    ctx = home("cast", a, ctx=ctx)
    to = as_type(dtype)
    if not a.size:
        raise fail("cast", "a has no elements", a=a)
    floats = (Type.F32, Type.F16, Type.BF16)
    if a.dtype not in floats and not (is_quantized(a.dtype) and to is Type.F32):
        raise fail("cast", f"there is no conversion to {to.name}", a=a)
    if to in INTERNAL:
        raise fail("cast", f"{to.name} is a format inside ggml's products", a=a)
    if to not in floats and not (encodes(to) and a.dtype is Type.F32 and a.is_contiguous):
        raise fail("cast", f"there is no conversion to {to.name}", a=a)
    if is_quantized(a.dtype) and a.size >= 2**32:  # the CPU counts with 32 bits
        raise fail("cast", "a has 2**32 elements or more", a=a)
    if a.ne[0] % block_size(to):
        raise fail("cast", f"rows of {a.ne[0]} are no whole blocks of {to.name}", a=a)
    return ctx.build(c.ggml_cast, a.ndim, a.ptr, to)


_REPEATED = frozenset({Type.F32, Type.F16, Type.BF16, Type.I16, Type.I32})


def repeat(a: Tensor, shape: Sequence[int] | Tensor, *, ctx: Context | None = None) -> Tensor:
    """``a`` repeated along its axes up to ``shape``, as ``numpy.tile``.

    Parameters
    ----------
    a
        F32, F16, BF16, I16 or I32 with contiguous rows.
    shape
        Each size a multiple of ``a``'s; more axes come before ``a``'s own. Or a tensor of that shape.

    Raises
    ------
    ValueError
        If ``shape`` is no multiple of ``a``'s, or the type is another.

    C: ``ggml_repeat``, ``ggml_repeat_4d``.
    """
    ctx = home("repeat", a, ctx=ctx)
    sizes = check_shape(shape.shape if isinstance(shape, Tensor) else shape)
    ne = ne_of(sizes)
    if len(sizes) < a.ndim or not all(n and m % n == 0 for m, n in zip(ne, a.ne, strict=True)):
        raise fail("repeat", f"{sizes} is no multiple of a's shape", a=a)
    if a.dtype not in _REPEATED or a.nb[0] != type_size(a.dtype):
        raise fail("repeat", "a must be F32, F16, BF16, I16 or I32 with contiguous rows", a=a)
    check_result("repeat", ne, a.dtype)
    return ctx.build(c.ggml_repeat_4d, len(sizes), a.ptr, *ne)


def concat(a: Tensor, b: Tensor, axis: int = 0, *, ctx: Context | None = None) -> Tensor:
    """``a`` and ``b`` one after the other along ``axis``, as ``numpy.concatenate``.

    Parameters
    ----------
    a, b
        One type that is not quantized, as many axes, and one shape but for ``axis``.
    axis
        Counted as numpy does, from the end if negative.

    Raises
    ------
    ValueError
        If types or shapes differ, or there is no such axis.

    C: ``ggml_concat``.
    """
    ctx = home("concat", a, b, ctx=ctx)
    n = a.ndim
    if b.ndim != n or not -n <= axis < n:
        raise fail("concat", f"a and b must have as many axes, {axis} among them", a=a, b=b)
    dim = n - 1 - axis % n
    if a.dtype is not b.dtype or is_quantized(a.dtype):
        raise fail("concat", "a and b must be of one type that is not quantized", a=a, b=b)
    if any(x != y for i, (x, y) in enumerate(zip(a.ne, b.ne, strict=True)) if i != dim):
        raise fail("concat", f"a and b differ in more than axis {axis}", a=a, b=b)
    check_result("concat", tuple(x + b.ne[i] if i == dim else x for i, x in enumerate(a.ne)), a.dtype)
    return ctx.build(c.ggml_concat, n, a.ptr, b.ptr, dim)
