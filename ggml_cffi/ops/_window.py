"""What convolution, pooling and resizing check alike: parameters, windows, and what GPUs can address."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from math import prod
from typing import Any, TypeVar

from ggml_cffi.core.dtypes import type_size
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.ops._args import GROUPS, INT_MAX, integer
from ggml_cffi.ops._check import check_result, contiguous_rows, fail

Ints = int | Sequence[int]
Window = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

F32_F16 = (Type.F32, Type.F16)
_START = 256  # the coarsest multiple that a Vulkan device may ask of the start of an operand
_E = TypeVar("_E", bound=IntEnum)


def integers(op: str, name: str, value: Any, n: int, low: int = 0, high: int = INT_MAX) -> tuple[int, ...]:
    """One integer for each of ``n`` axes, given in numpy's order or as one for all; returned in ggml's."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return (integer(op, name, value, low, high),) * n
    if len(value) != n:
        raise ValueError(f"{op}: {name} takes an integer, or {n} of them, not {value!r}")
    return tuple(integer(op, name, v, low, high) for v in reversed(value))


def member(op: str, kind: type[_E], value: Any) -> _E:
    """``value`` as a member of an enumeration."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {kind.__name__} is needed, not {value!r}")
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{op}: there is no {kind.__name__} {value}") from None


def slide(
    op: str, kernel: tuple[int, ...], sizes: tuple[int, ...], window: Window, /, **operands: Tensor
) -> tuple[int, ...]:
    """How many places a kernel has along each axis of a window, in ggml's order."""
    out = []
    for size, k, s, p, d in zip(sizes, kernel, *window, strict=False):
        room, need = size + 2 * p, d * (k - 1) + 1
        if room > INT_MAX:
            raise fail(op, "the padded input is too long", **operands)
        if need > room:  # C rounds towards 0, and would still find a place for it
            raise fail(op, "the kernel, dilated, is larger than the padded input", **operands)
        out.append((room - need) // s + 1)
    return tuple(out)


def check_types(op: str, kernel: Tensor, x: Tensor, kernels: Sequence[Type], inputs: Sequence[Type]) -> None:
    """Raise ``ValueError`` unless the types are among those."""
    for name, t, allowed in (("kernel", kernel, kernels), ("x", x, inputs)):
        if t.dtype not in allowed:
            raise fail(op, f"{name} must be {' or '.join(k.name for k in allowed)}", kernel=kernel, x=x)


def check_sizes(op: str, **operands: Tensor) -> None:
    """Raise ``ValueError`` for operands without elements, or with more than the kernels can count."""
    for name, t in operands.items():
        if not t.size:
            raise fail(op, f"{name} has no elements", **operands)
        if t.size > INT_MAX:
            raise fail(op, f"{name} has 2**31 elements or more", **operands)


def check_groups(op: str, what: str, n: int, each: int = 1) -> None:
    """Raise ``ValueError`` if a GPU could not start work for ``n`` items, ``each`` of them in a group."""
    if n > GROUPS * each:
        raise ValueError(f"{op}: {what}: at most {GROUPS * each}, not {n}")


def check_start(op: str, **operands: Tensor) -> None:
    """Raise ``ValueError`` for views that start where ggml's Vulkan kernels would end the process."""
    for name, t in operands.items():
        pointer = t.ptr
        if pointer.view_src and pointer.view_offs % _START:
            raise fail(
                op, f"{name} starts inside another tensor, at no multiple of {_START} bytes (use cont)", **operands
            )


def is_contiguous(t: Tensor) -> bool:
    """Contiguous, and also to kernels that look at the stride of a single element."""
    return contiguous_rows(t) and t.is_contiguous


# ---------------------------------------------------------------------- convolutions


def window_of(op: str, n: int, stride: Ints, padding: Ints, dilation: Ints) -> Window:
    """Stride, padding and dilation of ``n`` axes, in ggml's order."""
    return (
        integers(op, "stride", stride, n, 1),
        integers(op, "padding", padding, n, 0, 2**30 - 1),  # C doubles it
        integers(op, "dilation", dilation, n, 1),
    )


def check_channels(op: str, kernel: Tensor, x: Tensor, n: int) -> None:
    """Raise ``ValueError`` unless a kernel of ``n`` axes has as many channels as ``x``."""
    if kernel.ne[n] != x.ne[n]:
        raise fail(op, f"the kernel has {kernel.ne[n]} channels, x {x.ne[n]}", kernel=kernel, x=x)


def check_depthwise(op: str, kernel: Tensor, x: Tensor) -> None:
    """Raise ``ValueError`` unless there is one kernel for each channel of ``x``."""
    check_sizes(op, kernel=kernel, x=x)
    check_start(op, kernel=kernel, x=x)
    if kernel.ne[2:] != (1, x.ne[2]):
        raise fail(op, f"the kernel must be ({x.ne[2]}, 1, kh, kw), one for each channel", kernel=kernel, x=x)


def gather(op: str, kernel: Tensor, x: Tensor, window: Window, to: Type) -> tuple[int, ...]:
    """What the gathering of windows of one or two axes asks for; how many there are, in ggml's order."""
    n = len(window[0])
    check_sizes(op, kernel=kernel, x=x)
    check_channels(op, kernel, x, n)
    if n == 1 and x.ne[3] != 1:
        raise fail(op, "x must have three axes at most", kernel=kernel, x=x)
    # The CPU walks by element inside an image, and by an int of bytes from one to the next.
    if not contiguous_rows(x) or (n == 2 and x.ne[1] > 1 and x.nb[1] != x.ne[0] * type_size(x.dtype)):
        what = "images" if n == 2 else "rows"
        raise fail(op, f"the {what} of x must be contiguous (use cont)", kernel=kernel, x=x)
    if max(x.nb[n : n + 2]) > INT_MAX:
        raise fail(op, "x has 2**31 bytes or more from one channel or batch to the next", kernel=kernel, x=x)
    check_start(op, kernel=kernel)
    if x.is_contiguous:  # otherwise it is the CPU's
        check_start(op, x=x)
    out = slide(op, kernel.ne, x.ne, window, kernel=kernel, x=x)
    row = prod(kernel.ne[: n + 1])
    check_result(op, (row, *out, x.ne[n + 1]), to)
    check_groups(op, "elements of a window", row, 512)
    return out


def check_volumes(op: str, kernel: Tensor, x: Tensor, channels: int, window: Window) -> tuple[int, ...]:
    """What convolutions of three axes ask for; how many windows there are, in ggml's order."""
    if kernel.ne[3] % channels or x.ne[3] % channels:
        raise fail(op, f"the first sizes must be multiples of the {channels} channels", kernel=kernel, x=x)
    check_sizes(op, kernel=kernel, x=x)
    check_start(op, kernel=kernel, x=x)
    if not contiguous_rows(x):
        raise fail(op, "the rows of x must be contiguous (use cont)", kernel=kernel, x=x)
    return slide(op, kernel.ne, x.ne, window, kernel=kernel, x=x)


def gather_3d(op: str, kernel: Tensor, x: Tensor, channels: int, window: Window, to: Type) -> tuple[int, ...]:
    """As :func:`gather`, of three axes."""
    if x.dtype is not Type.F32:
        raise fail(op, "x must be F32", kernel=kernel, x=x)
    out = check_volumes(op, kernel, x, channels, window)
    n, row = x.ne[3] // channels, prod(kernel.ne[:3]) * channels
    check_result(op, (row, *out[:2], out[2] * n), to)
    check_groups(op, "elements of a window", row, 512)
    check_groups(op, "windows along the last axis", out[0])
    if max(row * prod(out), out[1] * out[2] * n) > INT_MAX:
        raise fail(op, "the windows of a volume have 2**31 elements or more", kernel=kernel, x=x)
    return out
