"""Element by element."""

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
        if not isinstance(b, Tensor) or b.dtype is not Type.F32 or a.ne != b.ne:
            raise fail("add", "a quantized a takes an F32 b of the same shape", a=a, b=b)
        if not (contiguous_rows(a) and contiguous_rows(b)):
            raise fail("add", "the rows of a and b must be contiguous (use cont)", a=a, b=b)
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


def _unary(op: str, function: Callable[..., Any], a: Tensor, ctx: Context | None) -> Tensor:
    ctx = home(op, a, ctx=ctx)
    if a.dtype not in FLOATS:
        raise fail(op, "a must be F32, F16 or BF16", a=a)
    if not contiguous_rows(a):
        raise fail(op, "the rows of a must be contiguous (use cont)", a=a)
    return ctx.build(function, a.ndim, a.ptr)


def relu(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """``max(a, 0)`` of a float tensor with contiguous rows. C: ``ggml_relu``."""
    return _unary("relu", c.ggml_relu, a, ctx)


def silu(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """``a / (1 + exp(-a))`` of an F32 or F16 tensor with contiguous rows. C: ``ggml_silu``."""
    if isinstance(a, Tensor) and a.dtype is Type.BF16:
        raise fail("silu", "a must be F32 or F16", a=a)
    return _unary("silu", c.ggml_silu, a, ctx)


def gelu(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """The tanh approximation ``a/2 (1 + tanh(sqrt(2/pi) (a + 0.044715 a^3)))`` of an F32 or F16 tensor.

    C: ``ggml_gelu``.
    """
    if isinstance(a, Tensor) and a.dtype is Type.BF16:
        raise fail("gelu", "a must be F32 or F16", a=a)
    return _unary("gelu", c.ggml_gelu, a, ctx)


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


def swiglu_split(a: Tensor, b: Tensor, *, ctx: Context | None = None) -> Tensor:
    """The gated unit ``silu(a) * b``.

    Parameters
    ----------
    a, b
        F32 or F16, of one shape and type, contiguous along all but the first axis.

    Raises
    ------
    ValueError
        If shapes or types differ, or rows are not contiguous.

    C: ``ggml_swiglu_split``. Source: Shazeer, GLU Variants Improve Transformer, 2020.
    """
    ctx = home("swiglu_split", a, b, ctx=ctx)
    if a.ne != b.ne or a.dtype is not b.dtype or a.dtype not in (Type.F32, Type.F16):
        raise fail("swiglu_split", "a and b must have one shape, and both be F32 or both F16", a=a, b=b)
    if not (c.ggml_is_contiguous_1(a.ptr) and c.ggml_is_contiguous_1(b.ptr)):
        raise fail("swiglu_split", "a and b must be contiguous (use cont)", a=a, b=b)
    return ctx.build(c.ggml_swiglu_split, a.ndim, a.ptr, b.ptr)
