"""Rows, copies and shapes."""

from __future__ import annotations

import ggml_cffi as ggml
from ggml_cffi.enums import ScaleFlag, ScaleMode, TriType
from tests.upstream.builders import builds
from tests.upstream.draw import Inputs, lower, permute, times, view
from tests.upstream.text import Params


@builds("GET_ROWS", unused="offset_cols")
def get_rows(b: Inputs, p: Params) -> ggml.Tensor:
    ne, older = (p.n, p.m, p.be1, p.be2), not hasattr(p, "vs0")
    if older or not p.vs0:
        a = b.new(p.type, ne)
    else:
        a = b.new(p.type, (p.n + p.offset_cols, p.m + 3, p.be1, p.be2))
        a = view(a, ne, offset=p.offset_cols * a.nb[0] + 3 * a.nb[1])
    if not p.v:
        return ggml.get_rows(a, b.ids("i32", (p.r, p.be1, p.be2), p.m))
    rows = b.ids("i32", (p.r if older else p.r + 1, p.be1, p.be2), p.m)
    return ggml.get_rows(a, view(rows, (p.r // 2, p.be1, p.be2), offset=0 if older else rows.nb[0]))


@builds("GET_ROWS_BACK")
def get_rows_back(b: Inputs, p: Params) -> ggml.Tensor:
    rows = b.ids("i32", (p.r, p.b) if p.b > 1 else (p.r,), p.m)
    grad = b.new(p.type, (p.n, p.r, p.b) if p.b > 1 else (p.n, p.r))
    return ggml.get_rows_back(grad, view(rows, (p.r // 2, *rows.ne[1 : rows.ndim])) if p.v else rows, p.m)


@builds("SET_ROWS")
def set_rows(b: Inputs, p: Params) -> ggml.Tensor:
    k, m, n2, n3 = times(p.ne, (1, 1, *p.nr23))
    a = b.new(p.type_dst, (k, m, n2, n3))
    src = b.new(p.type_src, (k, p.r, n2, n3))
    rows = b.chosen(p.type_idx, (p.r, *p.ne[2:]), p.ne[1])
    if p.v:
        src = view(src, (k, p.r // 2, n2, n3))
        rows = view(rows, (p.r // 2, *p.ne[2:]))
    return ggml.set_rows(a, src, rows)


@builds("REPEAT")
def repeat(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.repeat(b.new(p.type, p.ne), tuple(reversed(times(p.ne, p.nr))))


@builds("REPEAT_BACK")
def repeat_back(b: Inputs, p: Params) -> ggml.Tensor:
    a = b.new(p.type, times(p.ne, p.nr))
    if p.v:
        a = view(a, [n if r == 1 else n // 2 for n, r in zip(a.ne, p.nr, strict=True)])
    return ggml.repeat_back(a, tuple(reversed(p.ne)))


@builds("DUP")
def dup(b: Inputs, p: Params) -> ggml.Tensor:
    a = b.new(p.type, p.ne)
    return ggml.dup(permute(a, p.permute) if hasattr(p, "permute") else a)


@builds("SET")
def set_part(b: Inputs, p: Params) -> ggml.Tensor:
    part = b.new(p.type_src, p.ne)
    sizes = times(p.ne, [2 if i < p.dim else 1 for i in range(4)])
    whole = b.new(p.type_dst, sizes)
    offset = sum((sizes[i] - p.ne[i]) // 2 * whole.nb[i] for i in range(p.dim))
    function = ggml.set_inplace if p.inplace else ggml.set
    return function(whole, part, strides=_strides(part), offset=offset)


@builds("ACC")
def acc(b: Inputs, p: Params) -> ggml.Tensor:
    a = b.new(p.type, p.ne_a)
    if p.stride_dim > 0:
        padded = b.new(p.type, [n + (i == p.stride_dim) for i, n in enumerate(p.ne_b)])
        part = view(padded, p.ne_b, offset=padded.nb[1])
    else:
        part = b.new(p.type, p.ne_b)
    return ggml.acc(a, part, strides=_strides(a))


def _strides(t: ggml.Tensor) -> tuple[int, ...]:
    return tuple(reversed(t.nb))


@builds("CPY", unused="permute_dst")
def cpy(b: Inputs, p: Params) -> ggml.Tensor:
    reach = (-150.0, 150.0)
    src = b.new(p.type_src, p.ne_src, reach)
    if any(p.permute_src):
        src = permute(src, p.permute_src)
    if p._src_transpose:
        src = ggml.transpose(src)
    ne = getattr(p, "ne_dst", src.ne)
    if hasattr(p, "dst_alloc"):
        b.read = b.new(p.type_dst, p.dst_alloc, reach)
        dst = view(b.read, ne)
    else:
        dst = b.read = b.new(p.type_dst, ne, reach)
        if any(p.permute_dst):
            dst = permute(dst, p.permute_dst)
    return ggml.cpy(src, dst)


@builds("CONT", unused="use_view_slice")
def cont(b: Inputs, p: Params) -> ggml.Tensor:
    a = b.new(p.type, p.ne)
    if any(getattr(p, "permute", ())):
        return ggml.cont(permute(a, p.permute))
    if p.use_view_slice:
        return ggml.cont(view(a, (p.ne[0], 1, *p.ne[2:]), offset=a.nb[0] * (p.ne[1] - 1)))
    return ggml.cont(ggml.transpose(a))


@builds("CONCAT")
def concat(b: Inputs, p: Params) -> ggml.Tensor:
    def make(
        ne: tuple[int, ...], inner: bool, outer: bool, by: tuple[int, ...], by_outer: tuple[int, ...]
    ) -> ggml.Tensor:
        if inner or outer:
            return view(b.new(p.type, times(ne, by if inner else by_outer)), ne)
        return b.new(p.type, ne)

    ne_b = tuple(p.ne_b_d if i == p.dim else n for i, n in enumerate(p.ne_a))
    x = make(p.ne_a, bool(p.v & 1), bool(p.v & 4), (2, 4, 3, 1), (1, 1, 2, 4))
    y = make(ne_b, bool(p.v & 2), bool(p.v & 8), (3, 2, 4, 1), (1, 1, 3, 2))
    return ggml.concat(x, y, 3 - p.dim)


@builds("PAD")
def pad(b: Inputs, p: Params) -> ggml.Tensor:
    a = b.new(p.type, p.ne_a)
    if hasattr(p, "pad_0"):
        widths = [(0, 0), (0, 0), (0, p.pad_1), (0, p.pad_0)]
    else:
        widths = [(p.lp3, p.rp3), (p.lp2, p.rp2), (p.lp1, p.rp1), (p.lp0, p.rp0)]
        if p.tfrm == 1:
            a = view(a, [(n + 1) // 2 for n in a.ne])
        elif p.tfrm == 2:
            a = permute(a, (2, 1, 0, 3))
    return (ggml.pad_circular if p.circular else ggml.pad)(a, widths)


@builds("PAD_REFLECT_1D")
def pad_reflect_1d(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.pad_reflect_1d(b.new(p.type, p.ne_a[:2]), (p.pad_0, p.pad_1))


@builds("ROLL")
def roll(b: Inputs, p: Params) -> ggml.Tensor:
    a = b.new("f32", (10, 5, 4, 3))
    shifts = (p.shift4, p.shift3, p.shift1, p.shift0)
    return ggml.roll(permute(a, (0, 2, 1, 3)) if p.permute else a, shifts, (0, 1, 2, 3))


@builds("ARANGE", unused="type")
def arange(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.arange(p.start, p.stop, p.step, ctx=b.ctx)


@builds("TIMESTEP_EMBEDDING")
def timestep_embedding(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.timestep_embedding(b.new(p.type, p.ne_a[:1]), p.dim, p.max_period)


@builds("TRI")
def tri(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.tri(b.new(p.type, p.ne), TriType(p.tri_type))


@builds("FILL")
def fill(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.fill(b.new(p.type, p.ne), p.c)


@builds("DIAG")
def diag(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.diag(b.new(p.type, p.ne))


@builds("DIAG_MASK_INF")
def diag_mask_inf(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.diag_mask_inf(b.new(p.type, p.ne), p.n_past)


@builds("SOLVE_TRI")
def solve_tri(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.solve_tri(b.new(p.type, p.ne_lhs, lower), b.new(p.type, p.ne_rhs))


@builds("UPSCALE")
def upscale(b: Inputs, p: Params) -> ggml.Tensor:
    a = b.new(p.type, p.ne)
    name, *options = p.mode.upper().split("|")
    mode, flags = ScaleMode[name], ScaleFlag(0)
    for option in options:
        flags |= ScaleFlag[option]
    if hasattr(p, "ne_tgt"):
        return ggml.interpolate(a, tuple(reversed(p.ne_tgt)), mode, flags)
    return ggml.upscale(ggml.transpose(a) if p.transpose else a, p.scale_factor, mode)
