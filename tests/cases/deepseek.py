"""DeepSeek's indexer and hyper-connections."""

from __future__ import annotations

import numpy as np

import ggml_cffi as ggml
from ggml_cffi import Type
from tests.cases import Array, In, case, reference
from tests.cases.unary import sigmoid


@reference
def lightning_indexer(q: Array, k: Array, weights: Array, mask: Array) -> Array:
    if q.ndim == 3:  # sequences are an axis in front
        return np.einsum("th,thn->tn", weights, np.maximum(np.einsum("thi,nji->thn", q, k), 0)) + mask
    each = len(q) // len(mask)
    one = [lightning_indexer(q[s], k[s], weights[s, 0], mask[s % len(mask), 0]) for s in range(len(mask) * each)]
    return np.array(one)[:, None]


@reference
def dsv4_hc_comb(mixes: Array, scale: Array, base: Array, eps: float = 1e-6, n_iter: int = 20) -> Array:
    out = np.zeros((len(mixes), 4, 4))
    for t, row in enumerate(mixes):
        w = np.exp((row * scale[2] + base)[-16:].reshape(4, 4))
        w = w / w.sum(1, keepdims=True) + eps
        w /= w.sum(0) + eps
        for _ in range(n_iter - 1):
            w /= w.sum(1, keepdims=True) + eps
            w /= w.sum(0) + eps
        out[t] = w
    return out


@reference
def dsv4_hc_pre(x: Array, weights: Array) -> Array:
    return np.array([w @ streams for w, streams in zip(weights, x, strict=True)])


@reference
def dsv4_hc_pre_gated(x: Array, gate: Array, scale: float = 1.0) -> Array:
    return scale * np.sum(x * sigmoid(gate), 1)


@reference
def dsv4_hc_post(x: Array, residual: Array, post: Array, comb: Array | None = None) -> Array:
    mixed = residual if comb is None else comb.transpose(0, 2, 1) @ residual
    return x[:, None] * post[..., None] + mixed


CASES = [
    case("lightning_indexer", q=In((3, 2, 8)), k=In((5, 1, 8)), weights=In((3, 2)), mask=In((3, 5), Type.F16)),
    case(
        "lightning_indexer",
        q=In((4, 3, 2, 32), layout="permuted"),
        k=In((4, 5, 1, 32), Type.Q8_0),
        weights=In((4, 1, 3, 2), layout="gaps"),
        mask=In((2, 1, 3, 5), Type.F16, "gaps"),
    ),
    case(
        "lightning_indexer",
        q=In((1, 7, 33), layout="gaps"),
        k=In((4, 1, 33), Type.F16, "gaps"),
        weights=In((1, 7)),
        mask=In((1, 4), Type.F16),
    ),
    case("dsv4_hc_comb", mixes=In((5, 24)), scale=In((3,)), base=In((24,))),
    case("dsv4_hc_comb", mixes=In((1, 24)), scale=In((7,)), base=In((24,)), eps=0.01, n_iter=1),
    case("dsv4_hc_comb", mixes=In((3, 24), layout="transposed"), scale=In((3,)), base=In((24,)), eps=0.0, n_iter=3),
    case("dsv4_hc_pre", x=In((3, 4, 7)), weights=In((3, 4))),
    case("dsv4_hc_pre", x=In((3, 2, 5), layout="permuted"), weights=In((3, 2), layout="gaps")),
    case("dsv4_hc_pre", x=In((1, 1, 33), layout="transposed"), weights=In((1, 1))),
    case("dsv4_hc_pre_gated", x=In((3, 4, 7)), gate=In((3, 4, 7))),
    case("dsv4_hc_pre_gated", x=In((3, 2, 5), layout="permuted"), gate=In((3, 2, 5), layout="gaps"), scale=0.5),
    case("dsv4_hc_pre_gated", x=In((1, 1, 33), layout="gaps"), gate=In((1, 1, 33), layout="permuted"), scale=-2.0),
    case("dsv4_hc_post", x=In((3, 7)), residual=In((3, 4, 7)), post=In((3, 4))),
    case(
        "dsv4_hc_post",
        x=In((3, 5), layout="transposed"),
        residual=In((3, 2, 5), layout="permuted"),
        post=In((3, 2), layout="gaps"),
    ),
    case("dsv4_hc_post", x=In((3, 7)), residual=In((3, 4, 7)), post=In((3, 4)), comb=In((3, 4, 4))),
    case(
        "dsv4_hc_post",
        x=In((3, 5), layout="transposed"),
        residual=In((3, 2, 5), layout="permuted"),
        post=In((3, 2), layout="gaps"),
        comb=In((3, 2, 2), layout="transposed"),
    ),
    case("dsv4_hc_post", x=In((1, 1)), residual=In((1, 1, 1)), post=In((1, 1)), comb=In((1, 1, 1))),
]


def index(t, q=(3, 2, 8), k=(5, 1, 8), weights=(3, 2), mask=(3, 5), dtypes=None):  # type: ignore[no-untyped-def]
    made = {"q": q, "k": k, "weights": weights, "mask": mask}
    kinds = {"mask": "f16", **(dtypes or {})}
    return ggml.lightning_indexer(**{name: t(*shape, dtype=kinds.get(name, "f32")) for name, shape in made.items()})


def comb(t, mixes=(5, 24), scale=(3,), base=(24,), **params):  # type: ignore[no-untyped-def]
    return ggml.dsv4_hc_comb(t(*mixes), t(*scale), t(*base), **params)


WRONG = {
    "lightning_indexer: k and weights do not fit q": lambda t: index(t, k=(5, 2, 8)),
    "lightning_indexer: k and weights do not": lambda t: index(t, k=(5, 1, 9)),
    "lightning_indexer: k and weights do": lambda t: index(t, weights=(2, 3)),
    "lightning_indexer: mask does not fit": lambda t: index(t, mask=(3, 6)),
    "lightning_indexer: mask does not": lambda t: index(
        t, q=(3, 3, 2, 8), k=(3, 5, 1, 8), weights=(3, 1, 3, 2), mask=(2, 1, 3, 5)
    ),
    "lightning_indexer: mask must be F16": lambda t: index(t, dtypes={"mask": "f32"}),
    "lightning_indexer: q must be F32": lambda t: index(t, dtypes={"q": "f16"}),
    "lightning_indexer: k must be float or quantized": lambda t: index(t, dtypes={"k": "i32"}),
    "dsv4_hc_comb: mixes must be of shape": lambda t: comb(t, mixes=(5, 25)),
    "and base (24,)": lambda t: comb(t, base=(2, 24)),
    "dsv4_hc_comb: scale must be a vector": lambda t: comb(t, scale=(2,)),
    "dsv4_hc_comb: n_iter must be": lambda t: comb(t, n_iter=0),
    "dsv4_hc_comb: eps must be": lambda t: comb(t, eps=-1.0),
    "dsv4_hc_pre: x and weights do not fit": lambda t: ggml.dsv4_hc_pre(t(3, 4, 5), t(3, 5)),
    "dsv4_hc_pre: x must be F32": lambda t: ggml.dsv4_hc_pre(t(3, 4, 5, dtype="f16"), t(3, 4)),
    "dsv4_hc_pre: x and weights do not": lambda t: ggml.dsv4_hc_pre(t(3, 0, 5), t(3, 0)),
    "dsv4_hc_pre_gated: x and gate must both be": lambda t: ggml.dsv4_hc_pre_gated(t(3, 4, 5), t(3, 4)),
    "dsv4_hc_pre_gated: gate must be F32": lambda t: ggml.dsv4_hc_pre_gated(t(3, 4, 5), t(3, 4, 5, dtype="f16")),
    "dsv4_hc_pre_gated: scale must be": lambda t: ggml.dsv4_hc_pre_gated(t(3, 4, 5), t(3, 4, 5), float("nan")),
    "dsv4_hc_post: x must be (n_tokens, n_embd)": lambda t: ggml.dsv4_hc_post(t(3, 6), t(3, 4, 5), t(3, 4), t(3, 4, 4)),
    "dsv4_hc_post: post and comb do not fit": lambda t: ggml.dsv4_hc_post(t(3, 5), t(3, 4, 5), t(3, 4), t(3, 4, 5)),
}
