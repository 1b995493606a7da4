"""Matrix products."""

from __future__ import annotations

import numpy as np

import ggml_cffi as ggml
from ggml_cffi import Prec, Type
from tests.cases import Array, In, case, reference


def repeated(small: Array, big: Array) -> Array:
    """Repeat each matrix of ``small`` along its leading axes up to those of ``big``."""
    small = small.reshape((1,) * (big.ndim - small.ndim) + small.shape)
    for axis in range(big.ndim - 2):
        small = np.repeat(small, big.shape[axis] // small.shape[axis], axis)
    return small


@reference
def mul_mat(a: Array, b: Array, prec: Prec = Prec.DEFAULT, b_prec: Prec = Prec.DEFAULT) -> Array:
    return b @ np.swapaxes(repeated(a, b), -1, -2)


@reference
def linear(x: Array, weight: Array, bias: Array | None = None, prec: Prec = Prec.DEFAULT) -> Array:
    return x @ weight.T + (0 if bias is None else bias)


@reference
def mul_mat_id(a: Array, b: Array, ids: Array, prec: Prec = Prec.DEFAULT, b_prec: Prec = Prec.DEFAULT) -> Array:
    n_tokens, n_used = ids.shape
    rows = [[b[t, e % b.shape[1]] @ a[ids[t, e]].T for e in range(n_used)] for t in range(n_tokens)]
    return np.array(rows)


@reference
def out_prod(a: Array, b: Array, prec: Prec = Prec.DEFAULT) -> Array:
    return np.swapaxes(b, -1, -2) @ repeated(a, b)


F16, Q8_0, I32 = Type.F16, Type.Q8_0, Type.I32
#: Backends may round operands to half precision, or to 8 bits if weights are quantized, and sum in F16.
ROUNDED = 5e-3
EXACT = 1e-5
COARSE = 1e-2

CASES = [
    *(
        case(
            "linear",
            COARSE if ggml.c.ggml_is_quantized(dtype) else ROUNDED,
            x=In((m, k)),
            weight=In((n, k), dtype),
            bias=In((n,)),
        )
        for dtype in (Type.F32, F16, Q8_0, Type.Q4_1, Type.Q4_K)
        for m, n, k in ((1, 16, 256), (9, 33, 512))
    ),
    case("linear", COARSE, x=In((9, 512)), weight=In((33, 512), Type.BF16), bias=In((33,))),
    case("linear", ROUNDED, x=In((32,)), weight=In((6, 32))),
    case("linear", ROUNDED, x=In((2, 1, 32)), weight=In((6, 32)), bias=In((6,))),
    *(case("mul_mat", COARSE, a=In((5, 32), Type.BF16), b=In((m, 32), Type.BF16)) for m in (1, 2, 9)),
    *(case("mul_mat", COARSE, a=In((5, 32)), b=In((m, 32), dtype)) for m in (1, 9) for dtype in (F16, Type.BF16)),
    # The accuracy of F32 also for operands of half precision, without tolerances of their types.
    *(
        case("mul_mat", EXACT, a=In((33, 512), dtype), b=In((m, 512)), prec=Prec.F32)
        for dtype in (Type.F32, F16, Type.BF16)
        for m in (3, 9, 129)
    ),
    case("mul_mat", EXACT, a=In((3, 33, 65)), b=In((2, 3, 9, 65)), prec=Prec.F32),
    case("mul_mat", EXACT, a=In((1, 2, 5, 32)), b=In((3, 4, 7, 32)), prec=Prec.F32),
    case("mul_mat", EXACT, a=In((5, 32), layout="gaps"), b=In((4, 17, 32), layout="permuted"), prec=Prec.F32),
    case("mul_mat", EXACT, a=In((2, 15, 32), F16, "permuted"), b=In((2, 17, 32), F16), prec=Prec.F32),
    case("mul_mat", EXACT, a=In((9, 33)), b=In((33,)), prec=Prec.F32, b_prec=Prec.F32),
    case("mul_mat", COARSE, a=In((16, 256), Q8_0), b=In((9, 256)), prec=Prec.F32),
    case("mul_mat", EXACT, a=In((9, 33)), b=In((20, 33), layout="gaps"), prec=Prec.F32),
    case("linear", EXACT, x=In((19, 70)), weight=In((31, 70)), bias=In((31,)), prec=Prec.F32),
    case("linear", EXACT, x=In((2, 11, 32)), weight=In((6, 32), F16), prec=Prec.F32),
    case("mul_mat", ROUNDED, a=In((1, 2, 5, 32)), b=In((3, 4, 7, 32))),
    case("mul_mat", ROUNDED, a=In((5, 32), layout="gaps"), b=In((4, 7, 32), layout="permuted")),
    case("mul_mat", ROUNDED, a=In((2, 5, 32), F16, "permuted"), b=In((2, 7, 32), F16)),
    case("mul_mat", 1e-2, a=In((33, 512), F16), b=In((9, 512)), prec=Prec.F16, b_prec=Prec.F16),
    case("mul_mat", COARSE, a=In((16, 256), Q8_0), b=In((2, 256)), b_prec=Prec.Q8),
    case(
        "mul_mat_id",
        EXACT,
        a=In((4, 6, 32)),
        b=In((3, 2, 32)),
        ids=In((3, 2), I32, values=4),
        prec=Prec.F32,
        b_prec=Prec.F32,
    ),
    case("mul_mat_id", EXACT, a=In((3, 16, 64), F16), b=In((12, 1, 64)), ids=In((12, 2), I32, values=3), prec=Prec.F32),
    case("mul_mat_id", EXACT, a=In((2, 7, 33)), b=In((1, 1, 33)), ids=In((1, 1), I32, values=2), prec=Prec.F32),
    case("mul_mat_id", ROUNDED, a=In((4, 6, 32)), b=In((3, 2, 32)), ids=In((3, 2), I32, values=4)),
    case("mul_mat_id", ROUNDED, a=In((3, 16, 64), F16), b=In((12, 1, 64)), ids=In((12, 2), I32, values=3)),
    case("mul_mat_id", COARSE, a=In((4, 6, 64), Q8_0), b=In((5, 2, 64)), ids=In((5, 4), I32, values=4)),
    case("mul_mat_id", COARSE, a=In((8, 32, 256), Type.Q4_K), b=In((40, 1, 256)), ids=In((40, 2), I32, values=8)),
    case("mul_mat_id", COARSE, a=In((2, 7, 33), Type.BF16), b=In((2, 1, 33)), ids=In((2, 1), I32, values=2)),
    case("out_prod", a=In((5, 7)), b=In((5, 4))),
    case("out_prod", a=In((17, 33)), b=In((3, 17, 20)), prec=Prec.F32),
    case("out_prod", a=In((1, 2, 3, 5)), b=In((2, 4, 3, 6))),
    case("out_prod", a=In((2, 6, 8), layout="gaps"), b=In((2, 6, 3), layout="transposed")),
    case("out_prod", a=In((2, 3, 8), F16), b=In((2, 3, 4), layout="permuted")),
    case("out_prod", a=In((3, 64), Type.Q4_0), b=In((3, 5))),
]


def ids(t, *shape):  # type: ignore[no-untyped-def]
    return t(*shape, dtype="i32")


WRONG = {
    "linear: bias must have one value for each row": lambda t: ggml.linear(t(3, 8), t(4, 8), t(2)),
    "linear: bias must have one value for each row of weight": lambda t: ggml.linear(t(4, 8), t(4, 8), t(2, 4)),
    "linear: weight must be a matrix": lambda t: ggml.linear(t(3, 8), t(2, 4, 8)),
    "mul_mat: inner sizes differ: a (32, 64) F32 · b (8, 63) F32": lambda t: ggml.mul_mat(t(32, 64), t(8, 63)),
    "mul_mat: the inner size is 0": lambda t: ggml.mul_mat(t(4, 0), t(3, 0)),
    "leading sizes of b must be multiples": lambda t: ggml.mul_mat(t(2, 4, 8), t(3, 4, 8)),
    "mul_mat: the rows of a and b must be contiguous": lambda t: ggml.mul_mat(ggml.transpose(t(8, 4)), t(3, 8)),
    "the rows of a and b must be contiguous (use cont): a (4, 8) F32 · b (3, 8)": lambda t: ggml.mul_mat(
        t(4, 8), ggml.transpose(t(8, 3))
    ),
    "mul_mat: a must be a float or quantized": lambda t: ggml.mul_mat(t(4, 8, dtype="i32"), t(3, 8)),
    "mul_mat: prec must be F32, BF16 or F16, not Q8": lambda t: ggml.mul_mat(t(4, 8), t(3, 8), prec=Prec.Q8),
    "out_prod: prec must be DEFAULT or F32, not F16": lambda t: ggml.out_prod(t(4, 8), t(4, 3), prec=Prec.F16),
    "mul_mat_id: a must be a float or quantized type, b F32": lambda t: ggml.mul_mat_id(
        t(4, 6, 8), t(3, 2, 8, dtype="f16"), ids(t, 3, 2)
    ),
    "mul_mat_id: inner sizes differ": lambda t: ggml.mul_mat_id(t(4, 6, 8), t(3, 2, 7), ids(t, 3, 2)),
    "mul_mat_id: ids must name a matrix": lambda t: ggml.mul_mat_id(t(4, 6, 8), t(3, 2, 8), ids(t, 4, 2)),
    "mul_mat_id: ids must name a matrix of a for each row of b, or several: a (4, 6, 8) F32 · b (3, 2, 8)": (
        lambda t: ggml.mul_mat_id(t(4, 6, 8), t(3, 2, 8), ids(t, 3, 3))
    ),
    "mul_mat_id: a, b and the rows of ids must be contiguous": lambda t: ggml.mul_mat_id(
        ggml.permute(t(6, 4, 8), (1, 0, 2)), t(3, 2, 8), ids(t, 3, 2)
    ),
    "mul_mat_id: more than 65535 experts": lambda t: ggml.mul_mat_id(t(65536, 1, 1), t(3, 2, 1), ids(t, 3, 2)),
    "mul_mat_id: a has no experts": lambda t: ggml.mul_mat_id(t(0, 6, 8), t(3, 2, 8), ids(t, 3, 2)),
    "mul_mat_id: row numbers must be an input tensor": lambda t: ggml.mul_mat_id(
        t(4, 6, 8), t(3, 2, 8), ggml.top_k(t(3, 4), 2)
    ),
    "mul_mat_id: positions in rows of 5 exceed the 4 experts": lambda t: ggml.mul_mat_id(
        t(4, 6, 8), t(3, 2, 8), ggml.argsort_top_k(t(3, 5), 2)
    ),
    "out_prod: inner sizes differ": lambda t: ggml.out_prod(t(3, 4), t(4, 3)),
    "out_prod: a must be F32, F16 or quantized": lambda t: ggml.out_prod(t(3, 4, dtype="bf16"), t(3, 4)),
    "out_prod: a must be F32, F16 or quantized, and b F32": lambda t: ggml.out_prod(t(3, 4), t(3, 4, dtype="f16")),
    "out_prod: the leading sizes of b": lambda t: ggml.out_prod(t(2, 3, 4), t(3, 3, 4)),
    "out_prod: a F16 a must have the leading sizes of b": lambda t: ggml.out_prod(t(1, 3, 4, dtype="f16"), t(2, 3, 4)),
    "out_prod: the rows of a must be contiguous": lambda t: ggml.out_prod(ggml.transpose(t(3, 4)), t(4, 5)),
}
