"""Sums, means, and the position of the largest element."""

from __future__ import annotations

import numpy as np

import ggml_cffi as ggml
from tests.cases import Array, In, case, reference


@reference
def sum(a: Array) -> Array:  # noqa: A001 - named as the operation
    return np.sum(a)


@reference
def sum_rows(a: Array) -> Array:
    return a.sum(-1, keepdims=True)


@reference
def mean(a: Array) -> Array:
    return a.mean(-1, keepdims=True)


@reference
def cumsum(a: Array) -> Array:
    return a.cumsum(-1)


@reference
def argmax(a: Array) -> Array:
    return a.argmax(-1)


CASES = [
    *(
        case(op, a=In(shape, layout="contiguous" if op == "sum" else layout, values=(-1, 2)))
        for op in ("sum", "sum_rows", "mean", "cumsum")
        for shape, layout in (
            ((33,), "contiguous"),
            ((4, 64), "gaps"),
            ((2, 3, 2, 17), "contiguous"),
            ((2, 3, 4, 5), "permuted"),
        )
    ),
    case("argmax", a=In((12,))),
    case("argmax", a=In((7, 33))),
    case("argmax", a=In((5, 1))),
    case("argmax", a=In((3, 65), layout="gaps")),
]

WRONG = {
    "sum: a must be F32": lambda t: ggml.sum(t(4, dtype="f16")),
    "sum: a must be F32 and contiguous": lambda t: ggml.sum(ggml.view(t(3, 4), (3, 2), strides=(16, 4))),
    "mean: a must be F32": lambda t: ggml.mean(ggml.transpose(t(4, 5))),
    "cumsum: a must be F32": lambda t: ggml.cumsum(t(4, dtype="i32")),
    "argmax: a must be an F32 matrix": lambda t: ggml.argmax(t(2, 3, 4)),
    "argmax: a must be an F32 matrix with contiguous rows that are not empty": lambda t: ggml.argmax(t(2, 0)),
}
