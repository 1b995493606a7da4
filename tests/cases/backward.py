"""Gradients, compared with central differences or the Jacobian of the operation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import ggml_cffi as ggml
from ggml_cffi import RopeMode, Type
from tests.cases import Array, In, case, reference


def differences(function: Callable[[Array], Array], x: Array, grad: Array) -> Array:
    """Return the gradient of ``sum(grad * function(x))`` by central differences."""
    out = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        step = np.zeros(x.shape)
        step[i] = 1e-5
        out[i] = np.sum(grad * (function(x + step) - function(x - step))) / 2e-5
    return out


@reference
def repeat_back(grad: Array, shape: tuple[int, ...]) -> Array:
    out = np.zeros((1,) * (grad.ndim - len(shape)) + shape)
    for i in np.ndindex(grad.shape):
        out[tuple(at % n for at, n in zip(i, out.shape, strict=True))] += grad[i]
    return out.reshape(shape)


@reference
def get_rows_back(grad: Array, rows: Array, n_rows: int) -> Array:
    out = np.zeros((n_rows, grad.shape[1]))
    for i, row in enumerate(rows):
        out[row] += grad[i]
    return out


@reference
def silu_back(grad: Array, x: Array) -> Array:
    return differences(lambda x: x / (1 + np.exp(-x)), x, grad)


@reference
def rms_norm_back(grad: Array, x: Array, eps: float = 1e-6) -> Array:
    mean = (lambda a: np.mean(a, -1, keepdims=True)) if x.ndim else np.mean
    return differences(lambda x: x / np.sqrt(mean(x * x) + eps), x, grad)


@reference
def soft_max_ext_back(grad: Array, y: Array, scale: float = 1.0) -> Array:
    out = np.zeros(y.shape)
    for i in np.ndindex(y.shape[:-1]):
        p = np.atleast_1d(y[i])
        out[i] = scale * (np.diag(p) - np.outer(p, p)) @ np.atleast_1d(grad[i])
    return out


def turned_back(a: Array, angles: Array, pairs: list[tuple[int, int]], factor: float) -> Array:
    """Rotate ``a``, ``(..., n_tokens, n_heads, head_size)``, back by ``angles[token, pair]``."""
    shape = a.shape
    a = a.reshape((1,) * (3 - a.ndim) + shape)
    out = a.copy()
    for token in range(a.shape[-3]):
        for n, (i, j) in enumerate(pairs):
            rotation = factor * np.array([[np.cos(angles[token, n]), -np.sin(angles[token, n])],
                                          [np.sin(angles[token, n]), np.cos(angles[token, n])]])  # fmt: skip
            out[..., token, :, [i, j]] = np.einsum("p...,pq->q...", a[..., token, :, [i, j]], rotation)
    return out.reshape(shape)


@reference
def rope_ext_back(
    a: Array,
    positions: Array,
    freq_factors: Array | None = None,
    *,
    n_dims: int,
    offset: int = 0,
    mode: RopeMode = RopeMode.NORMAL,
    freq_base: float = 10000.0,
    freq_scale: float = 1.0,
    attn_factor: float = 1.0,
) -> Array:
    n = n_dims // 2
    speeds = freq_scale * freq_base ** (-2 * np.arange(n) / n_dims)
    if freq_factors is not None:
        speeds = speeds / freq_factors.ravel()[:n]
    pairs = [(2 * i, 2 * i + 1) if mode is RopeMode.NORMAL else (i, i + n) for i in range(n)]
    pairs = [(offset + i, offset + j) for i, j in pairs]
    return turned_back(a, np.outer(positions, speeds), pairs, attn_factor)


@reference
def rope_multi_back(
    a: Array,
    positions: Array,
    freq_factors: Array | None = None,
    *,
    n_dims: int,
    offset: int = 0,
    sections: tuple[int, ...],
    mode: RopeMode = RopeMode.MROPE,
    freq_base: float = 10000.0,
) -> Array:
    head = a.shape[-1]
    n = head // 2 if mode is RopeMode.VISION else n_dims // 2
    angles = np.zeros((positions.size // 4, n))
    starts = np.cumsum([0, *sections])
    for i in range(n):
        s = i % sum(sections)
        kind = int(np.searchsorted(starts, s, "right")) - 1
        power = s - starts[kind] if mode is RopeMode.VISION else i
        if mode is RopeMode.IMROPE:
            kind = s % 3 if s < 3 * sections[s % 3] else 3
        angles[:, i] = positions.reshape(4, -1)[kind] * freq_base ** (-2 * power / n_dims)
        if freq_factors is not None:
            angles[:, i] /= freq_factors.ravel()[i]
    return turned_back(a, angles, [(offset + i, offset + i + n) for i in range(n)], 1.0)


def probabilities(*shape: int) -> In:
    p = np.random.default_rng(7).uniform(0.1, 1, shape)
    return In(shape, values=p / p.sum(-1, keepdims=True))


FACTORS = In((5,), values=(0.5, 2.0))
MULTI = {"a": In((3, 2, 16)), "positions": In((12,), Type.I32, values=20)}

CASES = [
    case("repeat_back", grad=In((12,)), shape=(4,)),
    case("repeat_back", grad=In((2, 6, 3, 10)), shape=(2, 3, 5)),
    case("repeat_back", grad=In((4, 6), layout="gaps"), shape=(1, 3)),
    case("repeat_back", grad=In((2, 3, 4, 5), layout="permuted"), shape=(2, 1, 2, 1)),
    case("get_rows_back", grad=In((6, 5)), rows=In((6,), Type.I32, values=3), n_rows=3),
    case("get_rows_back", grad=In((4, 33), layout="gaps"), rows=In((4,), Type.I32, values=9), n_rows=9),
    case("get_rows_back", grad=In((4, 5), Type.F16), rows=In((4,), Type.I32, values=2), n_rows=2),
    case("get_rows_back", grad=In((1, 300)), rows=In((1,), Type.I32, values=1), n_rows=1),
    case("silu_back", grad=In((7,)), x=In((7,), values=(-8.0, 8.0))),
    case("silu_back", grad=In((2, 3, 2, 33)), x=In((2, 3, 2, 33))),
    case("silu_back", grad=In((3, 32), Type.F16), x=In((3, 32), Type.F16)),
    case("rms_norm_back", grad=In((5,)), x=In((5,)), eps=0.5),
    case("rms_norm_back", grad=In((2, 3, 33)), x=In((2, 3, 33))),
    case("rms_norm_back", grad=In((3, 2, 1, 8)), x=In((3, 2, 1, 8)), eps=0.1),
    case("rms_norm_back", grad=In((2, 300, 2)), x=In((2, 300, 2)), eps=1.0),
    case("soft_max_ext_back", grad=In((9,)), y=probabilities(9)),
    case("soft_max_ext_back", grad=In((2, 3, 33)), y=probabilities(2, 3, 33), scale=0.3),
    case("soft_max_ext_back", grad=In((2, 2, 3, 5)), y=probabilities(2, 2, 3, 5), scale=-2.0),
    case("rope_ext_back", a=In((3, 2, 8)), positions=In((3,), Type.I32, values=20), n_dims=8),
    case(
        "rope_ext_back",
        a=In((2, 3, 2, 10), layout="permuted"),
        positions=In((3,), Type.I32, values=20),
        freq_factors=FACTORS,
        n_dims=6,
        mode=RopeMode.NEOX,
        freq_base=100.0,
        freq_scale=0.5,
        attn_factor=1.5,
    ),
    case(
        "rope_ext_back",
        a=In((4, 1, 10), Type.F16, "gaps"),
        positions=In((4,), Type.I32, values=20),
        freq_factors=FACTORS,
        n_dims=4,
    ),
    case(
        "rope_ext_back",
        a=In((3, 2, 10)),
        positions=In((3,), Type.I32, values=20),
        n_dims=4,
        offset=6,
        mode=RopeMode.NEOX,
    ),
    case("rope_multi_back", **MULTI, n_dims=8, offset=4, sections=(3, 2, 2, 1)),
    case("rope_multi_back", **MULTI, n_dims=16, sections=(3, 2, 2, 1)),
    case(
        "rope_multi_back",
        **MULTI,
        freq_factors=In((8,), values=(0.5, 2.0)),
        n_dims=12,
        sections=(2, 2, 2, 0),
        mode=RopeMode.IMROPE,
        freq_base=50.0,
    ),
    case("rope_multi_back", **MULTI, n_dims=8, sections=(5, 3, 0, 0), mode=RopeMode.VISION),
]


def rows_back(t, grad=(4, 5), rows=(4,), n_rows=3, dtype="f32", index="i32"):  # type: ignore[no-untyped-def]
    return ggml.get_rows_back(t(*grad, dtype=dtype), t(*rows, dtype=index), n_rows)


WRONG = {
    "repeat_back: the sizes of grad are not multiples": lambda t: ggml.repeat_back(t(4), (3,)),
    "repeat_back: the sizes of grad are not multiples of (0, 2)": lambda t: ggml.repeat_back(t(2, 2), (0, 2)),
    "repeat_back: grad must be F32": lambda t: ggml.repeat_back(t(4, dtype="f16"), (2,)),
    "repeat_back: grad must be F32 with contiguous rows": lambda t: ggml.repeat_back(t(4, 2).T, (2, 2)),
    "repeat_back: grad has no elements": lambda t: ggml.repeat_back(t(0, 2), (2, 2)),
    "repeat_back: grad has a size of more": lambda t: ggml.repeat_back(t(2**31, 1), (1,)),
    "repeat_back: grad starts inside": lambda t: ggml.repeat_back(ggml.view(t(8), (4,), offset=4), (4,)),
    "get_rows_back: grad must be F32 or F16": lambda t: rows_back(t, dtype="bf16"),
    "get_rows_back: rows must be contiguous I32": lambda t: rows_back(t, index="i64"),
    "get_rows_back: grad must be a matrix": lambda t: rows_back(t, grad=(2, 4, 5)),
    "rows a vector with one number per row": lambda t: rows_back(t, rows=(3,)),
    "get_rows_back: n_rows must be 1": lambda t: rows_back(t, n_rows=0),
    "get_rows_back: n_rows must be an integer": lambda t: rows_back(t, n_rows=True),
    "get_rows_back: grad has no elements": lambda t: rows_back(t, grad=(4, 0)),
    "get_rows_back: row numbers must be": lambda t: ggml.get_rows_back(
        t(4, 5), ggml.repeat(t(1, dtype="i32"), (4,)), 7
    ),
    "silu_back: grad and x differ": lambda t: ggml.silu_back(t(4), t(5)),
    "silu_back: grad and x differ in shape or type": lambda t: ggml.silu_back(t(4), t(4, dtype="f16")),
    "silu_back: grad and x must be contiguous F32": lambda t: ggml.silu_back(t(4, 3).T, t(3, 4)),
    "silu_back: x has more than 2**31": lambda t: ggml.silu_back(t(2**31, 1), t(2**31, 1)),
    "silu_back: grad starts inside": lambda t: ggml.silu_back(ggml.view(t(8), (4,), offset=4), t(4)),
    "rms_norm_back: grad and x differ": lambda t: ggml.rms_norm_back(t(4), t(5)),
    "rms_norm_back: x must be contiguous F32": lambda t: ggml.rms_norm_back(t(4, 3), t(3, 4).T),
    "rms_norm_back: eps must be": lambda t: ggml.rms_norm_back(t(4), t(4), -1.0),
    "rms_norm_back: eps must be a finite": lambda t: ggml.rms_norm_back(t(4), t(4), float("nan")),
    "rms_norm_back: grad starts inside": lambda t: ggml.rms_norm_back(ggml.view(t(8), (4,), offset=4), t(4)),
    "soft_max_ext_back: grad and y differ": lambda t: ggml.soft_max_ext_back(t(4), t(5)),
    "soft_max_ext_back: y must be contiguous": lambda t: ggml.soft_max_ext_back(t(4, 3), t(3, 4).T),
    "soft_max_ext_back: scale must be": lambda t: ggml.soft_max_ext_back(t(4), t(4), scale=1e39),
    "soft_max_ext_back_inplace: grad and y differ": lambda t: ggml.soft_max_ext_back_inplace(t(4), t(5)),
    "rope_ext_back: positions must be I32": lambda t: ggml.rope_ext_back(t(3, 2, 8), t(2, dtype="i32"), n_dims=8),
    "rope_ext_back: the size of a head must be even": lambda t: ggml.rope_ext_back(
        t(3, 2, 7), t(3, dtype="i32"), n_dims=6
    ),
    "rope_ext_back: MROPE is a mode of rope_multi": lambda t: ggml.rope_ext_back(
        t(3, 2, 8), t(3, dtype="i32"), n_dims=8, mode=RopeMode.MROPE
    ),
    "rope_multi_back: positions must be I32": lambda t: ggml.rope_multi_back(
        t(3, 2, 8), t(3, dtype="i32"), n_dims=8, sections=(2, 1, 1, 0)
    ),
    "rope_multi_back: sections must be": lambda t: ggml.rope_multi_back(
        t(3, 2, 8), t(12, dtype="i32"), n_dims=8, sections=(2, 2)
    ),
    "rope_multi_back: the sections": lambda t: ggml.rope_multi_back(
        t(3, 2, 8), t(12, dtype="i32"), n_dims=8, sections=(0, 0, 0, 4)
    ),
}
