"""Copies, and writes over a part of a tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.context import Context
from ggml_cffi.core.dtypes import INTEGERS, is_quantized, type_size
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.ops._operands import FLOATS, check_separate, contiguous_rows, encodes, op_error, result_context
from ggml_cffi.ops._parameters import INT_MAX, MAX_GROUPS, check_integer

__all__ = [
    "acc",
    "acc_inplace",
    "cpy",
    "dup",
    "dup_inplace",
    "set",
    "set_inplace",
]

_PLAIN = FLOATS | {Type.I32}


def _check_target(op: str, a: Tensor, b: Tensor) -> None:
    """Raise ``ValueError`` if the target may hold row numbers, or overlaps with the source."""
    if a.dtype in INTEGERS:
        raise op_error(op, "integers, which may be checked row numbers, cannot be written in place", a=a)
    start, other = a.memory_offset(), b.memory_offset()
    if a.memory_root() == b.memory_root() and start < other + b.nbytes and other < start + a.nbytes:
        raise op_error(op, "a and b overlap in memory", a=a, b=b)
    check_separate(op, a)


def _window(
    op: str, a: Tensor, b: Tensor, strides: Sequence[int] | None, offset: int, largest: int
) -> tuple[int, int, int, int]:
    """Return the strides and the offset of ``b`` in ``a``, in C's order."""
    unit, bn = type_size(a.dtype), b.ne
    offset = check_integer(op, "offset", offset, 0, largest)
    if not b.size:
        raise op_error(op, "b has no elements", a=a, b=b)
    given = list(a.nb)
    if strides is not None:
        if len(strides) != b.ndim:
            raise op_error(op, f"strides {tuple(strides)} do not fit the axes of b", a=a, b=b)
        given[: b.ndim] = [check_integer(op, "strides", s, 0, 2**62) for s in reversed(strides)]
        if b.ndim and given[0] != unit and bn[0] > 1:
            raise op_error(op, f"the last axis must be contiguous, with a stride of {unit}, not {given[0]}", a=a, b=b)
    nb, end = [unit], bn[0] * unit
    for n, stride in zip(bn[1:], given[1:], strict=True):
        # ggml's Vulkan kernel divides by the strides to find the place in b, so each must span the axes inside.
        nb.append(stride if n > 1 else end)
        if nb[-1] < end or nb[-1] % unit:
            raise op_error(op, f"strides {tuple(given[:4])[: max(b.ndim, 1)][::-1]} mix the axes of b", a=a, b=b)
        end += (n - 1) * nb[-1]
    if offset % unit or offset + end > a.nbytes:
        raise op_error(op, f"bytes {offset} to {offset + end} are not elements of a ({a.nbytes} bytes)", a=a, b=b)
    if max(nb) > INT_MAX or a.size > MAX_GROUPS * 512:
        raise op_error(op, f"a has more than {MAX_GROUPS * 512} elements, or strides of 2**31 bytes or more", a=a, b=b)
    return nb[1], nb[2], nb[3], offset


def _acc(
    op: str,
    function: Callable[..., Any],
    a: Tensor,
    b: Tensor,
    strides: Sequence[int] | None,
    offset: int,
    ctx: Context | None,
) -> Tensor:
    ctx = result_context(op, a, b, ctx=ctx)
    if a.dtype is not Type.F32 or b.dtype is not Type.F32:
        raise op_error(op, "a and b must be F32", a=a, b=b)
    if not a.is_contiguous or not contiguous_rows(b):
        raise op_error(op, "a and the rows of b must be contiguous (use cont)", a=a, b=b)
    window = _window(op, a, b, strides, offset, INT_MAX)
    if op.endswith("_inplace"):
        _check_target(op, a, b)
    return ctx.build(function, a.ndim, a.ptr, b.ptr, *window)


def acc(
    a: Tensor, b: Tensor, *, strides: Sequence[int] | None = None, offset: int = 0, ctx: Context | None = None
) -> Tensor:
    """Add ``b`` to a part of ``a``: ``out = a.copy(); out[part] += b``.

    Parameters
    ----------
    a
        Contiguous F32 of at most 33,553,920 elements.
    b
        F32 with contiguous rows.
    strides
        Bytes in ``a`` from one element of ``b`` to the next along each axis of ``b``. Default: the strides of ``a``,
        for the last axes. The last axis is contiguous, and each stride spans the axes after it.
    offset
        Bytes from the start of ``a`` to the first element of the part.

    Returns
    -------
    Tensor
        ``a``'s shape, F32.

    Raises
    ------
    ValueError
        If types or layouts do not fit, or the part reaches outside ``a``.

    C: ``ggml_acc``.
    """
    return _acc("acc", c.ggml_acc, a, b, strides, offset, ctx)


def acc_inplace(
    a: Tensor, b: Tensor, *, strides: Sequence[int] | None = None, offset: int = 0, ctx: Context | None = None
) -> Tensor:
    """Compute :func:`acc` in place: write the result over ``a``. C: ``ggml_acc_inplace``."""
    return _acc("acc_inplace", c.ggml_acc_inplace, a, b, strides, offset, ctx)


def _set(
    op: str,
    function: Callable[..., Any],
    a: Tensor,
    b: Tensor,
    strides: Sequence[int] | None,
    offset: int,
    ctx: Context | None,
) -> Tensor:
    ctx = result_context(op, a, b, ctx=ctx)
    if a.dtype not in (Type.F32, Type.I32) or a.dtype is not b.dtype:
        raise op_error(op, "a and b must both be F32 or both I32", a=a, b=b)
    if not a.is_contiguous or not contiguous_rows(b):
        raise op_error(op, "a and the rows of b must be contiguous (use cont)", a=a, b=b)
    window = _window(op, a, b, strides, offset, 2**30 - 1)
    if op.endswith("_inplace"):
        _check_target(op, a, b)
    return ctx.build(function, a.ndim, a.ptr, b.ptr, *window)


def set(
    a: Tensor, b: Tensor, *, strides: Sequence[int] | None = None, offset: int = 0, ctx: Context | None = None
) -> Tensor:
    """Replace a part of ``a`` by ``b``: ``out = a.copy(); out[part] = b``.

    Parameters and errors as for :func:`acc`. ``a`` and ``b`` may also both be I32; ``offset`` is below 2**30.

    C: ``ggml_set``, ``ggml_set_1d``, ``ggml_set_2d``.
    """
    return _set("set", c.ggml_set, a, b, strides, offset, ctx)


def set_inplace(
    a: Tensor, b: Tensor, *, strides: Sequence[int] | None = None, offset: int = 0, ctx: Context | None = None
) -> Tensor:
    """Compute :func:`set` in place, F32 only: write the result over ``a``.

    C: ``ggml_set_inplace``, ``ggml_set_1d_inplace``, ``ggml_set_2d_inplace``.
    """
    return _set("set_inplace", c.ggml_set_inplace, a, b, strides, offset, ctx)


def cpy(a: Tensor, b: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Write ``a`` over ``b``, cast to its type: ``b[...] = a``. Return a view of ``b``.

    Parameters
    ----------
    a
        F32, F16, BF16, I32 or quantized.
    b
        Tensor with as many elements as ``a``, filled in order. F32, F16 or BF16 if ``a`` is a float; F32 if ``a`` is
        I32 or quantized. Also quantized, contiguous and of ``a``'s shape, if ``a`` is a float with contiguous rows, or
        contiguous and of the same type.

    Raises
    ------
    ValueError
        If ggml has no such conversion, the number of elements differs, or both are the same memory.

    C: ``ggml_cpy``.
    """
    ctx = result_context("cpy", a, b, ctx=ctx)
    source, target = a.dtype, b.dtype
    if a.size != b.size:
        raise op_error("cpy", "a and b differ in their number of elements", a=a, b=b)
    _check_target("cpy", b, a)
    if is_quantized(source) or is_quantized(target):
        if a.ne != b.ne:
            raise op_error("cpy", "quantized tensors are copied to and from tensors of the same shape", a=a, b=b)
        if source is target:
            known, layout_fits = True, a.is_contiguous and b.is_contiguous
        elif is_quantized(source):
            # The CPU kernel counts elements in 32 bits.
            known, layout_fits = target is Type.F32 and a.size < 2**32, contiguous_rows(b)
        else:
            known, layout_fits = source in FLOATS and encodes(target), contiguous_rows(a) and b.is_contiguous
        if known and not layout_fits:
            raise op_error(
                "cpy", "quantized tensors, and the rows of other tensors, must be contiguous (use cont)", a=a, b=b
            )
    else:
        known = (source in FLOATS and target in FLOATS) or (source is Type.I32 and target is Type.F32)
    if not known:
        raise op_error("cpy", "ggml has no such conversion", a=a, b=b)
    return ctx.build(c.ggml_cpy, b.ndim, a.ptr, b.ptr)


def _dup(op: str, function: Callable[..., Any], a: Tensor, ctx: Context | None) -> Tensor:
    ctx = result_context(op, a, ctx=ctx)
    if a.dtype not in _PLAIN and not (is_quantized(a.dtype) and a.is_contiguous):
        raise op_error(op, "a must be F32, F16, BF16 or I32, or quantized and contiguous", a=a)
    return ctx.build(function, a.ndim, a.ptr)


def dup(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Copy ``a`` to contiguous memory.

    Raises
    ------
    ValueError
        If ``a`` is neither F32, F16, BF16 or I32, nor quantized and contiguous.

    C: ``ggml_dup``.
    """
    return _dup("dup", c.ggml_dup, a, ctx)


def dup_inplace(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Copy ``a`` onto itself, which leaves it unchanged. C: ``ggml_dup_inplace``."""
    return _dup("dup_inplace", c.ggml_dup_inplace, a, ctx)
