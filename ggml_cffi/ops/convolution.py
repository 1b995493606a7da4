"""Convolutions through windows: these are gathered, by default **rounded to F16**, and multiplied by the kernels.

A *kernel* ``(out, in, ..., height, width)`` slides over ``x``, ``(batch, in, ..., height, width)``. As in
``torch.nn.functional``, ``x`` comes first (in C the kernel does), and the kernel is not mirrored. ``stride``,
``padding`` (zeros on both sides) and ``dilation`` are one integer for all axes, or one per axis in the order of the
shape. In windows of F16, values beyond 65504 become infinite.

``prec=Prec.F32`` keeps the windows F32 and gives the accuracy of F32, as in :func:`ggml_cffi.mul_mat`. So do all
convolutions through windows if ``Session(precision="f32")`` or ``Context(precision="f32")`` makes it the default.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.context import Context
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Prec, Type
from ggml_cffi.ops._convolution_f32 import (
    conv_1d_dw_f32,
    conv_1d_f32,
    conv_2d_dw_f32,
    conv_2d_f32,
    conv_3d_f32,
)
from ggml_cffi.ops._f32 import is_f32
from ggml_cffi.ops._operands import (
    F32_F16,
    check_bf16,
    check_groups,
    check_result,
    check_sizes,
    check_start,
    is_contiguous,
    op_error,
    result_context,
)
from ggml_cffi.ops._parameters import INT_MAX, check_integer
from ggml_cffi.ops._windows import (
    Ints,
    Window,
    check_depthwise,
    check_gather,
    check_gather_3d,
    check_types,
    check_window,
    window_counts,
)

__all__ = [
    "conv_1d",
    "conv_1d_dw",
    "conv_1d_dw_ph",
    "conv_1d_ph",
    "conv_2d",
    "conv_2d_dw",
    "conv_2d_s1_ph",
    "conv_2d_sk_p0",
    "conv_3d",
]


def _conv_1d(
    op: str,
    function: Callable[..., Any],
    kernel: Tensor,
    x: Tensor,
    window: Window,
    prec: Prec,
    ctx: Context,
    *args: int,
) -> Tensor:
    check_types(op, kernel, x, F32_F16, F32_F16)
    if not is_contiguous(kernel) or kernel.ne[3] != 1:
        raise op_error(op, "the kernel must be contiguous and have three axes at most", kernel=kernel, x=x)
    if x.ne[2] != 1:  # C reshapes (out, n, length) to (n, out, length)
        raise op_error(op, "x must be one signal: ggml mixes up batches (use conv_2d for those)", kernel=kernel, x=x)
    out = check_gather(op, kernel, x, window, Type.F16)
    check_result(op, (*out, kernel.ne[2]))
    if is_f32(op, prec, ctx):
        return conv_1d_f32(kernel, x, window, ctx)
    return ctx.build(function, max(x.ndim, 2), kernel.ptr, x.ptr, *args, n=5)


def conv_1d(
    x: Tensor,
    kernel: Tensor,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    *,
    prec: Prec = Prec.DEFAULT,
    ctx: Context | None = None,
) -> Tensor:
    """Convolve a signal, as ``torch.nn.functional.conv1d`` does. Windows are rounded to F16 by default.

    Parameters
    ----------
    x
        ``(in, length)`` or ``(1, in, length)``, one signal only: ggml mixes up batches. F32 or F16, contiguous rows.
    kernel
        ``(out, in, k)``, contiguous F32 or F16.

    Returns
    -------
    Tensor
        ``(out, (length + 2 * padding - dilation * (k - 1) - 1) // stride + 1)``, F32.

    Raises
    ------
    ValueError
        If shapes or types do not fit.

    C: ``ggml_conv_1d``.
    """
    ctx = result_context("conv_1d", kernel, x, ctx=ctx)
    (s,), (p,), (d,) = window = check_window("conv_1d", 1, stride, padding, dilation)
    return _conv_1d("conv_1d", c.ggml_conv_1d, kernel, x, window, prec, ctx, s, p, d)


def conv_1d_ph(
    x: Tensor,
    kernel: Tensor,
    stride: int = 1,
    dilation: int = 1,
    *,
    prec: Prec = Prec.DEFAULT,
    ctx: Context | None = None,
) -> Tensor:
    """Convolve a signal as :func:`conv_1d` does, padded by half of the kernel. C: ``ggml_conv_1d_ph``."""
    ctx = result_context("conv_1d_ph", kernel, x, ctx=ctx)
    (s,), _, (d,) = window = check_window("conv_1d_ph", 1, stride, min(kernel.ne[0] // 2, 2**30 - 1), dilation)
    return _conv_1d("conv_1d_ph", c.ggml_conv_1d_ph, kernel, x, window, prec, ctx, s, d)


def _conv_1d_dw(
    op: str,
    function: Callable[..., Any],
    kernel: Tensor,
    x: Tensor,
    window: Window,
    prec: Prec,
    ctx: Context,
    *args: int,
) -> Tensor:
    check_types(op, kernel, x, (*F32_F16, Type.BF16), (Type.F32,) if kernel.dtype is Type.BF16 else F32_F16)
    check_bf16(op, kernel)
    check_sizes(op, kernel=kernel, x=x)
    check_start(op, kernel=kernel, x=x)
    if not is_contiguous(kernel) or not is_contiguous(x):
        raise op_error(op, "the kernel and x must be contiguous (use cont)", kernel=kernel, x=x)
    if x.ne[2:] != (1, 1):
        raise op_error(op, "x must be one signal, without batches", kernel=kernel, x=x)
    if kernel.ne[1] != 1 or kernel.ne[3] != 1 or kernel.ne[2] % x.ne[1]:
        raise op_error(op, f"the kernel must be ({x.ne[1]}, 1, k), or a multiple of that", kernel=kernel, x=x)
    if x.nb[1] > INT_MAX:
        raise op_error(op, "a channel has 2**31 bytes or more", kernel=kernel, x=x)
    out = window_counts(op, kernel.ne, x.ne, window, kernel=kernel, x=x)
    check_result(op, (kernel.ne[0], *out, kernel.ne[2]))
    check_groups(op, "elements of a window", kernel.ne[0], 512)
    if is_f32(op, prec, ctx):
        return conv_1d_dw_f32(kernel, x, window, ctx)
    return ctx.build(function, max(x.ndim, 2), kernel.ptr, x.ptr, *args, n=4)


def conv_1d_dw(
    x: Tensor,
    kernel: Tensor,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    *,
    prec: Prec = Prec.DEFAULT,
    ctx: Context | None = None,
) -> Tensor:
    """Convolve each channel of a signal with its own kernels, as torch does with one group per channel.

    Windows are rounded to F16 by default.

    Parameters
    ----------
    x
        ``(channels, length)``, contiguous F32, or F16 if the kernel is not BF16.
    kernel
        ``(channels * m, 1, k)``, contiguous F32, F16 or BF16; the ``m`` kernels of a channel are adjacent. BF16 needs
        ggml 0.25.3.

    Returns
    -------
    Tensor
        ``(channels * m, (length + 2 * padding - dilation * (k - 1) - 1) // stride + 1)``, F32.

    Raises
    ------
    ValueError
        If shapes or types do not fit.

    C: ``ggml_conv_1d_dw``.
    """
    ctx = result_context("conv_1d_dw", kernel, x, ctx=ctx)
    (s,), (p,), (d,) = window = check_window("conv_1d_dw", 1, stride, padding, dilation)
    return _conv_1d_dw("conv_1d_dw", c.ggml_conv_1d_dw, kernel, x, window, prec, ctx, s, p, d)


def conv_1d_dw_ph(
    x: Tensor,
    kernel: Tensor,
    stride: int = 1,
    dilation: int = 1,
    *,
    prec: Prec = Prec.DEFAULT,
    ctx: Context | None = None,
) -> Tensor:
    """Convolve each channel as :func:`conv_1d_dw` does, padded by half of the kernel. C: ``ggml_conv_1d_dw_ph``."""
    ctx = result_context("conv_1d_dw_ph", kernel, x, ctx=ctx)
    (s,), _, (d,) = window = check_window("conv_1d_dw_ph", 1, stride, min(kernel.ne[0] // 2, 2**30 - 1), dilation)
    return _conv_1d_dw("conv_1d_dw_ph", c.ggml_conv_1d_dw_ph, kernel, x, window, prec, ctx, s, d)


def _conv_2d(
    op: str,
    function: Callable[..., Any],
    kernel: Tensor,
    x: Tensor,
    window: Window,
    prec: Prec,
    ctx: Context,
    *args: int,
) -> Tensor:
    check_types(op, kernel, x, F32_F16, F32_F16)
    if not is_contiguous(kernel):
        raise op_error(op, "the kernel must be contiguous (use cont)", kernel=kernel, x=x)
    out = check_gather(op, kernel, x, window, Type.F16)
    check_result(op, (*out, kernel.ne[3], x.ne[3]))
    if is_f32(op, prec, ctx):
        return conv_2d_f32(kernel, x, window, ctx)
    return ctx.build(function, max(x.ndim, 3), kernel.ptr, x.ptr, *args, n=7)


def conv_2d(
    x: Tensor,
    kernel: Tensor,
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    *,
    prec: Prec = Prec.DEFAULT,
    ctx: Context | None = None,
) -> Tensor:
    """Convolve images, as ``torch.nn.functional.conv2d`` does. Windows are rounded to F16 by default.

    Parameters
    ----------
    x
        ``(n, in, h, w)``, F32 or F16; each channel is contiguous.
    kernel
        ``(out, in, kh, kw)``, contiguous F32 or F16.
    stride, padding, dilation
        One integer, or ``(vertical, horizontal)``.

    Returns
    -------
    Tensor
        ``(n, out, (h + 2 * padding - dilation * (kh - 1) - 1) // stride + 1, ...)``, F32.

    Raises
    ------
    ValueError
        If shapes or types do not fit.

    C: ``ggml_conv_2d``.
    """
    ctx = result_context("conv_2d", kernel, x, ctx=ctx)
    window = check_window("conv_2d", 2, stride, padding, dilation)
    return _conv_2d("conv_2d", c.ggml_conv_2d, kernel, x, window, prec, ctx, *window[0], *window[1], *window[2])


def conv_2d_sk_p0(x: Tensor, kernel: Tensor, *, prec: Prec = Prec.DEFAULT, ctx: Context | None = None) -> Tensor:
    """Convolve as :func:`conv_2d` does, with windows side by side, such as the patches of an image.

    C: ``ggml_conv_2d_sk_p0``.
    """
    ctx = result_context("conv_2d_sk_p0", kernel, x, ctx=ctx)
    window = (tuple(min(max(k, 1), INT_MAX) for k in kernel.ne[:2]), (0, 0), (1, 1))
    return _conv_2d("conv_2d_sk_p0", c.ggml_conv_2d_sk_p0, kernel, x, window, prec, ctx)


def conv_2d_s1_ph(x: Tensor, kernel: Tensor, *, prec: Prec = Prec.DEFAULT, ctx: Context | None = None) -> Tensor:
    """Convolve as :func:`conv_2d` does, with stride 1 and padding by half of the kernel. C: ``ggml_conv_2d_s1_ph``."""
    ctx = result_context("conv_2d_s1_ph", kernel, x, ctx=ctx)
    window = ((1, 1), tuple(k // 2 for k in kernel.ne[:2]), (1, 1))
    return _conv_2d("conv_2d_s1_ph", c.ggml_conv_2d_s1_ph, kernel, x, window, prec, ctx)


def conv_2d_dw(
    x: Tensor,
    kernel: Tensor,
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    *,
    prec: Prec = Prec.DEFAULT,
    ctx: Context | None = None,
) -> Tensor:
    """Convolve each channel of images with its own kernel, as torch does with one group per channel.

    Windows are rounded to F16 by default if the kernel is F16. :func:`conv_2d_dw_direct` needs less memory.

    Parameters
    ----------
    x
        ``(n, channels, h, w)``, contiguous F32, or F16 if the kernel is F16.
    kernel
        ``(channels, 1, kh, kw)``, contiguous F16 or BF16: ggml's CPU cannot multiply F32 kernels and F16
        windows. With ``prec=Prec.F32`` also F32.
    stride, padding, dilation
        One integer, or ``(vertical, horizontal)``.

    Returns
    -------
    Tensor
        ``(n, channels, (h + 2 * padding - dilation * (kh - 1) - 1) // stride + 1, ...)``, F32.

    Raises
    ------
    ValueError
        If shapes or types do not fit.

    C: ``ggml_conv_2d_dw``. Source: Howard et al., MobileNets, 2017.
    """
    op = "conv_2d_dw"
    ctx = result_context(op, kernel, x, ctx=ctx)
    window = check_window(op, 2, stride, padding, dilation)
    f32 = is_f32(op, prec, ctx)
    if kernel.dtype is Type.F32 and not f32:
        raise op_error(
            op, "the kernel must be F16 or BF16 (prec=Prec.F32 and conv_2d_dw_direct take F32)", kernel=kernel, x=x
        )
    check_types(
        op, kernel, x, (Type.F32, Type.F16, Type.BF16), F32_F16 if kernel.dtype is not Type.BF16 else (Type.F32,)
    )
    check_depthwise(op, kernel, x)
    if not is_contiguous(kernel) or not is_contiguous(x):
        raise op_error(op, "the kernel and x must be contiguous (use cont)", kernel=kernel, x=x)
    if x.nb[2] > INT_MAX:
        raise op_error(op, "a channel has 2**31 bytes or more", kernel=kernel, x=x)
    out = window_counts(op, kernel.ne, x.ne, window, kernel=kernel, x=x)
    check_result(op, (prod(kernel.ne[:2]), *out, x.ne[2] * x.ne[3]))
    check_groups(op, "elements of a window", prod(kernel.ne[:2]), 512)
    if f32:
        return conv_2d_dw_f32(kernel, x, window, ctx)
    return ctx.build(c.ggml_conv_2d_dw, max(x.ndim, 3), kernel.ptr, x.ptr, *window[0], *window[1], *window[2], n=7)


def conv_3d(
    x: Tensor,
    kernel: Tensor,
    channels: int,
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    *,
    prec: Prec = Prec.DEFAULT,
    ctx: Context | None = None,
) -> Tensor:
    """Convolve volumes, as ``torch.nn.functional.conv3d`` does. Windows are rounded to F16 by default.

    Parameters
    ----------
    x
        ``(n * in, depth, h, w)``, F32, contiguous rows.
    kernel
        ``(out * in, kd, kh, kw)``, contiguous F32 or F16.
    channels
        The size ``in``: ggml's tensors have no fifth axis for it.
    stride, padding, dilation
        One integer, or three.

    Returns
    -------
    Tensor
        ``(n * out, (depth + 2 * padding - dilation * (kd - 1) - 1) // stride + 1, ..., ...)``, F32.

    Raises
    ------
    ValueError
        If shapes or types do not fit.

    C: ``ggml_conv_3d``.
    """
    op = "conv_3d"
    ctx = result_context(op, kernel, x, ctx=ctx)
    channels = check_integer(op, "channels", channels, 1)
    window = check_window(op, 3, stride, padding, dilation)
    check_types(op, kernel, x, F32_F16, (Type.F32,))
    if not is_contiguous(kernel):
        raise op_error(op, "the kernel must be contiguous (use cont)", kernel=kernel, x=x)
    out = check_gather_3d(op, kernel, x, channels, window, Type.F16)
    check_result(op, (*out, kernel.ne[3] // channels * (x.ne[3] // channels)))
    if is_f32(op, prec, ctx):
        return conv_3d_f32(kernel, x, channels, window, ctx)
    return ctx.build(c.ggml_conv_3d, 4, kernel.ptr, x.ptr, channels, *window[0], *window[1], *window[2], n=8)
