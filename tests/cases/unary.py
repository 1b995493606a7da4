"""Functions of each element."""

from __future__ import annotations

import math

import numpy as np

import ggml_cffi as ggml
from ggml_cffi import Type
from tests.cases import Array, In, case, reference

erf = np.vectorize(math.erf, otypes=[float])


@reference
def abs(a: Array) -> Array:  # noqa: A001 - named as the operation
    return np.abs(a)


@reference
def ceil(a: Array) -> Array:
    return np.ceil(a)


@reference
def clamp(a: Array, low: float, high: float) -> Array:
    return np.minimum(np.maximum(a, low), high)


@reference
def cos(a: Array) -> Array:
    return np.cos(a)


@reference
def elu(a: Array) -> Array:
    return np.where(a > 0, a, np.expm1(a))


@reference
def exp(a: Array) -> Array:
    return np.exp(a)


@reference
def expm1(a: Array) -> Array:
    return np.expm1(a)


@reference
def floor(a: Array) -> Array:
    return np.floor(a)


@reference
def gelu(a: Array) -> Array:
    return a / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))


@reference
def gelu_erf(a: Array) -> Array:
    return a / 2 * (1 + erf(a / np.sqrt(2)))


@reference
def gelu_quick(a: Array) -> Array:
    return a * sigmoid(1.702 * a)


@reference
def hardsigmoid(a: Array) -> Array:
    return np.clip(a + 3, 0, 6) / 6


@reference
def hardswish(a: Array) -> Array:
    return a * np.clip(a + 3, 0, 6) / 6


@reference
def leaky_relu(a: Array, negative_slope: float = 0.01, inplace: bool = False) -> Array:
    return np.where(a > 0, a, negative_slope * a)


@reference
def log(a: Array) -> Array:
    return np.log(a)


@reference
def neg(a: Array) -> Array:
    return -a


@reference
def relu(a: Array) -> Array:
    return np.maximum(a, 0)


@reference
def round(a: Array) -> Array:  # noqa: A001 - named as the operation
    """Round halves away from zero."""
    return np.sign(a) * np.floor(np.abs(a) + 0.5)


@reference
def sgn(a: Array) -> Array:
    return np.sign(a)


@reference
def sigmoid(a: Array) -> Array:
    return 1 / (1 + np.exp(-a))


@reference
def silu(a: Array) -> Array:
    return a * sigmoid(a)


@reference
def sin(a: Array) -> Array:
    return np.sin(a)


@reference
def softplus(a: Array) -> Array:
    return np.log1p(np.exp(a))


@reference
def sqr(a: Array) -> Array:
    return a * a


@reference
def sqrt(a: Array) -> Array:
    return np.sqrt(a)


@reference
def step(a: Array) -> Array:
    return np.where(a > 0, 1.0, 0.0)


@reference
def tanh(a: Array) -> Array:
    return np.tanh(a)


@reference
def trunc(a: Array) -> Array:
    return np.trunc(a)


@reference
def xielu(a: Array, alpha_n: float, alpha_p: float, beta: float, eps: float) -> Array:
    positive, negative = np.log1p(np.exp(alpha_p)), beta + np.log1p(np.exp(alpha_n))
    return np.where(a > 0, positive * a * a + beta * a, (np.expm1(np.minimum(a, eps)) - a) * negative + beta * a)


F16, BF16 = Type.F16, Type.BF16
SMOOTH = ["cos", "elu", "exp", "expm1", "sgn", "sin", "softplus", "sqr", "tanh"]
STEPS = ["abs", "ceil", "floor", "hardsigmoid", "hardswish", "neg", "relu", "round", "sigmoid", "step", "trunc"]
POSITIVE = ["log", "sqrt"]
#: The CPU reads these from a table of half-precision values.
GELUS = ["gelu", "gelu_erf", "gelu_quick"]

CASES = [
    *(
        case(op, 1e-3 if op in GELUS and dtype is Type.F32 else None, a=In(shape, dtype, layout, values))
        for ops, values in ((SMOOTH + STEPS + GELUS + ["silu"], (-4, 4)), (POSITIVE, (0.1, 4)))
        for op in ops
        for shape, dtype, layout in (
            ((33,), Type.F32, "contiguous"),
            ((2, 3, 2, 17), Type.F32, "permuted"),
            ((3, 32), F16, "contiguous"),
            ((4, 31), F16, "gaps"),
            ((5, 7), BF16, "gaps"),
        )
    ),
    case("clamp", a=In((3, 32)), low=-0.5, high=1.0),
    case("clamp", a=In((2, 3, 5)), low=0, high=float("inf")),
    case("clamp", a=In((33,), F16), low=-float("inf"), high=0.25),
    case("clamp", a=In((2, 3, 2, 17), layout="permuted"), low=-0.5, high=0.5),
    case("clamp", a=In((4, 31), F16, "gaps"), low=-0.5, high=0.5),
    case("leaky_relu", a=In((2, 3, 17))),
    case("leaky_relu", a=In((33,), F16), negative_slope=0.5),
    case("leaky_relu", a=In((4, 8)), negative_slope=-1.0, inplace=True),
    case("xielu", a=In((33,)), alpha_n=0.2, alpha_p=0.7, beta=0.5, eps=-1e-6),
    case("xielu", a=In((2, 3, 5), F16), alpha_n=-1.0, alpha_p=2.0, beta=0.25, eps=-1e-6),
    case("xielu", a=In((4, 8)), alpha_n=3.0, alpha_p=0.0, beta=0.0, eps=-0.5),
]

NAN, INF = float("nan"), float("inf")
WRONG = {
    "relu: a must be one of BF16, F16, F32": lambda t: ggml.relu(t(4, dtype="i32")),
    "silu: a must be one of BF16, F16, F32": lambda t: ggml.silu(t(4, dtype="i32")),
    "gelu: a must be one of BF16, F16, F32": lambda t: ggml.gelu(t(4, dtype="i32")),
    "relu: the rows of a must be contiguous": lambda t: ggml.relu(ggml.transpose(t(4, 5))),
    "leaky_relu: a must be contiguous F32 or F16": lambda t: ggml.leaky_relu(ggml.transpose(t(4, 5))),
    "leaky_relu: negative_slope must be a finite": lambda t: ggml.leaky_relu(t(4), INF),
    "clamp: low 2.0 is above high 1.0": lambda t: ggml.clamp(t(4), 2, 1),
    "clamp: low must be a finite number of single precision, not nan": lambda t: ggml.clamp(t(4), NAN, 1),
    "clamp: high must be a number, not None": lambda t: ggml.clamp(t(4), 0, None),
    "clamp: a must be one of F16, F32": lambda t: ggml.clamp(t(4, dtype="bf16"), 0, 1),
    "xielu: a must be a contiguous float": lambda t: ggml.xielu(t(4, dtype="i32"), 1, 1, 1, 1),
    "xielu: a must be a contiguous float (use cont): a (5, 4)": lambda t: ggml.xielu(
        ggml.transpose(t(4, 5)), 1, 1, 1, 1
    ),
    "xielu: beta must be a number, not '1'": lambda t: ggml.xielu(t(4), 1, 1, "1", 1),
    "xielu: eps must be a finite number": lambda t: ggml.xielu(t(4), 1, 1, 1, 10**400),
}
