"""Operations written in Python: each function here doubles as its own reference."""

from __future__ import annotations

import numpy as np

from ggml_cffi import Type
from tests.cases import Array, In, case, reference


def cube(out: Array, a: Array) -> None:
    np.power(a, 3, out=out, casting="same_kind")


def product(out: Array, a: Array, b: Array) -> None:
    np.multiply(a, b, out=out, casting="same_kind")


def fused(out: Array, a: Array, b: Array, c: Array) -> None:
    out[...] = a * b.sum() + c.T


def by_parts(out: Array, a: Array, i: int, n: int) -> None:
    out[i::n] = 2 * a[i::n]


def table(out: Array, *operands: Array) -> None:
    out[...] = sum((x.sum() for x in operands), 1.0) * np.arange(out.size).reshape(out.shape)


def increase(a: Array, b: Array) -> None:
    a += b


@reference
def map_custom1(a: Array, function, n_tasks=1) -> Array:
    return 2 * a if function is by_parts else a**3


@reference
def map_custom2(a: Array, b: Array, function) -> Array:
    return a * b


@reference
def map_custom3(a: Array, b: Array, c: Array, function) -> Array:
    return a * b.sum() + c.T


@reference
def custom_4d(function, operands, shape, dtype=Type.F32) -> Array:
    return np.arange(np.prod(shape)).reshape(shape).astype(np.float64)


CASES = [
    case("map_custom1", a=In((3, 5)), function=cube),
    case("map_custom1", a=In((2, 3, 5), Type.F16), function=cube),
    case("map_custom1", a=In((3, 5), layout="transposed"), function=cube),
    case("map_custom1", a=In((17, 5)), function=by_parts, n_tasks=2),
    case("map_custom1", a=In((17, 5)), function=by_parts, n_tasks=None),
    case("map_custom2", a=In((3, 4)), b=In((3, 4), Type.F16, "gaps"), function=product),
    case("map_custom2", a=In((7,)), b=In((7,)), function=product),
    case("map_custom3", a=In((3, 4)), b=In((2, 2, 2)), c=In((4, 3)), function=fused),
    case("map_custom3", a=In((1, 6)), b=In((5,), values=(0, 1)), c=In((6, 1)), function=fused),
]

WRONG = {}
