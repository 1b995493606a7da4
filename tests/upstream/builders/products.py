"""Matrix products, attention and rotary positions."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

import ggml_cffi as ggml
from ggml_cffi import c
from ggml_cffi.core import dtypes
from ggml_cffi.enums import OpHint, Prec
from tests.upstream.builders import UnknownCaseError, builds
from tests.upstream.draw import Array, Inputs, mask, permute, sparse_mask, times, view
from tests.upstream.text import Params

_LAYOUT = "type_b per k_v m_v pad"  # each of them makes a layout of its own


def _mul_mat(prec: Prec) -> Callable[[Inputs, Params], ggml.Tensor]:
    """Make a builder for products whose second operand may be rounded to a precision."""

    def build(b: Inputs, p: Params) -> ggml.Tensor:
        x, y = _factors(b, p)
        out = ggml.mul_mat(x, y, b_prec=prec)
        for _ in range(p.o - 1):
            out = ggml.add(out, ggml.mul_mat(x, y, b_prec=prec))
        return out

    return build


def _factors(b: Inputs, p: Params) -> tuple[ggml.Tensor, ggml.Tensor]:
    ne_a, ne_b = (p.k, p.m, *p.bs), (p.k, p.n, *times(p.bs, p.nr))
    reach = getattr(p, "src1", (-1, 1))
    rows, pad = getattr(p, "m_v", 0), getattr(p, "pad", 0)
    if getattr(p, "src_overlap", 0):
        both = b.new(p.type_a, (2 * p.k, max(p.m, p.n), *ne_b[2:]))
        return view(both, ne_a), view(both, ne_b, offset=p.k * both.nb[0])
    if p.per != (0, 1, 2, 3):
        x = permute(b.new(p.type_a, [ne_a[i] for i in p.per]), p.per)
        return x, permute(b.new(p.type_b, [ne_b[i] for i in p.per], reach), p.per)
    if p.k_v:
        x = view(b.new(p.type_a, (p.k_v, *ne_a[1:])), ne_a)
        return x, view(b.new(p.type_b, (p.k_v, *ne_b[1:]), reach), ne_b)
    if rows:  # the first m rows of matrices of m_v rows, which pad bytes separate
        x = b.new(p.type_a, (p.k, rows + (pad > 0), *p.bs))
        nb = (x.nb[0], x.nb[1], rows * x.nb[1] + pad, x.nb[3])
        return view(x, ne_a, nb=nb), b.new(p.type_b, ne_b, reach)
    return b.new(p.type_a, ne_a), b.new(p.type_b, ne_b, reach)


builds("MUL_MAT", unused=_LAYOUT)(_mul_mat(Prec.DEFAULT))
builds("MUL_MAT_W4A8", unused=_LAYOUT)(_mul_mat(Prec.Q8))
builds("MUL_MAT_W4A4", unused=_LAYOUT)(_mul_mat(Prec.Q4))


@builds("MUL_MAT_HADAMARD", unused="per k_v o src_overlap m_v pad")
def mul_mat_hadamard(b: Inputs, p: Params) -> ggml.Tensor:
    def hadamard(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        n = shape[-1]
        i = np.arange(math.prod(shape[:-1]))[:, None] & np.arange(n)
        odd = np.array([number.bit_count() % 2 for number in i.ravel().tolist()])
        return np.where(odd, -1, 1).reshape(shape) / math.sqrt(n)

    x = b.new(p.type_a, (p.k, p.m, *p.bs), hadamard)
    y = b.new(p.type_b, (p.k, p.n, *times(p.bs, p.nr)))
    out = ggml.mul_mat(x, y)
    c.ggml_mul_mat_set_hint(out.ptr, OpHint.SRC0_IS_HADAMARD)
    return out


def _mul_mat_id(prec: Prec) -> Callable[[Inputs, Params], ggml.Tensor]:
    """Make a builder for products whose second operand may be rounded to a precision."""

    def build(b: Inputs, p: Params) -> ggml.Tensor:
        rows, amax = getattr(p, "m_v", 0), getattr(p, "amax", 1.0)
        if getattr(p, "ids_offset", 0):
            raise UnknownCaseError("no list has had an offset of the ids")
        a = b.new(p.type_a, (p.k, rows or p.m, p.n_mats))
        if rows:
            a = view(a, (p.k, p.m, p.n_mats))
        ids = b.shuffled("i32", (p.n_mats, p.n), p.n_mats)
        if p.n_used != p.n_mats:
            ids = view(ids, (p.n_used, p.n))
        y = b.new(p.type_b, (p.k, 1 if p.b else p.n_used, p.n), (-amax, amax))
        return ggml.mul_mat_id(a, y, ids, b_prec=Prec.F32 if amax > 1 else prec)  # F16 has no such values

    return build


builds("MUL_MAT_ID")(_mul_mat_id(Prec.DEFAULT))
builds("MUL_MAT_ID_W4A8")(_mul_mat_id(Prec.Q8))
builds("MUL_MAT_ID_W4A4")(_mul_mat_id(Prec.Q4))


@builds("OUT_PROD")
def out_prod(b: Inputs, p: Params) -> ggml.Tensor:
    x = b.new(p.type_a, (p.m, p.k, *p.bs))
    batch = times(p.bs, p.nr)
    y = ggml.transpose(b.new(p.type_b, (p.k, p.n, *batch))) if p.trans_b else b.new(p.type_b, (p.n, p.k, *batch))
    return ggml.out_prod(x, y)


@builds("FLASH_ATTN_EXT", unused="prec")
def flash_attn_ext(b: Inputs, p: Params) -> ggml.Tensor:
    def padded(n: int, kind: str) -> int:
        block = dtypes.block_size(dtypes.as_type(kind))
        return -(-n // block) * block

    def make(kind: str, ne: tuple[int, ...], part: bool, reach: tuple[float, float] = (-1.0, 1.0)) -> ggml.Tensor:
        stored = [0] * 4
        for i, place in enumerate(p.permute):
            stored[place] = ne[i]
        t = view(b.new(kind, times(stored, (1, 2, 1, 1))), stored) if part else b.new(kind, stored, reach)
        return t if p.permute == (0, 1, 2, 3) else permute(t, p.permute)

    hsk, hsv = padded(p.hsk, p.type_K), padded(p.hsv, p.type_V)
    cached, visible = bool(getattr(p, "kv_view", 1)), getattr(p, "n_kv_max", 0)
    reach = getattr(p, "q_range", 1)
    q = make("f32", (hsk, p.nb, p.nh * p.nr23[0], p.nr23[1]), False, (-reach, reach))
    k = make(p.type_K, (hsk, p.kv, p.nh, p.nr23[1]), cached)
    if getattr(p, "v_is_view_of_k", p.type_K == p.type_V and (hsk, hsv) == (576, 512)):
        v = view(k, (hsv, p.kv, p.nh, p.nr23[1]))
    else:
        v = make(p.type_V, (hsv, p.kv, p.nh, p.nr23[1]), cached)
    # Upstream also tells the operation how many keys are visible, which only permits it to skip the others.
    m = b.new("f16", (p.kv, p.nb, 1, p.nr23[1]), sparse_mask(visible) if visible else mask) if p.mask else None
    sinks = b.new("f32", (q.ne[2],), (-10.0, 10.0)) if p.sinks else None
    # Sums are always F32 here, so "def", with which devices may sum in F16, is the same case.
    return ggml.flash_attn_ext(
        q, k, v, m, sinks, scale=1 / math.sqrt(p.hsk), max_bias=p.max_bias, logit_softcap=p.logit_softcap
    )


_MROPE, _VISION = 8, 24


@builds("ROPE")
def rope(b: Inputs, p: Params) -> ggml.Tensor:
    return _rope(b, p, "_inplace" if p.inplace else "")


@builds("ROPE_BACK", unused="inplace")
def rope_back(b: Inputs, p: Params) -> ggml.Tensor:
    return _rope(b, p, "_back")


def _rope(b: Inputs, p: Params, form: str) -> ggml.Tensor:
    if p.v & 1:
        a = view(b.new(p.type, times(p.ne_a, (2, 4, 3, 1))), p.ne_a)
    elif p.v == 2:
        whole = b.new(p.type, times(p.ne_a, (2, 1, 1, 1)))
        a = view(whole, p.ne_a, offset=p.ne_a[0] * whole.nb[0])
    else:
        a = b.new(p.type, p.ne_a)
    multi = bool(p.mode & _MROPE)
    n_pos = p.ne_a[2] * (4 if multi else 1)
    positions = b.ids("i32", (n_pos,), p.n_ctx)
    # The CPU also reads factors of the elements that are not rotated, which upstream's tensor lacks.
    freq = b.new("f32", (max(p.n_dims, p.ne_a[0]) // 2,), (0.9, 1.1)) if p.ff else None
    options = {
        "n_dims": p.n_dims // 2 if p.mode == _VISION else p.n_dims,
        "mode": p.mode,
        "freq_scale": p.fs,
        "ext_factor": p.ef,
        "attn_factor": p.af,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
    }
    if multi:
        n = p.n_dims // (4 if p.mode == _VISION else 3)
        options["sections"] = (n, n, 0, 0) if p.mode == _VISION else (n, n, n, 0)
    if getattr(p, "n_offs", 0):
        options["offset"] = p.n_offs
    name = ("rope_multi" if multi else "rope_ext") + form
    return getattr(ggml, name)(a, positions, freq, **options)


@builds("LIGHTNING_INDEXER")
def lightning_indexer(b: Inputs, p: Params) -> ggml.Tensor:
    q = b.new("f32", (p.hsk, p.nh, p.nb, p.ns))
    k = b.new(p.type_K, (p.hsk, 1, p.kv, p.ns))
    w = b.new("f32", (p.nh, p.nb, 1, p.ns))
    return ggml.lightning_indexer(q, k, w, b.new("f16", (p.kv, p.nb, 1, p.nm), mask))
