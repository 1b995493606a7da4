"""Convolutions and pooling."""

from __future__ import annotations

import math

import ggml_cffi as ggml
from ggml_cffi.enums import OpPool
from tests.upstream.builders import builds
from tests.upstream.draw import Inputs, permute, view
from tests.upstream.text import Params


@builds("POOL_1D")
def pool_1d(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.pool_1d(b.new(p.type_input, p.ne_input), OpPool[p.pool_type.upper()], p.k0, p.s0, p.p0)


@builds("POOL_2D")
def pool_2d(b: Inputs, p: Params) -> ggml.Tensor:
    a = b.new(p.type_input, p.ne_input)
    return ggml.pool_2d(a, OpPool[p.pool_type.upper()], (p.k1, p.k0), (p.s1, p.s0), (p.p1, p.p0))


@builds("CONV_TRANSPOSE_1D", unused="p0 d0")
def conv_transpose_1d(b: Inputs, p: Params) -> ggml.Tensor:
    a, kernel = b.new("f32", p.ne_input), b.new("f32", p.ne_kernel)
    return ggml.conv_transpose_1d(a, kernel, stride=p.s0)


@builds("CONV_TRANSPOSE_2D")
def conv_transpose_2d(b: Inputs, p: Params) -> ggml.Tensor:
    a, kernel = b.new("f32", p.ne_input), b.new(p.kernel_type, p.ne_kernel)
    return ggml.conv_transpose_2d_p0(a, kernel, stride=p.stride)


@builds("COL2IM_1D")
def col2im_1d(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.col2im_1d(b.new(p.type, (p.K * p.OC, p.T_in)), p.OC, stride=p.s0, padding=p.p0)


@builds("IM2COL", unused="s1 p1 d1")
def im2col(b: Inputs, p: Params) -> ggml.Tensor:
    a, kernel = b.new(p.type_input, p.ne_input), b.new(p.type_kernel, p.ne_kernel)
    if p.is_2D:
        steps = {"stride": (p.s1, p.s0), "padding": (p.p1, p.p0), "dilation": (p.d1, p.d0)}
    else:
        steps = {"stride": p.s0, "padding": p.p0, "dilation": p.d0}
    return ggml.im2col(kernel, a, is_2d=bool(p.is_2D), dtype=p.dst_type, **steps)


@builds("IM2COL_3D")
def im2col_3d(b: Inputs, p: Params) -> ggml.Tensor:
    a = b.new(p.type_input, p.ne_input)
    if p.v:
        a = view(a, [n - 2 for n in p.ne_input])
    kernel = b.new(p.type_kernel, p.ne_kernel)
    return ggml.im2col_3d(
        kernel,
        a,
        p.IC,
        stride=(p.s2, p.s1, p.s0),
        padding=(p.p2, p.p1, p.p0),
        dilation=(p.d2, p.d1, p.d0),
        dtype=p.dst_type,
    )


def _channels_last(a: ggml.Tensor, kernel: ggml.Tensor) -> tuple[ggml.Tensor, ggml.Tensor]:
    a = permute(ggml.cont(permute(a, (1, 2, 0, 3))), (2, 0, 1, 3))
    return a, permute(ggml.cont(permute(kernel, (2, 3, 1, 0))), (3, 2, 0, 1))


def _kernel(b: Inputs, p: Params, ne: tuple[int, ...]) -> ggml.Tensor:
    """Make a kernel that begins ``kernel_offset`` elements after an aligned address."""
    skipped = getattr(p, "kernel_offset", 0)
    if not skipped:
        return b.new(p.type_kernel, ne)
    whole = b.new(p.type_kernel, (math.prod(ne) + skipped,))
    nb = [whole.nb[0] * math.prod(ne[:i]) for i in range(4)]
    return view(whole, ne, nb=nb, offset=skipped * whole.nb[0])


@builds("CONV_1D_DW")
def conv_1d_dw(b: Inputs, p: Params) -> ggml.Tensor:
    a, kernel = b.new("f32", p.ne_input[:2]), b.new(p.type_kernel, p.ne_kernel[:3])
    return ggml.conv_1d_dw(a, kernel, p.stride, p.padding, p.dilation)


@builds("CONV_2D")
def conv_2d(b: Inputs, p: Params) -> ggml.Tensor:
    a, kernel = b.new("f32", p.ne_input), _kernel(b, p, p.ne_kernel)
    if p.cwhn:
        a, kernel = _channels_last(a, kernel)
    return ggml.conv_2d_direct(
        a,
        kernel,
        stride=(p.stride1, p.stride0),
        padding=(p.padding1, p.padding0),
        dilation=(p.dilation1, p.dilation0),
    )


@builds("CONV_2D_DW")
def conv_2d_dw(b: Inputs, p: Params) -> ggml.Tensor:
    a, kernel = b.new("f32", p.ne_input), b.new(p.type_kernel, p.ne_kernel)
    if p.cwhn:
        a, kernel = _channels_last(a, kernel)
    return ggml.conv_2d_dw_direct(a, kernel, stride=p.stride, padding=p.padding, dilation=p.dilation)


@builds("CONV_3D")
def conv_3d(b: Inputs, p: Params) -> ggml.Tensor:
    a = b.new("f32", (p.IW, p.IH, p.ID, p.IC * p.N))
    kernel = _kernel(b, p, (p.KW, p.KH, p.KD, p.IC * p.OC))
    return ggml.conv_3d_direct(
        a,
        kernel,
        p.IC,
        stride=(p.s2, p.s1, p.s0),
        padding=(p.p2, p.p1, p.p0),
        dilation=(p.d2, p.d1, p.d0),
    )
