"""Rotary positions."""

from __future__ import annotations

from typing import Any

import numpy as np

import ggml_cffi as ggml
from ggml_cffi import RopeMode, Type
from tests.cases import Array, In, case, reference


def rotated(a: Array, angles: Array, n_dims: int, mode: RopeMode, factor: float = 1.0, offset: int = 0) -> Array:
    """Rotate the pairs of ``a`` from element ``offset`` on by ``angles`` (tokens, pairs)."""
    n = angles.shape[1]
    first, second = np.arange(n), np.arange(n) + (n_dims if mode is RopeMode.VISION else n_dims // 2)
    if mode is RopeMode.NORMAL:
        first, second = 2 * first, 2 * first + 1
    first, second = offset + first, offset + second
    cos, sin = factor * np.cos(angles)[:, None], factor * np.sin(angles)[:, None]
    out = a.copy()
    out[..., first] = a[..., first] * cos - a[..., second] * sin
    out[..., second] = a[..., first] * sin + a[..., second] * cos
    return out


def yarn(turns: Array, n_dims: int, n_ctx_orig: int, base: float, scale: float, ext: float, fast: float, slow: float):  # type: ignore[no-untyped-def]
    """Return the angles of YaRN and their factor: fast pairs are kept, slow pairs scaled, with a ramp in between."""
    if not ext:
        return turns * scale, 1.0
    low, high = (n_dims * np.log(n_ctx_orig / (2 * np.pi * beta)) / (2 * np.log(base)) for beta in (fast, slow))
    low, high = max(0, np.floor(low)), min(n_dims - 1, np.ceil(high))
    kept = ext * (1 - np.clip((np.arange(turns.shape[1]) - low) / max(0.001, high - low), 0, 1))
    return turns * (scale * (1 - kept) + kept), 1 + 0.1 * np.log(1 / scale)


def resolution(values: dict[str, Any], arguments: dict[str, Any]) -> float:
    """Return the error that single-precision angles cause, which have a relative spacing of ``2**-24``."""
    factors = values.get("freq_factors")
    slowest = 1.0 if factors is None else min(np.abs(factors).min(initial=1), 1.0)
    faster = max(abs(arguments.get("freq_scale", 1.0)), 1.0)
    angle = faster * np.abs(values["positions"]).max(initial=0) / max(slowest, 1e-30)
    return float(angle) * 2**-23


@reference
def rope_ext(
    a: Array,
    positions: Array,
    freq_factors: Array | None = None,
    n_dims: int = 0,
    offset: int = 0,
    mode: RopeMode = RopeMode.NORMAL,
    n_ctx_orig: int = 0,
    freq_base: float = 10000.0,
    freq_scale: float = 1.0,
    ext_factor: float = 0.0,
    attn_factor: float = 1.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Array:
    n = n_dims // 2
    turns = positions.reshape(-1)[:, None] * freq_base ** (-np.arange(n) / n)
    if freq_factors is not None:
        turns = turns / freq_factors[:n]
    angles, factor = yarn(turns, n_dims, n_ctx_orig, freq_base, freq_scale, ext_factor, beta_fast, beta_slow)
    return rotated(a, angles, n_dims, mode, attn_factor * factor, offset)


@reference
def rope(a: Array, positions: Array, n_dims: int, mode: RopeMode = RopeMode.NORMAL) -> Array:
    return rope_ext(a, positions, None, n_dims, mode=mode)


@reference
def rope_multi(
    a: Array,
    positions: Array,
    freq_factors: Array | None = None,
    n_dims: int = 0,
    offset: int = 0,
    sections: tuple[int, ...] = (),
    mode: RopeMode = RopeMode.MROPE,
    freq_base: float = 10000.0,
    freq_scale: float = 1.0,
) -> Array:
    pairs = n_dims if mode is RopeMode.VISION else n_dims // 2
    of = positions.reshape(4, -1)
    starts = np.cumsum([0, *sections])
    turns = np.zeros((of.shape[1], pairs))
    for i in range(pairs):
        s = i % starts[-1]
        section = int(np.searchsorted(starts, s, "right")) - 1
        if mode is RopeMode.IMROPE:
            section = s % 3 if s < 3 * sections[s % 3] else 3
        exponent = s - starts[section] if mode is RopeMode.VISION else i
        turns[:, i] = of[section] * freq_base ** (-2 * exponent / n_dims)
    if freq_factors is not None:
        turns = turns / freq_factors[:pairs]
    return rotated(a, turns * freq_scale, n_dims, mode, offset=offset)


F16, I32, NEOX = Type.F16, Type.I32, RopeMode.NEOX
#: The error of single-precision angles grows with the position.
ANGLES = 1e-4
FAR = np.array([0, 1, 7, 100, 999])

CASES = [
    case("rope", ANGLES, a=In((5, 3, 32)), positions=In((5,), I32, values=FAR), n_dims=32),
    case("rope", ANGLES, a=In((2, 5, 1, 8), layout="gaps"), positions=In((5,), I32, values=50), n_dims=4, mode=NEOX),
    case("rope", ANGLES, a=In((2, 5, 3, 32)), positions=In((1, 5), I32, values=FAR[None]), n_dims=32),
    case("rope", a=In((1, 3, 6), F16), positions=In((1,), I32, values=9), n_dims=6, mode=NEOX),
    *(
        case(
            "rope_ext",
            ANGLES,
            a=In((5, 3, 32), layout=layout),
            positions=In((5,), I32, values=FAR),
            n_dims=n_dims,
            mode=mode,
        )
        for mode, n_dims, layout in (
            (RopeMode.NORMAL, 32, "contiguous"),
            (RopeMode.NORMAL, 16, "gaps"),
            (NEOX, 32, "permuted"),
            (NEOX, 16, "contiguous"),
        )
    ),
    case(
        "rope_ext",
        ANGLES,
        a=In((2, 4, 16)),
        positions=In((2,), I32, values=99),
        freq_factors=In((8,), values=(1, 9)),
        n_dims=8,
        mode=NEOX,
        freq_base=5e5,
        freq_scale=0.5,
    ),
    case(
        "rope_ext",
        ANGLES,
        a=In((2, 4, 16)),
        positions=In((2,), I32, values=99),
        freq_factors=In((9,), values=(1, 9)),
        n_dims=16,
        attn_factor=1.5,
    ),
    case(
        "rope_ext",
        ANGLES,
        a=In((4, 2, 64)),
        positions=In((4,), I32, values=9000),
        n_dims=64,
        mode=NEOX,
        n_ctx_orig=4096,
        freq_scale=0.25,
        ext_factor=1.0,
    ),
    case(
        "rope_ext",
        ANGLES,
        a=In((4, 2, 64)),
        positions=In((4,), I32, values=9000),
        n_dims=48,
        n_ctx_orig=2048,
        freq_scale=0.125,
        ext_factor=0.5,
        beta_fast=16.0,
        beta_slow=2.0,
    ),
    *(
        case(
            "rope_ext",
            ANGLES,
            a=In((5, 3, 32), layout=layout),
            positions=In((5,), I32, values=FAR),
            freq_factors=In((16,), values=(1, 9)),
            n_dims=n_dims,
            offset=offset,
            mode=mode,
        )
        for mode, n_dims, offset, layout in (
            (RopeMode.NORMAL, 16, 8, "gaps"),
            (NEOX, 10, 22, "contiguous"),
        )
    ),
    case("rope_ext", a=In((2, 3, 8), F16), positions=In((2,), I32, values=9), n_dims=4, offset=2, mode=NEOX),
    case(
        "rope_multi",
        ANGLES,
        a=In((3, 2, 32)),
        positions=In((12,), I32, values=99),
        n_dims=16,
        offset=16,
        sections=(4, 2, 2, 0),
    ),
    case("rope_multi", ANGLES, a=In((3, 2, 32)), positions=In((12,), I32, values=99), n_dims=32, sections=(4, 6, 6, 0)),
    case(
        "rope_multi",
        ANGLES,
        a=In((3, 2, 32), layout="gaps"),
        positions=In((12,), I32, values=99),
        n_dims=16,
        sections=(1, 1, 1, 2),
        freq_scale=0.5,
    ),
    case(
        "rope_multi",
        ANGLES,
        a=In((2, 3, 2, 48)),
        positions=In((12,), I32, values=99),
        n_dims=48,
        sections=(10, 6, 6, 2),
        mode=RopeMode.IMROPE,
    ),
    case(
        "rope_multi",
        ANGLES,
        a=In((3, 2, 32)),
        positions=In((12,), I32, values=99),
        n_dims=16,
        sections=(8, 8, 8, 8),
        mode=RopeMode.VISION,
    ),
    case(
        "rope_multi",
        ANGLES,
        a=In((3, 2, 32)),
        positions=In((12,), I32, values=99),
        freq_factors=In((16,), values=(1, 9)),
        n_dims=16,
        sections=(3, 4, 0, 0),
        mode=RopeMode.VISION,
    ),
    case("rope_multi", a=In((3, 2, 16), F16), positions=In((12,), I32, values=9), n_dims=16, sections=(4, 2, 2, 0)),
]


def p(t, n=5):  # type: ignore[no-untyped-def]
    return t(n, dtype="i32")


NAN = float("nan")
WRONG = {
    "rope_ext: positions must be I32 of shape (5,)": lambda t: ggml.rope_ext(t(5, 2, 8), p(t, 4), n_dims=8),
    "rope: positions must be I32 of shape (5,), one per token": lambda t: ggml.rope(t(5, 2, 8), t(5), n_dims=8),
    "rope_multi: positions must be I32 of shape (20,), four per token": lambda t: ggml.rope_multi(
        t(5, 2, 8), p(t), n_dims=8, sections=(2, 1, 1, 0)
    ),
    "rope_ext: n_dims must be even": lambda t: ggml.rope_ext(t(5, 2, 8), p(t), n_dims=7),
    "rope_ext: n_dims must be even and 2 to": lambda t: ggml.rope_ext(t(5, 2, 8), p(t), n_dims=10),
    "rope_inplace: n_dims must be even and 2 to": lambda t: ggml.rope_inplace(t(5, 2, 8), p(t), n_dims=-8),
    "rope: n_dims must be an integer, not 8.0": lambda t: ggml.rope(t(5, 2, 8), p(t), n_dims=8.0),
    "rope_ext: offset must be even": lambda t: ggml.rope_ext(t(5, 2, 8), p(t), n_dims=4, offset=3),
    "rope_ext: offset must be even and at most": lambda t: ggml.rope_ext(t(5, 2, 8), p(t), n_dims=4, offset=6),
    "rope_ext: offset must be 0 to": lambda t: ggml.rope_ext(t(5, 2, 8), p(t), n_dims=4, offset=-2),
    "rope_multi: the mode VISION rotates the whole head": lambda t: ggml.rope_multi(
        t(5, 2, 8), p(t, 20), n_dims=4, offset=2, sections=(2, 2, 0, 0), mode=24
    ),
    "rope_ext: the size of a head must be even": lambda t: ggml.rope_ext(t(5, 2, 9), p(t), n_dims=8),
    "rope_ext: a must be F32 or F16 with contiguous rows": lambda t: ggml.rope_ext(
        ggml.transpose(t(5, 8, 2)), p(t), n_dims=8
    ),
    "rope_ext: freq_base must be above 0": lambda t: ggml.rope_ext(t(5, 2, 8), p(t), n_dims=8, freq_base=0),
    "rope_ext: freq_scale must be a finite": lambda t: ggml.rope_ext(t(5, 2, 8), p(t), n_dims=8, freq_scale=NAN),
    "rope_ext: n_ctx_orig must be 0 to": lambda t: ggml.rope_ext(t(5, 2, 8), p(t), n_dims=8, n_ctx_orig=2**31),
    "rope_ext: ext_factor needs n_ctx_orig": lambda t: ggml.rope_ext(t(5, 2, 8), p(t), n_dims=8, ext_factor=1.0),
    "freq_factors must be F32 of one axis with at least 4 values": lambda t: ggml.rope_ext(
        t(5, 2, 8), p(t), t(3), n_dims=4
    ),
    "rope_ext: IMROPE is a mode of rope_multi": lambda t: ggml.rope_ext(t(5, 2, 8), p(t), n_dims=8, mode=40),
    "rope_multi: NEOX is a mode of rope_ext": lambda t: ggml.rope_multi(
        t(5, 2, 8), p(t), n_dims=8, mode=2, sections=(1, 1, 1, 1)
    ),
    "3 is not a valid RopeMode": lambda t: ggml.rope_ext(t(5, 2, 8), p(t), n_dims=8, mode=3),
    "rope_multi: sections must be 4 sizes": lambda t: ggml.rope_multi(t(5, 2, 8), p(t, 20), n_dims=8, sections=(2, 2)),
    "rope_multi: the sections (0, 0, 0, 4) must hold 1 to 8 pairs": lambda t: ggml.rope_multi(
        t(5, 2, 8), p(t, 20), n_dims=8, sections=(0, 0, 0, 4)
    ),
    "rope_multi: the sections (4, 4, 1, 0) must hold": lambda t: ggml.rope_multi(
        t(5, 2, 8), p(t, 20), n_dims=8, sections=(4, 4, 1, 0)
    ),
    "rope_multi: sections must be 0 to": lambda t: ggml.rope_multi(
        t(5, 2, 8), p(t, 20), n_dims=8, sections=(4, -4, 1, 0)
    ),
    "rope_multi: n_dims must be half of the head": lambda t: ggml.rope_multi(
        t(5, 2, 8), p(t, 20), n_dims=8, sections=(4, 4, 0, 0), mode=24
    ),
    "rope_multi_inplace: the first two sections of (1, 1, 1, 1)": lambda t: ggml.rope_multi_inplace(
        t(5, 2, 8), p(t, 20), n_dims=4, sections=(1, 1, 1, 1), mode=24
    ),
}
