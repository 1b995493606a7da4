"""Arithmetic, element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ggml_cffi import c
from ggml_cffi.context import Context
from ggml_cffi.dtypes import is_quantized
from ggml_cffi.enums import Type
from ggml_cffi.ops._check import FLOATS, broadcasts, contiguous_rows, fail, home
from ggml_cffi.tensor import Tensor


def _binary(op: str, function: Callable[..., Any], a: Tensor, b: Tensor, ctx: Context | None) -> Tensor:
    ctx = home(op, a, b, ctx=ctx)
    if not broadcasts(a.ne, b.ne):
        raise fail(op, "b does not broadcast to a (each size of a must be a multiple of b's)", a=a, b=b)
    if a.dtype not in FLOATS or (b.dtype is not Type.F32 and b.dtype is not a.dtype):
        raise fail(op, "types must be equal floats, or b F32", a=a, b=b)
    if not contiguous_rows(a):
        raise fail(op, "the rows of a must be contiguous (use cont)", a=a, b=b)
    return ctx.build(function, max(a.ndim, b.ndim), a.ptr, b.ptr)


def add(a: Tensor, b: Tensor, *, ctx: Context | None = None) -> Tensor:
    """``a + b``, of ``a``'s shape and type.

    Parameters
    ----------
    a
        F32, F16, BF16; quantized if ``b`` is F32 of the same shape.
    b
        F32 or of ``a``'s type. Each of its sizes divides ``a``'s; it is repeated along those axes.
    ctx
        Context of the result; default the youngest of the operands'.

    Raises
    ------
    ValueError
        If the shapes do not broadcast, the types do not fit, or the rows of ``a`` are not contiguous.

    C: ``ggml_add``.
    """
    if isinstance(a, Tensor) and is_quantized(a.dtype):
        home("add", a, b, ctx=ctx)
        if b.dtype is not Type.F32 or a.ne != b.ne:
            raise fail("add", "a quantized a takes an F32 b of the same shape", a=a, b=b)
        if not (contiguous_rows(a) and contiguous_rows(b)):
            raise fail("add", "the rows of a and b must be contiguous (use cont)", a=a, b=b)
        if not c.ggml_get_type_traits_cpu(a.dtype).from_float:
            raise fail("add", f"ggml cannot quantize the sum to {a.dtype.name}", a=a, b=b)
        return home("add", a, b, ctx=ctx).build(c.ggml_add, a.ndim, a.ptr, b.ptr)
    return _binary("add", c.ggml_add, a, b, ctx)


def sub(a: Tensor, b: Tensor, *, ctx: Context | None = None) -> Tensor:
    """``a - b``. Shapes, types and errors as :func:`add`, floats only. C: ``ggml_sub``."""
    return _binary("sub", c.ggml_sub, a, b, ctx)


def mul(a: Tensor, b: Tensor, *, ctx: Context | None = None) -> Tensor:
    """``a * b``, element by element. Shapes, types and errors as :func:`add`, floats only. C: ``ggml_mul``."""
    return _binary("mul", c.ggml_mul, a, b, ctx)


def div(a: Tensor, b: Tensor, *, ctx: Context | None = None) -> Tensor:
    """``a / b``, element by element. Shapes, types and errors as :func:`add`, floats only. C: ``ggml_div``."""
    return _binary("div", c.ggml_div, a, b, ctx)


def scale(a: Tensor, factor: float, *, ctx: Context | None = None) -> Tensor:
    """``factor * a`` of a contiguous F32 tensor.

    Raises
    ------
    ValueError
        If ``a`` is not contiguous F32.

    C: ``ggml_scale``.
    """
    ctx = home("scale", a, ctx=ctx)
    if a.dtype is not Type.F32 or not a.is_contiguous:
        raise fail("scale", "a must be contiguous F32", a=a)
    return ctx.build(c.ggml_scale, a.ndim, a.ptr, float(factor))


def scale_inplace(a: Tensor, factor: float, *, ctx: Context | None = None) -> Tensor:
    """As :func:`scale`, written over ``a``. C: ``ggml_scale_inplace``."""
    ctx = home("scale_inplace", a, ctx=ctx)
    if a.dtype is not Type.F32 or not a.is_contiguous:
        raise fail("scale_inplace", "a must be contiguous F32", a=a)
    return ctx.build(c.ggml_scale_inplace, a.ndim, a.ptr, float(factor))


def scale_bias(a: Tensor, factor: float, bias: float, *, ctx: Context | None = None) -> Tensor:
    """``factor * a + bias`` of a contiguous F32 tensor. C: ``ggml_scale_bias``."""
    ctx = home("scale_bias", a, ctx=ctx)
    if a.dtype is not Type.F32 or not a.is_contiguous:
        raise fail("scale_bias", "a must be contiguous F32", a=a)
    return ctx.build(c.ggml_scale_bias, a.ndim, a.ptr, float(factor), float(bias))


def add_inplace(a: Tensor, b: Tensor, *, ctx: Context | None = None) -> Tensor:
    """As :func:`add`, written over ``a``. C: ``ggml_add_inplace``."""
    return _binary("add_inplace", c.ggml_add_inplace, a, b, ctx)


def sub_inplace(a: Tensor, b: Tensor, *, ctx: Context | None = None) -> Tensor:
    """As :func:`sub`, written over ``a``. C: ``ggml_sub_inplace``."""
    return _binary("sub_inplace", c.ggml_sub_inplace, a, b, ctx)


def mul_inplace(a: Tensor, b: Tensor, *, ctx: Context | None = None) -> Tensor:
    """As :func:`mul`, written over ``a``. C: ``ggml_mul_inplace``."""
    return _binary("mul_inplace", c.ggml_mul_inplace, a, b, ctx)


def div_inplace(a: Tensor, b: Tensor, *, ctx: Context | None = None) -> Tensor:
    """As :func:`div`, written over ``a``. C: ``ggml_div_inplace``."""
    return _binary("div_inplace", c.ggml_div_inplace, a, b, ctx)
