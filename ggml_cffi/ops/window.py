"""Attention inside windows of an image, with relative positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.context import Context
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.ops._operands import check_result, check_sizes, is_contiguous, op_error, result_context
from ggml_cffi.ops._parameters import INT_MAX, check_integer, check_integers

__all__ = [
    "add_rel_pos",
    "add_rel_pos_inplace",
    "get_rel_pos",
    "win_part",
    "win_unpart",
]


def _check(op: str, a: Tensor) -> None:
    if a.dtype is not Type.F32 or not is_contiguous(a):
        raise op_error(op, "a must be contiguous F32 (use cont)", a=a)
    check_sizes(op, a=a)


def win_part(a: Tensor, window: int, *, ctx: Context | None = None) -> Tensor:
    """Partition an image into square windows; zeros fill up the last windows of a row or column.

    Parameters
    ----------
    a
        ``(h, w, channels)``, contiguous F32.
    window
        Side length of a window.

    Returns
    -------
    Tensor
        ``(n, window, window, channels)``, F32; windows are in row-major order.

    Raises
    ------
    ValueError
        If ``a`` does not fit.

    C: ``ggml_win_part``. Source: Li et al., Exploring plain vision transformer backbones, 2022.
    """
    op = "win_part"
    ctx = result_context(op, a, ctx=ctx)
    side = check_integer(op, "window", window, 1, 2**30)
    _check(op, a)
    if a.ne[3] != 1:
        raise op_error(op, "a must be one image", a=a)
    across, down = (-(-n // side) for n in a.ne[1:3])
    check_result(op, (a.ne[0], side, side, across * down))
    if max(across, down) * side > INT_MAX or a.ne[0] * side * side * across * down > INT_MAX:
        raise op_error(op, "the windows have 2**31 elements or more", a=a)
    return ctx.build(c.ggml_win_part, 4, a.ptr, side)


def win_unpart(a: Tensor, shape: Sequence[int], *, ctx: Context | None = None) -> Tensor:
    """Join the windows of :func:`win_part` to an image.

    Parameters
    ----------
    a
        ``(n, window, window, channels)``, contiguous F32.
    shape
        Size of the image: ``(h, w)``, or one number for both.

    Returns
    -------
    Tensor
        ``(h, w, channels)``, F32.

    Raises
    ------
    ValueError
        If ``a`` does not hold the windows of such an image.

    C: ``ggml_win_unpart``.
    """
    op = "win_unpart"
    ctx = result_context(op, a, ctx=ctx)
    w, h = check_integers(op, "shape", shape, 2, 1)
    _check(op, a)
    side = a.ne[1]
    if a.ne[2] != side or -(-w // side) * -(-h // side) != a.ne[3] or max(w, h) + side > INT_MAX:
        raise op_error(op, f"a does not hold the windows of an image of ({h}, {w})", a=a)
    return ctx.build(c.ggml_win_unpart, 3, a.ptr, w, h, side)


def get_rel_pos(a: Tensor, qh: int, kh: int, *, ctx: Context | None = None) -> Tensor:
    """Look up the row for each pair of a query's and a key's position: ``result[q, k] = a[q - k + kh - 1]``.

    Parameters
    ----------
    a
        ``(2 * kh - 1, channels)``, contiguous F16.
    qh, kh
        Numbers of query and key positions; ggml supports equal numbers only.

    Returns
    -------
    Tensor
        ``(qh, kh, channels)``, F16.

    Raises
    ------
    ValueError
        If ``a`` does not fit.

    C: ``ggml_get_rel_pos``. Source: Kirillov et al., Segment anything, 2023.
    """
    op = "get_rel_pos"
    ctx = result_context(op, a, ctx=ctx)
    n, keys = check_integer(op, "qh", qh, 1, 2**30), check_integer(op, "kh", kh, 1, 2**30)
    if n != keys:
        raise ValueError(f"{op}: qh and kh must be equal, not {n} and {keys}")
    if a.dtype is not Type.F16 or not is_contiguous(a):
        raise op_error(op, "a must be contiguous F16 (use cont)", a=a)
    check_sizes(op, a=a)
    if a.ne[1:] != (2 * n - 1, 1, 1):
        raise op_error(op, f"a must have {2 * n - 1} rows", a=a)
    check_result(op, (a.ne[0], n, n), Type.F16)
    return ctx.build(c.ggml_get_rel_pos, 3, a.ptr, n, n)


def _add_rel_pos(
    op: str, function: Callable[..., Any], a: Tensor, pw: Tensor, ph: Tensor, ctx: Context | None
) -> Tensor:
    ctx = result_context(op, a, pw, ph, ctx=ctx)
    for t in (a, pw, ph):
        if t.dtype is not Type.F32 or not is_contiguous(t):
            raise op_error(op, "a, pw and ph must be contiguous F32 (use cont)", a=a, pw=pw, ph=ph)
    check_sizes(op, a=a, pw=pw, ph=ph)
    k, qw, qh, batch = pw.ne
    if ph.ne != pw.ne or a.ne != (k * k, qw * qh, batch, 1):
        raise op_error(op, "pw and ph must be (n, qh, qw, k), and a (n, qh * qw, k * k)", a=a, pw=pw, ph=ph)
    return ctx.build(function, a.ndim, a.ptr, pw.ptr, ph.ptr)


def add_rel_pos(a: Tensor, pw: Tensor, ph: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Add the contributions of relative positions, along each axis of an image, to attention scores.

    ``result[n, q, i, j] = a[n, q, i, j] + ph[n, q, i] + pw[n, q, j]``, where a key is pixel ``(i, j)``.

    Parameters
    ----------
    a
        ``(n, qh * qw, k * k)``, contiguous F32.
    pw, ph
        ``(n, qh, qw, k)``, contiguous F32.

    Raises
    ------
    ValueError
        If shapes or types do not fit.

    C: ``ggml_add_rel_pos``. Source: Kirillov et al., Segment anything, 2023.
    """
    return _add_rel_pos("add_rel_pos", c.ggml_add_rel_pos, a, pw, ph, ctx)


def add_rel_pos_inplace(a: Tensor, pw: Tensor, ph: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`add_rel_pos` in place: write the result over ``a``. C: ``ggml_add_rel_pos_inplace``."""
    return _add_rel_pos("add_rel_pos_inplace", c.ggml_add_rel_pos_inplace, a, pw, ph, ctx)
