"""Arithmetic."""

from __future__ import annotations

import numpy as np

import ggml_cffi as ggml
from ggml_cffi import Type
from tests.cases import Array, In, case, reference


def tiled(small: Array, big: Array) -> Array:
    """Repeat ``small`` up to the shape of ``big`` by ggml's rule: each size divides the other."""
    small = small.reshape((1,) * (big.ndim - small.ndim) + small.shape)
    return np.tile(small, [m // n if n else 0 for m, n in zip(big.shape, small.shape, strict=True)])


@reference
def add(a: Array, b: Array) -> Array:
    return a + tiled(b, a)


@reference
def sub(a: Array, b: Array) -> Array:
    return a - tiled(b, a)


@reference
def mul(a: Array, b: Array) -> Array:
    return a * tiled(b, a)


@reference
def div(a: Array, b: Array) -> Array:
    return a / tiled(b, a)


@reference
def add_cast(a: Array, b: Array, dtype: Type) -> Array:
    return a + tiled(b, a)


@reference
def scale(a: Array, factor: float) -> Array:
    return factor * a


@reference
def scale_bias(a: Array, factor: float, bias: float) -> Array:
    return factor * a + bias


F16, BF16, Q8_0, Q4_0 = Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0
AWAY_FROM_0 = (1.0, 2.0)

CASES = [
    *(
        case(op, a=In(a, dtype, layout), b=In(b, dtype_b, layout_b, AWAY_FROM_0))
        for op in ("add", "sub", "mul", "div")
        for a, dtype, layout, b, dtype_b, layout_b in (
            ((5,), Type.F32, "contiguous", (5,), Type.F32, "contiguous"),
            ((2, 3, 4, 5), Type.F32, "contiguous", (3, 1, 5), Type.F32, "contiguous"),
            ((4, 6), Type.F32, "gaps", (2, 3), Type.F32, "transposed"),
            ((3, 4, 6), Type.F32, "permuted", (6,), Type.F32, "contiguous"),
            ((3, 32), F16, "contiguous", (3, 32), F16, "gaps"),
            ((4, 32), F16, "contiguous", (2, 32), Type.F32, "contiguous"),
            ((4, 32), BF16, "contiguous", (1, 32), BF16, "contiguous"),
        )
    ),
    case("add", a=In((3, 64), Q8_0), b=In((3, 64))),
    # The sum is rounded to 4 bits.
    case("add", 0.1, a=In((2, 3, 32), Q4_0, "gaps"), b=In((2, 3, 32), layout="permuted")),
    case("add_cast", a=In((3, 32), F16), b=In((3, 32)), dtype=Type.F32),
    case("add_cast", a=In((4, 6, 8), BF16, "permuted"), b=In((2, 3, 8)), dtype=Type.F32),
    case("add_cast", a=In((5, 7), F16, "gaps"), b=In((7,), F16), dtype=F16),
    case("add_cast", a=In((3, 64), Q8_0), b=In((3, 64)), dtype=Type.F32),
    case("add_cast", 0.03, a=In((2, 2, 256), Q4_0), b=In((2, 2, 256)), dtype=Type.Q6_K),  # 6 bits
    case("add_cast", a=In((64,), Type.Q4_1), b=In((64,)), dtype=BF16),
    case("scale", a=In((33,)), factor=-2.5),
    case("scale", a=In((2, 3, 8)), factor=0),
    case("scale", a=In((3, 4, 5, 6)), factor=1e-3),
    case("scale", a=In((3, 32), Type.BF16), factor=0.75),
    case("scale_bias", a=In((33,)), factor=2.0, bias=-1.0),
    case("scale_bias", a=In((2, 3, 7), Type.BF16), factor=-0.5, bias=0.25),
    case("scale_bias", a=In((3, 32)), factor=0.0, bias=3),
    case("scale_bias", a=In((2, 3, 4, 5)), factor=-1.5, bias=0.0),
]

WRONG = {
    "add: b does not broadcast to a": lambda t: ggml.add(t(3, 4), t(2, 4)),
    "add: b does not broadcast": lambda t: ggml.add(t(4), t(3, 4)),
    "add: the rows of a must be contiguous": lambda t: ggml.add(ggml.transpose(t(8, 4)), t(8)),
    "add: the rows of a and b": lambda t: ggml.add(t(32, 32, dtype="q4_0"), ggml.transpose(t(32, 32))),
    "add: a quantized a takes an F32 b": lambda t: ggml.add(t(32, dtype="q4_0"), t(1)),
    "add: ggml cannot quantize the sum to IQ2_XXS": lambda t: ggml.add(t(256, dtype="iq2_xxs"), t(256)),
    "mul: types must be equal floats": lambda t: ggml.mul(t(4, dtype="i32"), t(4, dtype="i32")),
    "sub: types must be equal floats": lambda t: ggml.sub(t(4), t(4, dtype="f16")),
    "add_cast: a must be F16, BF16 or quantized": lambda t: ggml.add_cast(t(4), t(4), "f32"),
    "add_cast: a must be F16, BF16 or quantized; Q8_0": lambda t: ggml.add_cast(t(32, dtype="f16"), t(32), "q8_0"),
    "add_cast: b must be F32, or of a's type": lambda t: ggml.add_cast(t(4, dtype="f16"), t(4, dtype="f16"), "f32"),
    "add_cast: rows of b must be as long as a's": lambda t: ggml.add_cast(t(4, dtype="f16"), t(2), "f32"),
    "add_cast: the rows of a must be contiguous": lambda t: ggml.add_cast(
        ggml.transpose(t(2, 3, dtype="f16")), t(2), "f32"
    ),
    "add_cast: a quantized a takes": lambda t: ggml.add_cast(t(2, 32, dtype="q4_0"), t(32), "f32"),
    "add_cast: ggml cannot quantize the sum to I32": lambda t: ggml.add_cast(t(32, dtype="q4_0"), t(32), "i32"),
    "add_cast: ggml cannot quantize the sum to Q8_1": lambda t: ggml.add_cast(t(32, dtype="q4_0"), t(32), "q8_1"),
    "add_cast: rows of 32 elements do not fill whole blocks of Q4_K": lambda t: ggml.add_cast(
        t(32, dtype="q4_0"), t(32), "q4_k"
    ),
    "scale: a must be contiguous F32": lambda t: ggml.scale(ggml.transpose(t(4, 5)), 2.0),
    "scale_bias: a must be contiguous F32": lambda t: ggml.scale_bias(t(4, dtype="f16"), 1, 1),
    "scale_bias_inplace: a must be contiguous F32": lambda t: ggml.scale_bias_inplace(t(4, dtype="f16"), 1, 1),
    "scale_inplace: a must be contiguous F32": lambda t: ggml.scale_inplace(t(4, dtype="f16"), 1),
    "scale: factor must be a number, not '2'": lambda t: ggml.scale(t(4), "2"),
    "scale_bias: bias must be a finite number": lambda t: ggml.scale_bias(t(4), 1, float("nan")),
}
