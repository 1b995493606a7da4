"""Convolutions."""

from __future__ import annotations

from typing import Any

import numpy as np

import ggml_cffi as ggml
from ggml_cffi import Prec
from tests.cases import Array, In, case, reference
from tests.cases.im2col import BF16, F16, channels_after_places, windows


def convolve(kernel: Array, x: Array, *window: Any) -> Array:
    """Convolve ``(n, in, *sizes)`` with kernels ``(out, in, *k)``."""
    n = kernel.ndim - 2
    rows = channels_after_places(windows(x, kernel.shape[2:], *window), n)
    return np.moveaxis(rows @ kernel.reshape(len(kernel), -1).T, -1, 1)


def depthwise(kernel: Array, x: Array, *window: Any) -> Array:
    """Convolve ``(n, in, *sizes)`` with kernels ``(in * m, 1, *k)``, ``m`` adjacent kernels per channel."""
    m = len(kernel) // x.shape[1]
    parts = [convolve(kernel[i : i + 1], x[:, i // m : i // m + 1], *window) for i in range(len(kernel))]
    return np.concatenate(parts, 1)


def halves(kernel: Array, n: int) -> tuple[int, ...]:
    return tuple(size // 2 for size in kernel.shape[-n:])


@reference
def conv_1d(
    x: Array, kernel: Array, stride: int = 1, padding: int = 0, dilation: int = 1, prec: Prec = Prec.DEFAULT
) -> Array:
    out = convolve(kernel, x.reshape(1, *x.shape[-2:]), stride, padding, dilation)
    return out.reshape(*x.shape[:-2], *out.shape[-2:])


@reference
def conv_1d_ph(x: Array, kernel: Array, stride: int = 1, dilation: int = 1, prec: Prec = Prec.DEFAULT) -> Array:
    return conv_1d(x, kernel, stride, kernel.shape[-1] // 2, dilation)


@reference
def conv_1d_dw(
    x: Array, kernel: Array, stride: int = 1, padding: int = 0, dilation: int = 1, prec: Prec = Prec.DEFAULT
) -> Array:
    return depthwise(kernel, x[None], stride, padding, dilation)[0]


@reference
def conv_1d_dw_ph(x: Array, kernel: Array, stride: int = 1, dilation: int = 1, prec: Prec = Prec.DEFAULT) -> Array:
    return conv_1d_dw(x, kernel, stride, kernel.shape[-1] // 2, dilation)


@reference
def conv_2d(
    x: Array, kernel: Array, stride: Any = 1, padding: Any = 0, dilation: Any = 1, prec: Prec = Prec.DEFAULT
) -> Array:
    out = convolve(kernel, x.reshape(-1, *x.shape[-3:]), stride, padding, dilation)
    return out.reshape(*x.shape[:-3], *out.shape[-3:])


@reference
def conv_2d_sk_p0(x: Array, kernel: Array, prec: Prec = Prec.DEFAULT) -> Array:
    return conv_2d(x, kernel, kernel.shape[-2:])


@reference
def conv_2d_s1_ph(x: Array, kernel: Array, prec: Prec = Prec.DEFAULT) -> Array:
    return conv_2d(x, kernel, 1, halves(kernel, 2))


@reference
def conv_2d_dw(
    x: Array, kernel: Array, stride: Any = 1, padding: Any = 0, dilation: Any = 1, prec: Prec = Prec.DEFAULT
) -> Array:
    out = depthwise(kernel, x.reshape(-1, *x.shape[-3:]), stride, padding, dilation)
    return out.reshape(*x.shape[:-3], *out.shape[-3:])


@reference
def conv_3d(
    x: Array,
    kernel: Array,
    channels: int,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    prec: Prec = Prec.DEFAULT,
) -> Array:
    out = convolve(
        kernel.reshape(-1, channels, *kernel.shape[1:]),
        x.reshape(-1, channels, *x.shape[1:]),
        stride,
        padding,
        dilation,
    )
    return out.reshape(-1, *out.shape[2:])


# Windows are F16 for operands of any type.
ROUNDED = 2e-3
EXACT = 1e-5
F32 = Prec.F32

# Most cases have nine output channels: ggml compiles another kernel for each smaller number, slowly without a GPU.
CASES = [
    case("conv_1d", ROUNDED, kernel=In((9, 3, 3)), x=In((3, 11))),
    case("conv_1d", kernel=In((9, 2, 4), F16), x=In((1, 2, 16)), stride=3, padding=2, dilation=2),
    case("conv_1d", kernel=In((9, 2, 3), F16), x=In((2, 9), F16), padding=1),
    case("conv_1d", ROUNDED, kernel=In((9, 3, 1)), x=In((3, 7), layout="gaps"), stride=2),
    case("conv_1d_ph", ROUNDED, kernel=In((9, 3, 5)), x=In((3, 12))),
    case("conv_1d_ph", kernel=In((9, 1, 4), F16), x=In((1, 13)), stride=2, dilation=3),
    case("conv_1d_ph", ROUNDED, kernel=In((9, 8, 3)), x=In((8, 40))),
    case("conv_1d_dw", ROUNDED, kernel=In((3, 1, 3)), x=In((3, 10))),
    case("conv_1d_dw", kernel=In((6, 1, 4), F16), x=In((3, 17)), stride=2, padding=3, dilation=2),
    case("conv_1d_dw", kernel=In((2, 1, 2), F16), x=In((2, 5), F16)),
    case("conv_1d_dw", kernel=In((6, 1, 4), BF16), x=In((3, 17)), stride=2, padding=3, dilation=2),
    case("conv_1d_dw_ph", kernel=In((3, 1, 3), BF16), x=In((3, 10))),
    case("conv_1d_dw_ph", ROUNDED, kernel=In((3, 1, 3)), x=In((3, 10))),
    case("conv_1d_dw_ph", kernel=In((4, 1, 5), F16), x=In((4, 11)), stride=2),
    case("conv_1d_dw_ph", ROUNDED, kernel=In((1, 1, 4)), x=In((1, 6)), dilation=2),
    case("conv_2d", ROUNDED, kernel=In((9, 3, 3, 3)), x=In((2, 3, 7, 9)), padding=1),
    case("conv_2d", kernel=In((9, 2, 2, 3), F16), x=In((1, 2, 8, 11)), stride=(2, 3), padding=(0, 2), dilation=(3, 1)),
    case("conv_2d", kernel=In((9, 2, 3, 3), F16), x=In((2, 2, 5, 5), F16)),
    case("conv_2d", ROUNDED, kernel=In((9, 3, 1, 1)), x=In((3, 4, 5))),
    case("conv_2d", ROUNDED, kernel=In((9, 3, 2, 2)), x=In((2, 3, 5, 6), layout=(1, 0, 2, 3))),
    case("conv_2d_sk_p0", ROUNDED, kernel=In((9, 3, 4, 2)), x=In((2, 3, 8, 8))),
    case("conv_2d_sk_p0", kernel=In((9, 1, 3, 3), F16), x=In((1, 10, 11))),
    case("conv_2d_sk_p0", ROUNDED, kernel=In((9, 3, 2, 2)), x=In((3, 3, 4, 4))),
    case("conv_2d_s1_ph", ROUNDED, kernel=In((9, 3, 3, 5)), x=In((2, 3, 8, 8))),
    case("conv_2d_s1_ph", kernel=In((9, 2, 3, 3), F16), x=In((2, 10, 11))),
    case("conv_2d_s1_ph", ROUNDED, kernel=In((9, 1, 2, 2)), x=In((1, 1, 3, 4))),
    case("conv_2d_dw", kernel=In((3, 1, 3, 3), F16), x=In((2, 3, 7, 5)), padding=1),
    case("conv_2d_dw", kernel=In((2, 1, 2, 3), F16), x=In((2, 9, 8)), stride=(2, 1), dilation=(1, 3)),
    case("conv_2d_dw", kernel=In((4, 1, 3, 2), BF16), x=In((1, 4, 6, 6)), stride=2),
    case("conv_2d_dw", kernel=In((2, 1, 2, 2), F16), x=In((3, 2, 4, 4), F16)),
    case("conv_3d", ROUNDED, kernel=In((18, 2, 3, 2)), x=In((4, 4, 5, 6)), channels=2),
    case(
        "conv_3d",
        kernel=In((9, 2, 2, 3), F16),
        x=In((2, 5, 6, 7)),
        channels=1,
        stride=(1, 2, 3),
        padding=(0, 1, 2),
        dilation=(2, 1, 1),
    ),
    case("conv_3d", ROUNDED, kernel=In((27, 1, 1, 3)), x=In((6, 3, 2, 5), layout="gaps"), channels=3, padding=1),
    case("conv_1d", EXACT, kernel=In((9, 3, 3)), x=In((1, 3, 11)), padding=1, prec=F32),
    case("conv_1d", EXACT, kernel=In((9, 2, 4), F16), x=In((2, 16), F16), stride=3, dilation=2, prec=F32),
    case("conv_1d_ph", EXACT, kernel=In((9, 3, 5)), x=In((3, 12)), prec=F32),
    case("conv_1d_dw", EXACT, kernel=In((6, 1, 4), F16), x=In((3, 17)), stride=2, padding=3, dilation=2, prec=F32),
    case("conv_1d_dw_ph", EXACT, kernel=In((3, 1, 3)), x=In((3, 10)), prec=F32),
    case("conv_2d", EXACT, kernel=In((9, 3, 3, 2)), x=In((2, 3, 7, 9)), stride=(2, 1), padding=(1, 0), prec=F32),
    case("conv_2d", EXACT, kernel=In((9, 2, 3, 3), F16), x=In((2, 5, 5)), dilation=(1, 2), prec=F32),
    case("conv_2d_sk_p0", EXACT, kernel=In((9, 3, 4, 2)), x=In((2, 3, 8, 8)), prec=F32),
    case("conv_2d_s1_ph", EXACT, kernel=In((9, 2, 3, 5), F16), x=In((2, 10, 11), F16), prec=F32),
    case("conv_2d_dw", EXACT, kernel=In((3, 1, 3, 2)), x=In((2, 3, 7, 5)), padding=(1, 0), stride=2, prec=F32),
    case("conv_2d_dw", EXACT, kernel=In((2, 1, 2, 3), BF16), x=In((2, 9, 8)), dilation=(1, 3), prec=F32),
    case("conv_3d", EXACT, kernel=In((18, 2, 3, 2)), x=In((4, 4, 5, 6)), channels=2, padding=(0, 1, 2), prec=F32),
]

WRONG = {
    "conv_1d: prec must be DEFAULT or F32, not BF16": lambda t: ggml.conv_1d(t(3, 8), t(4, 3, 3), prec=Prec.BF16),
    "conv_1d: x must be one signal: ggml mixes up batches": lambda t: ggml.conv_1d(t(2, 3, 8), t(4, 3, 3)),
    "conv_1d: the kernel has 3 channels, x 2": lambda t: ggml.conv_1d(t(2, 8), t(4, 3, 3)),
    "conv_1d: kernel must be F32 or F16": lambda t: ggml.conv_1d(t(3, 8), t(4, 3, 3, dtype="bf16")),
    "conv_1d: x must be F32 or F16": lambda t: ggml.conv_1d(t(3, 8, dtype="i32"), t(4, 3, 3)),
    "conv_1d: the kernel must be contiguous": lambda t: ggml.conv_1d(t(3, 8), ggml.transpose(t(4, 3, 3))),
    "conv_1d: the kernel, dilated, is larger": lambda t: ggml.conv_1d(t(3, 2), t(4, 3, 3)),
    "conv_1d: stride must be 1": lambda t: ggml.conv_1d(t(3, 8), t(4, 3, 3), 0),
    "conv_1d: dilation must be 1": lambda t: ggml.conv_1d(t(3, 8), t(4, 3, 3), dilation=0),
    "conv_1d_ph: stride must be an integer, not '1'": lambda t: ggml.conv_1d_ph(t(3, 8), t(4, 3, 3), "1"),
    "conv_1d_dw: the kernel must be (3, 1, k)": lambda t: ggml.conv_1d_dw(t(3, 8), t(4, 1, 3)),
    "conv_1d_dw: x must be F32": lambda t: ggml.conv_1d_dw(t(3, 8, dtype="f16"), t(3, 1, 3, dtype="bf16")),
    "conv_1d_dw: x must be one signal": lambda t: ggml.conv_1d_dw(t(2, 3, 8), t(3, 1, 3)),
    "conv_1d_dw: the kernel and x must be contiguous": lambda t: ggml.conv_1d_dw(ggml.transpose(t(8, 3)), t(3, 1, 3)),
    "conv_1d_dw_ph: stride must be 1": lambda t: ggml.conv_1d_dw_ph(t(3, 8), t(3, 1, 3), -1),
    "conv_2d: the kernel has 3 channels, x 2": lambda t: ggml.conv_2d(t(1, 2, 8, 8), t(4, 3, 3, 3)),
    "conv_2d: stride must be 1": lambda t: ggml.conv_2d(t(1, 1, 8, 8), t(1, 1, 3, 3), stride=0),
    "conv_2d: padding must be 0": lambda t: ggml.conv_2d(t(1, 1, 8, 8), t(1, 1, 3, 3), padding=-1),
    "conv_2d: the kernel, dilated, is larger": lambda t: ggml.conv_2d(t(1, 1, 8, 2), t(1, 1, 3, 3)),
    "conv_2d: the kernel must be contiguous": lambda t: ggml.conv_2d(t(1, 1, 8, 8), ggml.transpose(t(1, 1, 3, 3))),
    "conv_2d: kernel must be F32 or F16": lambda t: ggml.conv_2d(t(1, 1, 8, 32), t(1, 1, 3, 32, dtype="q8_0")),
    "conv_2d: kernel starts inside another": lambda t: ggml.conv_2d(
        t(1, 1, 8, 8), ggml.view(t(2, 1, 3, 3), (1, 1, 3, 3), offset=36)
    ),
    "conv_2d_sk_p0: the kernel, dilated, is larger": lambda t: ggml.conv_2d_sk_p0(t(1, 1, 8, 2), t(1, 1, 3, 3)),
    "conv_2d_s1_ph: kernel has no elements": lambda t: ggml.conv_2d_s1_ph(t(1, 1, 8, 2), t(1, 1, 0, 3)),
    "conv_2d_dw: the kernel must be F16 or BF16": lambda t: ggml.conv_2d_dw(t(1, 2, 8, 8), t(2, 1, 3, 3)),
    "conv_2d_dw: the kernel must be (2, 1, kh, kw)": lambda t: ggml.conv_2d_dw(
        t(1, 2, 8, 8), t(4, 1, 3, 3, dtype="f16")
    ),
    "conv_2d_dw: x must be F32:": lambda t: ggml.conv_2d_dw(t(1, 2, 8, 8, dtype="f16"), t(2, 1, 3, 3, dtype="bf16")),
    "conv_2d_dw: the kernel and x must be contiguous": lambda t: ggml.conv_2d_dw(
        ggml.transpose(t(1, 2, 8, 8)), t(2, 1, 3, 3, dtype="f16")
    ),
    "conv_3d: the first sizes must be multiples": lambda t: ggml.conv_3d(t(2, 2, 2, 2), t(3, 1, 1, 1), 2),
    "conv_3d: the kernel must be contiguous": lambda t: ggml.conv_3d(t(2, 2, 2, 2), ggml.transpose(t(2, 1, 2, 2)), 2),
    "conv_3d: x must be F32": lambda t: ggml.conv_3d(t(2, 2, 2, 2, dtype="f16"), t(2, 1, 1, 1), 2),
    "conv_3d: stride must be one integer or 3 integers": lambda t: ggml.conv_3d(
        t(2, 2, 2, 2), t(2, 1, 1, 1), 2, (1, 1)
    ),
}
