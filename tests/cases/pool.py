"""Pooling."""

from __future__ import annotations

from math import ceil, floor
from typing import Any

import numpy as np

import ggml_cffi as ggml
from ggml_cffi.enums import OpPool
from tests.cases import Array, In, case, reference
from tests.cases.im2col import F16, each

MAX, AVG = OpPool.MAX, OpPool.AVG


def corners(size: int, k: int, s: int, p: float) -> list[tuple[int, int]]:
    """Return start and end of each window; half an element of padding is one element at the end."""
    return [(at, at + k) for at in range(-floor(p), size + ceil(p) - k + 1, s)]


@reference
def pool_1d(a: Array, pool: OpPool, kernel: int, stride: int | None = None, padding: int = 0) -> Array:
    parts = [
        a[..., max(i, 0) : j] for i, j in corners(a.shape[-1], kernel, kernel if stride is None else stride, padding)
    ]
    return np.stack([part.max(-1) if pool is MAX else part.mean(-1) for part in parts], -1)


def boxes(shape: tuple[int, ...], kernel: Any, stride: Any, padding: Any) -> list[tuple[int, int, slice, slice]]:
    """Yield row, column and elements of each window of the last two axes."""
    k = each(kernel, 2)
    s, p = k if stride is None else each(stride, 2), each(padding, 2)
    rows, columns = (corners(shape[i - 2], k[i], s[i], p[i]) for i in (0, 1))
    return [
        (i, j, slice(max(top, 0), bottom), slice(max(left, 0), right))
        for i, (top, bottom) in enumerate(rows)
        for j, (left, right) in enumerate(columns)
    ]


@reference
def pool_2d(a: Array, pool: OpPool, kernel: Any, stride: Any = None, padding: Any = 0) -> Array:
    found = boxes(a.shape, kernel, stride, padding)
    out = np.empty((*a.shape[:-2], found[-1][0] + 1, found[-1][1] + 1))
    for i, j, down, across in found:
        part = a[..., down, across]
        out[..., i, j] = part.max((-2, -1)) if pool is MAX else part.sum((-2, -1)) / np.prod(each(kernel, 2))
    return out


@reference
def pool_2d_back(a: Array, af: Array, pool: OpPool, kernel: Any, stride: Any = None, padding: Any = 0) -> Array:
    out = np.zeros(af.shape)
    for i, j, down, across in boxes(af.shape, kernel, stride, padding):
        for lead in np.ndindex(*af.shape[:-2]):
            part, to = af[lead][down, across], out[lead][down, across]
            if pool is MAX:
                to[np.unravel_index(part.argmax(), part.shape)] += a[(*lead, i, j)]
            else:
                to += a[(*lead, i, j)] / np.prod(each(kernel, 2))
    return out


CASES = [
    case("pool_1d", a=In((10,)), pool=MAX, kernel=2),
    case("pool_1d", a=In((2, 3, 11)), pool=AVG, kernel=4, stride=3, padding=2),
    case("pool_1d", a=In((2, 1, 2, 7)), pool=MAX, kernel=3, stride=1, padding=1),
    case("pool_1d", a=In((3, 9), F16), pool=AVG, kernel=9),
    case("pool_2d", a=In((3, 6, 8)), pool=MAX, kernel=2),
    case("pool_2d", a=In((2, 3, 7, 9)), pool=AVG, kernel=(3, 2), stride=(2, 3), padding=(1, 0)),
    case("pool_2d", a=In((2, 13, 13)), pool=MAX, kernel=2, stride=1, padding=0.5),
    case("pool_2d", a=In((1, 2, 5, 6), F16), pool=MAX, kernel=(2, 3), stride=2, padding=(0.5, 1)),
    case("pool_2d", a=In((4, 5)), pool=AVG, kernel=2, stride=1, padding=(0, 0.5)),
    case("pool_2d_back", a=In((3, 3, 4)), af=In((3, 6, 8)), pool=MAX, kernel=2),
    case(
        "pool_2d_back", a=In((2, 3, 4, 3)), af=In((2, 3, 7, 9)), pool=AVG, kernel=(3, 2), stride=(2, 3), padding=(1, 0)
    ),
    case("pool_2d_back", a=In((5, 6)), af=In((5, 6)), pool=MAX, kernel=2, stride=1, padding=0.5),
]

WRONG = {
    "pool_1d: the window is larger than": lambda t: ggml.pool_1d(t(3), MAX, 4),
    "pool_1d: kernel must be 1 to": lambda t: ggml.pool_1d(t(3), MAX, 0),
    "pool_1d: stride must be 1 to": lambda t: ggml.pool_1d(t(3), MAX, 2, 0),
    "pool_1d: padding must be an integer": lambda t: ggml.pool_1d(t(3), MAX, 2, 1, 0.5),
    "pool_1d: padding 2 would give windows of 2 that hold padding only": lambda t: ggml.pool_1d(t(3), MAX, 2, 1, 2),
    "pool_1d: OpPool has no member 2": lambda t: ggml.pool_1d(t(3), 2, 2),
    "pool_1d: a member of OpPool is needed, not 'max'": lambda t: ggml.pool_1d(t(3), "max", 2),
    "pool_1d: a must be contiguous F32 or F16": lambda t: ggml.pool_1d(ggml.transpose(t(3, 4)), AVG, 2),
    "pool_1d: a has no elements": lambda t: ggml.pool_1d(t(0), AVG, 2),
    "pool_1d: axes and windows must be at most": lambda t: ggml.pool_1d(t(2**22 + 1), AVG, 2),
    "pool_1d: elements of the result": lambda t: ggml.pool_1d(t(2**14, 2**12), AVG, 1),
    "pool_2d: padding must be whole or half": lambda t: ggml.pool_2d(t(3, 3), MAX, 2, padding=0.25),
    "pool_2d: padding 0.5 would give windows of 1 that hold padding only": lambda t: ggml.pool_2d(
        t(3, 3), MAX, 1, padding=0.5
    ),
    "pool_2d: padding must be a finite number": lambda t: ggml.pool_2d(t(3, 3), MAX, 2, padding=float("nan")),
    "pool_2d: padding takes a number, or 2": lambda t: ggml.pool_2d(t(3, 3), MAX, 2, padding=(1, 1, 1)),
    "pool_2d: stride must be one integer or 2 integers": lambda t: ggml.pool_2d(t(3, 3), MAX, 2, (1,)),
    "pool_2d: a must be contiguous F32 or F16": lambda t: ggml.pool_2d(t(3, 3, dtype="bf16"), MAX, 2),
    "pool_2d: the window is larger than": lambda t: ggml.pool_2d(t(3, 3), MAX, (2, 4)),
    "pool_2d: a starts inside another": lambda t: ggml.pool_2d(ggml.view(t(4, 3), (3, 3), offset=12), MAX, 2),
    "pool_2d_back: af is pooled to (1, 1, 1, 2)": lambda t: ggml.pool_2d_back(t(1, 3), t(2, 4), MAX, 2),
    "pool_2d_back: a and af must be contiguous F32": lambda t: ggml.pool_2d_back(t(1, 2), t(2, 4, dtype="f16"), MAX, 2),
}
