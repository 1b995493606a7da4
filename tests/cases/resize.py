"""Resampling, padding, shifting, triangles; ranges and constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import ggml_cffi as ggml
from ggml_cffi.enums import ScaleFlag, ScaleMode, TriType
from tests.cases import Array, In, case, reference
from tests.cases.im2col import F16

NEAREST, BILINEAR, BICUBIC = ScaleMode.NEAREST, ScaleMode.BILINEAR, ScaleMode.BICUBIC
CORNERS, ANTIALIAS = ScaleFlag.ALIGN_CORNERS, ScaleFlag.ANTIALIAS


def hat(x: Array) -> Array:
    return np.maximum(1 - np.abs(x), 0)


def cubic(x: Array, a: float = -0.75) -> Array:
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def resampling(old: int, new: int, mode: ScaleMode, flags: int) -> Array:
    """Return ``(new, old)``: the weight of each old element in each new one."""
    corners = bool(flags & CORNERS) and old > 1 and new > 1
    ratio = (old - 1) / (new - 1) if corners else old / new
    if mode is NEAREST:
        return np.eye(old)[np.floor(np.arange(new) * ratio + 1e-9).astype(int)]
    centre = 0.0 if flags & CORNERS else 0.5
    at = (np.arange(new) + centre) * ratio - centre
    if flags & ANTIALIAS:
        weights = hat((np.arange(old) - at[:, None]) / max(ratio, 1))
        return weights / weights.sum(1, keepdims=True)
    # Elements beyond an edge repeat the element at the edge.
    kernel: Callable[[Array], Array] = hat if mode is BILINEAR else cubic
    out = np.zeros((new, old))
    for i in range(-3, old + 3):
        out[:, min(max(i, 0), old - 1)] += kernel(at - i)
    return out


@reference
def interpolate(a: Array, shape: Sequence[int], mode: ScaleMode = NEAREST, flags: int = 0) -> Array:
    for axis, (old, new) in enumerate(zip(a.shape, shape, strict=True)):
        inside = axis >= a.ndim - 2
        weights = resampling(old, new, mode if inside else NEAREST, flags if inside else 0)
        a = np.moveaxis(np.tensordot(weights, a, (1, axis)), 0, axis)
    return a


@reference
def upscale(a: Array, factor: int, mode: ScaleMode = NEAREST) -> Array:
    return interpolate(a, (*a.shape[:-2], *(n * factor for n in a.shape[-2:])), mode)


@reference
def pad(a: Array, pad_width: Any) -> Array:
    return np.pad(a, pad_width)


@reference
def pad_circular(a: Array, pad_width: Any) -> Array:
    return np.pad(a, pad_width, mode="wrap")


@reference
def pad_reflect_1d(a: Array, pad_width: Any) -> Array:
    ends = (pad_width, pad_width) if isinstance(pad_width, int) else pad_width
    return np.pad(a, [*[(0, 0)] * (a.ndim - 1), ends], mode="reflect")


@reference
def roll(a: Array, shift: Any, axis: Any) -> Array:
    return np.roll(a, shift, axis)


@reference
def tri(a: Array, kind: TriType) -> Array:
    row, column = np.indices(a.shape[-2:])
    keep = {
        TriType.LOWER: column < row,
        TriType.LOWER_DIAG: column <= row,
        TriType.UPPER: column > row,
        TriType.UPPER_DIAG: column >= row,
    }
    return np.where(keep[kind], a, 0)


@reference
def fill(a: Array, value: float) -> Array:
    return np.full(a.shape, value)


@reference
def arange(start: float, stop: float | None = None, step: float = 1.0) -> Array:
    first, last = (np.float32(x) for x in ((0, start) if stop is None else (start, stop)))
    count = int(np.ceil((last - first) / np.float32(step)))  # in F32, as the docstring says
    return float(first) + np.arange(count) * float(np.float32(step))


@reference
def timestep_embedding(timesteps: Array, dim: int, max_period: int = 10000) -> Array:
    half = dim // 2
    angles = timesteps[:, None] * max_period ** (-np.arange(half) / half)
    return np.concatenate([np.cos(angles), np.sin(angles), np.zeros((len(timesteps), dim % 2))], 1)


CASES = [
    case("interpolate", a=In((2, 3, 4, 5)), shape=(2, 3, 8, 15)),
    case("interpolate", a=In((2, 8, 8)), shape=(4, 3, 20)),
    case("interpolate", a=In((3, 5), layout="transposed"), shape=(5, 9)),
    case("interpolate", a=In((2, 3, 4, 5)), shape=(2, 3, 7, 9), mode=BILINEAR),
    case("interpolate", a=In((3, 8, 9)), shape=(3, 3, 4), mode=BILINEAR),
    case("interpolate", a=In((2, 4, 5)), shape=(4, 7, 3), mode=BILINEAR, flags=CORNERS),
    case("interpolate", a=In((2, 11, 9)), shape=(2, 4, 5), mode=BILINEAR, flags=ANTIALIAS),
    case("interpolate", a=In((4, 5), layout="gaps"), shape=(9, 3), mode=BILINEAR, flags=ANTIALIAS),
    case("interpolate", a=In((2, 4, 5)), shape=(2, 10, 7), mode=BICUBIC),
    case("interpolate", a=In((1, 2, 6, 5), layout="permuted"), shape=(1, 2, 3, 11), mode=BICUBIC, flags=CORNERS),
    case("upscale", a=In((2, 3, 4, 5)), factor=2),
    case("upscale", a=In((3, 4)), factor=3, mode=BILINEAR),
    case("upscale", a=In((2, 4, 3), layout="transposed"), factor=2, mode=BICUBIC),
    case("pad", a=In((3, 5)), pad_width=2),
    case("pad", a=In((2, 3, 4, 5)), pad_width=((0, 1), (2, 0), (1, 1), (0, 3))),
    case("pad", a=In((3, 5), layout="transposed"), pad_width=(1, 2)),
    case("pad", a=In((2, 3, 5), layout="gaps"), pad_width=((0, 0), (0, 4), (3, 0))),
    case("pad_circular", a=In((3, 5)), pad_width=2),
    case("pad_circular", a=In((2, 3, 4, 5)), pad_width=((2, 1), (0, 7), (1, 1), (5, 11))),
    case("pad_circular", a=In((3, 5), layout="transposed"), pad_width=(1, 2)),
    case("pad_reflect_1d", a=In((3, 5)), pad_width=4),
    case("pad_reflect_1d", a=In((2, 3, 2, 7)), pad_width=(0, 3)),
    case("pad_reflect_1d", a=In((9,)), pad_width=(5, 1)),
    case("roll", a=In((7,)), shift=2, axis=0),
    case("roll", a=In((2, 3, 4, 5)), shift=(1, -2, 9, -12), axis=(0, 1, 2, -1)),
    case("roll", a=In((3, 4, 5), layout="gaps"), shift=1, axis=(1, 2)),
    case("roll", a=In((3, 4, 5), layout="permuted"), shift=(1, 1), axis=1),
    case("roll", a=In((2, 70000)), shift=-32767, axis=1),
    case("tri", a=In((5, 5)), kind=TriType.LOWER),
    case("tri", a=In((2, 3, 4, 4)), kind=TriType.LOWER_DIAG),
    case("tri", a=In((3, 33, 33)), kind=TriType.UPPER),
    case("tri", a=In((1, 6, 6)), kind=TriType.UPPER_DIAG),
    case("fill", a=In((3, 5)), value=-2.5),
    case("fill", a=In((2, 3, 4, 5), F16), value=0.1),
    case("fill", a=In((600,)), value=7),
    case("arange", start=5),
    case("arange", start=-1.5, stop=2.25, step=0.25),
    case("arange", start=10, stop=1000),
    case("timestep_embedding", timesteps=In((3,), values=(0, 10)), dim=8),
    case("timestep_embedding", timesteps=In((2,), values=(-5, 5)), dim=7, max_period=100),
    case("timestep_embedding", timesteps=In((5,), values=(0, 1)), dim=320),
]

WRONG = {
    "interpolate: (4, 4, 4) has a different number": lambda t: ggml.interpolate(t(2, 2), (4, 4, 4)),
    "interpolate: ALIGN_CORNERS has no meaning for NEAREST": lambda t: ggml.interpolate(t(2, 2), (4, 4), flags=CORNERS),
    "interpolate: ggml supports ANTIALIAS with BILINEAR": lambda t: ggml.interpolate(
        t(2, 2), (4, 4), BICUBIC, ANTIALIAS
    ),
    "interpolate: ggml's ANTIALIAS is wrong": lambda t: ggml.interpolate(
        t(2, 2), (4, 4), BILINEAR, ANTIALIAS | CORNERS
    ),
    "interpolate: ScaleMode has no member 3": lambda t: ggml.interpolate(t(2, 2), (4, 4), 3),
    "interpolate: flags must be of ScaleFlag": lambda t: ggml.interpolate(t(2, 2), (4, 4), BILINEAR, 1),
    "interpolate: a must be F32": lambda t: ggml.interpolate(t(2, 2, dtype="f16"), (4, 4)),
    "interpolate: sizes must be 1 to": lambda t: ggml.interpolate(t(2, 2), (4, 0)),
    "interpolate: the result would have 2**31": lambda t: ggml.interpolate(t(2, 2), (2**16, 2**16)),
    "interpolate: a has no elements": lambda t: ggml.interpolate(t(2, 0), (4, 4)),
    "upscale: factor must be 2 to": lambda t: ggml.upscale(t(2, 2), 1),
    "upscale: sizes must be 1 to": lambda t: ggml.upscale(t(2, 2), 2**31 - 1),
    "pad: pad_width must be 0 to": lambda t: ggml.pad(t(2, 2), -1),
    "pad: pad_width [(1, 1)] needs one pair per axis": lambda t: ggml.pad(t(2, 2), [(1, 1)]),
    "pad: pad_width is an integer or (before, after)": lambda t: ggml.pad(t(2, 2), (1, 2, 3)),
    "pad: a must be F32": lambda t: ggml.pad(t(2, 2, dtype="f16"), 1),
    "pad: the result would have 2**31": lambda t: ggml.pad(t(2, 2), (0, 2**16)),
    "pad_circular: the padding before an axis must not exceed": lambda t: ggml.pad_circular(t(2, 2), (3, 0)),
    "pad_circular: a has no elements": lambda t: ggml.pad_circular(t(2, 0), 1),
    "pad_circular: pad_width must be an integer": lambda t: ggml.pad_circular(t(2, 2), None),
    "pad_reflect_1d: the last axis must be longer": lambda t: ggml.pad_reflect_1d(t(2, 2), (0, 2)),
    "pad_reflect_1d: a must be contiguous F32": lambda t: ggml.pad_reflect_1d(ggml.transpose(t(4, 4)), 1),
    "roll: axis must be -2 to 1": lambda t: ggml.roll(t(2, 2), 1, 2),
    "roll: shift must be an integer": lambda t: ggml.roll(t(2, 2), 1.0, 0),
    "roll: 2 shifts for 3 axes": lambda t: ggml.roll(t(2, 2, 2), (1, 1), (0, 1, 2)),
    "roll: a shift by 32768 is more": lambda t: ggml.roll(t(70000), 32768, 0),
    "roll: the rows of a must be": lambda t: ggml.roll(ggml.transpose(t(2, 3)), 1, 0),
    "roll: a must be F32": lambda t: ggml.roll(t(2, 3, dtype="i32"), 1, 0),
    "roll: a has no elements": lambda t: ggml.roll(t(2, 0), 1, 0),
    "tri: a must be contiguous F32": lambda t: ggml.tri(t(2, 3), TriType.LOWER),
    "tri: TriType has no member 4": lambda t: ggml.tri(t(2, 2), 4),
    "fill: F16 cannot hold": lambda t: ggml.fill(t(2, dtype="f16"), 1e5),
    "fill: value must be a finite number": lambda t: ggml.fill(t(2), float("nan")),
    "fill: a must be contiguous F32 or F16": lambda t: ggml.fill(t(2, dtype="bf16"), 1),
    "fill: elements: at most 33553920": lambda t: ggml.fill(t(2**25), 1),
    "fill_inplace: a starts inside another": lambda t: ggml.fill_inplace(ggml.view(t(4), (2,), offset=8), 1),
    "arange: ctx is required": lambda t: ggml.arange(5, ctx=None),
    "arange: stop must be above start": lambda t: ggml.arange(5, 5, ctx=t(1).context),
    "arange: stop must be above start and step above 0, not 0.0, 5.0, 0": lambda t: ggml.arange(
        5, step=0, ctx=t(1).context
    ),
    "arange: the number of elements must be 1 to 33553920": lambda t: ggml.arange(1, step=1e-30, ctx=t(1).context),
    "arange: step must be a finite number": lambda t: ggml.arange(1, 2, float("inf"), ctx=t(1).context),
    "timestep_embedding: timesteps must be an F32 vector": lambda t: ggml.timestep_embedding(t(2, 2), 8),
    "timestep_embedding: dim must be 2": lambda t: ggml.timestep_embedding(t(2), 0),
    "timestep_embedding: max_period must be 1": lambda t: ggml.timestep_embedding(t(2), 8, 0),
    "timestep_embedding: times: at most 65535": lambda t: ggml.timestep_embedding(t(65536), 8),
}
