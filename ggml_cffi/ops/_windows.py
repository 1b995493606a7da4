"""Checks of convolutions, and the number of their windows."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ggml_cffi.core.dtypes import type_size
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.ops._operands import check_groups, check_result, check_sizes, check_start, contiguous_rows, op_error
from ggml_cffi.ops._parameters import INT_MAX, check_integers

Ints = int | Sequence[int]
Window = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def check_window(op: str, n: int, stride: Ints, padding: Ints, dilation: Ints) -> Window:
    """Return stride, padding and dilation of ``n`` axes, in ggml's order."""
    return (
        check_integers(op, "stride", stride, n, 1),
        check_integers(op, "padding", padding, n, 0, 2**30 - 1),  # C doubles it
        check_integers(op, "dilation", dilation, n, 1),
    )


def window_counts(
    op: str, kernel: tuple[int, ...], sizes: tuple[int, ...], window: Window, /, **operands: Tensor
) -> tuple[int, ...]:
    """Return the number of windows along each axis, in ggml's order."""
    out = []
    for size, k, s, p, d in zip(sizes, kernel, *window, strict=False):
        padded, need = size + 2 * p, d * (k - 1) + 1
        if padded > INT_MAX:
            raise op_error(op, "the padded input is too long", **operands)
        if need > padded:  # C rounds towards 0, and would compute one window
            raise op_error(op, "the kernel, dilated, is larger than the padded input", **operands)
        out.append((padded - need) // s + 1)
    return tuple(out)


def check_types(op: str, kernel: Tensor, x: Tensor, kernels: Sequence[Type], inputs: Sequence[Type]) -> None:
    """Raise ``ValueError`` unless the types of kernel and input are allowed."""
    for name, t, allowed in (("kernel", kernel, kernels), ("x", x, inputs)):
        if t.dtype not in allowed:
            raise op_error(op, f"{name} must be {' or '.join(k.name for k in allowed)}", kernel=kernel, x=x)


def check_channels(op: str, kernel: Tensor, x: Tensor, n: int) -> None:
    """Raise ``ValueError`` unless the kernel, with ``n`` axes, has as many channels as ``x``."""
    if kernel.ne[n] != x.ne[n]:
        raise op_error(op, f"the kernel has {kernel.ne[n]} channels, x {x.ne[n]}", kernel=kernel, x=x)


def check_depthwise(op: str, kernel: Tensor, x: Tensor) -> None:
    """Raise ``ValueError`` unless there is one kernel per channel of ``x``."""
    check_sizes(op, kernel=kernel, x=x)
    check_start(op, kernel=kernel, x=x)
    if kernel.ne[2:] != (1, x.ne[2]):
        raise op_error(op, f"the kernel must be ({x.ne[2]}, 1, kh, kw), one for each channel", kernel=kernel, x=x)


def check_gather(op: str, kernel: Tensor, x: Tensor, window: Window, to: Type) -> tuple[int, ...]:
    """Check a gather of windows with one or two axes, and return the number of windows per axis in ggml's order."""
    n = len(window[0])
    check_sizes(op, kernel=kernel, x=x)
    check_channels(op, kernel, x, n)
    if n == 1 and x.ne[3] != 1:
        raise op_error(op, "x must have three axes at most", kernel=kernel, x=x)
    # The CPU kernel assumes dense images, and an int for the bytes from one image to the next.
    if not contiguous_rows(x) or (n == 2 and x.ne[1] > 1 and x.nb[1] != x.ne[0] * type_size(x.dtype)):
        unit = "images" if n == 2 else "rows"
        raise op_error(op, f"the {unit} of x must be contiguous (use cont)", kernel=kernel, x=x)
    if max(x.nb[n : n + 2]) > INT_MAX:
        raise op_error(op, "x has 2**31 bytes or more from one channel or batch to the next", kernel=kernel, x=x)
    check_start(op, kernel=kernel)
    if x.is_contiguous:  # others are computed by the CPU only
        check_start(op, x=x)
    out = window_counts(op, kernel.ne, x.ne, window, kernel=kernel, x=x)
    row = prod(kernel.ne[: n + 1])
    check_result(op, (row, *out, x.ne[n + 1]), to)
    check_groups(op, "elements of a window", row, 512)
    return out


def check_volumes(op: str, kernel: Tensor, x: Tensor, channels: int, window: Window) -> tuple[int, ...]:
    """Check a convolution with three axes, and return the number of windows per axis in ggml's order."""
    if kernel.ne[3] % channels or x.ne[3] % channels:
        raise op_error(op, f"the first sizes must be multiples of channels={channels}", kernel=kernel, x=x)
    check_sizes(op, kernel=kernel, x=x)
    check_start(op, kernel=kernel, x=x)
    if not contiguous_rows(x):
        raise op_error(op, "the rows of x must be contiguous (use cont)", kernel=kernel, x=x)
    return window_counts(op, kernel.ne, x.ne, window, kernel=kernel, x=x)


def check_gather_3d(op: str, kernel: Tensor, x: Tensor, channels: int, window: Window, to: Type) -> tuple[int, ...]:
    """Check a gather of windows with three axes, as :func:`check_gather` does for fewer."""
    if x.dtype is not Type.F32:
        raise op_error(op, "x must be F32", kernel=kernel, x=x)
    out = check_volumes(op, kernel, x, channels, window)
    n, row = x.ne[3] // channels, prod(kernel.ne[:3]) * channels
    check_result(op, (row, *out[:2], out[2] * n), to)
    check_groups(op, "elements of a window", row, 512)
    check_groups(op, "windows along the last axis", out[0])
    if max(row * prod(out), out[1] * out[2] * n) > INT_MAX:
        raise op_error(op, "the windows of a volume have 2**31 elements or more", kernel=kernel, x=x)
    return out
