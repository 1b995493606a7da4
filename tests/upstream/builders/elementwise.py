"""Elementwise operations, norms, reductions and sorting."""

from __future__ import annotations

from collections.abc import Callable

import ggml_cffi as ggml
from ggml_cffi.enums import SortOrder
from tests.upstream.builders import UnknownCaseError, builds
from tests.upstream.draw import Inputs, permute, times, view
from tests.upstream.text import Params

_UNARY = "ABS SGN NEG STEP TANH ELU RELU SIGMOID GELU GELU_QUICK SILU HARDSWISH HARDSIGMOID EXP EXPM1 SOFTPLUS GELU_ERF"
_ROUND = "FLOOR CEIL ROUND TRUNC"
_GLU = "REGLU GEGLU SWIGLU GEGLU_ERF GEGLU_QUICK"


def _unary(op: str) -> Callable[[Inputs, Params], ggml.Tensor]:
    def build(b: Inputs, p: Params) -> ggml.Tensor:
        function = getattr(ggml, op.lower())
        if not hasattr(p, "ne_a"):  # a test class for a single operation
            return function(b.new(p.type, p.ne, (-10.0, 10.0)))
        reach = 10.0 if p.type == "f16" and op in ("EXP", "EXPM1") else 150.0
        a = b.new(p.type, times(p.ne_a, (3, 2, 5, 4)) if p.v & 1 else p.ne_a, (-reach, reach))
        return function(view(a, p.ne_a) if p.v & 1 else a)

    return build


def _glu(op: str) -> Callable[[Inputs, Params], ggml.Tensor]:
    def build(b: Inputs, p: Params) -> ggml.Tensor:
        if getattr(p, "split", False):
            return getattr(ggml, f"{op.lower()}_split")(_wide(b, p), _wide(b, p))
        return getattr(ggml, op.lower() + ("_swapped" if p.swapped else ""))(_wide(b, p))

    return build


def _wide(b: Inputs, p: Params) -> ggml.Tensor:
    a = b.new(p.type, times(p.ne_a, (3, 1, 1, 1)) if p.v & 1 else p.ne_a, (-150.0, 150.0))
    return view(a, p.ne_a) if p.v & 1 else a


def _binary(op: str) -> Callable[[Inputs, Params], ggml.Tensor]:
    def build(b: Inputs, p: Params) -> ggml.Tensor:
        near = (0.9, 1.1) if op in ("MUL", "DIV") else (-1.0, 1.0)
        kind = getattr(p, "type_b", p.type)
        out = a = b.new(p.type, times(p.ne, p.nr), near)
        part = (*p.ne[:3], 2 * (p.ne[3] // 3))
        if p.src_overlap:
            out = view(a, part)
        for _ in range(p.nf):
            if p.perm1:
                other = permute(b.new(kind, [p.ne[i] for i in (1, 2, 0, 3)], near), (1, 2, 0, 3))
            elif p.src_overlap:
                other = view(a, part, offset=p.ne[3] // 3 * a.nb[3])
            else:
                other = b.new(kind, p.ne, near)
            if getattr(p, "weights", 0):
                b.ctx.alloc(b.device, [other], usage=ggml.Usage.WEIGHTS)
            out = getattr(ggml, op.lower())(out, other)
        return out

    return build


for _op in f"{_UNARY} {_ROUND}".split():
    builds(_op)(_unary(_op))
for _op in _GLU.split():
    builds(_op)(_glu(_op))
for _op in ("ADD", "SUB", "MUL", "DIV"):
    builds(_op)(_binary(_op))


@builds("SWIGLU_CLAMP", unused="swapped split")
def swiglu_clamp(b: Inputs, p: Params) -> ggml.Tensor:
    # The program of 0.20.2 does not know this operation: it lists it with the others, which have no limit.
    if not hasattr(p, "limit"):
        raise ValueError("swiglu_clamp needs a limit")
    return ggml.swiglu_clamp(_wide(b, p), _wide(b, p), p.limit)


@builds("SWIGLU_OAI")
def swiglu_oai(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.swiglu_oai(_wide(b, p), _wide(b, p), p.alpha, p.limit)


@builds("XIELU")
def xielu(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.xielu(b.new(p.type, p.ne), 4.0, 20.0, 0.5, 1e-7)


@builds("SQR")
def sqr(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.sqr(b.new(p.type, p.ne))


@builds("SQRT")
def sqrt(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.sqrt(b.new(p.type, p.ne, (50.0, 100.0)))


@builds("LOG")
def log(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.log(b.new(p.type, p.ne, (0.9, 1.1)))


@builds("SIN")
def sin(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.sin(b.new(p.type, p.ne, (-6.5, 6.5)))


@builds("COS")
def cos(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.cos(b.new(p.type, p.ne, (-6.5, 6.5)))


@builds("CLAMP")
def clamp(b: Inputs, p: Params) -> ggml.Tensor:
    a = view(b.new(p.type, times(p.ne, (3, 2, 5, 4))), p.ne) if getattr(p, "v", 0) else b.new(p.type, p.ne)
    return ggml.clamp(a, p.min, p.max)


@builds("LEAKY_RELU")
def leaky_relu(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.leaky_relu(b.new(p.type, p.ne_a), p.negative_slope, inplace=True)


@builds("SCALE")
def scale(b: Inputs, p: Params) -> ggml.Tensor:
    a = b.new(p.type, p.ne)
    return (ggml.scale_bias_inplace if p.inplace else ggml.scale_bias)(a, p.scale, p.bias)


@builds("SILU_BACK", unused="eps")
def silu_back(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.silu_back(b.new(p.type, p.ne), b.new(p.type, p.ne))


@builds("ADD_ID")
def add_id(b: Inputs, p: Params) -> ggml.Tensor:
    a = b.new(p.type_a, (p.n_embd, p.n_experts_used, p.n_token))
    table = b.new(p.type_b, (p.n_embd, p.n_experts))
    ids = b.shuffled("i32", (p.n_experts, p.n_token), p.n_experts)
    if p.n_experts_used != p.n_experts:
        ids = view(ids, (p.n_experts_used, p.n_token))
    return ggml.add_id(a, table, ids)


def _halves(a: ggml.Tensor) -> ggml.Tensor:
    return view(a, [n // 2 for n in a.ne])


@builds("NORM")
def norm(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.norm(_rows(b, p), p.eps)


@builds("L2_NORM")
def l2_norm(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.l2_norm(_rows(b, p), p.eps)


def _rows(b: Inputs, p: Params) -> ggml.Tensor:
    if p.noncontig_rows:
        a = permute(b.new(p.type, (p.ne[1], p.ne[0], *p.ne[2:])), (1, 0, 2, 3))
    else:
        a = b.new(p.type, p.ne)
    return _halves(a) if p.v else a


@builds("RMS_NORM")
def rms_norm(b: Inputs, p: Params) -> ggml.Tensor:
    a = b.new(p.type, p.ne, (-10.0, 10.0))
    return (ggml.rms_norm_inplace if p.inplace else ggml.rms_norm)(_halves(a) if p.v else a, p.eps)


@builds("RMS_NORM_BACK")
def rms_norm_back(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.rms_norm_back(b.new(p.type, p.ne, (-10.0, 10.0)), b.new(p.type, p.ne, (-10.0, 10.0)), p.eps)


@builds("GROUP_NORM")
def group_norm(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.group_norm(b.new(p.type, p.ne), p.num_groups, p.eps)


@builds("SUM")
def total(b: Inputs, p: Params) -> ggml.Tensor:
    a = b.new(p.type, p.ne, (-0.9, 1.1))
    return ggml.sum(permute(a, p.permute) if hasattr(p, "permute") else a)


@builds("SUM_ROWS")
def sum_rows(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.sum_rows(_part(b.new(p.type, p.ne), p))


@builds("MEAN")
def mean(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.mean(_part(b.new(p.type, p.ne, (-0.9, 1.1)), p))


def _part(a: ggml.Tensor, p: Params) -> ggml.Tensor:
    if getattr(p, "slice", 0):
        nb = (a.nb[0], a.nb[1], a.nb[2] * 2, a.nb[3])
        a = view(a, (*p.ne[:2], p.ne[2] // 2, p.ne[3] - 1), nb=nb, offset=a.nb[3])
    return permute(a, (0, 2, 3, 1)) if getattr(p, "permute", 0) else a


@builds("CUMSUM")
def cumsum(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.cumsum(b.new(p.type, p.ne))


@builds("ARGMAX")
def argmax(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.argmax(b.shuffled(p.type, _matrix(p.ne)))


@builds("COUNT_EQUAL")
def count_equal(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.count_equal(*(ggml.argmax(b.shuffled(p.type, _matrix(p.ne))) for _ in range(2)))


def _matrix(ne: tuple[int, ...]) -> tuple[int, ...]:
    return ne[:2] if ne[2:] == (1, 1) else ne


@builds("ARGSORT")
def argsort(b: Inputs, p: Params) -> ggml.Tensor:
    return ggml.argsort(b.shuffled(p.type, p.ne), SortOrder(p.order))


@builds("TOP_K")
def top_k(b: Inputs, p: Params) -> ggml.Tensor:
    if p.ties:
        raise UnknownCaseError("no list has had ties, of which either is right")
    return ggml.top_k(b.shuffled(p.type, p.ne), p.k)


@builds("SOFT_MAX", unused="m_prec")
def soft_max(b: Inputs, p: Params) -> ggml.Tensor:
    a = b.new(p.type, times(p.ne, (1, 1, *p.nr23)))
    mask = b.new(p.m_prec, p.ne) if p.mask else None
    sinks = b.new("f32", (p.ne[2] * p.nr23[0],)) if p.sinks else None
    function = ggml.soft_max_ext_inplace if p.inplace else ggml.soft_max_ext
    return function(a, mask, sinks, scale=p.scale, max_bias=p.max_bias)


@builds("SOFT_MAX_BACK")
def soft_max_back(b: Inputs, p: Params) -> ggml.Tensor:
    if p.max_bias:
        raise ValueError("soft_max_ext_back has no max_bias")
    return ggml.soft_max_ext_back(b.new(p.type, p.ne), b.new(p.type, p.ne), scale=p.scale)


@builds("CROSS_ENTROPY_LOSS")
def cross_entropy_loss(b: Inputs, p: Params) -> ggml.Tensor:
    logits, labels = (b.new(p.type, p.ne, (-100.0, 100.0)) for _ in range(2))
    return ggml.cross_entropy_loss(logits, ggml.soft_max_ext(labels))


@builds("CROSS_ENTROPY_LOSS_BACK")
def cross_entropy_loss_back(b: Inputs, p: Params) -> ggml.Tensor:
    grad = b.new("f32", (1,))
    logits, labels = (b.new(p.type, p.ne) for _ in range(2))
    return ggml.cross_entropy_loss_back(grad, logits, ggml.soft_max_ext(labels))


@builds("OPT_STEP_ADAMW")
def opt_step_adamw(b: Inputs, p: Params) -> ggml.Tensor:
    a, grad, m, v = (b.new(p.type, p.ne, (0.0, 1.0)) for _ in range(4))
    b.ctx.alloc(b.device, [a, m, v])  # a step needs weights and moments with memory
    return ggml.opt_step_adamw(a, grad, m, v, b.new("f32", (7,), (0.0, 1.0)))


@builds("OPT_STEP_SGD")
def opt_step_sgd(b: Inputs, p: Params) -> ggml.Tensor:
    a, grad = (b.new(p.type, p.ne, (0.0, 1.0)) for _ in range(2))
    b.ctx.alloc(b.device, [a])
    return ggml.opt_step_sgd(a, grad, b.new("f32", (2,), (0.0, 1.0)))
