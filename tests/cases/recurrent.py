"""State-space models and linear attention, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np

import ggml_cffi as ggml
from ggml_cffi import Type
from tests.cases import Array, In, case, reference


@reference
def ssm_conv(sx: Array, weight: Array) -> Array:
    n_tokens = sx.shape[-1] - weight.shape[1] + 1
    out = np.zeros((*sx.shape[:-2], n_tokens, sx.shape[-2]))
    for i, kernel in enumerate(weight):
        for t in range(n_tokens):
            out[..., t, i] = sx[..., i, t : t + len(kernel)] @ kernel
    return out


@reference
def ssm_scan(
    s: Array, x: Array, dt: Array, A: Array, B: Array, C: Array, ids: Array, n_snapshots: int = 1
) -> Array:  # fmt: skip
    n_seqs, n_tokens, n_heads, _ = x.shape
    y = np.zeros(x.shape)
    kept = np.zeros((n_snapshots, n_seqs, *s.shape[1:]))
    for seq in range(n_seqs):
        state = s[ids[seq]].copy()
        for t in range(n_tokens):
            for h in range(n_heads):
                group = h * B.shape[2] // n_heads
                d = np.log1p(np.exp(dt[seq, t, h]))
                state[h] = np.exp(d * A[h]) * state[h] + d * np.outer(x[seq, t, h], B[seq, t, group])
                y[seq, t, h] = state[h] @ C[seq, t, group]
            if n_tokens - 1 - t < n_snapshots:
                kept[n_tokens - 1 - t, seq] = state
    return np.concatenate([y.ravel(), kept.ravel()])


def run_heads(step: Any, state: Array, *operands: Array) -> Array:
    """Run ``step(state, head, *operands)``, which returns the new state and the result; return all rows."""
    n_tokens, n_heads, size = operands[0].shape
    states = state.reshape(-1, n_heads, size, size).copy()
    each = n_tokens // len(states)
    y = np.zeros(operands[0].shape)
    for t in range(n_tokens):
        for h in range(n_heads):
            states[t // each, h], y[t, h] = step(states[t // each, h], h, *(o[t, h] for o in operands))
    return np.concatenate([y.reshape(n_tokens, -1), states.reshape(-1, n_heads * size)])


@reference
def rwkv_wkv6(k: Array, v: Array, r: Array, tf: Array, td: Array, state: Array) -> Array:
    def step(S: Array, h: int, k: Array, v: Array, r: Array, td: Array) -> tuple[Array, Array]:
        kv = np.outer(k, v)
        return np.diag(td) @ S + kv, r @ (np.diag(tf[h]) @ kv + S)

    return run_heads(step, state, k, v, r, td)


@reference
def rwkv_wkv7(r: Array, w: Array, k: Array, v: Array, a: Array, b: Array, state: Array) -> Array:
    def step(S: Array, h: int, r: Array, w: Array, k: Array, v: Array, a: Array, b: Array) -> tuple[Array, Array]:
        S = S @ (np.diag(w) + np.outer(a, b)) + np.outer(v, k)
        return S, S @ r

    return run_heads(step, state, r, w, k, v, a, b)


@reference
def gated_linear_attn(k: Array, v: Array, q: Array, g: Array, state: Array, scale: float) -> Array:
    def step(S: Array, h: int, k: Array, v: Array, q: Array, g: Array) -> tuple[Array, Array]:
        S = np.diag(g) @ S + np.outer(k, v)
        return S, scale * q @ S

    return run_heads(step, state, k, v, q, g)


@reference
def gated_delta_net(
    q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array, n_snapshots: int = 1
) -> Array:  # fmt: skip
    n_seqs, n_tokens, n_heads, size = v.shape
    y = np.zeros(v.shape)
    kept = np.zeros((n_snapshots, *state.shape))
    for s in range(n_seqs):
        for h in range(n_heads):
            S, shared = state[s, h], h % q.shape[2]
            for t in range(n_tokens):
                key = k[s, t, shared]
                S = S * np.exp(g[s, t, h])
                S = S + beta[s, t, h] * np.outer(v[s, t, h] - S @ key, key)
                y[s, t, h] = S @ q[s, t, shared] / np.sqrt(size)
                if n_tokens - 1 - t < n_snapshots:
                    kept[n_tokens - 1 - t, s, h] = S
    return np.concatenate([y.ravel(), kept.ravel()]).reshape(-1, n_heads * size)


@reference
def solve_tri(a: Array, b: Array) -> Array:
    return np.linalg.solve(np.tril(a), b)


def scan(
    n: int = 2,
    n_seqs: int = 2,
    n_tokens: int = 3,
    n_heads: int = 4,
    size: int = 5,
    d_state: int = 6,
    groups: int = 2,
    mamba1: bool = False,
    **changed: Any,
) -> dict[str, Any]:
    """Return operands of ssm_scan."""
    return {
        "s": In((n, n_heads, size, d_state)),
        "x": In((n_seqs, n_tokens, n_heads, size)),
        "dt": In((n_seqs, n_tokens, n_heads)),
        "A": In((n_heads, d_state if mamba1 else 1), values=(-1.0, -0.1)),
        "B": In((n_seqs, n_tokens, groups, d_state)),
        "C": In((n_seqs, n_tokens, groups, d_state)),
        "ids": In((n_seqs,), Type.I32, values=n),
        **changed,
    }


def heads(op: str, tokens: int, n_heads: int, n_seqs: int, size: int = 64, **changed: Any) -> dict[str, Any]:
    """Return operands of the two RWKVs and of gated_linear_attn, so small that states do not grow."""
    small, decay = (-0.2, 0.2), (0.5, 1.0)
    given = {"rwkv_wkv6": "k v r td", "rwkv_wkv7": "r w k v a b", "gated_linear_attn": "k v q g"}[op].split()
    shape = (tokens, n_heads, size)
    made = {name: In(shape, values=decay if name in ("td", "w", "g") else small) for name in given}
    if op == "rwkv_wkv6":
        made["tf"] = In((n_heads, size))
    return {**made, "state": In((n_seqs, n_heads * size**2)), **changed}


def delta(
    n_seqs: int = 2, tokens: int = 3, n_heads: int = 4, size: int = 16, shared: int = 2, gates: int = 1, **changed: Any
) -> dict[str, Any]:
    """Return operands of gated_delta_net."""
    key = In((n_seqs, tokens, shared, size), values=(-0.3, 0.3))
    return {
        "q": key,
        "k": key,
        "v": In((n_seqs, tokens, n_heads, size)),
        "g": In((n_seqs, tokens, n_heads, gates), values=(-1.0, 0.0)),
        "beta": In((n_seqs, tokens, n_heads, 1), values=(0.0, 1.0)),
        "state": In((n_seqs, n_heads, size, size)),
        **changed,
    }


def triangle(*shape: int) -> In:
    """Return a matrix near the triangle of ones, which is well-conditioned: its inverse has two diagonals."""
    return In(shape, values=(1.0, 1.1))


CASES = [
    case("ssm_conv", sx=In((5, 9)), weight=In((5, 4))),
    case("ssm_conv", sx=In((2, 7, 8)), weight=In((7, 3))),
    case("ssm_conv", sx=In((3, 40, 20)), weight=In((40, 1))),
    case("ssm_scan", **scan()),
    case("ssm_scan", **scan(n=5, n_seqs=3, n_tokens=1, mamba1=True, size=1, n_heads=7, groups=1)),
    case("ssm_scan", **scan(n_tokens=4, n_snapshots=3)),
    case("ssm_scan", **scan(n=1, size=16, d_state=128, n_heads=4, n_snapshots=2)),
    case("ssm_scan", **scan(size=32, d_state=256, n_heads=2, n_seqs=1, groups=1)),
    case("rwkv_wkv6", **heads("rwkv_wkv6", 3, 2, 1)),
    case("rwkv_wkv6", **heads("rwkv_wkv6", 4, 1, 2)),
    case("rwkv_wkv6", **heads("rwkv_wkv6", 3, 5, 3)),
    case("rwkv_wkv7", **heads("rwkv_wkv7", 3, 2, 1)),
    case("rwkv_wkv7", **heads("rwkv_wkv7", 4, 1, 2)),
    case("rwkv_wkv7", **heads("rwkv_wkv7", 3, 5, 3)),
    case("gated_linear_attn", **heads("gated_linear_attn", 3, 2, 1, scale=0.125)),
    case("gated_linear_attn", **heads("gated_linear_attn", 4, 3, 2, 9, scale=1.0)),
    case("gated_linear_attn", **heads("gated_linear_attn", 6, 1, 3, 32, scale=-0.5)),
    case("gated_delta_net", **delta()),
    case("gated_delta_net", **delta(size=5, shared=4, gates=5)),
    case("gated_delta_net", **delta(size=32, gates=32, n_seqs=1, shared=1, tokens=4, n_snapshots=3)),
    case("gated_delta_net", **delta(q=In((2, 3, 2, 16), layout="gaps"), k=In((2, 3, 2, 16), layout="gaps"))),
    case("gated_delta_net", **delta(v=In((2, 3, 4, 16), layout="permuted"), n_snapshots=2)),
    case("solve_tri", a=triangle(1, 1), b=In((1, 3))),
    case("solve_tri", a=triangle(9, 9), b=In((9, 5))),
    case("solve_tri", a=triangle(2, 3, 20, 20), b=In((2, 3, 20, 1))),
    case("solve_tri", a=triangle(64, 64), b=In((64, 3))),
]


def call(op, operands, t, **changed):  # type: ignore[no-untyped-def]
    """Call ``op`` with inputs in the shapes of its operands, some of them changed."""
    made = {k: t(*v.shape, dtype=v.dtype) if isinstance(v, In) else v for k, v in {**operands, **changed}.items()}
    return getattr(ggml, op)(**made)


def rwkv6(t, **changed):  # type: ignore[no-untyped-def]
    return call("rwkv_wkv6", heads("rwkv_wkv6", 4, 3, 2), t, **changed)


WRONG = {
    "ssm_conv: sx must have two or three axes": lambda t: ggml.ssm_conv(t(2, 2, 5, 9), t(5, 4)),
    "ssm_conv: sx needs the channels of weight": lambda t: ggml.ssm_conv(t(6, 9), t(5, 4)),
    "and d_conv - 1 inputs or more": lambda t: ggml.ssm_conv(t(5, 2), t(5, 4)),
    "ssm_conv: sx must be F32": lambda t: ggml.ssm_conv(t(5, 9, dtype="f16"), t(5, 4)),
    "ssm_conv: sx must not have gaps": lambda t: ggml.ssm_conv(ggml.view(t(5, 10), (5, 9), strides=(40, 4)), t(5, 4)),
    "ssm_conv: weight must be contiguous F32": lambda t: ggml.ssm_conv(t(5, 9), t(5, 4, dtype="f16")),
    "ssm_conv: more than 65535 sequences": lambda t: ggml.ssm_conv(t(65536, 1, 1), t(1, 1)),
    "ssm_conv: sx has more than 2**31": lambda t: ggml.ssm_conv(t(2**16, 2**15), t(2**16, 1)),
    "ssm_conv: sx starts inside": lambda t: ggml.ssm_conv(ggml.view(t(50), (5, 9), offset=4), t(5, 4)),
    "ssm_scan: s must be contiguous F32": lambda t: call("ssm_scan", scan(), t, s=t(2, 4, 5, 6, dtype="f16")),
    "ssm_scan: x must be F32 with": lambda t: call("ssm_scan", scan(), t, x=t(2, 3, 5, 4).permute(0, 1, 3, 2)),
    "ssm_scan: x, B and C must not have gaps": lambda t: call(
        "ssm_scan", scan(), t, x=t(2, 4, 3, 5).permute(0, 2, 1, 3)
    ),
    "ssm_scan: ids must be contiguous I32": lambda t: call("ssm_scan", scan(), t, ids=t(2)),
    "ssm_scan: s and dt do not fit": lambda t: call("ssm_scan", scan(), t, dt=t(2, 3, 5)),
    "ssm_scan: B, C and ids do not fit": lambda t: call("ssm_scan", scan(), t, C=t(2, 4, 2, 6)),
    "ssm_scan: B, C and ids do not fit x:": lambda t: call("ssm_scan", scan(), t, ids=t(3, dtype="i32")),
    "ssm_scan: A must be of shape": lambda t: call("ssm_scan", scan(), t, A=t(4, 2)),
    "ssm_scan: the groups of B and C": lambda t: call("ssm_scan", scan(groups=3), t),
    "ssm_scan: x has no elements": lambda t: call("ssm_scan", scan(n_tokens=0), t),
    "ssm_scan: n_snapshots 4 exceeds the number of tokens": lambda t: call("ssm_scan", scan(), t, n_snapshots=4),
    "or 1 for Mamba-1": lambda t: call("ssm_scan", scan(mamba1=True), t, n_snapshots=2),
    "ssm_scan: n_snapshots must be 1": lambda t: call("ssm_scan", scan(), t, n_snapshots=0),
    "ssm_scan: n_snapshots must be an integer": lambda t: call("ssm_scan", scan(), t, n_snapshots=1.0),
    "ssm_scan: there are more than 65535": lambda t: call("ssm_scan", scan(n_seqs=65536), t),
    "ssm_scan: heads times head_size must be a multiple": lambda t: call(
        "ssm_scan", scan(n_heads=1, groups=1, size=16, d_state=256), t
    ),
    "ssm_scan: s starts inside": lambda t: call("ssm_scan", scan(), t, s=ggml.view(t(241), (2, 4, 5, 6), offset=4)),
    "rwkv_wkv6: k must be contiguous F32": lambda t: rwkv6(t, k=t(4, 3, 64, dtype="f16")),
    "rwkv_wkv6: all operands but the state must have one shape": lambda t: rwkv6(t, v=t(4, 2, 64)),
    "rwkv_wkv6: all operands but the state must have one": lambda t: rwkv6(
        t, **dict.fromkeys(("k", "v", "r", "td"), t(2, 4, 3, 64))
    ),
    "rwkv_wkv6: tf must be contiguous F32": lambda t: rwkv6(t, tf=t(3, 64, dtype="f16")),
    "rwkv_wkv6: tf must be of shape": lambda t: rwkv6(t, tf=t(64)),
    "rwkv_wkv6: tf starts inside": lambda t: rwkv6(t, tf=ggml.view(t(200), (3, 64), offset=4)),
    "rwkv_wkv6: head_size must be 64": lambda t: call("rwkv_wkv6", heads("rwkv_wkv6", 4, 3, 2, 32), t),
    "rwkv_wkv6: state must be of shape": lambda t: rwkv6(t, state=t(2, 64, 64 * 3)),
    "rwkv_wkv6: the sequences must have the same number": lambda t: call("rwkv_wkv6", heads("rwkv_wkv6", 4, 3, 3), t),
    "rwkv_wkv6: k has no elements": lambda t: call("rwkv_wkv6", heads("rwkv_wkv6", 0, 3, 2), t),
    "rwkv_wkv6: state has no elements": lambda t: call("rwkv_wkv6", heads("rwkv_wkv6", 4, 3, 0), t),
    "rwkv_wkv6: there are more than": lambda t: call("rwkv_wkv6", heads("rwkv_wkv6", 4, 32768, 2), t),
    "rwkv_wkv7: head_size must be 64": lambda t: call("rwkv_wkv7", heads("rwkv_wkv7", 4, 3, 2, 128), t),
    "gated_linear_attn: v starts inside": lambda t: call(
        "gated_linear_attn",
        heads("gated_linear_attn", 4, 3, 2, scale=1.0),
        t,
        v=ggml.view(t(999), (4, 3, 64), offset=4),
    ),
    "gated_linear_attn: scale must be a finite": lambda t: call(
        "gated_linear_attn", heads("gated_linear_attn", 4, 3, 2), t, scale=float("inf")
    ),
    "gated_delta_net: v must be F32 with contiguous rows": lambda t: call(
        "gated_delta_net", delta(), t, v=t(2, 3, 4, 16, dtype="f16")
    ),
    "gated_delta_net: g must be contiguous F32": lambda t: call(
        "gated_delta_net", delta(), t, g=t(2, 4, 3, 1).permute(0, 2, 1, 3)
    ),
    "gated_delta_net: q and k must have the same shape and strides": lambda t: call(
        "gated_delta_net", delta(), t, k=t(2, 2, 3, 16).permute(0, 2, 1, 3)
    ),
    "gated_delta_net: q and k must have v's shape": lambda t: call("gated_delta_net", delta(shared=3), t),
    "q and k must have v's shape, or fewer heads, which": lambda t: call("gated_delta_net", delta(shared=0), t),
    "gated_delta_net: g and beta must have one": lambda t: call("gated_delta_net", delta(gates=2), t),
    "gated_delta_net: g and beta must": lambda t: call("gated_delta_net", delta(), t, beta=t(2, 3, 5, 1)),
    "gated_delta_net: state must be": lambda t: call("gated_delta_net", delta(), t, state=t(1, 4, 16, 16)),
    "gated_delta_net: q has no elements": lambda t: call("gated_delta_net", delta(tokens=0), t),
    "gated_delta_net: n_snapshots 4": lambda t: call("gated_delta_net", delta(n_snapshots=4), t),
    "gated_delta_net: there are more than": lambda t: call("gated_delta_net", delta(n_seqs=65536, size=1), t),
    "gated_delta_net: v starts inside": lambda t: call(
        "gated_delta_net", delta(), t, v=ggml.view(t(999), (2, 3, 4, 16), offset=4)
    ),
    "solve_tri: a must be square": lambda t: ggml.solve_tri(t(4, 5), t(4, 2)),
    "and b have as many rows": lambda t: ggml.solve_tri(t(4, 4), t(5, 2)),
    "the same leading axes": lambda t: ggml.solve_tri(t(2, 4, 4), t(4, 2)),
    "solve_tri: a has more than 64 rows": lambda t: ggml.solve_tri(t(65, 65), t(65, 2)),
    "solve_tri: a must be contiguous F32": lambda t: ggml.solve_tri(t(4, 4).T, t(4, 2)),
}
