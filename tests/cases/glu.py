"""Gated linear units."""

from __future__ import annotations

import numpy as np

import ggml_cffi as ggml
from ggml_cffi import Type
from tests.cases import Array, In, case, reference
from tests.cases.unary import gelu, gelu_erf, gelu_quick, relu, sigmoid, silu


def halves(a: Array) -> tuple[Array, Array]:
    n = a.shape[-1] // 2
    return a[..., :n], a[..., n:]


@reference
def reglu(a: Array) -> Array:
    x, y = halves(a)
    return relu(x) * y


@reference
def reglu_swapped(a: Array) -> Array:
    x, y = halves(a)
    return x * relu(y)


@reference
def reglu_split(x: Array, y: Array) -> Array:
    return relu(x) * y


@reference
def geglu(a: Array) -> Array:
    x, y = halves(a)
    return gelu(x) * y


@reference
def geglu_swapped(a: Array) -> Array:
    x, y = halves(a)
    return x * gelu(y)


@reference
def geglu_split(x: Array, y: Array) -> Array:
    return gelu(x) * y


@reference
def swiglu(a: Array) -> Array:
    x, y = halves(a)
    return silu(x) * y


@reference
def swiglu_swapped(a: Array) -> Array:
    x, y = halves(a)
    return x * silu(y)


@reference
def swiglu_split(x: Array, y: Array) -> Array:
    return silu(x) * y


@reference
def geglu_erf(a: Array) -> Array:
    x, y = halves(a)
    return gelu_erf(x) * y


@reference
def geglu_erf_swapped(a: Array) -> Array:
    x, y = halves(a)
    return x * gelu_erf(y)


@reference
def geglu_erf_split(x: Array, y: Array) -> Array:
    return gelu_erf(x) * y


@reference
def geglu_quick(a: Array) -> Array:
    x, y = halves(a)
    return gelu_quick(x) * y


@reference
def geglu_quick_swapped(a: Array) -> Array:
    x, y = halves(a)
    return x * gelu_quick(y)


@reference
def geglu_quick_split(x: Array, y: Array) -> Array:
    return gelu_quick(x) * y


@reference
def swiglu_oai(x: Array, y: Array, alpha: float, limit: float) -> Array:
    low = np.minimum(x, limit)
    return low * sigmoid(alpha * low) * (1 + np.clip(y, -limit, limit))


@reference
def swiglu_clamp(x: Array, y: Array, limit: float) -> Array:
    return silu(np.minimum(x, limit)) * np.clip(y, -limit, limit)


F16 = Type.F16
# The CPU reads GELU from a table of half-precision values.
CASES = [
    *(
        case(f"{op}{form}", tolerance, **{name: In(shape, dtype, layout) for name in names})
        for op, tolerance in (
            ("reglu", None),
            ("geglu", 2e-3),
            ("swiglu", None),
            ("geglu_erf", 2e-3),
            ("geglu_quick", 2e-3),
        )
        for form, names in (("", "a"), ("_swapped", "a"), ("_split", "xy"))
        for shape, dtype, layout in (
            ((66,), Type.F32, "contiguous"),
            ((2, 3, 10), Type.F32, "gaps"),
            ((4, 32), F16, "contiguous"),
            ((2, 3, 14), Type.BF16, "gaps"),
        )
    ),
    case("swiglu_oai", x=In((2, 32), values=(-6, 6)), y=In((2, 32), values=(-6, 6)), alpha=1.7, limit=2.0),
    case("swiglu_oai", x=In((7,)), y=In((7,)), alpha=1.0, limit=7.0),
    case("swiglu_oai", x=In((2, 3, 5), layout="gaps"), y=In((2, 3, 5)), alpha=-1.0, limit=0.5),
    case("swiglu_oai", x=In((4, 32), F16), y=In((4, 32), F16), alpha=1.7, limit=0.5),
    case("swiglu_oai", x=In((2, 3, 5), F16, "gaps"), y=In((2, 3, 5), F16), alpha=-1.0, limit=7.0),
    case("swiglu_clamp", x=In((2, 32), values=(-6, 6)), y=In((2, 32), values=(-6, 6)), limit=2.0),
    case("swiglu_clamp", x=In((2, 3, 5), layout="gaps"), y=In((2, 3, 5), layout="gaps"), limit=0.5),
    case("swiglu_clamp", x=In((4, 32), F16), y=In((4, 32), F16), limit=0.0),
]

WRONG = {
    "swiglu_split: x and y must be floats of one type and shape": lambda t: ggml.swiglu_split(t(4), t(5)),
    "reglu_split: x and y must be floats of one type": lambda t: ggml.reglu_split(t(4), t(4, dtype="f16")),
    "swiglu_split: x and y must be contiguous": lambda t: ggml.swiglu_split(
        ggml.transpose(t(4, 5)), ggml.transpose(t(4, 5))
    ),
    "swiglu: a must be a float with an even last size": lambda t: ggml.swiglu(t(5)),
    "geglu_erf: a must be a float": lambda t: ggml.geglu_erf(t(4, dtype="i32")),
    "swiglu: a must be contiguous": lambda t: ggml.swiglu(ggml.transpose(t(4, 6))),
    "swiglu_oai: x and y must be F32 or F16": lambda t: ggml.swiglu_oai(t(4, dtype="bf16"), t(4, dtype="bf16"), 1, 1),
    "swiglu_clamp: x and y must be floats of one type and shape": lambda t: ggml.swiglu_clamp(t(4), t(5), 1.0),
    "swiglu_clamp: x and y must be F32 or F16": lambda t: ggml.swiglu_clamp(
        t(4, dtype="bf16"), t(4, dtype="bf16"), 1.0
    ),
    "swiglu_clamp: limit must be": lambda t: ggml.swiglu_clamp(t(4), t(4), -1.0),
    "swiglu_oai: limit must be a finite": lambda t: ggml.swiglu_oai(t(4), t(4), 1, float("nan")),
}
