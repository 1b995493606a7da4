"""Windows of an image and relative positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import ggml_cffi as ggml
from tests.cases import Array, In, case, reference
from tests.cases.im2col import F16


@reference
def win_part(a: Array, window: int) -> Array:
    h, w, channels = a.shape
    down, across = -(-h // window), -(-w // window)
    full = np.zeros((down * window, across * window, channels))
    full[:h, :w] = a
    parts = full.reshape(down, window, across, window, channels).swapaxes(1, 2)
    return parts.reshape(-1, window, window, channels)


@reference
def win_unpart(a: Array, shape: Sequence[int]) -> Array:
    h, w = np.broadcast_to(shape, 2)  # one size stands for both
    side = a.shape[1]
    parts = a.reshape(-(-h // side), -(-w // side), *a.shape[1:]).swapaxes(1, 2)
    return parts.reshape(parts.shape[0] * side, -1, a.shape[3])[:h, :w]


@reference
def get_rel_pos(a: Array, qh: int, kh: int) -> Array:
    return a[np.arange(qh)[:, None] - np.arange(kh) + kh - 1]


@reference
def add_rel_pos(a: Array, pw: Array, ph: Array) -> Array:
    n, qh, qw, k = pw.shape
    scores = a.reshape(n, qh, qw, k, k) + ph[..., :, None] + pw[..., None, :]
    return scores.reshape(a.shape)


CASES = [
    case("win_part", a=In((7, 5, 3)), window=3),
    case("win_part", a=In((4, 6, 2)), window=2),
    case("win_part", a=In((2, 3, 4)), window=5),
    case("win_unpart", a=In((6, 3, 3, 2)), shape=(7, 5)),
    case("win_unpart", a=In((6, 2, 2, 3)), shape=(4, 6)),
    case("win_unpart", a=In((1, 5, 5, 4)), shape=(2, 3)),
    case("get_rel_pos", a=In((9, 4), F16), qh=5, kh=5),
    case("get_rel_pos", a=In((1, 3), F16), qh=1, kh=1),
    case("get_rel_pos", a=In((27, 7), F16), qh=14, kh=14),
    case("add_rel_pos", a=In((2, 12, 9)), pw=In((2, 4, 3, 3)), ph=In((2, 4, 3, 3))),
    case("add_rel_pos", a=In((5, 4, 4)), pw=In((5, 2, 2, 2)), ph=In((5, 2, 2, 2))),
    case("add_rel_pos", a=In((1, 7, 1)), pw=In((1, 7, 1, 1)), ph=In((1, 7, 1, 1))),
]

WRONG = {
    "win_part: window must be 1 to": lambda t: ggml.win_part(t(4, 4, 2), 0),
    "win_part: a must be one image": lambda t: ggml.win_part(t(2, 4, 4, 2), 2),
    "win_part: a must be contiguous F32": lambda t: ggml.win_part(t(4, 4, 2, dtype="f16"), 2),
    "win_part: a has no elements": lambda t: ggml.win_part(t(4, 0, 2), 2),
    "win_part: the windows have 2**31": lambda t: ggml.win_part(t(4, 4, 2), 2**16),
    "win_unpart: a does not hold the windows of an image of (5, 6)": lambda t: ggml.win_unpart(t(6, 2, 2, 3), (5, 6)),
    "win_unpart: shape must be 1 to": lambda t: ggml.win_unpart(t(6, 2, 2, 3), (0, 6)),
    "win_unpart: a must be contiguous F32": lambda t: ggml.win_unpart(ggml.transpose(t(6, 2, 2, 2)), (4, 6)),
    "get_rel_pos: qh and kh must be equal": lambda t: ggml.get_rel_pos(t(9, 4, dtype="f16"), 5, 4),
    "get_rel_pos: a must have 7 rows": lambda t: ggml.get_rel_pos(t(9, 4, dtype="f16"), 4, 4),
    "get_rel_pos: a must be contiguous F16": lambda t: ggml.get_rel_pos(t(9, 4), 5, 5),
    "add_rel_pos: a, pw and ph must be contiguous F32": lambda t: ggml.add_rel_pos(
        t(2, 12, 9), t(2, 4, 3, 3, dtype="f16"), t(2, 4, 3, 3)
    ),
    "add_rel_pos: pw and ph must be (n, qh, qw, k)": lambda t: ggml.add_rel_pos(
        t(2, 12, 9), t(2, 4, 3, 3), t(2, 3, 4, 3)
    ),
    "add_rel_pos_inplace: pw and ph must be": lambda t: ggml.add_rel_pos_inplace(
        t(2, 12, 8), t(2, 4, 3, 3), t(2, 4, 3, 3)
    ),
}
