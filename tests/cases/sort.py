"""Order of the elements in rows."""

from __future__ import annotations

import numpy as np

import ggml_cffi as ggml
from ggml_cffi.enums import SortOrder
from tests.cases import Array, In, case, reference


@reference
def argsort(a: Array, order: SortOrder = SortOrder.ASC) -> Array:
    return np.argsort(a if order is SortOrder.ASC else -a, axis=-1)


@reference
def argsort_top_k(a: Array, k: int) -> Array:
    return np.argsort(-a, axis=-1)[..., :k]


@reference
def top_k(a: Array, k: int) -> Array:
    return np.argsort(-a, axis=-1)[..., :k]


NEGATIVE = (-4.0, -1.0)

CASES = [
    case("argsort", a=In((33,))),
    case("argsort", a=In((4, 64)), order=SortOrder.DESC),
    case("argsort", a=In((2, 3, 2, 5))),
    case("argsort", a=In((2, 1500)), order=SortOrder.DESC),
    case("argsort_top_k", a=In((33,)), k=1),
    case("argsort_top_k", a=In((5, 8)), k=3),
    case("argsort_top_k", a=In((2, 3, 7), values=NEGATIVE), k=7),
    case("top_k", a=In((33,)), k=4),
    case("top_k", a=In((5, 64), values=NEGATIVE), k=1),
    case("top_k", a=In((2, 3, 7)), k=7),
    case("top_k", a=In((2, 3000)), k=10),
]

WRONG = {
    "argsort: a must be contiguous F32": lambda t: ggml.argsort(t(4, dtype="i32")),
    "argsort: a must be contiguous F32 (use cont): a (5, 4)": lambda t: ggml.argsort(ggml.transpose(t(4, 5))),
    "argsort: rows of 2097153 elements are too long": lambda t: ggml.argsort(t(2**21 + 1)),
    "2 is not a valid SortOrder": lambda t: ggml.argsort(t(4), 2),
    "argsort_top_k: k must be 1 to 4, not 5": lambda t: ggml.argsort_top_k(t(4), 5),
    "argsort_top_k: the rows of a are empty": lambda t: ggml.argsort_top_k(t(3, 0), 1),
    "top_k: k must be 1 to 4, not 0": lambda t: ggml.top_k(t(4), 0),
    "top_k: k must be an integer, not True": lambda t: ggml.top_k(t(4), True),
    "top_k: a must be contiguous F32": lambda t: ggml.top_k(t(4, dtype="f16"), 1),
}
