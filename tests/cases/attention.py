"""Scores, masks, softmax and attention."""

from __future__ import annotations

from typing import Any

import numpy as np

import ggml_cffi as ggml
from ggml_cffi import Prec, Type
from tests.cases import Array, In, case, reference


def softmax(x: Array, sinks: Array | None = None) -> Array:
    """Compute softmax along the last axis; ``sinks`` are an additional score per head."""
    e = np.exp(x - x.max(-1, keepdims=True))
    total = e.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks.reshape(-1, 1, 1) - x.max(-1, keepdims=True))
    return e / total


def slopes(n_heads: int, max_bias: float) -> Array:
    """Return ALiBi's slopes: powers of ``2**(-max_bias / n)``, ``n`` a power of two; then odd powers of its root."""
    n = 2 ** int(np.log2(n_heads))
    first = 2.0 ** (-max_bias * np.arange(1, n + 1) / n)
    return np.concatenate([first, 2.0 ** (-max_bias / 2 * np.arange(1, 2 * (n_heads - n), 2) / n)])


def biased(scores: Array, mask: Array | None, max_bias: float) -> Array:
    """Add the mask to ``scores`` (..., heads, m, n), repeated over leading axes."""
    if mask is None:
        return scores
    mask = mask.reshape((1,) * (scores.ndim - mask.ndim) + mask.shape)[..., : scores.shape[-2], :]
    mask = np.tile(mask, [*(m // n for m, n in zip(scores.shape[:-2], mask.shape[:-2], strict=True)), 1, 1])
    if max_bias:
        mask = mask * slopes(scores.shape[-3], max_bias)[:, None, None]
    return scores + mask


@reference
def soft_max(a: Array) -> Array:
    return softmax(a)


@reference
def soft_max_ext(
    a: Array, mask: Array | None = None, sinks: Array | None = None, scale: float = 1.0, max_bias: float = 0.0
) -> Array:
    return softmax(biased(scale * a, mask, max_bias), sinks)


def masked(a: Array, n_past: int, value: float) -> Array:
    return np.where(np.triu(np.ones(a.shape[-2:] if a.ndim > 1 else (1, a.shape[-1])), n_past + 1), value, a)


@reference
def diag_mask_inf(a: Array, n_past: int = 0) -> Array:
    return masked(a, n_past, -np.inf).reshape(a.shape)


@reference
def diag_mask_zero(a: Array, n_past: int = 0) -> Array:
    return masked(a, n_past, 0.0).reshape(a.shape)


def resolution(values: dict[str, Any], arguments: dict[str, Any]) -> float:
    """Return the error that rounding causes if the keys are quantized: queries are rounded to 8 bits then.

    The error of a score is that of the query times the key, and an output changes by as much as its scores.
    """
    longest = [np.linalg.norm(values[name], axis=-1).max(initial=0) for name in ("q", "k")]
    return float(2**-10 * abs(arguments.get("scale", 1.0)) * longest[0] * longest[1])


@reference
def flash_attn_ext(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None = None,
    sinks: Array | None = None,
    scale: float = 1.0,
    max_bias: float = 0.0,
    logit_softcap: float = 0.0,
    prec: Prec = Prec.DEFAULT,
) -> Array:
    q, k, v = (t.reshape((1,) * (3 - t.ndim) + t.shape) for t in (q, k, v))
    groups = q.shape[-3] // k.shape[-3]
    scores = scale * q @ np.swapaxes(np.repeat(k, groups, -3), -1, -2)
    if logit_softcap:
        scores = logit_softcap * np.tanh(scores / logit_softcap)
    out = softmax(biased(scores, mask, max_bias), sinks) @ np.repeat(v, groups, -3)
    return np.swapaxes(out, -2, -3)


def causal(m: int, n: int, *leading: int) -> Array:
    """Return the causal mask of the last ``m`` of ``n`` tokens."""
    return np.broadcast_to(np.where(np.tri(m, n, n - m), 0.0, -np.inf), (*leading, m, n)).copy()


F16 = Type.F16
#: Tolerance for keys and values of half precision, in which GPUs sum.
HALF = 3e-3
EXACT = 1e-5

CASES = [
    case("soft_max", a=In((33,))),
    case("soft_max", a=In((2, 3, 4, 5), values=(-20, 20))),
    case("soft_max", a=In((3, 1100))),
    case("soft_max_ext", a=In((3, 5, 8)), mask=In((5, 8), values=causal(5, 8)), scale=0.5),
    case("soft_max_ext", a=In((2, 6, 5, 8)), mask=In((1, 2, 7, 8), F16), max_bias=8.0),
    case("soft_max_ext", a=In((2, 3, 4, 5)), sinks=In((3,), values=(-1, 3)), scale=2.0),
    case("soft_max_ext", a=In((4, 3, 33)), mask=In((3, 33), F16, values=causal(3, 33)), sinks=In((4,)), max_bias=2.0),
    case("diag_mask_inf", a=In((5, 7))),
    case("diag_mask_inf", a=In((2, 3, 4, 6)), n_past=2),
    case("diag_mask_inf", a=In((9,)), n_past=8),
    case("diag_mask_zero", a=In((5, 7))),
    case("diag_mask_zero", a=In((2, 3, 4, 6)), n_past=2),
    case("diag_mask_zero", a=In((9,)), n_past=3),
    *(
        case(
            "flash_attn_ext",
            HALF,
            q=In((h, n, 64)),
            k=In((kv, 256, 64), F16),
            v=In((kv, 256, 64), F16),
            mask=In((n, 256), F16, values=causal(n, 256)),
            scale=0.125,
        )
        for h, kv, n in ((4, 4, 1), (6, 2, 3))
    ),
    case("flash_attn_ext", HALF, q=In((2, 3, 40)), k=In((2, 50, 40)), v=In((2, 50, 40)), scale=0.2),
    case(
        "flash_attn_ext",
        HALF,
        q=In((2, 6, 5, 64)),
        k=In((2, 3, 33, 64), F16, "permuted"),
        v=In((2, 3, 33, 64), F16, "permuted"),
        mask=In((2, 1, 5, 33), F16),
        sinks=In((6,), values=(-1, 3)),
        scale=0.125,
        max_bias=4.0,
    ),
    case(
        "flash_attn_ext",
        1e-2,
        q=In((4, 2, 64), layout="permuted"),
        k=In((2, 64, 64), Type.Q8_0),
        v=In((2, 64, 64), Type.Q8_0),
        sinks=In((4,)),
        scale=0.125,
        logit_softcap=5.0,
    ),
    case("flash_attn_ext", EXACT, q=In((2, 13, 40)), k=In((2, 50, 40)), v=In((2, 50, 24)), scale=0.2, prec=Prec.F32),
    case(
        "flash_attn_ext",
        EXACT,
        q=In((2, 6, 9, 64)),
        k=In((2, 3, 33, 64), F16, "permuted"),
        v=In((2, 3, 33, 64), F16, "permuted"),
        mask=In((2, 1, 10, 33), F16),
        sinks=In((6,), values=(-1, 3)),
        scale=0.125,
        max_bias=4.0,
        logit_softcap=5.0,
        prec=Prec.F32,
    ),
]

NAN = float("nan")
WRONG = {
    "soft_max: a must be contiguous F32": lambda t: ggml.soft_max(ggml.transpose(t(4, 5))),
    "soft_max_inplace: there are more than 65535 rows": lambda t: ggml.soft_max_inplace(t(65536, 16385)),
    "soft_max_ext: a must be contiguous F32": lambda t: ggml.soft_max_ext(t(4, dtype="f16")),
    "soft_max_ext: the mask does not fit": lambda t: ggml.soft_max_ext(t(4, 4), t(4, 5)),
    "soft_max_ext: the mask must be contiguous F32 or F16": lambda t: ggml.soft_max_ext(
        t(4, 4), ggml.transpose(t(4, 4))
    ),
    "soft_max_ext: max_bias needs a mask": lambda t: ggml.soft_max_ext(t(4, 4), max_bias=8.0),
    "soft_max_ext: max_bias must be at least 0": lambda t: ggml.soft_max_ext(t(4, 4), t(4, 4), max_bias=-1),
    "soft_max_ext: scale must be a finite": lambda t: ggml.soft_max_ext(t(4, 4), scale=NAN),
    "soft_max_ext: sinks must be contiguous F32 of shape (2,)": lambda t: ggml.soft_max_ext(t(2, 4, 4), None, t(4)),
    "diag_mask_inf: a must be contiguous F32": lambda t: ggml.diag_mask_inf(ggml.transpose(t(4, 5))),
    "diag_mask_zero: n_past must be 0 to 2147483647, not -1": lambda t: ggml.diag_mask_zero(t(4, 5), -1),
    "diag_mask_inf_inplace: n_past must be an integer": lambda t: ggml.diag_mask_inf_inplace(t(4, 5), None),
    "diag_mask_inf: there are more than 65535 rows": lambda t: ggml.diag_mask_inf(t(2, 32768, 4)),
    "flash_attn_ext: q, k and v differ": lambda t: ggml.flash_attn_ext(t(2, 1, 8), t(2, 4, 8), t(2, 5, 8), scale=1),
    "flash_attn_ext: the heads of k": lambda t: ggml.flash_attn_ext(t(3, 1, 8), t(2, 4, 8), t(2, 4, 8), scale=1),
    "flash_attn_ext: the heads have no elements": lambda t: ggml.flash_attn_ext(
        t(2, 1, 0), t(2, 4, 0), t(2, 4, 8), scale=1
    ),
    "flash_attn_ext: q must be F32": lambda t: ggml.flash_attn_ext(
        t(2, 1, 8, dtype="f16"), t(2, 4, 8), t(2, 4, 8), scale=1
    ),
    "flash_attn_ext: rows of q, k and v must start at multiples of 4": lambda t: ggml.flash_attn_ext(
        t(2, 1, 8), ggml.view(t(2, 4, 9), (2, 4, 8), strides=(144, 36, 4)), t(2, 4, 8), scale=1
    ),
    "flash_attn_ext: the mask must be": lambda t: ggml.flash_attn_ext(
        t(2, 1, 8), t(2, 4, 8), t(2, 4, 8), t(1, 4), scale=1
    ),
    "flash_attn_ext: the mask does not fit": lambda t: ggml.flash_attn_ext(
        t(2, 3, 8), t(2, 4, 8), t(2, 4, 8), t(1, 4, dtype="f16"), scale=1
    ),
    "flash_attn_ext: prec must be DEFAULT or F32, not F16": lambda t: ggml.flash_attn_ext(
        t(2, 1, 8), t(2, 4, 8), t(2, 4, 8), scale=1, prec=Prec.F16
    ),
    "flash_attn_ext: max_bias": lambda t: ggml.flash_attn_ext(t(2, 1, 8), t(2, 4, 8), t(2, 4, 8), scale=1, max_bias=8),
    "flash_attn_ext: scale must be a number": lambda t: ggml.flash_attn_ext(
        t(2, 1, 8), t(2, 4, 8), t(2, 4, 8), scale=None
    ),
    "flash_attn_ext: sinks must be contiguous F32": lambda t: ggml.flash_attn_ext(
        t(2, 1, 8), t(2, 4, 8), t(2, 4, 8), None, t(2, dtype="f16"), scale=1
    ),
    "flash_attn_ext: k and v must be float": lambda t: ggml.flash_attn_ext(
        t(2, 1, 8), t(2, 4, 8, dtype="i32"), t(2, 4, 8), scale=1
    ),
}
