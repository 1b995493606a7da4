"""Rows by number."""

from __future__ import annotations

import numpy as np

import ggml_cffi as ggml
from ggml_cffi import Type
from tests.cases import Array, In, case, reference


@reference
def get_rows(a: Array, rows: Array) -> Array:
    if rows.ndim == 1:
        return a[rows]
    return np.array([get_rows(matrix, numbers) for matrix, numbers in zip(a, rows, strict=True)])


@reference
def set_rows(a: Array, b: Array, rows: Array) -> Array:
    out = a.copy()
    numbers = (
        np.broadcast_to(rows, b.shape[:-1])
        if rows.ndim == 1
        else np.tile(
            rows, [m // n for m, n in zip(b.shape[:-1], (1,) * (b.ndim - 1 - rows.ndim) + rows.shape, strict=True)]
        )
    )
    for place in np.ndindex(b.shape[:-1]):
        out[(*place[:-1], numbers[place])] = b[place]
    return out


@reference
def add_id(a: Array, b: Array, ids: Array) -> Array:
    return a + b[ids]


I32, I64 = Type.I32, Type.I64
NUMBERS = np.array([6, 1, 2])

CASES = [
    case("get_rows", a=In((10, 64)), rows=In((4,), I32, values=10)),
    case("get_rows", a=In((10, 64), Type.F16, "gaps"), rows=In((7,), I32, values=10)),
    case("get_rows", a=In((3, 256), Type.BF16), rows=In((1,), I32, values=3)),
    case("get_rows", a=In((10, 64), Type.Q8_0), rows=In((4,), I32, values=10)),
    case("get_rows", a=In((5, 256), Type.Q4_K), rows=In((4,), I32, values=5)),
    case("get_rows", a=In((10, 7), I32, values=1000), rows=In((4,), I32, values=10)),
    case("get_rows", a=In((2, 10, 5), layout="permuted"), rows=In((2, 4), I32, values=10)),
    case("get_rows", a=In((3, 2, 6, 5)), rows=In((3, 2, 4), I32, values=6)),
    case("set_rows", a=In((8, 32)), b=In((3, 32)), rows=In((3,), I64, values=NUMBERS)),
    case("set_rows", a=In((8, 33), Type.F16), b=In((3, 33), layout="gaps"), rows=In((3,), I32, values=NUMBERS)),
    case("set_rows", a=In((2, 8, 5), layout="permuted"), b=In((2, 3, 5)), rows=In((3,), I64, values=NUMBERS)),
    case(
        "set_rows",
        a=In((4, 8, 32), Type.BF16),
        b=In((4, 3, 32)),
        rows=In((2, 3), I64, values=np.stack([NUMBERS, NUMBERS + 1])),
    ),
    case("set_rows", a=In((8, 32)), b=In((3, 32), Type.F16), rows=In((3,), I64, values=NUMBERS)),
    case("set_rows", a=In((8, 64), Type.Q8_0), b=In((3, 64)), rows=In((3,), I64, values=NUMBERS)),
    case("set_rows", 0.1, a=In((8, 32), Type.Q4_0), b=In((3, 32)), rows=In((3,), I64, values=NUMBERS)),  # 4 bits
    case("add_id", a=In((3, 2, 33)), b=In((5, 33)), ids=In((3, 2), I32, values=5)),
    case("add_id", a=In((4, 8), layout="gaps"), b=In((3, 8), layout="gaps"), ids=In((4,), I32, values=3)),
    case("add_id", a=In((3, 2, 5), layout="permuted"), b=In((1, 5)), ids=In((3, 2), I32, values=1)),
]


def i32(t, *shape):  # type: ignore[no-untyped-def]
    return t(*shape, dtype="i32")


WRONG = {
    "get_rows: rows must be I32": lambda t: ggml.get_rows(t(4, 4), t(2)),
    "get_rows: the leading sizes": lambda t: ggml.get_rows(t(2, 4, 4), i32(t, 2)),
    "get_rows: a has no rows": lambda t: ggml.get_rows(t(0, 4), i32(t, 2)),
    "get_rows: a must be a float, quantized or I32": lambda t: ggml.get_rows(ggml.transpose(t(4, 5)), i32(t, 2)),
    "get_rows: row numbers must be an input tensor": lambda t: ggml.get_rows(t(4, 4), ggml.top_k(t(4), 2)),
    "get_rows: positions in rows of 5 exceed the 4 rows": lambda t: ggml.get_rows(t(4, 4), ggml.argsort(t(5))),
    "set_rows: a and b differ": lambda t: ggml.set_rows(t(4, 4), t(2, 5), t(2, dtype="i64")),
    "set_rows: one row number per row": lambda t: ggml.set_rows(t(4, 4), t(2, 4), t(3, dtype="i64")),
    "set_rows: b must be F32": lambda t: ggml.set_rows(t(4, 4), t(2, 4, dtype="bf16"), t(2, dtype="i64")),
    "set_rows: a and b must have contiguous rows": lambda t: ggml.set_rows(
        t(4, 4), ggml.transpose(t(4, 2)), t(2, dtype="i64")
    ),
    "set_rows: ggml cannot convert rows to IQ1_S": lambda t: ggml.set_rows(
        t(4, 256, dtype="iq1_s"), t(2, 256), t(2, dtype="i64")
    ),
    "set_rows: ggml cannot convert rows to I32": lambda t: ggml.set_rows(i32(t, 4, 4), t(2, 4), i32(t, 2)),
    "add_id: a and b must be F32 and ids I32": lambda t: ggml.add_id(t(2, 4), t(3, 4), t(2)),
    "add_id: ids must name a row of b for each row of a": lambda t: ggml.add_id(t(2, 4), t(3, 4), i32(t, 3)),
    "add_id: the rows of a, b and ids must be contiguous": lambda t: ggml.add_id(
        ggml.transpose(t(4, 2)), t(3, 4), i32(t, 2)
    ),
    "add_id: a has more than 65535 tokens": lambda t: ggml.add_id(t(65536, 1, 4), t(3, 4), i32(t, 65536, 1)),
    "add_id: row numbers must be an input tensor": lambda t: ggml.add_id(t(2, 4), t(3, 4), ggml.top_k(t(4), 2)),
}
