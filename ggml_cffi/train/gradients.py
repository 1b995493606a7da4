"""Gradients by reverse accumulation.

The new nodes are checked operations like any other, so an operation without gradient raises an exception. ggml's own
``ggml_build_backward_expand`` ends the process on more than half of the operations, on a division that broadcasts, and,
when it runs, on the gradient of a transposition. ggml's kernels for backward passes are used where there are any.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

from ggml_cffi import c, ops
from ggml_cffi.core.context import Context
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import GluOp, Op, Prec, Type, UnaryOp
from ggml_cffi.errors import UnsupportedOpError
from ggml_cffi.scheduler.graph import steps

_Rule = Callable[["_Node"], Sequence[Callable[[], Tensor] | None]]


def gradients(loss: Tensor, params: Sequence[Tensor], *, ctx: Context | None = None) -> list[Tensor]:
    """Return the gradients of ``loss`` with respect to ``params``, as tensors to compute.

    Parameters
    ----------
    loss
        One element, F32: a mean, a sum, :func:`ggml_cffi.cross_entropy_loss`.
    params
        F32 tensors that ``loss`` is computed from.
    ctx
        Context of the new tensors; default ``loss``'s.

    Returns
    -------
    list of Tensor
        One for each of ``params``, of its shape, F32.

    Raises
    ------
    ValueError
        If ``loss`` is not one F32 element, a parameter is not F32, or ``loss`` does not depend on it.
    UnsupportedOpError
        If an operation between them has no gradient here.
    """
    if not isinstance(loss, Tensor) or not all(isinstance(p, Tensor) for p in params):
        raise TypeError("gradients takes a tensor and a sequence of tensors")
    if loss.dtype is not Type.F32 or loss.size != 1:
        raise ValueError(f"a loss is one F32 element, not {loss!r}: take its sum or mean")
    for p in params:
        if p.dtype is not Type.F32:
            raise ValueError(f"{p!r} is not F32: parameters must be, since gradients are")
    ctx = ctx or loss.context
    ctx.use(loss.context)
    order = list(steps(loss))
    products = {out: operands for each in loss.context.reachable() for out, operands in each.products.items()}
    wanted = {p.ptr for p in params}
    needed = set(wanted)
    for p in order:
        if any(src in needed for src in _differentiable(products.get(p, p.src))):
            needed.add(p)
    reached = set(order)
    for param in params:
        if param.ptr not in reached:
            raise ValueError(f"the loss does not depend on {param!r}")
    found: dict[Any, Tensor] = {loss.ptr: ops.fill(_whole(ctx, loss.ptr), 1.0, ctx=ctx)}
    for p in reversed(order):
        if p in needed and p.op != Op.NONE and p in found:
            node = _Node(ctx, p, found[p], products.get(p))
            for src, rule in zip(node.src, _rule(node), strict=False):
                if src and src in needed and rule is not None:
                    _add(ctx, found, src, rule())
    missing = [param for param in params if param.ptr not in found]
    if missing:
        raise ValueError(f"the loss does not depend on {missing[0]!r} in a way that has a gradient")
    return [ops.reshape(found[param.ptr], param.shape, ctx=ctx) for param in params]


def _differentiable(operands: Iterable[Any]) -> list[Any]:
    return [src for src in operands if src and src.type not in (Type.I32, Type.I64)]


def _add(ctx: Context, found: dict[Any, Tensor], src: Any, grad: Tensor) -> None:
    """Add a gradient to that of ``src``, summed to its shape where the operation repeated ``src``."""
    shape = _whole(ctx, src).shape
    if not grad.is_contiguous:
        grad = ops.cont(grad, ctx=ctx)
    if grad.ne != tuple(src.ne):
        grad = ops.repeat_back(grad, shape, ctx=ctx)
    found[src] = ops.add(found[src], grad, ctx=ctx) if src in found else grad


def _whole(ctx: Context, p: Any) -> Tensor:
    """Return a tensor with all four axes, so that no rule depends on the number of axes."""
    return Tensor(ctx, p, 4)


class _Node:
    """A computed tensor with its operands, and its own gradient."""

    def __init__(self, ctx: Context, p: Any, grad: Tensor, product: tuple[Any, Any] | None = None) -> None:
        self.ctx = ctx
        self.p = p
        self.g = grad
        self.op = Op(p.op) if product is None else Op.MUL_MAT
        self.src = product or p.src
        """The operands. A product that consists of several nodes has those of the whole."""
        f32 = product is not None or (self.op is Op.MUL_MAT and p.op_params[0] == Prec.F32)
        self.prec = Prec.F32 if f32 else Prec.DEFAULT
        """The precision of a matrix product, which is that of its gradients too."""

    def _plain(self, p: Any) -> Tensor:
        """Return a tensor as contiguous F32."""
        t = _whole(self.ctx, p)
        if t.dtype is not Type.F32:
            t = ops.cast(t, Type.F32, ctx=self.ctx)
        return t if t.is_contiguous else ops.cont(t, ctx=self.ctx)

    @cached_property
    def a(self) -> Tensor:
        return self._plain(self.src[0])

    @cached_property
    def b(self) -> Tensor:
        return self._plain(self.src[1])

    @cached_property
    def out(self) -> Tensor:
        return self._plain(self.p)

    def __str__(self) -> str:
        return repr(_whole(self.ctx, self.p))

    def ints(self, n: int) -> list[int]:
        """Return the first ``n`` operation parameters as integers."""
        return list(c.ffi.unpack(self.p.op_params, n))

    def real(self, i: int) -> float:
        """Return operation parameter ``i`` as a float."""
        (value,) = struct.unpack("f", struct.pack("i", self.p.op_params[i]))
        return float(value)

    def like(self, shape_of: Tensor, x: Tensor) -> Tensor:
        return ops.repeat(x, shape_of.shape, ctx=self.ctx)


def _rule(node: _Node) -> Sequence[Callable[[], Tensor] | None]:
    op = node.op
    if node.p.view_src and op not in _VIEWS:
        raise UnsupportedOpError(f"{node} is in place: its gradient needs the values that it overwrites")
    if op is Op.UNARY:
        return _unary(node, UnaryOp(node.p.op_params[0]))
    if op is Op.GLU:
        return _glu(node, GluOp(node.p.op_params[0]))
    if op not in _RULES:
        raise UnsupportedOpError(f"there is no gradient of {op.name.lower()} here: {node}")
    return _RULES[op](node)


_VIEWS = frozenset({Op.VIEW, Op.RESHAPE, Op.PERMUTE, Op.TRANSPOSE})


def _unary(n: _Node, kind: UnaryOp) -> Sequence[Callable[[], Tensor] | None]:
    slopes: dict[UnaryOp, Callable[[], Tensor] | None] = {
        UnaryOp.ABS: lambda: ops.mul(n.g, ops.sgn(n.a)),
        UnaryOp.NEG: lambda: ops.neg(n.g),
        UnaryOp.RELU: lambda: ops.mul(n.g, ops.step(n.a)),
        UnaryOp.EXP: lambda: ops.mul(n.g, n.out),
        UnaryOp.EXPM1: lambda: ops.mul(n.g, ops.scale_bias(n.out, 1.0, 1.0)),
        UnaryOp.SOFTPLUS: lambda: ops.mul(n.g, ops.sigmoid(n.a)),
        UnaryOp.SILU: lambda: ops.silu_back(n.g, n.a),
        UnaryOp.TANH: lambda: ops.mul(n.g, ops.scale_bias(ops.sqr(n.out), -1.0, 1.0)),
        UnaryOp.SIGMOID: lambda: ops.mul(n.g, ops.mul(n.out, ops.scale_bias(n.out, -1.0, 1.0))),
        UnaryOp.ELU: lambda: ops.mul(n.g, _elu_slope(n)),
        UnaryOp.GELU: lambda: ops.mul(n.g, _gelu_slope(n.a)),
        UnaryOp.GELU_QUICK: lambda: ops.mul(n.g, _gelu_quick_slope(n.a)),
        # Piecewise constant functions have no gradient to pass on.
        **dict.fromkeys((UnaryOp.SGN, UnaryOp.STEP, UnaryOp.FLOOR, UnaryOp.CEIL, UnaryOp.ROUND, UnaryOp.TRUNC), None),
    }
    if kind not in slopes:
        raise UnsupportedOpError(f"there is no gradient of {kind.name.lower()} here: {n}")
    return (slopes[kind],)


def _elu_slope(n: _Node) -> Tensor:
    """Return the slope: 1 above 0, and below it ``exp(x)``, which is the result plus 1."""
    positive = ops.step(n.a)
    negative = ops.scale_bias(positive, -1.0, 1.0)
    return ops.add(positive, ops.mul(negative, ops.scale_bias(n.out, 1.0, 1.0)))


def _gelu_slope(x: Tensor) -> Tensor:
    """Return the slope of ``x / 2 * (1 + tanh(u))`` with ``u = k * (x + 0.044715 * x**3)``."""
    k = 0.7978845608028654  # sqrt(2 / pi)
    square = ops.sqr(x)
    t = ops.tanh(ops.mul(x, ops.scale_bias(square, k * 0.044715, k)))
    du = ops.scale_bias(square, 3 * k * 0.044715, k)
    curve = ops.mul(ops.mul(x, ops.scale_bias(ops.sqr(t), -0.5, 0.5)), du)
    return ops.add(curve, ops.scale_bias(t, 0.5, 0.5))


def _gelu_quick_slope(x: Tensor) -> Tensor:
    """Return the slope of ``x * sigmoid(1.702 * x)``."""
    s = ops.sigmoid(ops.scale(x, 1.702))
    return ops.add(s, ops.scale(ops.mul(ops.mul(x, s), ops.scale_bias(s, -1.0, 1.0)), 1.702))


def _glu(n: _Node, kind: GluOp) -> Sequence[Callable[[], Tensor] | None]:
    if not n.p.src[1]:
        raise UnsupportedOpError(f"there is no gradient of {n} here: use the form of two operands, _split")
    if kind is GluOp.SWIGLU:
        return lambda: ops.silu_back(ops.mul(n.g, n.b), n.a), lambda: ops.mul(n.g, ops.silu(n.a))
    if kind is GluOp.REGLU:
        return lambda: ops.mul(ops.mul(n.g, n.b), ops.step(n.a)), lambda: ops.mul(n.g, ops.relu(n.a))
    if kind is GluOp.GEGLU:
        return lambda: ops.mul(ops.mul(n.g, n.b), _gelu_slope(n.a)), lambda: ops.mul(n.g, ops.gelu(n.a))
    raise UnsupportedOpError(f"there is no gradient of {kind.name.lower()} here: {n}")


def _mul_mat(n: _Node) -> Sequence[Callable[[], Tensor]]:
    """Return the rules of ``out = b @ a.T``, in which consecutive matrices of ``b`` may share one of ``a``."""

    def turned(t: Tensor) -> Tensor:
        return ops.cont(ops.transpose(t, ctx=n.ctx), ctx=n.ctx)

    def of_a() -> Tensor:
        each = ops.mul_mat(turned(n.b), turned(n.g), prec=n.prec)
        outer, inner, rows, columns = n.a.shape
        if inner in (1, each.shape[1]) and outer in (1, each.shape[0]):
            return each  # _add sums it up
        if each.shape[0] != 1:
            raise UnsupportedOpError(f"there is no gradient of {n} here: both leading axes repeat a part of a")
        grouped = ops.reshape(each, (inner, -1, rows, columns))
        return ops.reshape(ops.repeat_back(grouped, (inner, 1, rows, columns)), n.a.shape)

    return of_a, lambda: ops.mul_mat(turned(n.a), n.g, prec=n.prec)


def _soft_max(n: _Node) -> Sequence[Callable[[], Tensor] | None]:
    def slope() -> Tensor:
        mean = ops.sum_rows(ops.mul(n.g, n.out))
        return ops.scale(ops.mul(n.out, ops.sub(n.g, n.like(n.out, mean))), n.real(0))

    return (slope,)


def _norm(n: _Node) -> Sequence[Callable[[], Tensor]]:
    def slope() -> Tensor:
        # The result is (x - mean) / s: s is computed again from x.
        centred = ops.sub(n.a, n.like(n.a, ops.mean(n.a)))
        s = ops.sqrt(ops.scale_bias(ops.mean(ops.sqr(centred)), 1.0, n.real(0)))
        along = ops.mul(n.out, n.like(n.out, ops.mean(ops.mul(n.g, n.out))))
        rest = ops.sub(ops.sub(n.g, n.like(n.g, ops.mean(n.g))), along)
        return ops.div(rest, n.like(rest, s))

    return (slope,)


def _view(n: _Node) -> Sequence[Callable[[], Tensor]]:
    def put() -> Tensor:
        zeros = ops.fill(n.a, 0.0, ctx=n.ctx)
        (offset,) = struct.unpack("Q", struct.pack("2i", *n.ints(2)))
        strides = _whole(n.ctx, n.p).nb[::-1]
        return ops.acc(zeros, n.g, strides=strides, offset=offset, ctx=n.ctx)

    if n.p.src[0].type != Type.F32 or not n.a.is_contiguous:
        raise UnsupportedOpError(f"there is no gradient of a view of a tensor that is not contiguous F32: {n}")
    return (put,)


def _permute(n: _Node) -> Sequence[Callable[[], Tensor]]:
    axes = n.ints(4) if n.p.op == Op.PERMUTE else [1, 0, 2, 3]
    # ggml moved axis i of the operand to axes[i]. numpy counts from the other end, and names the source axes.
    return (lambda: ops.permute(n.g, [3 - axes[3 - i] for i in range(4)], ctx=n.ctx),)


def _concat(n: _Node) -> Sequence[Callable[[], Tensor]]:
    (dim,) = n.ints(1)
    shape_a, shape_b = n.a.shape, n.b.shape
    offset = n.g.nb[dim] * n.a.ne[dim]
    return (
        lambda: ops.view(n.g, shape_a, strides=n.g.nb[::-1], ctx=n.ctx),
        lambda: ops.view(n.g, shape_b, strides=n.g.nb[::-1], offset=offset, ctx=n.ctx),
    )


def _rope(n: _Node) -> Sequence[Callable[[], Tensor] | None]:
    _, n_dims, mode, _, n_ctx_orig, *_, offset = n.ints(16)
    factors = _whole(n.ctx, n.p.src[2]) if n.p.src[2] else None
    if mode not in (ops.RopeMode.NORMAL, ops.RopeMode.NEOX):
        raise UnsupportedOpError(f"rope has a gradient in the modes NORMAL and NEOX only: {n}")
    return (
        lambda: ops.rope_ext_back(
            n.g,
            _whole(n.ctx, n.p.src[1]),
            factors,
            n_dims=n_dims,
            offset=offset,
            mode=ops.RopeMode(mode),
            n_ctx_orig=n_ctx_orig,
            freq_base=n.real(5),
            freq_scale=n.real(6),
            ext_factor=n.real(7),
            attn_factor=n.real(8),
            beta_fast=n.real(9),
            beta_slow=n.real(10),
            ctx=n.ctx,
        ),
    )


def _get_rows(n: _Node) -> Sequence[Callable[[], Tensor]]:
    rows = Tensor(n.ctx, n.p.src[1], 1)
    if n.p.src[0].ne[2] != 1 or n.p.src[0].ne[3] != 1:
        raise UnsupportedOpError(f"get_rows has a gradient for the rows of a matrix only: {n}")
    return (lambda: ops.get_rows_back(Tensor(n.ctx, n.g.ptr, 2), rows, n.p.src[0].ne[1], ctx=n.ctx),)


def _cross_entropy(n: _Node) -> Sequence[Callable[[], Tensor]]:
    return (lambda: ops.cross_entropy_loss_back(n.g, n.a, n.b, ctx=n.ctx),)


def _cumsum(n: _Node) -> Sequence[Callable[[], Tensor]]:
    """Return the rule: each element's gradient is the sum from that element on."""

    def after() -> Tensor:
        total = n.like(n.g, ops.sum_rows(n.g))
        return ops.add(ops.sub(total, ops.cumsum(n.g)), n.g)

    return (after,)


def _reshape(n: _Node) -> Sequence[Callable[[], Tensor]]:
    return (lambda: ops.reshape(n.g, _whole(n.ctx, n.p.src[0]).shape, ctx=n.ctx),)


def _leaky(n: _Node) -> Sequence[Callable[[], Tensor]]:
    return (lambda: ops.mul(n.g, ops.scale_bias(ops.step(n.a), 1.0 - n.real(0), n.real(0))),)


_RULES: dict[Op, _Rule] = {
    Op.ADD: lambda n: (lambda: n.g, lambda: n.g),
    Op.SUB: lambda n: (lambda: n.g, lambda: ops.neg(n.g)),
    Op.MUL: lambda n: (lambda: ops.mul(n.g, n.b), lambda: ops.mul(n.g, n.a)),
    Op.DIV: lambda n: (lambda: ops.div(n.g, n.b), lambda: ops.neg(ops.div(ops.mul(n.g, n.out), n.b))),
    Op.SCALE: lambda n: (lambda: ops.scale(n.g, n.real(0)),),
    Op.SQR: lambda n: (lambda: ops.scale(ops.mul(n.g, n.a), 2.0),),
    Op.SQRT: lambda n: (lambda: ops.scale(ops.div(n.g, n.out), 0.5),),
    Op.LOG: lambda n: (lambda: ops.div(n.g, n.a),),
    Op.SIN: lambda n: (lambda: ops.mul(n.g, ops.cos(n.a)),),
    Op.COS: lambda n: (lambda: ops.neg(ops.mul(n.g, ops.sin(n.a))),),
    Op.SUM: lambda n: (lambda: n.like(n.a, n.g),),
    Op.SUM_ROWS: lambda n: (lambda: n.like(n.a, n.g),),
    Op.MEAN: lambda n: (lambda: n.like(n.a, ops.scale(n.g, 1.0 / n.a.ne[0])),),
    Op.CUMSUM: _cumsum,
    Op.REPEAT: lambda n: (lambda: n.g,),
    Op.REPEAT_BACK: lambda n: (lambda: n.like(n.a, n.g),),
    Op.RMS_NORM: lambda n: (lambda: ops.rms_norm_back(n.g, n.a, n.real(0)),),
    Op.NORM: _norm,
    Op.MUL_MAT: _mul_mat,
    Op.SOFT_MAX: _soft_max,
    Op.DIAG_MASK_INF: lambda n: (lambda: ops.diag_mask_zero(n.g, n.ints(1)[0]),),
    Op.DIAG_MASK_ZERO: lambda n: (lambda: ops.diag_mask_zero(n.g, n.ints(1)[0]),),
    Op.LEAKY_RELU: _leaky,
    Op.ROPE: _rope,
    Op.GET_ROWS: _get_rows,
    Op.CROSS_ENTROPY_LOSS: _cross_entropy,
    Op.CONCAT: _concat,
    Op.DUP: lambda n: (lambda: n.g,),
    Op.CONT: _reshape,
    Op.CPY: _reshape,
    Op.RESHAPE: _reshape,
    Op.VIEW: _view,
    Op.PERMUTE: _permute,
    Op.TRANSPOSE: _permute,
}
