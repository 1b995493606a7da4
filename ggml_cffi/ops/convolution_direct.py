"""Direct and transposed convolutions: they need no memory for the windows.

Shapes and parameters are those of :mod:`~ggml_cffi.ops.convolution`. F32 kernels stay F32, except on GPUs that have
matrix units for F16.
"""

from __future__ import annotations

from math import prod

from ggml_cffi import c
from ggml_cffi.c import library
from ggml_cffi.core.context import Context
from ggml_cffi.core.dtypes import type_size
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.ops._operands import (
    F32_F16,
    GGML_0_25,
    check_groups,
    check_sizes,
    check_start,
    contiguous_rows,
    is_contiguous,
    op_error,
    result_context,
)
from ggml_cffi.ops._parameters import INT_MAX, check_integer
from ggml_cffi.ops._windows import (
    Ints,
    check_channels,
    check_depthwise,
    check_types,
    check_volumes,
    check_window,
    window_counts,
)

__all__ = [
    "conv_2d_direct",
    "conv_2d_dw_direct",
    "conv_3d_direct",
    "conv_transpose_1d",
    "conv_transpose_2d_p0",
]

_WORK = 16 * 2**20  # bytes that the CPU has for gathered windows


def _check_direct(op: str, kernel: Tensor, x: Tensor, row: int, out_channels: int, places: int) -> None:
    """Check the operands of a direct convolution with windows of ``row`` elements."""
    if not is_contiguous(kernel) or not contiguous_rows(x):
        raise op_error(op, "the kernel and the rows of x must be contiguous (use cont)", kernel=kernel, x=x)
    check_start(op, kernel=kernel, x=x)
    if row * type_size(kernel.dtype) + out_channels * 4 > _WORK:
        raise op_error(op, f"a window takes more than the {_WORK} bytes that the CPU has for it", kernel=kernel, x=x)
    # GPUs compute places in blocks of 32 or more, at most 512 of them along one axis.
    if places * out_channels > INT_MAX or places > 2**29:
        raise op_error(op, "the result would have 2**31 elements or more", kernel=kernel, x=x)


def conv_2d_direct(
    x: Tensor, kernel: Tensor, stride: Ints = 1, padding: Ints = 0, dilation: Ints = 1, *, ctx: Context | None = None
) -> Tensor:
    """Convolve images as :func:`~ggml_cffi.ops.conv_2d` does, without memory for the windows.

    Parameters
    ----------
    x
        ``(n, in, h, w)``, F32, contiguous rows.
    kernel
        ``(out, in, kh, kw)``, contiguous F32 or F16; windows have its type, and at most 16 MiB each.
    stride, padding, dilation
        One integer, or ``(vertical, horizontal)``.

    Raises
    ------
    ValueError
        If shapes or types do not fit.

    C: ``ggml_conv_2d_direct``.
    """
    op = "conv_2d_direct"
    ctx = result_context(op, kernel, x, ctx=ctx)
    window = check_window(op, 2, stride, padding, dilation)
    check_types(op, kernel, x, F32_F16, (Type.F32,))
    check_sizes(op, kernel=kernel, x=x)
    check_channels(op, kernel, x, 2)
    out = window_counts(op, kernel.ne, x.ne, window, kernel=kernel, x=x)
    _check_direct(op, kernel, x, prod(kernel.ne[:3]), kernel.ne[3], prod(out) * x.ne[3])
    return ctx.build(c.ggml_conv_2d_direct, max(x.ndim, 3), kernel.ptr, x.ptr, *window[0], *window[1], *window[2])


def conv_3d_direct(
    x: Tensor,
    kernel: Tensor,
    channels: int,
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    *,
    ctx: Context | None = None,
) -> Tensor:
    """Convolve volumes as :func:`~ggml_cffi.ops.conv_3d` does, without memory for the windows.

    Parameters
    ----------
    x
        ``(n * in, depth, h, w)``, F32, contiguous rows.
    kernel
        ``(out * in, kd, kh, kw)``, contiguous F32 or F16; windows have its type, and at most 16 MiB each.
    channels
        The size ``in``.
    stride, padding, dilation
        One integer, or three.

    Raises
    ------
    ValueError
        If shapes or types do not fit.

    C: ``ggml_conv_3d_direct``.
    """
    op = "conv_3d_direct"
    ctx = result_context(op, kernel, x, ctx=ctx)
    channels = check_integer(op, "channels", channels, 1)
    window = check_window(op, 3, stride, padding, dilation)
    check_types(op, kernel, x, F32_F16, (Type.F32,))
    out = check_volumes(op, kernel, x, channels, window)
    n, oc = x.ne[3] // channels, kernel.ne[3] // channels
    _check_direct(op, kernel, x, prod(kernel.ne[:3]) * channels, oc, prod(out) * n)
    return ctx.build(c.ggml_conv_3d_direct, 4, kernel.ptr, x.ptr, *window[0], *window[1], *window[2], channels, n, oc)


def _channels_last(kernel: Tensor, x: Tensor) -> bool:
    """Return whether the channels of each pixel are adjacent in both, as the kernels for this layout need them."""
    w, h, channels = x.ne[:3]
    size, one = type_size(x.dtype), type_size(kernel.dtype)
    strides = (channels * size, w * channels * size, size, h * w * channels * size)
    across, down, single, channel = kernel.nb
    return (
        channels > 1 and w > 1  # else ggml treats x as contiguous, or as neither
        and x.nb == strides
        and channel == one
        and across == channels * one
        and down == kernel.ne[0] * across
        and single <= across
    )  # fmt: skip


def conv_2d_dw_direct(
    x: Tensor, kernel: Tensor, stride: Ints = 1, padding: Ints = 0, dilation: Ints = 1, *, ctx: Context | None = None
) -> Tensor:
    """Convolve each channel as :func:`~ggml_cffi.ops.conv_2d_dw` does, in one pass, without memory for the windows.

    Parameters
    ----------
    x
        ``(n, channels, h, w)``, F32. Both are contiguous, or both have the channels of a pixel adjacent: ``x`` is then
        a ``permute(_, (0, 3, 1, 2))`` of ``(n, h, w, channels)``, the kernel a ``permute(_, (3, 2, 0, 1))`` of
        ``(kh, kw, 1, channels)``. The result has the layout of ``x``.
    kernel
        ``(channels, 1, kh, kw)``, F32 or F16.
    stride, padding, dilation
        One integer, or ``(vertical, horizontal)``.

    Raises
    ------
    ValueError
        If shapes or types do not fit.

    C: ``ggml_conv_2d_dw_direct``.
    """
    op = "conv_2d_dw_direct"
    ctx = result_context(op, kernel, x, ctx=ctx)
    window = check_window(op, 2, stride, padding, dilation)
    check_types(op, kernel, x, F32_F16, (Type.F32,))
    check_depthwise(op, kernel, x)
    if not (is_contiguous(kernel) and x.head.dense) and not _channels_last(kernel, x):
        raise op_error(op, "the kernel and x must be contiguous, or have their channels last", kernel=kernel, x=x)
    out = window_counts(op, kernel.ne, x.ne, window, kernel=kernel, x=x)
    if prod(out) * x.ne[2] * x.ne[3] > INT_MAX:
        raise op_error(op, "the result would have 2**31 elements or more", kernel=kernel, x=x)
    return ctx.build(c.ggml_conv_2d_dw_direct, max(x.ndim, 3), kernel.ptr, x.ptr, *window[0], *window[1], *window[2])


def conv_transpose_1d(x: Tensor, kernel: Tensor, stride: int = 1, *, ctx: Context | None = None) -> Tensor:
    """Compute the transposed convolution of a signal, as ``torch.nn.functional.conv_transpose1d`` without padding.

    ``result[o, stride * t + j] += sum(kernel[:, o, j] * x[:, t])``

    Parameters
    ----------
    x
        ``(in, length)``, F32, contiguous rows.
    kernel
        ``(in, out, k)``, contiguous rows. F32 if ``128 * stride + k`` is at most 4096, the
        limit of a GPU's workgroup; or F16, for the CPU.

    Returns
    -------
    Tensor
        ``(out, (length - 1) * stride + k)``, F32.

    Raises
    ------
    ValueError
        If shapes or types do not fit.

    C: ``ggml_conv_transpose_1d``, with padding 0 and dilation 1, the only values that ggml supports.
    """
    op = "conv_transpose_1d"
    ctx = result_context(op, kernel, x, ctx=ctx)
    s = check_integer(op, "stride", stride, 1)
    check_types(op, kernel, x, F32_F16, (Type.F32,))
    check_sizes(op, kernel=kernel, x=x)
    if kernel.ne[3] != 1 or x.ne[2:] != (1, 1):
        raise op_error(op, "the kernel must be (in, out, k) and x (in, length), without batches", kernel=kernel, x=x)
    if kernel.ne[2] != x.ne[1]:
        raise op_error(op, f"the kernel has {kernel.ne[2]} channels, x {x.ne[1]}", kernel=kernel, x=x)
    if not contiguous_rows(kernel) or not contiguous_rows(x):
        raise op_error(op, "the rows of the kernel and of x must be contiguous (use cont)", kernel=kernel, x=x)
    check_start(op, kernel=kernel, x=x)
    if kernel.dtype is Type.F32 and 128 * s + kernel.ne[0] > 4096:
        raise op_error(op, f"stride {s} is too large for F32 on GPUs (use col2im_1d, or F16)", kernel=kernel, x=x)
    if ((x.ne[0] - 1) * s + kernel.ne[0]) * kernel.ne[1] > INT_MAX:
        raise op_error(op, "the result would have 2**31 elements or more", kernel=kernel, x=x)
    check_groups(op, "channels of the result", kernel.ne[1])
    return ctx.build(c.ggml_conv_transpose_1d, max(x.ndim, 2), kernel.ptr, x.ptr, s, 0, 1)


def conv_transpose_2d_p0(x: Tensor, kernel: Tensor, stride: int = 1, *, ctx: Context | None = None) -> Tensor:
    """Compute the transposed convolution of images, as ``torch.nn.functional.conv_transpose2d`` without padding.

    ``result[0, o, stride * i + k, stride * j + l] += sum(kernel[:, o, k, l] * x[:, i, j])``

    Parameters
    ----------
    x
        ``(in, h, w)`` or ``(n, in, h, w)``, F32, contiguous rows. Several images need ggml 0.25.3.
    kernel
        ``(in, out, kh, kw)``, contiguous F32 or F16; ``x`` is rounded to its type.
    stride
        The same for both axes.

    Returns
    -------
    Tensor
        ``(..., out, (h - 1) * stride + kh, (w - 1) * stride + kw)``, F32.

    Raises
    ------
    ValueError
        If shapes or types do not fit.

    C: ``ggml_conv_transpose_2d_p0``.
    """
    op = "conv_transpose_2d_p0"
    ctx = result_context(op, kernel, x, ctx=ctx)
    s = check_integer(op, "stride", stride, 1)
    check_types(op, kernel, x, F32_F16, (Type.F32,))
    check_sizes(op, kernel=kernel, x=x)
    if x.ne[3] != 1:  # older CPU kernels ignore the other images
        library.require(GGML_0_25, f"{op} of several images")
    if kernel.ne[3] != x.ne[2]:
        raise op_error(op, f"the kernel has {kernel.ne[3]} channels, x {x.ne[2]}", kernel=kernel, x=x)
    if not is_contiguous(kernel) or not contiguous_rows(x):
        raise op_error(op, "the kernel and the rows of x must be contiguous (use cont)", kernel=kernel, x=x)
    check_start(op, kernel=kernel, x=x)
    out = [(size - 1) * s + k for size, k in zip(x.ne[:2], kernel.ne[:2], strict=True)]
    if prod(out) * kernel.ne[2] * x.ne[3] > INT_MAX or prod(out) > 2**29:
        raise op_error(op, "the result would have 2**31 elements or more", kernel=kernel, x=x)
    return ctx.build(c.ggml_conv_transpose_2d_p0, max(x.ndim, 3), kernel.ptr, x.ptr, s)
