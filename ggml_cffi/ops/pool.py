"""Pooling: the largest element of each window, or the mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.context import Context
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import OpPool, Type
from ggml_cffi.ops._args import INT_MAX, integer, real
from ggml_cffi.ops._check import fail, home
from ggml_cffi.ops._window import F32_F16, Ints, check_groups, check_sizes, check_start, integers, member

__all__ = [
    "pool_1d",
    "pool_2d",
    "pool_2d_back",
]

_LONGEST = 2**22  # C counts windows in single precision


def _places(
    op: str, a: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[float, ...]
) -> tuple[int, ...]:
    """How many windows there are along each axis, in ggml's order."""
    out = []
    for size, k, s, p in zip(a.ne, kernel, stride, padding, strict=False):
        room = size + int(2 * p)
        if room > _LONGEST or k > _LONGEST:
            raise fail(op, f"axes and windows must be at most {_LONGEST} long", a=a)
        if 2 * p - int(p) >= k:
            raise fail(op, f"padding {p} would leave windows of {k} with nothing but padding", a=a)
        if k > room:
            raise fail(op, "the window is larger than the padded input", a=a)
        out.append((room - k) // s + 1)
    return tuple(out)


def _halves(op: str, padding: Any) -> tuple[float, ...]:
    """Padding of two axes, in ggml's order."""
    given = padding if isinstance(padding, Sequence) and not isinstance(padding, str | bytes) else (padding, padding)
    if len(given) != 2:
        raise ValueError(f"{op}: padding takes a number, or 2 of them, not {padding!r}")
    values = tuple(real(op, "padding", p) for p in reversed(given))
    if any(p < 0 or p > _LONGEST or 2 * p != int(2 * p) for p in values):
        raise ValueError(f"{op}: padding must be whole or half elements, not {padding!r}")
    return values


def _check(op: str, a: Tensor) -> None:
    if a.dtype not in F32_F16 or not a.head.dense:
        raise fail(op, "a must be contiguous F32 or F16 (use cont)", a=a)
    check_sizes(op, a=a)
    check_start(op, a=a)


def pool_1d(
    a: Tensor, pool: OpPool, kernel: int, stride: int | None = None, padding: int = 0, *, ctx: Context | None = None
) -> Tensor:
    """The largest element or the mean of windows along the last axis. A mean leaves out the padding.

    Parameters
    ----------
    a
        ``(..., length)``, contiguous F32 or F16.
    pool
        ``OpPool.MAX`` or ``OpPool.AVG``.
    kernel
        Length of a window.
    stride
        From one window to the next; default the length of one.
    padding
        At both ends, less than a window.

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
    ctx = home(op, a, ctx=ctx)
    kind, k = member(op, OpPool, pool), integer(op, "kernel", kernel, 1)
    s = k if stride is None else integer(op, "stride", stride, 1)
    p = integer(op, "padding", padding, 0)
    _check(op, a)
    (length,) = _places(op, a, (k,), (s,), (p,))
    check_groups(op, "elements of the result", a.size // a.ne[0] * length, 512)
    return ctx.build(c.ggml_pool_1d, max(a.ndim, 1), a.ptr, kind, k, s, p)


def _pool_2d(
    op: str, a: Tensor, pool: OpPool, kernel: Ints, stride: Ints | None, padding: Any
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """What C takes after the operands, and the sizes of the pooled ``a`` in ggml's order."""
    kind, k = member(op, OpPool, pool), integers(op, "kernel", kernel, 2, 1)
    s = k if stride is None else integers(op, "stride", stride, 2, 1)
    p = _halves(op, padding)
    _check(op, a)
    if k[0] * k[1] > INT_MAX:
        raise fail(op, "the window has 2**31 elements or more", a=a)
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
    """The largest element or the mean of windows of the last two axes. A mean counts the padding, as zeros.

    Parameters
    ----------
    a
        ``(..., h, w)``, contiguous F32 or F16.
    pool
        ``OpPool.MAX`` or ``OpPool.AVG``.
    kernel, stride
        An integer, or ``(vertical, horizontal)``. Windows lie side by side by default.
    padding
        On both sides, less than a window. Half an element stands for one at the end only.

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
    ctx = home("pool_2d", a, ctx=ctx)
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
    """The gradient of :func:`pool_2d`: to the largest element of each window, the first of equals, or to all alike.

    Parameters
    ----------
    a
        Gradient of the pooled tensor, contiguous F32.
    af
        What was pooled, contiguous F32.
    pool, kernel, stride, padding
        As it was pooled.

    Returns
    -------
    Tensor
        Of ``af``'s shape, F32.

    Raises
    ------
    ValueError
        If shapes, types or parameters do not fit.

    C: ``ggml_pool_2d_back``.
    """
    op = "pool_2d_back"
    ctx = home(op, a, af, ctx=ctx)
    out, flat = _pool_2d(op, af, pool, kernel, stride, padding)
    if a.dtype is not Type.F32 or af.dtype is not Type.F32 or not a.head.dense:
        raise fail(op, "a and af must be contiguous F32 (use cont)", a=a, af=af)
    if a.ne != out:
        raise fail(op, f"af is pooled to {out[::-1]}", a=a, af=af)
    return ctx.build(c.ggml_pool_2d_back, af.ndim, a.ptr, af.ptr, *flat)
