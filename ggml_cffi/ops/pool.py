"""Pooling: the largest element or the mean of each window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.context import Context
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import OpPool, Type
from ggml_cffi.ops._operands import F32_F16, check_groups, check_sizes, check_start, op_error, result_context
from ggml_cffi.ops._parameters import INT_MAX, check_integer, check_integers, check_member, check_real
from ggml_cffi.ops._windows import Ints

__all__ = [
    "pool_1d",
    "pool_2d",
    "pool_2d_back",
]

_LONGEST = 2**22  # C computes the number of windows in single precision


def _places(
    op: str, a: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[float, ...]
) -> tuple[int, ...]:
    """Return the number of windows along each axis, in ggml's order."""
    out = []
    for size, k, s, p in zip(a.ne, kernel, stride, padding, strict=False):
        padded = size + int(2 * p)
        if padded > _LONGEST or k > _LONGEST:
            raise op_error(op, f"axes and windows must be at most {_LONGEST} long", a=a)
        if 2 * p - int(p) >= k:
            raise op_error(op, f"padding {p} would give windows of {k} that hold padding only", a=a)
        if k > padded:
            raise op_error(op, "the window is larger than the padded input", a=a)
        out.append((padded - k) // s + 1)
    return tuple(out)


def _halves(op: str, padding: Any) -> tuple[float, ...]:
    """Return the padding of two axes, in ggml's order."""
    given = padding if isinstance(padding, Sequence) and not isinstance(padding, str | bytes) else (padding, padding)
    if len(given) != 2:
        raise ValueError(f"{op}: padding takes a number, or 2 of them, not {padding!r}")
    values = tuple(check_real(op, "padding", p) for p in reversed(given))
    if any(p < 0 or p > _LONGEST or 2 * p != int(2 * p) for p in values):
        raise ValueError(f"{op}: padding must be whole or half elements, not {padding!r}")
    return values


def _check(op: str, a: Tensor) -> None:
    if a.dtype not in F32_F16 or not a.head.dense:
        raise op_error(op, "a must be contiguous F32 or F16 (use cont)", a=a)
    check_sizes(op, a=a)
    check_start(op, a=a)


def pool_1d(
    a: Tensor, pool: OpPool, kernel: int, stride: int | None = None, padding: int = 0, *, ctx: Context | None = None
) -> Tensor:
    """Take the largest element or the mean of each window along the last axis. A mean ignores the padding.

    Parameters
    ----------
    a
        ``(..., length)``, contiguous F32 or F16.
    pool
        ``OpPool.MAX`` or ``OpPool.AVG``.
    kernel
        Length of a window.
    stride
        Distance from one window to the next. Default: the length of a window.
    padding
        Padding at both ends, less than a window.

    Returns
    -------
    Tensor
        ``(..., (length + 2 * padding - kernel) // stride + 1)``, F32.

    Raises
    ------
    ValueError
        If shapes, types or parameters do not fit.

    C: ``ggml_pool_1d``.
    """
    op = "pool_1d"
    ctx = result_context(op, a, ctx=ctx)
    kind, k = check_member(op, OpPool, pool), check_integer(op, "kernel", kernel, 1)
    s = k if stride is None else check_integer(op, "stride", stride, 1)
    p = check_integer(op, "padding", padding, 0)
    _check(op, a)
    (length,) = _places(op, a, (k,), (s,), (p,))
    check_groups(op, "elements of the result", a.size // a.ne[0] * length, 512)
    return ctx.build(c.ggml_pool_1d, max(a.ndim, 1), a.ptr, kind, k, s, p)


def _pool_2d(
    op: str, a: Tensor, pool: OpPool, kernel: Ints, stride: Ints | None, padding: Any
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return the sizes of the pooled ``a`` in ggml's order, and the arguments of C after the operands."""
    kind, k = check_member(op, OpPool, pool), check_integers(op, "kernel", kernel, 2, 1)
    s = k if stride is None else check_integers(op, "stride", stride, 2, 1)
    p = _halves(op, padding)
    _check(op, a)
    if k[0] * k[1] > INT_MAX:
        raise op_error(op, "the window has 2**31 elements or more", a=a)
    out = (*_places(op, a, k, s, p), *a.ne[2:])
    check_groups(op, "elements of the result", out[0] * out[1] * out[2] * out[3], 512)
    return out, (kind, *k, *s, *p)


def pool_2d(
    a: Tensor,
    pool: OpPool,
    kernel: Ints,
    stride: Ints | None = None,
    padding: float | Sequence[float] = 0,
    *,
    ctx: Context | None = None,
) -> Tensor:
    """Take the largest element or the mean of each window of the last two axes. A mean counts the padding as zeros.

    Parameters
    ----------
    a
        ``(..., h, w)``, contiguous F32 or F16.
    pool
        ``OpPool.MAX`` or ``OpPool.AVG``.
    kernel, stride
        One integer, or ``(vertical, horizontal)``. By default windows are side by side.
    padding
        Padding on both sides, less than a window. Half an element means one element at the end only.

    Returns
    -------
    Tensor
        ``(..., (h + 2 * padding - kernel) // stride + 1, ...)``, F32.

    Raises
    ------
    ValueError
        If shapes, types or parameters do not fit.

    C: ``ggml_pool_2d``.
    """
    ctx = result_context("pool_2d", a, ctx=ctx)
    _, flat = _pool_2d("pool_2d", a, pool, kernel, stride, padding)
    return ctx.build(c.ggml_pool_2d, max(a.ndim, 2), a.ptr, *flat)


def pool_2d_back(
    a: Tensor,
    af: Tensor,
    pool: OpPool,
    kernel: Ints,
    stride: Ints | None = None,
    padding: float | Sequence[float] = 0,
    *,
    ctx: Context | None = None,
) -> Tensor:
    """Compute the gradient of :func:`pool_2d` for its operand.

    For ``MAX``, the gradient of a window goes to its largest element (the first of equals). For ``AVG``, all elements
    of the window get equal parts.

    Parameters
    ----------
    a
        Gradient of the pooled tensor, contiguous F32.
    af
        Operand of the pooling, contiguous F32.
    pool, kernel, stride, padding
        As for the pooling.

    Returns
    -------
    Tensor
        Shape of ``af``, F32.

    Raises
    ------
    ValueError
        If shapes, types or parameters do not fit.

    C: ``ggml_pool_2d_back``.
    """
    op = "pool_2d_back"
    ctx = result_context(op, a, af, ctx=ctx)
    out, flat = _pool_2d(op, af, pool, kernel, stride, padding)
    if a.dtype is not Type.F32 or af.dtype is not Type.F32 or not a.head.dense:
        raise op_error(op, "a and af must be contiguous F32 (use cont)", a=a, af=af)
    if a.ne != out:
        raise op_error(op, f"af is pooled to {out[::-1]}, the shape that a must have", a=a, af=af)
    return ctx.build(c.ggml_pool_2d_back, af.ndim, a.ptr, af.ptr, *flat)
