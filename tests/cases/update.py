"""Copies, and writes over a part of a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import ggml_cffi as ggml
from ggml_cffi import Type
from tests.cases import Array, In, case, reference


def part(a: Array, b: Array, strides: Sequence[int] | None, offset: int) -> tuple[Array, Array]:
    """Return a copy of ``a`` and the part for ``b``; ``strides`` and ``offset`` count bytes of F32."""
    out = np.array(a, np.float64)
    steps = out.strides[a.ndim - b.ndim :] if strides is None else [2 * s for s in strides]
    return out, np.ndarray(b.shape, out.dtype, out, 2 * offset, steps)


@reference
def acc(a: Array, b: Array, strides: Sequence[int] | None = None, offset: int = 0) -> Array:
    out, window = part(a, b, strides, offset)
    window += b
    return out


@reference
def set(a: Array, b: Array, strides: Sequence[int] | None = None, offset: int = 0) -> Array:  # noqa: A001 - named as the operation
    out, window = part(a, b, strides, offset)
    window[...] = b
    return out


@reference
def cpy(a: Array, b: Array) -> Array:
    return a.reshape(b.shape)


@reference
def dup(a: Array) -> Array:
    return a


F32, F16, BF16, I32, Q8_0 = Type.F32, Type.F16, Type.BF16, Type.I32, Type.Q8_0

CASES = [
    *(
        case(op, a=In(a), b=In(b, F32, layout), **where)
        for op in ("acc", "set")
        for a, b, layout, where in (
            ((3, 4, 5), (2, 3), "contiguous", {"offset": 8}),
            ((2, 3, 4, 5), (2, 1, 2, 5), "permuted", {"offset": 80}),
            ((24,), (2, 2, 3), "gaps", {"strides": (48, 16, 4), "offset": 4}),
            ((4, 6), (6,), "contiguous", {"offset": 72}),
            ((4, 6), (4, 6), "contiguous", {}),
        )
    ),
    case("set", a=In((4, 6), I32, values=9), b=In((2, 3), I32, "gaps", 9), offset=24),
    case("cpy", a=In((2, 3, 4)), b=In((2, 3, 4))),
    case("cpy", a=In((3, 8), layout="transposed"), b=In((4, 6), F16, "gaps")),
    case("cpy", a=In((5, 7), F16), b=In((5, 7), BF16)),
    case("cpy", a=In((2, 3, 4), BF16, "permuted"), b=In((24,))),
    case("cpy", a=In((5, 7), I32, "transposed", 99), b=In((5, 7), layout="gaps")),
    case("cpy", a=In((3, 64), Q8_0), b=In((3, 64), layout="gaps")),
    case("cpy", a=In((2, 3, 32), layout="permuted"), b=In((2, 3, 32), Q8_0)),
    case("cpy", 0.03, a=In((3, 256), F16, "gaps"), b=In((3, 256), Type.Q6_K)),  # 6 bits
    case("cpy", a=In((3, 64), Q8_0), b=In((3, 64), Q8_0)),
    case("dup", a=In((33,))),
    case("dup", a=In((2, 3, 4, 5), F16, "transposed")),
    case("dup", a=In((4, 6), BF16, "gaps")),
    case("dup", a=In((2, 3, 4), I32, "permuted", 9)),
    case("dup", a=In((3, 64), Q8_0)),
]


def overlapping(t):  # type: ignore[no-untyped-def]
    a = t(8)
    return ggml.view(a, (4,)), ggml.view(a, (4,), offset=8)


WRONG = {
    "acc: a and b must be F32": lambda t: ggml.acc(t(4), t(4, dtype="f16")),
    "acc: a and the rows of b must be contiguous": lambda t: ggml.acc(ggml.transpose(t(4, 5)), t(4)),
    "acc: b has no elements": lambda t: ggml.acc(t(4), t(0)),
    "acc: bytes 4 to 20 are not elements of a": lambda t: ggml.acc(t(4), t(4), offset=4),
    "acc: bytes 2 to 10 are not elements of a": lambda t: ggml.acc(t(4), t(2), offset=2),
    "acc: offset must be an integer, not 4.0": lambda t: ggml.acc(t(4), t(2), offset=4.0),
    "acc: offset must be 0 to 2147483647, not -4": lambda t: ggml.acc(t(4), t(2), offset=-4),
    "acc: strides (8,) do not fit the axes of b": lambda t: ggml.acc(t(4, 4), t(2, 2), strides=(8,)),
    "acc: strides (4, 4) mix the axes": lambda t: ggml.acc(t(4, 4), t(2, 2), strides=(4, 4)),
    "acc: strides (10, 4) mix the axes": lambda t: ggml.acc(t(4, 4), t(2, 2), strides=(10, 4)),
    "acc: the last axis must be contiguous": lambda t: ggml.acc(t(4, 4), t(2, 2), strides=(16, 8)),
    "acc: strides must be an integer, not None": lambda t: ggml.acc(t(4, 4), t(2, 2), strides=(None, 4)),
    "acc: a has more than 33553920 elements": lambda t: ggml.acc(t(33553921), t(2)),
    "acc_inplace: a and b overlap in memory": lambda t: ggml.acc_inplace(*overlapping(t)),
    "set: a and b must both be F32 or both I32": lambda t: ggml.set(t(4), t(4, dtype="i32")),
    "set: offset must be 0 to 1073741823": lambda t: ggml.set(t(4), t(4), offset=2**30),
    "set_inplace: integers, which may be checked row numbers, cannot be written in place": lambda t: ggml.set_inplace(
        t(4, dtype="i32"), t(2, dtype="i32")
    ),
    "cpy: a and b differ in their number of elements": lambda t: ggml.cpy(t(4), t(5)),
    "cpy: a and b overlap in memory": lambda t: ggml.cpy(*overlapping(t)),
    "cpy: integers, which may be checked row numbers, cannot be written in place": lambda t: ggml.cpy(
        t(4), t(4, dtype="i32")
    ),
    "cpy: ggml has no such conversion": lambda t: ggml.cpy(t(4, dtype="i32"), t(4, dtype="f16")),
    "cpy: ggml has no such conversion: a (256,) F32 · b (256,) IQ2_XXS": lambda t: ggml.cpy(
        t(256), t(256, dtype="iq2_xxs")
    ),
    "cpy: ggml has no such conversion: a (32,) Q8_0 · b (32,) F16": lambda t: ggml.cpy(
        t(32, dtype="q8_0"), t(32, dtype="f16")
    ),
    "cpy: quantized tensors are copied to and from tensors of the same shape": lambda t: ggml.cpy(
        t(2, 32), t(64, dtype="q8_0")
    ),
    "cpy: quantized tensors, and the rows of": lambda t: ggml.cpy(ggml.transpose(t(32, 2)), t(2, 32, dtype="q8_0")),
    "dup: a must be F32": lambda t: ggml.dup(t(4, dtype="i64")),
    "dup_inplace: a must be F32, F16, BF16 or I32": lambda t: ggml.dup_inplace(t(4, dtype="f64")),
}
