"""Normalizations."""

from __future__ import annotations

import numpy as np

import ggml_cffi as ggml
from tests.cases import Array, In, case, reference


@reference
def rms_norm(a: Array, eps: float = 1e-6) -> Array:
    return a / np.sqrt((a * a).mean(-1, keepdims=True) + eps)


@reference
def norm(a: Array, eps: float = 1e-5) -> Array:
    return (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + eps)


@reference
def l2_norm(a: Array, eps: float = 1e-12) -> Array:
    return a / np.maximum(np.linalg.norm(a, axis=-1, keepdims=True), eps)


@reference
def group_norm(a: Array, n_groups: int, eps: float = 1e-5) -> Array:
    channels = (1, *a.shape)[-3] if a.ndim > 2 else 1
    grouped = a.reshape(-1, n_groups, channels // n_groups * int(np.prod(a.shape[-2:])))
    centred = grouped - grouped.mean(-1, keepdims=True)
    return (centred / np.sqrt(grouped.var(-1, keepdims=True) + eps)).reshape(a.shape)


CASES = [
    *(
        case(op, a=In(shape, layout=layout), **eps)
        for op in ("rms_norm", "norm", "l2_norm")
        for shape, layout, eps in (
            ((33,), "contiguous", {}),
            ((2, 3, 4, 65), "contiguous", {"eps": 0.5}),
            ((5, 7), "gaps", {}),
            ((2, 3, 4, 6), "permuted", {}),
        )
    ),
    case("norm", a=In((2, 3, 5, 64), layout="transposed")),
    case("l2_norm", a=In((2, 33, 4), layout="transposed")),
    case("group_norm", a=In((6, 4, 5)), n_groups=3),
    case("group_norm", a=In((2, 8, 3, 3)), n_groups=4, eps=0.1),
    case("group_norm", a=In((2, 4, 3, 5), layout="gaps"), n_groups=1),
    case("group_norm", a=In((4, 3)), n_groups=1),
    case("group_norm", a=In((2, 4, 2, 5), layout="permuted"), n_groups=4),
]

WRONG = {
    "rms_norm: a must be F32 with contiguous rows": lambda t: ggml.rms_norm(ggml.transpose(t(2, 4))),
    "rms_norm: a must be F32": lambda t: ggml.rms_norm(t(4, dtype="f16")),
    "rms_norm: eps must be at least 0": lambda t: ggml.rms_norm(t(4), -1.0),
    "rms_norm: sizes before the last must be at most 65535": lambda t: ggml.rms_norm(t(65536, 4)),
    "norm: eps must be a finite number of single precision, not nan": lambda t: ggml.norm(t(4), float("nan")),
    "l2_norm_inplace: a must be F32": lambda t: ggml.l2_norm_inplace(t(4, dtype="i32")),
    "group_norm: n_groups must be 1 to": lambda t: ggml.group_norm(t(4, 2, 2), 0),
    "group_norm: n_groups must be an integer, not 2.0": lambda t: ggml.group_norm(t(4, 2, 2), 2.0),
    "group_norm: 4 channels do not divide into 3": lambda t: ggml.group_norm(t(4, 2, 2), 3),
    "group_norm: there are more than 65535 groups": lambda t: ggml.group_norm(t(65536, 1, 2), 65536),
    "group_norm: a must be F32": lambda t: ggml.group_norm(t(4, 2, 2, dtype="f16"), 2),
    "group_norm_inplace: eps must be": lambda t: ggml.group_norm_inplace(t(4, 2, 2), 2, -1e-3),
}
