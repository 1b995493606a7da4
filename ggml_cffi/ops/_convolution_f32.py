"""Convolutions with the accuracy of F32: their windows stay F32, and the products do not round them.

ggml's own convolutions gather windows of F16. The shapes of each step are those of C.
"""

from __future__ import annotations

from ggml_cffi.core.context import Context
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Prec, Type
from ggml_cffi.ops._f32 import decoded
from ggml_cffi.ops._windows import Window
from ggml_cffi.ops.im2col import im2col, im2col_3d
from ggml_cffi.ops.matmul import mul_mat
from ggml_cffi.ops.shape import cont, permute, reshape


def conv_1d_f32(kernel: Tensor, x: Tensor, window: Window, ctx: Context) -> Tensor:
    """Return the convolution of one signal."""
    rows = _gathered(kernel, x, window, ctx)
    k, length, _, _ = rows.ne
    out = _product(reshape(rows, (length, k), ctx=ctx), reshape(kernel, (-1, k), ctx=ctx), ctx)
    return reshape(out, (1,) * (x.ndim - 2) + out.shape, ctx=ctx)


def conv_1d_dw_f32(kernel: Tensor, x: Tensor, window: Window, ctx: Context) -> Tensor:
    """Return the convolution of each channel of a signal with its own kernels."""
    channels = reshape(x, (x.ne[1], 1, x.ne[0]), ctx=ctx)
    rows = _gathered(kernel, channels, window, ctx)
    out = _product(rows, kernel, ctx)
    return reshape(out, (1,) * (x.ndim - 2) + (out.ne[2], out.ne[0]), ctx=ctx)


def conv_2d_f32(kernel: Tensor, x: Tensor, window: Window, ctx: Context) -> Tensor:
    """Return the convolution of images."""
    rows = _gathered(kernel, x, window, ctx)
    k, w, h, n = rows.ne
    out = _product(reshape(rows, (-1, k), ctx=ctx), reshape(kernel, (-1, k), ctx=ctx), ctx)
    out = cont(permute(reshape(out, (-1, n, h, w), ctx=ctx), (1, 0, 2, 3), ctx=ctx), ctx=ctx)
    return out if x.ndim == 4 else reshape(out, out.shape[1:], ctx=ctx)


def conv_2d_dw_f32(kernel: Tensor, x: Tensor, window: Window, ctx: Context) -> Tensor:
    """Return the convolution of each channel of images with its own kernel."""
    _, _, channels, n = x.ne
    images = reshape(x, (n * channels, 1, x.ne[1], x.ne[0]), ctx=ctx)
    rows = _gathered(kernel, images, window, ctx)
    k, w, h, _ = rows.ne
    out = _product(reshape(kernel, (1, channels, 1, k), ctx=ctx), reshape(rows, (n, channels, h * w, k), ctx=ctx), ctx)
    return reshape(out, (n, channels, h, w)[4 - max(x.ndim, 3) :], ctx=ctx)


def conv_3d_f32(kernel: Tensor, x: Tensor, channels: int, window: Window, ctx: Context) -> Tensor:
    """Return the convolution of volumes."""
    rows = im2col_3d(kernel, x, channels, *(axes[::-1] for axes in window), ctx=ctx)
    k, w, h, depths = rows.ne
    n = x.ne[3] // channels
    out = _product(reshape(rows, (-1, k), ctx=ctx), reshape(kernel, (-1, k), ctx=ctx), ctx)
    out = cont(permute(reshape(out, (-1, n, depths // n, h * w), ctx=ctx), (1, 0, 2, 3), ctx=ctx), ctx=ctx)
    return reshape(out, (-1, depths // n, h, w), ctx=ctx)


def _gathered(kernel: Tensor, x: Tensor, window: Window, ctx: Context) -> Tensor:
    """Return the windows of ``x``, one per row, as F32."""
    sizes = (axes[::-1] for axes in window)
    return im2col(kernel, decoded(x, ctx), *sizes, is_2d=len(window[0]) == 2, dtype=Type.F32, ctx=ctx)


def _product(a: Tensor, b: Tensor, ctx: Context) -> Tensor:
    return mul_mat(a, decoded(b, ctx), prec=Prec.F32, ctx=ctx)
