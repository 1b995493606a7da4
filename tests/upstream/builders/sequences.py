"""State-space models and other recurrences."""

from __future__ import annotations

import ggml_cffi as ggml
from tests.upstream.builders import UnknownCaseError, builds
from tests.upstream.draw import Inputs, permute, view
from tests.upstream.text import Params


@builds("SSM_CONV")
def ssm_conv(b: Inputs, p: Params) -> ggml.Tensor:
    a = b.new(p.type, p.ne_a if p.ne_a[3] > 1 else p.ne_a[:3])
    return ggml.ssm_conv(a, b.new(p.type, p.ne_b[:2]))


@builds("SSM_SCAN")
def ssm_scan(b: Inputs, p: Params) -> ggml.Tensor:
    tokens = (p.n_seq_tokens, p.n_seqs)
    s = b.new(p.type, (p.d_state, p.head_dim, p.n_head, p.n_seqs))
    dt = b.new(p.type, (p.n_head, *tokens))
    decay = (-0.02, -0.005) if getattr(p, "weak_decay", 0) else (-1.0, -0.5)
    a = b.new(p.type, (1 if p.head_dim > 1 else p.d_state, p.n_head), decay)
    if p.xbc_overlap:
        xbc = b.new(p.type, (p.d_state, p.n_head, p.n_seq_tokens, 2 * p.n_seqs))
        x = view(xbc, (p.head_dim, p.n_head, *tokens), offset=xbc.nb[3])
        bb = view(xbc, (p.d_state, p.n_group, *tokens))
        cc = view(xbc, (p.d_state, p.n_group, *tokens), offset=2 * xbc.nb[3])
    else:
        x = b.new(p.type, (p.head_dim, p.n_head, *tokens))
        bb, cc = (b.new(p.type, (p.d_state, p.n_group, *tokens)) for _ in range(2))
    return ggml.ssm_scan(s, x, dt, a, bb, cc, b.shuffled("i32", (p.n_seqs,)), n_snapshots=p.K)


def _heads(b: Inputs, p: Params, n: int) -> list[ggml.Tensor]:
    return [b.new(p.type, (p.head_size, p.head_count, p.n_seq_tokens * p.n_seqs)) for _ in range(n)]


def _state(b: Inputs, p: Params) -> ggml.Tensor:
    return b.new(p.type, (p.head_size**2 * p.head_count, p.n_seqs))


@builds("RWKV_WKV6")
def rwkv_wkv6(b: Inputs, p: Params) -> ggml.Tensor:
    r, k, v, td = _heads(b, p, 4)
    tf = b.new(p.type, (p.head_size, p.head_count))
    return ggml.rwkv_wkv6(k, v, r, tf, td, _state(b, p))


@builds("RWKV_WKV7")
def rwkv_wkv7(b: Inputs, p: Params) -> ggml.Tensor:
    r, w, k, v, x, y = _heads(b, p, 6)
    return ggml.rwkv_wkv7(r, w, k, v, ggml.l2_norm(x, 1e-7), ggml.l2_norm(y, 1e-7), _state(b, p))


@builds("GATED_LINEAR_ATTN")
def gated_linear_attn(b: Inputs, p: Params) -> ggml.Tensor:
    q, k, v, g = _heads(b, p, 4)
    return ggml.gated_linear_attn(k, v, q, g, _state(b, p), scale=p.head_size**-0.5)


@builds("GATED_DELTA_NET")
def gated_delta_net(b: Inputs, p: Params) -> ggml.Tensor:
    heads, tokens = p.head_count * p.v_repeat, (p.n_seq_tokens, p.n_seqs)

    def make(n: int, values: tuple[float, float]) -> ggml.Tensor:
        if p.permuted:
            return permute(b.new(p.type, (p.head_size, p.n_seq_tokens, n, p.n_seqs), values), (0, 2, 1, 3))
        return b.new(p.type, (p.head_size, n, *tokens), values)

    q, k = (ggml.l2_norm(make(p.head_count, (-1.0, 1.0)), 1e-6) for _ in range(2))
    v = make(heads, (-0.3, 5.0))
    g = b.new(p.type, (p.head_size if p.kda else 1, heads, *tokens), (-20.0, -1e-4))
    beta = b.new(p.type, (1, heads, *tokens), (0.0, 1.0))
    state = b.new(p.type, (p.head_size, p.head_size, heads, p.n_seqs))
    return ggml.gated_delta_net(q, k, v, g, beta, state, n_snapshots=p.K)


_HC = 4


@builds("DSV4_HC_COMB")
def dsv4_hc_comb(b: Inputs, p: Params) -> ggml.Tensor:
    n = (2 + _HC) * _HC
    mixes = b.new("f32", (n, p.n_tokens), (-2.0, 2.0))
    scale, base = b.new("f32", (3,), (-0.5, 0.5)), b.new("f32", (n,), (-0.25, 0.25))
    return ggml.dsv4_hc_comb(mixes, scale, base, eps=p.eps, n_iter=p.n_iter)


@builds("DSV4_HC_PRE")
def dsv4_hc_pre(b: Inputs, p: Params) -> ggml.Tensor:
    streams = getattr(p, "n_hc", _HC)
    x = b.new("f32", (p.n_embd, streams, p.n_tokens))
    if getattr(p, "gated", 0):
        return ggml.dsv4_hc_pre_gated(x, b.new("f32", x.ne[:3], (-4.0, 4.0)), 1 / streams)
    return ggml.dsv4_hc_pre(x, b.new("f32", (streams, p.n_tokens), (0.0, 1.0)))


@builds("DSV4_HC_POST")
def dsv4_hc_post(b: Inputs, p: Params) -> ggml.Tensor:
    if getattr(p, "gated", 0):
        raise UnknownCaseError("no list has had a gated case")
    x, residual = b.new("f32", (p.n_embd, p.n_tokens)), b.new("f32", (p.n_embd, _HC, p.n_tokens))
    post = b.new("f32", (_HC, p.n_tokens), (0.0, 2.0))
    comb = None if getattr(p, "identity", 0) else b.new("f32", (_HC, _HC, p.n_tokens), (0.0, 1.0))
    return ggml.dsv4_hc_post(x, residual, post, comb)
