"""Shapes and views."""

from __future__ import annotations

from typing import Any

import numpy as np

import ggml_cffi as ggml
from ggml_cffi import Type
from tests.cases import Array, In, case, reference


@reference
def reshape(a: Array, shape: Any) -> Array:
    return a.reshape(shape.shape if isinstance(shape, np.ndarray) else shape)  # a tensor can stand for its shape


@reference
def permute(a: Array, axes: Any) -> Array:
    return a.transpose(axes)


@reference
def transpose(a: Array) -> Array:
    return np.swapaxes(a, -1, -2)


@reference
def view(a: Array, shape: Any, strides: Any = None, offset: int = 0) -> Array:
    """Compute a view with strides and offset in bytes of F32; float64 elements are twice as large."""
    steps = None if strides is None else [2 * s for s in strides]
    return np.ndarray(shape, np.float64, np.ascontiguousarray(a, np.float64), 2 * offset, steps)


@reference
def cont(a: Array, shape: Any = None) -> Array:
    return a if shape is None else a.reshape(shape)


@reference
def cast(a: Array, dtype: Type) -> Array:
    return a


@reference
def repeat(a: Array, shape: Any) -> Array:
    shape = getattr(shape, "shape", shape)  # a tensor can stand for its shape
    padded = (1,) * (len(shape) - a.ndim) + a.shape
    return np.tile(a, [m // n for m, n in zip(shape, padded, strict=True)])


@reference
def concat(a: Array, b: Array, axis: int = 0) -> Array:
    return np.concatenate([a, b], axis)


@reference
def diag(a: Array) -> Array:
    return a[..., None] * np.eye(a.shape[-1]) if a.ndim == 1 else a * np.eye(a.shape[-1])


F32, F16, BF16, I32, Q8_0 = Type.F32, Type.F16, Type.BF16, Type.I32, Type.Q8_0

CASES = [
    case("reshape", a=In((2, 3, 4)), shape=(4, -1)),
    case("reshape", a=In((12,), F16), shape=(2, 1, 3, 2)),
    case("reshape", a=In((2, 64), Q8_0), shape=(4, 32)),
    *(case("permute", a=In((2, 3, 4)), axes=axes) for axes in ((1, 0, 2), (2, 0, 1), (-1, 1, 0))),
    case("permute", a=In((2, 3, 4, 5), I32, values=9), axes=(3, 1, 0, 2)),
    case("transpose", a=In((2, 3, 4))),
    case("transpose", a=In((5, 1), F16)),
    case("transpose", a=In((3, 4), layout="gaps")),
    case("view", a=In((2, 3, 4)), shape=(2, 2), strides=(48, 4), offset=16),
    case("view", a=In((6,)), shape=(2, 2), offset=8),
    case("view", a=In((2, 3, 4)), shape=(3, 1, 2), strides=(16, 4, 4)),
    *(
        case("cont", a=In((2, 3, 4, 33), dtype, layout, values=9 if dtype is I32 else None))
        for dtype, layout in (
            (F32, "transposed"),
            (F32, "permuted"),
            (F16, "transposed"),
            (F16, "gaps"),
            (I32, "transposed"),
        )
    ),
    case("cont", a=In((2, 4, 6), BF16, "permuted")),
    case("cont", a=In((3, 64), Q8_0)),
    case("cont", a=In((4, 6), layout="transposed"), shape=(2, 12)),
    case("cont", a=In((2, 3, 4), F16, "gaps"), shape=(24,)),
    case("cont", a=In((2, 3, 4), I32, "permuted", 9), shape=(4, 3, 1, 2)),
    case("cont", a=In((4, 32), Q8_0), shape=(2, 64)),
    case("cast", a=In((3, 32)), dtype=F16),
    case("cast", a=In((2, 3, 5), layout="transposed"), dtype=BF16),
    case("cast", a=In((2, 3, 5), F16, "gaps"), dtype=F32),
    case("cast", a=In((4, 6), BF16, "transposed"), dtype=F16),
    case("cast", a=In((3, 64)), dtype=Q8_0),
    case("cast", a=In((3, 64), Q8_0, "gaps"), dtype=F32),
    case("cast", a=In((2, 3, 256), Type.Q4_K), dtype=F32),
    case("cast", 0.1, a=In((2, 256)), dtype=Type.Q4_K),  # 4 bits
    case("repeat", a=In((3,)), shape=(6,)),
    case("repeat", a=In((3,)), shape=(2, 3)),
    case("repeat", a=In((2, 1, 3), layout="permuted"), shape=(2, 2, 4, 6)),
    case("repeat", a=In((2, 5), F16, "gaps"), shape=(4, 5)),
    case("repeat", a=In((2, 5), I32, values=9), shape=(2, 10)),
    *(
        case(
            "concat",
            a=In((2, 3, 4)),
            b=In(tuple(5 if i == axis % 3 else n for i, n in enumerate((2, 3, 4)))),
            axis=axis,
        )
        for axis in (0, 1, 2, -1)
    ),
    case("concat", a=In((3, 4), F16, "gaps"), b=In((2, 4), F16, "transposed")),
    case("concat", a=In((2, 3, 64), Q8_0), b=In((2, 1, 64), Q8_0), axis=1),
    case("concat", a=In((3, 64), Type.Q4_0), b=In((3, 32), Type.Q4_0, "gaps"), axis=-1),
    case("concat", a=In((3, 4), I32, values=9), b=In((3, 1), I32, values=9), axis=1),
    case("diag", a=In((7,))),
    case("diag", a=In((2, 3, 1, 4))),
    case("diag", a=In((3, 1, 5), layout="gaps")),
]

WRONG = {
    "reshape: (5,) has a different number": lambda t: ggml.reshape(t(4), (5,)),
    "reshape: (3, -1) has a different number": lambda t: ggml.reshape(t(4), (3, -1)),
    "reshape: (2, 3) has a different number": lambda t: ggml.reshape(t(4), t(2, 3)),
    "reshape: a must be contiguous": lambda t: ggml.reshape(ggml.transpose(t(4, 5)), (20,)),
    "reshape: rows of 16 do not fill whole blocks": lambda t: ggml.reshape(t(32, dtype="q4_0"), (2, 16)),
    "permute: (0, 0) is not a permutation": lambda t: ggml.permute(t(4, 5), (0, 0)),
    "permute: (1, 0) is not a permutation": lambda t: ggml.permute(t(4), (1, 0)),
    "permute: the last axis of a quantized": lambda t: ggml.permute(t(4, 32, dtype="q4_0"), (1, 0)),
    "transpose: a must have at least two axes": lambda t: ggml.transpose(t(4)),
    "transpose: the last axis of a quantized": lambda t: ggml.transpose(t(4, 32, dtype="q4_0")),
    "view: bytes 0 to 20": lambda t: ggml.view(t(4), (5,)),
    "view: bytes 16 to 20": lambda t: ggml.view(t(4), (1,), offset=16),
    "view: bytes 2 to 6": lambda t: ggml.view(t(4), (1,), offset=2),
    "view: bytes -4": lambda t: ggml.view(t(4), (1,), offset=-4),
    "view: strides (16,) do not fit": lambda t: ggml.view(t(4), (2, 2), strides=(16,)),
    "view: strides (1180591620717411303424, 4) do not fit": lambda t: ggml.view(t(4), (1, 2), strides=(2**70, 4)),
    "view: the last axis must be contiguous": lambda t: ggml.view(t(8), (2, 2), strides=(16, 8)),
    "view: strides (6, 4) are not multiples": lambda t: ggml.view(t(8), (2, 1), strides=(6, 4)),
    "view: bytes 0 to 1000": lambda t: ggml.view(t(8), (2, 1), strides=(996, 4)),
    "view: a view of 16 bytes is larger": lambda t: ggml.view(t(3), (2, 2), strides=(4, 4)),
    "view: rows of 16 do not fill whole blocks": lambda t: ggml.view(t(32, dtype="q4_0"), (16,)),
    "cont: only F32": lambda t: ggml.cont(ggml.transpose(t(2, 32, dtype="f64"))),
    "cont: only F32, F16, BF16 and I32": lambda t: ggml.cont(t(4, dtype="i64")),
    "cont: (5,) has a different number of elements": lambda t: ggml.cont(t(4), (5,)),
    "cont: rows of 16 do not fill whole blocks of Q4_0": lambda t: ggml.cont(t(32, dtype="q4_0"), (2, 16)),
    "cast: ggml has no conversion to I32": lambda t: ggml.cast(t(4), "i32"),
    "cast: ggml has no conversion to IQ2_XXS": lambda t: ggml.cast(t(256), "iq2_xxs"),
    "cast: Q8_1 is an internal format of": lambda t: ggml.cast(t(32), "q8_1"),
    "cast: rows of 4 do not fill whole blocks": lambda t: ggml.cast(t(4), "q4_0"),
    "cast: a has no elements": lambda t: ggml.cast(t(0), "f16"),
    "repeat: (5,) is not a multiple": lambda t: ggml.repeat(t(2), (5,)),
    "repeat: (3,) is not a multiple": lambda t: ggml.repeat(t(2), t(3)),
    "repeat: (4,) is not a multiple": lambda t: ggml.repeat(t(1, 2), (4,)),
    "repeat: a must be F32, F16": lambda t: ggml.repeat(t(32, dtype="q4_0"), (64,)),
    "concat: a and b must have the same number of axes, and axis 0": lambda t: ggml.concat(t(2), t(2, 2)),
    "concat: a and b must have the same number of axes, and axis 1": lambda t: ggml.concat(t(2), t(2), 1),
    "concat: a and b must be of one type": lambda t: ggml.concat(t(2), t(2, dtype="f16")),
    "concat: a and b differ in more than axis 0": lambda t: ggml.concat(t(2, 3), t(2, 4)),
    "diag: a must be F32": lambda t: ggml.diag(t(4, dtype="f16")),
    "diag: the axis before the last": lambda t: ggml.diag(t(2, 4)),
}
