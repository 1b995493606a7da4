"""Gated linear units: one half of a tensor, or one of two tensors, gates the other.

The plain forms divide the last axis of ``a`` into halves ``x`` and ``y``, and return ``f(x) * y``. The ``_swapped``
forms return ``x * f(y)``. The ``_split`` forms take ``x`` and ``y`` as two tensors. Contiguous floats; BF16 needs ggml
0.25.3.
Source: Shazeer, GLU Variants Improve Transformer, 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ggml_cffi import c
from ggml_cffi.c import library
from ggml_cffi.core.context import Context
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.ops._operands import FLOATS, GGML_0_27, check_bf16, op_error, result_context
from ggml_cffi.ops._parameters import check_real

__all__ = [
    "geglu",
    "geglu_erf",
    "geglu_erf_split",
    "geglu_erf_swapped",
    "geglu_quick",
    "geglu_quick_split",
    "geglu_quick_swapped",
    "geglu_split",
    "geglu_swapped",
    "reglu",
    "reglu_split",
    "reglu_swapped",
    "swiglu",
    "swiglu_clamp",
    "swiglu_oai",
    "swiglu_split",
    "swiglu_swapped",
]


def _whole(op: str, function: Callable[..., Any], a: Tensor, ctx: Context | None) -> Tensor:
    ctx = result_context(op, a, ctx=ctx)
    if a.dtype not in FLOATS or a.ne[0] % 2:
        raise op_error(op, "a must be a float with an even last size", a=a)
    check_bf16(op, a)
    if not c.ggml_is_contiguous_1(a.ptr):
        raise op_error(op, "a must be contiguous (use cont)", a=a)
    return ctx.build(function, a.ndim, a.ptr)


def _split(op: str, function: Callable[..., Any], x: Tensor, y: Tensor, ctx: Context | None, *args: float) -> Tensor:
    ctx = result_context(op, x, y, ctx=ctx)
    if x.ne != y.ne or x.dtype is not y.dtype or x.dtype not in FLOATS:
        raise op_error(op, "x and y must be floats of one type and shape", x=x, y=y)
    if x.dtype is Type.BF16 and args:
        raise op_error(op, "x and y must be F32 or F16", x=x, y=y)
    check_bf16(op, x)
    if not (c.ggml_is_contiguous_1(x.ptr) and c.ggml_is_contiguous_1(y.ptr)):
        raise op_error(op, "x and y must be contiguous (use cont)", x=x, y=y)
    return ctx.build(function, x.ndim, x.ptr, y.ptr, *args)


def reglu(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Multiply ``f(x) * y`` for the halves of ``a``, with relu as ``f``: ``(..., 2 n)`` to ``(..., n)``.

    C: ``ggml_reglu``.
    """
    return _whole("reglu", c.ggml_reglu, a, ctx)


def reglu_swapped(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Multiply ``x * f(y)`` for the halves of ``a``, with relu as ``f``: ``(..., 2 n)`` to ``(..., n)``.

    C: ``ggml_reglu_swapped``.
    """
    return _whole("reglu_swapped", c.ggml_reglu_swapped, a, ctx)


def reglu_split(x: Tensor, y: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Multiply ``f(x) * y`` for two tensors of one shape, with relu as ``f``.

    C: ``ggml_reglu_split``.
    """
    return _split("reglu_split", c.ggml_reglu_split, x, y, ctx)


def geglu(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Multiply ``f(x) * y`` for the halves of ``a``, with gelu (tanh form) as ``f``: ``(..., 2 n)`` to ``(..., n)``.

    C: ``ggml_geglu``.
    """
    return _whole("geglu", c.ggml_geglu, a, ctx)


def geglu_swapped(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Multiply ``x * f(y)`` for the halves of ``a``, with gelu (tanh form) as ``f``: ``(..., 2 n)`` to ``(..., n)``.

    C: ``ggml_geglu_swapped``.
    """
    return _whole("geglu_swapped", c.ggml_geglu_swapped, a, ctx)


def geglu_split(x: Tensor, y: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Multiply ``f(x) * y`` for two tensors of one shape, with gelu (tanh form) as ``f``.

    C: ``ggml_geglu_split``.
    """
    return _split("geglu_split", c.ggml_geglu_split, x, y, ctx)


def swiglu(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Multiply ``f(x) * y`` for the halves of ``a``, with silu as ``f``: ``(..., 2 n)`` to ``(..., n)``.

    C: ``ggml_swiglu``.
    """
    return _whole("swiglu", c.ggml_swiglu, a, ctx)


def swiglu_swapped(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Multiply ``x * f(y)`` for the halves of ``a``, with silu as ``f``: ``(..., 2 n)`` to ``(..., n)``.

    C: ``ggml_swiglu_swapped``.
    """
    return _whole("swiglu_swapped", c.ggml_swiglu_swapped, a, ctx)


def swiglu_split(x: Tensor, y: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Multiply ``f(x) * y`` for two tensors of one shape, with silu as ``f``.

    C: ``ggml_swiglu_split``.
    """
    return _split("swiglu_split", c.ggml_swiglu_split, x, y, ctx)


def geglu_erf(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Multiply ``f(x) * y`` for the halves of ``a``, with gelu (exact form) as ``f``: ``(..., 2 n)`` to ``(..., n)``.

    C: ``ggml_geglu_erf``.
    """
    return _whole("geglu_erf", c.ggml_geglu_erf, a, ctx)


def geglu_erf_swapped(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Multiply ``x * f(y)`` for the halves of ``a``, with gelu (exact form) as ``f``: ``(..., 2 n)`` to ``(..., n)``.

    C: ``ggml_geglu_erf_swapped``.
    """
    return _whole("geglu_erf_swapped", c.ggml_geglu_erf_swapped, a, ctx)


def geglu_erf_split(x: Tensor, y: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Multiply ``f(x) * y`` for two tensors of one shape, with gelu (exact form) as ``f``.

    C: ``ggml_geglu_erf_split``.
    """
    return _split("geglu_erf_split", c.ggml_geglu_erf_split, x, y, ctx)


def geglu_quick(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Multiply ``f(x) * y`` for the halves of ``a``, with gelu_quick as ``f``: ``(..., 2 n)`` to ``(..., n)``.

    C: ``ggml_geglu_quick``.
    """
    return _whole("geglu_quick", c.ggml_geglu_quick, a, ctx)


def geglu_quick_swapped(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Multiply ``x * f(y)`` for the halves of ``a``, with gelu_quick as ``f``: ``(..., 2 n)`` to ``(..., n)``.

    C: ``ggml_geglu_quick_swapped``.
    """
    return _whole("geglu_quick_swapped", c.ggml_geglu_quick_swapped, a, ctx)


def geglu_quick_split(x: Tensor, y: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Multiply ``f(x) * y`` for two tensors of one shape, with gelu_quick as ``f``.

    C: ``ggml_geglu_quick_split``.
    """
    return _split("geglu_quick_split", c.ggml_geglu_quick_split, x, y, ctx)


def swiglu_clamp(x: Tensor, y: Tensor, limit: float, *, ctx: Context | None = None) -> Tensor:
    """Compute SwiGLU with limits: ``silu(min(x, limit)) * clip(y, -limit, limit)``. F32 or F16; ``limit`` is 0 or more.

    It needs ggml 0.25.3. C: ``ggml_swiglu_clamp``.
    """
    return _split(
        "swiglu_clamp", c.ggml_swiglu_clamp, x, y, ctx, check_real("swiglu_clamp", "limit", limit, lowest=0.0)
    )


def swiglu_oai(x: Tensor, y: Tensor, alpha: float, limit: float, *, ctx: Context | None = None) -> Tensor:
    """Compute SwiGLU with limits: ``x' / (1 + exp(-alpha x')) * (1 + y')`` with ``x' = min(x, limit)``, ``y' = clip(y,
    -limit, limit)``. F32 or F16; F16 needs ggml 0.27.

    C: ``ggml_swiglu_oai``.
    """
    result_context("swiglu_oai", x, y, ctx=ctx)
    if x.dtype is Type.F16:
        library.require(GGML_0_27, "swiglu_oai of F16")
    numbers = check_real("swiglu_oai", "alpha", alpha), check_real("swiglu_oai", "limit", limit)
    return _split("swiglu_oai", c.ggml_swiglu_oai, x, y, ctx, *numbers)
