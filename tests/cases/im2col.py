"""Windows of signals, images and volumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

import ggml_cffi as ggml
from ggml_cffi import Type
from tests.cases import Array, In, case, reference

F16, BF16 = Type.F16, Type.BF16


def each(value: Any, n: int) -> tuple[Any, ...]:
    """Return one value per axis."""
    return tuple(value) if isinstance(value, Sequence) else (value,) * n


def windows(x: Array, k: Sequence[int], stride: Any = 1, padding: Any = 0, dilation: Any = 1) -> Array:
    """Return the windows of the last ``len(k)`` axes of ``x``, with the axes (other axes, places, window)."""
    n = len(k)
    s, p, d = each(stride, n), each(padding, n), each(dilation, n)
    lead = x.shape[: x.ndim - n]
    x = np.pad(x, [(0, 0)] * len(lead) + [(q, q) for q in p])
    out = [(x.shape[len(lead) + i] - d[i] * (k[i] - 1) - 1) // s[i] + 1 for i in range(n)]
    rows = np.empty((*lead, *out, *k))
    for j in np.ndindex(*k):
        at = tuple(slice(j[i] * d[i], j[i] * d[i] + s[i] * (out[i] - 1) + 1, s[i]) for i in range(n))
        rows[(..., *j)] = x[(..., *at)]
    return rows


def channels_after_places(rows: Array, n: int) -> Array:
    """Reorder ``(batch, channels, *places, *window)`` to one row per place."""
    rows = np.moveaxis(rows, 1, 1 + n)
    return rows.reshape(*rows.shape[: n + 1], -1)


@reference
def im2col(
    kernel: Array,
    x: Array,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    is_2d: bool = True,
    dtype: Type = Type.F32,
) -> Array:
    n = 2 if is_2d else 1
    rows = windows(x.reshape(-1, *x.shape[-n - 1 :]), kernel.shape[-n:], stride, padding, dilation)
    rows = channels_after_places(rows, n)
    return rows.reshape(*x.shape[: -n - 1], *rows.shape[1:])


@reference
def im2col_back(
    a: Array,
    kernel: Array,
    shape: Sequence[int],
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    is_2d: bool = True,
) -> Array:
    # The gather is linear: its transpose follows from its effect on each element. Missing axes have one element.
    full = (1,) * (4 - len(shape)) + tuple(shape)
    kernel, a = (t.reshape((1,) * (4 - t.ndim) + t.shape) for t in (kernel, a))
    out = np.zeros(full)
    for at in np.ndindex(*full):
        one = np.zeros(full)
        one[at] = 1
        taken = im2col(kernel, one, stride, padding, dilation, is_2d)
        out[at] = np.sum(a * taken.reshape(a.shape))
    return out.reshape(shape)


@reference
def im2col_3d(
    kernel: Array,
    x: Array,
    channels: int,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    dtype: Type = Type.F32,
) -> Array:
    rows = windows(x.reshape(-1, channels, *x.shape[1:]), kernel.shape[1:], stride, padding, dilation)
    rows = channels_after_places(rows, 3)
    return rows.reshape(-1, *rows.shape[2:])


@reference
def col2im_1d(a: Array, out_channels: int, stride: int = 1, padding: int = 0) -> Array:
    length, k = a.shape[0], a.shape[1] // out_channels
    out = np.zeros((out_channels, (length - 1) * stride + k))
    for t in range(length):
        out[:, t * stride : t * stride + k] += a[t].reshape(out_channels, k)
    return out[:, padding : out.shape[1] - padding]


CASES = [
    case("im2col", kernel=In((2, 3, 3, 3)), x=In((2, 3, 7, 5))),
    case("im2col", kernel=In((1, 2, 2, 3)), x=In((1, 2, 8, 9)), stride=(2, 3), padding=(1, 2), dilation=(3, 2)),
    case("im2col", kernel=In((1, 2, 3, 1), F16), x=In((3, 2, 5, 5)), padding=1, dtype=F16),
    case("im2col", kernel=In((1, 2, 2, 2), F16), x=In((2, 2, 4, 5), F16), dtype=F16),
    case("im2col", kernel=In((4, 2, 3)), x=In((3, 2, 11)), is_2d=False, stride=2, padding=1),
    case("im2col", kernel=In((1, 3, 4)), x=In((3, 10), layout="gaps"), is_2d=False, dilation=2, dtype=F16),
    case("im2col", kernel=In((1, 5, 2, 2)), x=In((2, 5, 3, 4), layout=(1, 0, 2, 3))),
    case("im2col_back", a=In((2, 5, 3, 18)), kernel=In((1, 2, 3, 3)), shape=(2, 2, 7, 5)),
    case(
        "im2col_back",
        a=In((1, 4, 4, 12)),
        kernel=In((1, 2, 2, 3), F16),
        shape=(1, 2, 7, 8),
        stride=(2, 3),
        padding=(1, 2),
        dilation=(1, 1),
    ),
    case("im2col_back", a=In((2, 5, 6)), kernel=In((1, 2, 3)), shape=(2, 2, 9), stride=2, padding=1, is_2d=False),
    case("im2col_3d", kernel=In((6, 2, 3, 2)), x=In((6, 4, 5, 6)), channels=3),
    case(
        "im2col_3d",
        kernel=In((2, 2, 2, 3), F16),
        x=In((2, 5, 6, 7), layout="permuted"),
        channels=2,
        stride=(1, 2, 3),
        padding=(0, 1, 2),
        dilation=(2, 1, 1),
        dtype=F16,
    ),
    case("im2col_3d", kernel=In((4, 1, 1, 3)), x=In((4, 3, 2, 5), layout="gaps"), channels=1, padding=1),
    case("col2im_1d", a=In((5, 12)), out_channels=3, stride=2),
    case("col2im_1d", a=In((7, 6), F16), out_channels=2, stride=1, padding=2),
    case("col2im_1d", a=In((6, 8), BF16), out_channels=4, stride=5),  # windows that leave gaps
    case("col2im_1d", a=In((1, 5)), out_channels=5),
]

WRONG = {
    "im2col: the kernel has 3 channels, x 2": lambda t: ggml.im2col(t(4, 3, 3, 3), t(1, 2, 8, 8)),
    "im2col: the kernel, dilated, is larger than": lambda t: ggml.im2col(t(1, 1, 3, 3), t(1, 1, 4, 4), dilation=2),
    "im2col: stride must be 1 to": lambda t: ggml.im2col(t(1, 1, 3, 3), t(1, 1, 4, 4), stride=(1, 0)),
    "im2col: stride must be one integer or 2 integers": lambda t: ggml.im2col(
        t(1, 1, 3, 3), t(1, 1, 4, 4), stride=(1, 1, 1)
    ),
    "im2col: padding must be 0 to": lambda t: ggml.im2col(t(1, 1, 3, 3), t(1, 1, 4, 4), padding=2**31),
    "im2col: padding must be an integer, not 0.5": lambda t: ggml.im2col(t(1, 1, 3, 3), t(1, 1, 4, 4), padding=0.5),
    "im2col: dilation must be an integer, not True": lambda t: ggml.im2col(t(1, 1, 3, 3), t(1, 1, 4, 4), dilation=True),
    "im2col: the padded input is too long": lambda t: ggml.im2col(
        t(1, 1, 3), t(1, 1, 2**28), padding=2**30 - 1, is_2d=False
    ),
    "im2col: windows of F32 cannot be gathered": lambda t: ggml.im2col(t(1, 1, 3, 3), t(1, 1, 4, 4, dtype="f16")),
    "im2col: windows of Q8_0 cannot": lambda t: ggml.im2col(t(1, 1, 3, 3), t(1, 1, 4, 4), dtype="q8_0"),
    "im2col: the images of x must be": lambda t: ggml.im2col(t(1, 1, 3, 3), ggml.transpose(t(1, 1, 4, 4))),
    "im2col: the rows of x must be": lambda t: ggml.im2col(t(1, 4, 3), ggml.transpose(t(1, 8, 4)), is_2d=False),
    "im2col: x must have three axes": lambda t: ggml.im2col(t(1, 4, 3), t(2, 2, 4, 8), is_2d=False),
    "im2col: x has no elements": lambda t: ggml.im2col(t(1, 1, 3, 3), t(0, 1, 4, 4)),
    "im2col: is_2d must be a bool": lambda t: ggml.im2col(t(1, 1, 3, 3), t(1, 1, 4, 4), is_2d=1),
    "im2col: x starts inside another": lambda t: ggml.im2col(
        t(1, 1, 3, 3), ggml.view(t(2, 1, 5, 5), (1, 1, 5, 5), offset=100)
    ),
    "im2col: elements of a window: at most": lambda t: ggml.im2col(t(1, 1, 1, 2**26), t(1, 1, 1, 2**26)),
    "im2col_back: a does not hold the windows of (1, 1, 4, 4), which are (1, 2, 2, 9)": lambda t: ggml.im2col_back(
        t(1, 2, 3, 9), t(1, 1, 3, 3), (1, 1, 4, 4)
    ),
    "im2col_back: the kernel, dilated, is larger": lambda t: ggml.im2col_back(
        t(1, 1, 1, 9), t(1, 1, 3, 3), (1, 1, 2, 4)
    ),
    "im2col_back: the kernel does not fit": lambda t: ggml.im2col_back(t(1, 2, 2, 9), t(1, 1, 3, 3), (1, 2, 4, 4)),
    "im2col_back: a must be contiguous F32": lambda t: ggml.im2col_back(
        t(1, 2, 2, 9, dtype="f16"), t(1, 1, 3, 3), (1, 1, 4, 4)
    ),
    "im2col_back: (1, 1, 32768, 32768) has 2**31 bytes": lambda t: ggml.im2col_back(
        t(1, 2, 2, 9), t(1, 1, 3, 3), (1, 1, 2**15, 2**15)
    ),
    "im2col_3d: the first sizes must be multiples of channels=2": lambda t: ggml.im2col_3d(
        t(3, 1, 1, 1), t(2, 2, 2, 2), 2
    ),
    "im2col_3d: channels must be 1 to": lambda t: ggml.im2col_3d(t(3, 1, 1, 1), t(2, 2, 2, 2), 0),
    "im2col_3d: x must be F32": lambda t: ggml.im2col_3d(t(2, 1, 1, 1), t(2, 2, 2, 2, dtype="f16"), 2),
    "im2col_3d: the rows of x": lambda t: ggml.im2col_3d(t(2, 1, 1, 1), ggml.transpose(t(2, 2, 2, 2)), 2),
    "im2col_3d: windows of BF16": lambda t: ggml.im2col_3d(t(2, 1, 1, 1), t(2, 2, 2, 2), 2, dtype="bf16"),
    "im2col_3d: windows along the last axis": lambda t: ggml.im2col_3d(t(1, 1, 1, 1), t(1, 1, 1, 65536), 1),
    "im2col_3d: the windows of a volume": lambda t: ggml.im2col_3d(
        t(1, 100, 100, 100), t(1, 100, 101, 3000), 1, padding=(0, 0, 0)
    ),
    "col2im_1d: the last size is not a multiple of 4": lambda t: ggml.col2im_1d(t(3, 6), 4),
    "col2im_1d: a must be a contiguous matrix": lambda t: ggml.col2im_1d(t(2, 3, 6), 2),
    "col2im_1d: the result would have length 0": lambda t: ggml.col2im_1d(t(3, 2), 1, padding=2),
    "col2im_1d: stride must be 1": lambda t: ggml.col2im_1d(t(3, 2), 1, stride=0),
    "col2im_1d: channels: at most 65535": lambda t: ggml.col2im_1d(t(3, 65536), 65536),
    "col2im_1d: elements of a channel": lambda t: ggml.col2im_1d(t(3, 2), 1, stride=2**24),
    "col2im_1d: out_channels must be 1": lambda t: ggml.col2im_1d(t(3, 2), 0),
}
