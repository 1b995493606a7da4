"""Distance of two results, and its limit, by upstream's measures."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tests.upstream.text import Params

Array = npt.NDArray[Any]

_LIMIT = 1e-7
_LIMITS = {
    "ARGMAX": 0.0,
    "CONV_2D": 5e-4,
    "CONV_3D": 5e-4,
    "CONV_TRANSPOSE_2D": 5e-4,
    "COUNT_EQUAL": 0.0,
    "FLASH_ATTN_EXT": 5e-4,
    "LIGHTNING_INDEXER": 1e-6,
    "MUL_MAT": 5e-4,
    "MUL_MAT_HADAMARD": 5e-4,
    "MUL_MAT_ID": 5e-4,
    "MUL_MAT_ID_W4A4": 2e-2,
    "MUL_MAT_ID_W4A8": 5e-4,
    "MUL_MAT_W4A4": 2e-2,  # a device may round both operands to 4 bits
    "MUL_MAT_W4A8": 5e-4,
    "OUT_PROD": 5e-4,
    "SOFT_MAX": 1e-6,
    "TOP_K": 0.0,
}
#: Contribution of one rounding step in the blocks of a type to upstream's estimate.
_STEP = {"q4_0": 1.0, "q4_1": 1.0, "iq4_nl": 1.0, "q5_0": 0.5, "q5_1": 0.5, "q8_0": 0.125, "q2_0": 1.0}
_LARGEST = np.finfo(np.float32).max


def limit(op: str, p: Params) -> float:
    """Return the largest error that upstream allows."""
    if op == "SET_ROWS" and p.type_dst in _STEP:
        step = _STEP[p.type_dst] / 8
        if p.type_src == "f16":
            step *= 4.0 if p.type_dst == "q2_0" else 1.0
        error = step**2 * (16.0 if p.type_src == "f16" else 1.0)
        return error / (0.25 * p.ne[0] * p.r * p.ne[2] * p.nr23[0] * p.ne[3] * p.nr23[1])
    if op == "CPY":
        if p.type_src == p.type_dst:
            return 0.0
        if p.type_dst in _STEP and p.type_dst != "q2_0":
            step = _STEP[p.type_dst] / 8 * (2.0 if p.type_dst == "iq4_nl" else 1.0)
            return float(step**2 / (0.25 * np.prod(p.ne_src)))
        return 1e-6
    if op == "SSM_SCAN":
        return 2e-7 if p.head_dim > 1 else 1e-7
    if op == "COL2IM_1D":
        return 1e-7 if p.type == "f32" else 5e-4
    return _LIMITS.get(op, _LIMIT)


def error(op: str, p: Params, want: Array, got: Array) -> tuple[float, str]:
    """Return the distance of ``got`` from ``want``, and a remark if it is infinite."""
    if want.shape != got.shape:
        return np.inf, f"shapes {want.shape} and {got.shape}"
    if op == "TOP_K":
        return _sets(want, got), ""
    a, b = want.astype(np.float64).reshape(-1), got.astype(np.float64).reshape(-1)
    if np.isnan(a).any() or np.isnan(b).any():
        return np.inf, f"{np.isnan(a).sum()} and {np.isnan(b).sum()} values are NaN"
    beyond = (np.abs(a) >= _LARGEST, np.abs(b) >= _LARGEST)
    if (beyond[0] != beyond[1]).any() or (np.sign(a[beyond[0]]) != np.sign(b[beyond[0]])).any():
        return np.inf, f"infinite in different places: {beyond[0].sum()} and {beyond[1].sum()}"
    a, b = a[~beyond[0]], b[~beyond[0]]
    distance, size = float(((a - b) ** 2).sum()), float((a**2).sum())
    return (distance / size if size else np.inf) if distance else 0.0, ""


def _sets(want: Array, got: Array) -> float:
    """Return the share of the numbers in each row that the other row lacks."""
    pairs = zip(want.reshape(-1, want.shape[-1]), got.reshape(-1, got.shape[-1]), strict=True)
    return sum(len(set(a.tolist()) ^ set(b.tolist())) for a, b in pairs) / (2 * max(want.size, 1))
