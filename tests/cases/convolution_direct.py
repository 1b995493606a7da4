"""Direct and transposed convolutions."""

from __future__ import annotations

from typing import Any

import numpy as np

import ggml_cffi as ggml
from tests.cases import Array, In, case, reference
from tests.cases.convolution import conv_2d, conv_2d_dw, conv_3d
from tests.cases.im2col import F16


@reference
def conv_2d_direct(x: Array, kernel: Array, stride: Any = 1, padding: Any = 0, dilation: Any = 1) -> Array:
    return conv_2d(x, kernel, stride, padding, dilation)


@reference
def conv_2d_dw_direct(x: Array, kernel: Array, stride: Any = 1, padding: Any = 0, dilation: Any = 1) -> Array:
    return conv_2d_dw(x, kernel, stride, padding, dilation)


@reference
def conv_3d_direct(
    x: Array, kernel: Array, channels: int, stride: Any = 1, padding: Any = 0, dilation: Any = 1
) -> Array:
    return conv_3d(x, kernel, channels, stride, padding, dilation)


@reference
def conv_transpose_1d(x: Array, kernel: Array, stride: int = 1) -> Array:
    out = np.zeros((kernel.shape[1], (x.shape[1] - 1) * stride + kernel.shape[2]))
    for t in range(x.shape[1]):
        out[:, t * stride : t * stride + kernel.shape[2]] += np.einsum("iok,i->ok", kernel, x[:, t])
    return out


@reference
def conv_transpose_2d_p0(x: Array, kernel: Array, stride: int = 1) -> Array:
    h, w = x.shape[-2:]
    kh, kw = kernel.shape[-2:]
    out = np.zeros((*x.shape[:-3], kernel.shape[1], (h - 1) * stride + kh, (w - 1) * stride + kw))
    for i, j in np.ndindex(h, w):
        part = np.einsum("iokl,...i->...okl", kernel, x[..., i, j])
        out[..., i * stride : i * stride + kh, j * stride : j * stride + kw] += part
    return out


# GPUs with matrix units compute and sum in F16 here, for operands of any type.
ROUNDED = 5e-3

LAST = (0, 2, 3, 1)  # channels last
KERNEL_LAST = (2, 3, 1, 0)

CASES = [
    case("conv_2d_direct", ROUNDED, kernel=In((4, 3, 3, 3)), x=In((2, 3, 7, 9)), padding=1),
    case(
        "conv_2d_direct",
        ROUNDED,
        kernel=In((5, 2, 2, 3), F16),
        x=In((1, 2, 8, 11)),
        stride=(2, 3),
        padding=(0, 2),
        dilation=(3, 1),
    ),
    case("conv_2d_direct", ROUNDED, kernel=In((3, 4, 3, 3)), x=In((2, 4, 5, 6), layout="permuted"), padding=1),
    case("conv_2d_dw_direct", kernel=In((3, 1, 3, 3)), x=In((2, 3, 7, 5)), padding=1),
    case("conv_2d_dw_direct", kernel=In((2, 1, 2, 3), F16), x=In((2, 9, 8)), stride=(2, 1), dilation=(1, 3)),
    case(
        "conv_2d_dw_direct",
        kernel=In((11, 1, 3, 3), layout=KERNEL_LAST),
        x=In((2, 11, 6, 5), layout=LAST),
        padding=(2, 1),
    ),
    case("conv_2d_dw_direct", kernel=In((4, 1, 2, 2), F16, KERNEL_LAST), x=In((1, 4, 6, 6), layout=LAST), stride=2),
    case("conv_3d_direct", ROUNDED, kernel=In((6, 2, 3, 2)), x=In((4, 4, 5, 6)), channels=2),
    case(
        "conv_3d_direct",
        ROUNDED,
        kernel=In((4, 2, 2, 3), F16),
        x=In((2, 5, 6, 7)),
        channels=1,
        stride=(1, 2, 3),
        padding=(0, 1, 2),
        dilation=(2, 1, 1),
    ),
    case("conv_3d_direct", ROUNDED, kernel=In((3, 1, 1, 3)), x=In((6, 3, 2, 5), layout="gaps"), channels=3, padding=1),
    case("conv_transpose_1d", kernel=In((3, 4, 3)), x=In((3, 7))),
    case("conv_transpose_1d", kernel=In((2, 5, 4), F16), x=In((2, 6)), stride=2),
    case("conv_transpose_1d", kernel=In((2, 3, 2)), x=In((2, 300)), stride=7),
    case("conv_transpose_1d", kernel=In((4, 2, 3), layout="permuted"), x=In((4, 5), layout="gaps"), stride=3),
    case("conv_transpose_2d_p0", ROUNDED, kernel=In((3, 4, 3, 2)), x=In((3, 4, 5))),
    case("conv_transpose_2d_p0", ROUNDED, kernel=In((4, 3, 2, 3)), x=In((2, 4, 5, 3)), stride=2),
    case("conv_transpose_2d_p0", ROUNDED, kernel=In((2, 3, 2, 2), F16), x=In((3, 2, 4, 3))),
    case("conv_transpose_2d_p0", ROUNDED, kernel=In((2, 3, 2, 2), F16), x=In((1, 2, 5, 3)), stride=2),
    case("conv_transpose_2d_p0", ROUNDED, kernel=In((2, 1, 2, 3)), x=In((2, 3, 4), layout="permuted"), stride=3),
]

WRONG = {
    "conv_2d_direct: the kernel has 3 channels, x 2": lambda t: ggml.conv_2d_direct(t(1, 2, 8, 8), t(4, 3, 3, 3)),
    "conv_2d_direct: x must be F32": lambda t: ggml.conv_2d_direct(t(1, 1, 8, 8, dtype="f16"), t(1, 1, 3, 3)),
    "conv_2d_direct: kernel must be F32 or F16": lambda t: ggml.conv_2d_direct(
        t(1, 1, 8, 8), t(1, 1, 3, 3, dtype="bf16")
    ),
    "conv_2d_direct: a window takes more than": lambda t: ggml.conv_2d_direct(t(1, 1, 2048, 2048), t(1, 1, 2048, 2048)),
    "conv_2d_direct: the kernel and the rows of x must be": lambda t: ggml.conv_2d_direct(
        ggml.transpose(t(1, 1, 8, 8)), t(1, 1, 3, 3)
    ),
    "conv_2d_direct: the kernel, dilated, is larger": lambda t: ggml.conv_2d_direct(t(1, 1, 8, 2), t(1, 1, 3, 3)),
    "conv_2d_direct: the result would have": lambda t: ggml.conv_2d_direct(
        t(1, 1, 2**13, 2**13), t(64, 1, 1, 1), padding=100
    ),
    "conv_2d_direct: x starts inside another": lambda t: ggml.conv_2d_direct(
        ggml.view(t(2, 1, 5, 5), (1, 1, 5, 5), offset=100), t(1, 1, 3, 3)
    ),
    "conv_2d_dw_direct: the kernel must be (2, 1, kh, kw)": lambda t: ggml.conv_2d_dw_direct(
        t(1, 2, 8, 8), t(2, 2, 3, 3)
    ),
    "conv_2d_dw_direct: the kernel and x must be contiguous, or": lambda t: ggml.conv_2d_dw_direct(
        ggml.permute(t(1, 8, 8, 2), (0, 3, 1, 2)), t(2, 1, 3, 3)
    ),
    "conv_2d_dw_direct: stride must be 1": lambda t: ggml.conv_2d_dw_direct(t(1, 2, 8, 8), t(2, 1, 3, 3), (1, 0)),
    "conv_3d_direct: the first sizes must be": lambda t: ggml.conv_3d_direct(t(2, 2, 2, 2), t(3, 1, 1, 1), 2),
    "conv_3d_direct: a window takes more": lambda t: ggml.conv_3d_direct(t(1, 128, 256, 128), t(1, 128, 256, 128), 1),
    "conv_3d_direct: channels must be an integer": lambda t: ggml.conv_3d_direct(t(2, 2, 2, 2), t(2, 1, 1, 1), None),
    "conv_transpose_1d: the kernel has 3 channels, x 2": lambda t: ggml.conv_transpose_1d(t(2, 7), t(3, 4, 3)),
    "conv_transpose_1d: the kernel must be (in, out, k)": lambda t: ggml.conv_transpose_1d(t(2, 3, 7), t(3, 4, 3)),
    "conv_transpose_1d: stride 32 is too large for F32": lambda t: ggml.conv_transpose_1d(t(3, 7), t(3, 4, 3), 32),
    "conv_transpose_1d: stride must be 1": lambda t: ggml.conv_transpose_1d(t(3, 7), t(3, 4, 3), 0),
    "conv_transpose_1d: kernel must be F32 or F16": lambda t: ggml.conv_transpose_1d(t(3, 7), t(3, 4, 3, dtype="bf16")),
    "conv_transpose_1d: the rows of the kernel": lambda t: ggml.conv_transpose_1d(ggml.transpose(t(7, 3)), t(3, 4, 3)),
    "conv_transpose_1d: channels of the result": lambda t: ggml.conv_transpose_1d(t(1, 7), t(1, 65536, 1)),
    "conv_transpose_1d: the result would have": lambda t: ggml.conv_transpose_1d(
        t(1, 2**24), t(1, 64, 4, dtype="f16"), 4
    ),
    "conv_transpose_2d_p0: the kernel has 3": lambda t: ggml.conv_transpose_2d_p0(t(2, 4, 4), t(3, 4, 2, 2)),
    "conv_transpose_2d_p0: stride must be 1": lambda t: ggml.conv_transpose_2d_p0(t(3, 4, 4), t(3, 4, 2, 2), 0),
    "conv_transpose_2d_p0: the kernel and the rows of x must be": lambda t: ggml.conv_transpose_2d_p0(
        t(3, 4, 4), ggml.transpose(t(3, 4, 2, 2))
    ),
    "conv_transpose_2d_p0: the result would have": lambda t: ggml.conv_transpose_2d_p0(
        t(1, 4, 4), t(1, 1, 2, 2), 2**16
    ),
}
