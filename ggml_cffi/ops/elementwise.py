"""Arithmetic of tensors, element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.context import Context
from ggml_cffi.core.dtypes import as_type, block_size, is_quantized
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.ops._operands import (
    FLOATS,
    broadcasts,
    check_bf16,
    check_result,
    contiguous_rows,
    encodes,
    op_error,
    result_context,
)
from ggml_cffi.ops._parameters import check_real

__all__ = [
    "add",
    "add_cast",
    "add_inplace",
    "div",
    "div_inplace",
    "mul",
    "mul_inplace",
    "scale",
    "scale_bias",
    "scale_bias_inplace",
    "scale_inplace",
    "sub",
    "sub_inplace",
]


def _binary(op: str, function: Callable[..., Any], a: Tensor, b: Tensor, ctx: Context | None) -> Tensor:
    if ctx is None and a.__class__ is Tensor and b.__class__ is Tensor and a.context is b.context:
        head = a._head
        if head and head is b._head and head[3] and head[0] in FLOATS:  # the common case needs no further checks
            return a.context.emit(function, a.ndim if a.ndim > b.ndim else b.ndim, head, a._pointer, b._pointer)
    ctx = result_context(op, a, b, ctx=ctx)
    x, y = a.head, b.head
    if x.ne != y.ne and not broadcasts(x.ne, y.ne):
        raise op_error(op, "b does not broadcast to a (each size of a must be a multiple of b's)", a=a, b=b)
    if x.dtype not in FLOATS or (y.dtype is not Type.F32 and y.dtype is not x.dtype):
        if op not in ("add", "add_inplace") or not is_quantized(x.dtype):
            raise op_error(op, "types must be equal floats, or b F32", a=a, b=b)
        _check_quantized_sum(op, a, b)
    elif not (x.dense or contiguous_rows(a)):
        raise op_error(op, "the rows of a must be contiguous (use cont)", a=a, b=b)
    return ctx.build(function, a.ndim if a.ndim > b.ndim else b.ndim, a.ptr, b.ptr, head=x)


def _check_quantized_sum(op: str, a: Tensor, b: Tensor, to: Type | None = None) -> None:
    to = a.dtype if to is None else to
    if b.dtype is not Type.F32 or a.ne != b.ne:
        raise op_error(op, "a quantized a takes an F32 b of the same shape", a=a, b=b)
    if not (contiguous_rows(a) and contiguous_rows(b)):
        raise op_error(op, "the rows of a and b must be contiguous (use cont)", a=a, b=b)
    if to not in FLOATS and not encodes(to):
        raise op_error(op, f"ggml cannot quantize the sum to {to.name}", a=a, b=b)
    if a.ne[0] % block_size(to):
        raise op_error(op, f"rows of {a.ne[0]} elements do not fill whole blocks of {to.name}", a=a, b=b)


def add(a: Tensor, b: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Add two tensors: ``a + b``. The result has the shape and type of ``a``.

    Parameters
    ----------
    a
        F32, F16 or BF16; quantized if ``b`` is F32 of the same shape.
    b
        F32, or the type of ``a``. Each size divides that of ``a``; ``b`` is repeated along the larger axes.
    ctx
        Context of the result. Default: the youngest context of the operands.

    Raises
    ------
    ValueError
        If the shapes do not broadcast, the types do not fit, or the rows of ``a`` are not contiguous.

    C: ``ggml_add``.
    """
    return _binary("add", c.ggml_add, a, b, ctx)


def sub(a: Tensor, b: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Subtract ``b`` from ``a``. Shapes, types and errors as for :func:`add`, floats only. C: ``ggml_sub``."""
    return _binary("sub", c.ggml_sub, a, b, ctx)


def mul(a: Tensor, b: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Multiply two tensors element by element. Shapes, types and errors as for :func:`add`, floats only.

    C: ``ggml_mul``.
    """
    return _binary("mul", c.ggml_mul, a, b, ctx)


def div(a: Tensor, b: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Divide ``a`` by ``b``, element by element. Shapes, types and errors as for :func:`add`, floats only.

    C: ``ggml_div``.
    """
    return _binary("div", c.ggml_div, a, b, ctx)


def _scale(op: str, function: Callable[..., Any], a: Tensor, ctx: Context | None, **numbers: float) -> Tensor:
    ctx = result_context(op, a, ctx=ctx)
    if a.dtype not in (Type.F32, Type.BF16) or not a.is_contiguous:
        raise op_error(op, "a must be contiguous F32 or BF16", a=a)
    check_bf16(op, a)
    return ctx.build(function, a.ndim, a.ptr, *(check_real(op, name, x) for name, x in numbers.items()), head=a.head)


def scale(a: Tensor, factor: float, *, ctx: Context | None = None) -> Tensor:
    """Multiply a contiguous tensor by a number. F32 or BF16; BF16 needs ggml 0.25.3.

    Raises
    ------
    ValueError
        If ``a`` is not contiguous or of another type, or ``factor`` not finite.

    C: ``ggml_scale``.
    """
    return _scale("scale", c.ggml_scale, a, ctx, factor=factor)


def scale_inplace(a: Tensor, factor: float, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`scale` in place: write the result over ``a``. C: ``ggml_scale_inplace``."""
    return _scale("scale_inplace", c.ggml_scale_inplace, a, ctx, factor=factor)


def scale_bias(a: Tensor, factor: float, bias: float, *, ctx: Context | None = None) -> Tensor:
    """Compute ``factor * a + bias`` for a tensor as in :func:`scale`. C: ``ggml_scale_bias``."""
    return _scale("scale_bias", c.ggml_scale_bias, a, ctx, factor=factor, bias=bias)


def scale_bias_inplace(a: Tensor, factor: float, bias: float, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`scale_bias` in place: write the result over ``a``. C: ``ggml_scale_bias_inplace``."""
    return _scale("scale_bias_inplace", c.ggml_scale_bias_inplace, a, ctx, factor=factor, bias=bias)


def add_inplace(a: Tensor, b: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`add` in place: write the result over ``a``. C: ``ggml_add_inplace``."""
    return _binary("add_inplace", c.ggml_add_inplace, a, b, ctx)


def sub_inplace(a: Tensor, b: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`sub` in place: write the result over ``a``. C: ``ggml_sub_inplace``."""
    return _binary("sub_inplace", c.ggml_sub_inplace, a, b, ctx)


def mul_inplace(a: Tensor, b: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`mul` in place: write the result over ``a``. C: ``ggml_mul_inplace``."""
    return _binary("mul_inplace", c.ggml_mul_inplace, a, b, ctx)


def div_inplace(a: Tensor, b: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`div` in place: write the result over ``a``. C: ``ggml_div_inplace``."""
    return _binary("div_inplace", c.ggml_div_inplace, a, b, ctx)


def add_cast(a: Tensor, b: Tensor, dtype: Type | str, *, ctx: Context | None = None) -> Tensor:
    """Add two tensors, and return the sum as ``dtype``.

    Parameters
    ----------
    a
        F16, BF16 or quantized, contiguous rows.
    b
        With rows as long as ``a``'s, and leading sizes that divide ``a``'s. F32, or of ``a``'s type if that is also
        ``dtype``. For a quantized ``a``: F32 of ``a``'s shape with contiguous rows.
    dtype
        F32 or ``a``'s type. For a quantized ``a``: F32, F16, BF16 or a quantized type.

    Returns
    -------
    Tensor
        ``a``'s shape, of type ``dtype``.

    Raises
    ------
    ValueError
        If the shapes or types do not fit, or rows do not fill whole blocks of ``dtype``.

    C: ``ggml_add_cast``.
    """
    ctx = result_context("add_cast", a, b, ctx=ctx)
    to = as_type(dtype)
    if is_quantized(a.dtype):
        _check_quantized_sum("add_cast", a, b, to)
    elif a.dtype not in (Type.F16, Type.BF16) or to not in (Type.F32, a.dtype):
        raise op_error("add_cast", f"a must be F16, BF16 or quantized; {to.name} must be F32 or a's type", a=a, b=b)
    elif b.dtype is not Type.F32 and not b.dtype is a.dtype is to:
        raise op_error("add_cast", f"b must be F32, or of a's type and that of the sum, not {to.name}", a=a, b=b)
    if a.ne[0] != b.ne[0] or not broadcasts(a.ne, b.ne):
        raise op_error("add_cast", "rows of b must be as long as a's, and its leading sizes divide a's", a=a, b=b)
    if not contiguous_rows(a):
        raise op_error("add_cast", "the rows of a must be contiguous (use cont)", a=a, b=b)
    check_result("add_cast", a.ne, to)
    return ctx.build(c.ggml_add_cast, max(a.ndim, b.ndim), a.ptr, b.ptr, to)
