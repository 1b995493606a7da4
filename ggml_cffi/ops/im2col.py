"""Windows of signals, images and volumes, as the rows of a matrix.

A *kernel* ``(out, in, ..., height, width)`` slides over ``x``, ``(batch, in, ..., height, width)``. ``stride``,
``padding`` (zeros on both sides) and ``dilation`` are one integer for all axes, or one per axis in the order of the
shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ggml_cffi import c
from ggml_cffi.core.context import Context
from ggml_cffi.core.dtypes import as_type
from ggml_cffi.core.shapes import check_shape, ne_of
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.ops._operands import (
    F32_F16,
    check_groups,
    check_result,
    check_sizes,
    check_start,
    is_contiguous,
    op_error,
    result_context,
)
from ggml_cffi.ops._parameters import INT_MAX, check_integer
from ggml_cffi.ops._windows import Ints, check_gather, check_gather_3d, check_window, window_counts

__all__ = [
    "col2im_1d",
    "im2col",
    "im2col_3d",
    "im2col_back",
]


def im2col(
    kernel: Tensor,
    x: Tensor,
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    *,
    is_2d: bool = True,
    dtype: Type | str = Type.F32,
    ctx: Context | None = None,
) -> Tensor:
    """Gather the windows of ``x`` that a kernel of this shape covers, one per row of the result.

    The product of this matrix and the kernels is the convolution.

    Parameters
    ----------
    kernel
        ``(out, in, kh, kw)``, or ``(out, in, k)`` with ``is_2d=False``. Only its shape is used.
    x
        ``(n, in, h, w)``, or ``(n, in, length)``. F32, or F16 if ``dtype`` is.
    stride, padding, dilation
        One integer, or one per axis of a window.
    is_2d
        True for windows with two axes, False for one.
    dtype
        F32 or F16.

    Returns
    -------
    Tensor
        ``(n, out_h, out_w, in * kh * kw)``, or ``(n, out_length, in * k)``, of ``dtype``.

    Raises
    ------
    ValueError
        If shapes or types do not fit.

    C: ``ggml_im2col``.
    """
    to = as_type(dtype)
    if not isinstance(is_2d, bool):
        raise TypeError(f"im2col: is_2d must be a bool, not {is_2d!r}")
    n = 2 if is_2d else 1
    ctx = result_context("im2col", kernel, x, ctx=ctx)
    window = check_window("im2col", n, stride, padding, dilation)
    if to not in F32_F16 or x.dtype not in (Type.F32, to):
        raise op_error("im2col", f"windows of {to.name} cannot be gathered", x=x)
    check_gather("im2col", kernel, x, window, to)
    flat = (*window[0], *window[1], *window[2]) if is_2d else (*window[0], 0, *window[1], 0, *window[2], 0)
    return ctx.build(c.ggml_im2col, max(x.ndim, n + 1), kernel.ptr, x.ptr, *flat, is_2d, to)


def im2col_back(
    a: Tensor,
    kernel: Tensor,
    shape: Sequence[int],
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    *,
    is_2d: bool = True,
    ctx: Context | None = None,
) -> Tensor:
    """Compute the gradient of :func:`im2col`: add each window to the place that it was taken from.

    Parameters
    ----------
    a
        Gradient of the windows, in the shape that :func:`im2col` returns, contiguous F32.
    kernel
        As for :func:`im2col`, F32 or F16.
    shape
        Shape of the ``x`` of :func:`im2col`.
    stride, padding, dilation, is_2d
        As for :func:`im2col`.

    Returns
    -------
    Tensor
        Shape ``shape``, F32.

    Raises
    ------
    ValueError
        If shapes or types do not fit.

    C: ``ggml_im2col_back``.
    """
    op = "im2col_back"
    ctx = result_context(op, a, kernel, ctx=ctx)
    if not isinstance(is_2d, bool):
        raise TypeError(f"{op}: is_2d must be a bool, not {is_2d!r}")
    n = 2 if is_2d else 1
    sizes = check_shape(shape)
    ne = ne_of(sizes)
    s, p, d = check_window(op, n, stride, padding, dilation)
    if a.dtype is not Type.F32 or not is_contiguous(a) or kernel.dtype not in F32_F16:
        raise op_error(op, "a must be contiguous F32, and the kernel F32 or F16", a=a, kernel=kernel)
    check_sizes(op, a=a, kernel=kernel)
    if kernel.ne[n] != ne[n] or (n == 1 and ne[3] != 1):
        raise op_error(op, f"the kernel does not fit {sizes}", a=a, kernel=kernel)
    if prod(ne[: n + 1]) * 4 > INT_MAX:
        raise ValueError(f"{op}: {sizes} has 2**31 bytes or more in a batch")
    out = window_counts(op, kernel.ne, ne, (s, p, d), a=a, kernel=kernel)
    want = (prod(kernel.ne[: n + 1]), *out, ne[n + 1], 1)[:4]
    if a.ne != want:
        raise op_error(op, f"a does not hold the windows of {sizes}, which are {want[::-1]}", a=a, kernel=kernel)
    flat = (*s, *p, *d) if is_2d else (*s, 0, *p, 0, *d, 0)
    check_result(op, ne)
    return ctx.build(c.ggml_im2col_back, len(sizes), a.ptr, kernel.ptr, c.ffi.new("int64_t[4]", ne), *flat, is_2d)


def im2col_3d(
    kernel: Tensor,
    x: Tensor,
    channels: int,
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    *,
    dtype: Type | str = Type.F32,
    ctx: Context | None = None,
) -> Tensor:
    """Gather the windows of volumes, as :func:`im2col` does for images.

    Parameters
    ----------
    kernel
        ``(out * in, kd, kh, kw)``. Only its shape is used.
    x
        ``(n * in, depth, h, w)``, F32, contiguous rows.
    channels
        The size ``in``.
    stride, padding, dilation
        One integer, or three.
    dtype
        F32 or F16.

    Returns
    -------
    Tensor
        ``(n * out_depth, out_h, out_w, in * kd * kh * kw)``, of ``dtype``.

    Raises
    ------
    ValueError
        If shapes or types do not fit.

    C: ``ggml_im2col_3d``.
    """
    to = as_type(dtype)
    ctx = result_context("im2col_3d", kernel, x, ctx=ctx)
    channels = check_integer("im2col_3d", "channels", channels, 1)
    window = check_window("im2col_3d", 3, stride, padding, dilation)
    if to not in F32_F16:
        raise op_error("im2col_3d", f"windows of {to.name} cannot be gathered", x=x)
    check_gather_3d("im2col_3d", kernel, x, channels, window, to)
    return ctx.build(c.ggml_im2col_3d, 4, kernel.ptr, x.ptr, channels, *window[0], *window[1], *window[2], to)


def col2im_1d(a: Tensor, out_channels: int, stride: int = 1, padding: int = 0, *, ctx: Context | None = None) -> Tensor:
    """Sum overlapping windows of a signal: the second step of a transposed convolution, after a matrix product.

    ``result[o, stride * t + j - padding] += a[t, o * k + j]``

    Parameters
    ----------
    a
        ``(length, out_channels * k)``, contiguous F32, F16 or BF16.
    out_channels
        Number of output channels; divides the last size of ``a``.
    stride
        Distance from one window to the next.
    padding
        Number of elements removed at both ends.

    Returns
    -------
    Tensor
        ``(out_channels, (length - 1) * stride + k - 2 * padding)``, of ``a``'s type.

    Raises
    ------
    ValueError
        If shapes or types do not fit.

    C: ``ggml_col2im_1d``.
    """
    op = "col2im_1d"
    ctx = result_context(op, a, ctx=ctx)
    oc = check_integer(op, "out_channels", out_channels, 1)
    s, p = check_integer(op, "stride", stride, 1), check_integer(op, "padding", padding, 0, 2**30 - 1)
    if a.dtype not in (Type.F32, Type.F16, Type.BF16) or not is_contiguous(a) or a.ne[2:] != (1, 1):
        raise op_error(op, "a must be a contiguous matrix of F32, F16 or BF16", a=a)
    check_sizes(op, a=a)
    check_start(op, a=a)
    if a.ne[0] % oc:
        raise op_error(op, f"the last size is not a multiple of {oc} channels", a=a)
    length = (a.ne[1] - 1) * s + a.ne[0] // oc - 2 * p
    if not length > 0 or length * oc > INT_MAX or length + p > INT_MAX:
        raise op_error(op, f"the result would have length {length}", a=a)
    check_groups(op, "channels", oc)
    check_groups(op, "elements of a channel", length, 256)
    return ctx.build(c.ggml_col2im_1d, 2, a.ptr, s, oc, p)
