"""Functions of each element.

Each function takes a float tensor with contiguous rows (use ``cont`` to get them), and returns a tensor of the same
shape and type. The ``_inplace`` forms write over ``a`` and return a view of it: another node that reads ``a`` may see
the old or the new values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ggml_cffi import c
from ggml_cffi.c import library
from ggml_cffi.core.context import Context
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.ops._operands import FLOATS, GGML_0_27, check_bf16, contiguous_rows, op_error, result_context
from ggml_cffi.ops._parameters import check_real
from ggml_cffi.ops.update import dup

__all__ = [
    "abs",
    "abs_inplace",
    "ceil",
    "ceil_inplace",
    "clamp",
    "clamp_inplace",
    "cos",
    "cos_inplace",
    "elu",
    "elu_inplace",
    "exp",
    "exp_inplace",
    "expm1",
    "expm1_inplace",
    "floor",
    "floor_inplace",
    "gelu",
    "gelu_erf",
    "gelu_erf_inplace",
    "gelu_inplace",
    "gelu_quick",
    "gelu_quick_inplace",
    "hardsigmoid",
    "hardswish",
    "leaky_relu",
    "log",
    "log_inplace",
    "neg",
    "neg_inplace",
    "relu",
    "relu_inplace",
    "round",
    "round_inplace",
    "sgn",
    "sgn_inplace",
    "sigmoid",
    "sigmoid_inplace",
    "silu",
    "silu_inplace",
    "sin",
    "sin_inplace",
    "softplus",
    "softplus_inplace",
    "sqr",
    "sqr_inplace",
    "sqrt",
    "sqrt_inplace",
    "step",
    "step_inplace",
    "tanh",
    "tanh_inplace",
    "trunc",
    "trunc_inplace",
    "xielu",
]

_F32_F16 = frozenset({Type.F32, Type.F16})


def _unary(
    op: str, function: Callable[..., Any], a: Tensor, ctx: Context | None, *args: float, types: frozenset[Type] = FLOATS
) -> Tensor:
    if ctx is None and a.__class__ is Tensor and not args:
        head = a._head
        if head and head[3] and head[0] in types:  # the common case needs no further checks
            return a.context.emit(function, a.ndim, head, a._pointer)
    ctx = result_context(op, a, ctx=ctx)
    head = a.head
    if head.dtype not in types:
        names = ", ".join(sorted(t.name for t in types))
        raise op_error(op, f"a must be one of {names}", a=a)
    if not (head.dense or contiguous_rows(a)):
        raise op_error(op, "the rows of a must be contiguous (use cont)", a=a)
    return ctx.build(function, a.ndim, a.ptr, *args, head=head)


def _newer_bf16(op: str, function: Callable[..., Any], a: Tensor, ctx: Context | None) -> Tensor:
    """Build an operation that older versions of ggml have for F32 and F16 only."""
    if isinstance(a, Tensor):
        check_bf16(op, a)
    return _unary(op, function, a, ctx)


def sqr(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Square each element: ``a**2``. C: ``ggml_sqr``."""
    return _unary("sqr", c.ggml_sqr, a, ctx)


def sqr_inplace(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`sqr` in place: write the result over ``a``. C: ``ggml_sqr_inplace``."""
    return _unary("sqr_inplace", c.ggml_sqr_inplace, a, ctx)


def sqrt(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Take the square root of each element. C: ``ggml_sqrt``."""
    return _unary("sqrt", c.ggml_sqrt, a, ctx)


def sqrt_inplace(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`sqrt` in place: write the result over ``a``. C: ``ggml_sqrt_inplace``."""
    return _unary("sqrt_inplace", c.ggml_sqrt_inplace, a, ctx)


def log(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Take the natural logarithm of each element. C: ``ggml_log``."""
    return _unary("log", c.ggml_log, a, ctx)


def log_inplace(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`log` in place: write the result over ``a``. C: ``ggml_log_inplace``."""
    return _unary("log_inplace", c.ggml_log_inplace, a, ctx)


def exp(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Take the exponential of each element: ``e**a``. C: ``ggml_exp``."""
    return _unary("exp", c.ggml_exp, a, ctx)


def exp_inplace(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`exp` in place: write the result over ``a``. C: ``ggml_exp_inplace``."""
    return _unary("exp_inplace", c.ggml_exp_inplace, a, ctx)


def expm1(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute ``e**a - 1``, precise near 0. C: ``ggml_expm1``."""
    return _unary("expm1", c.ggml_expm1, a, ctx)


def expm1_inplace(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`expm1` in place: write the result over ``a``. C: ``ggml_expm1_inplace``."""
    return _unary("expm1_inplace", c.ggml_expm1_inplace, a, ctx)


def sin(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Take the sine of each element, in radians. C: ``ggml_sin``."""
    return _unary("sin", c.ggml_sin, a, ctx)


def sin_inplace(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`sin` in place: write the result over ``a``. C: ``ggml_sin_inplace``."""
    return _unary("sin_inplace", c.ggml_sin_inplace, a, ctx)


def cos(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Take the cosine of each element, in radians. C: ``ggml_cos``."""
    return _unary("cos", c.ggml_cos, a, ctx)


def cos_inplace(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`cos` in place: write the result over ``a``. C: ``ggml_cos_inplace``."""
    return _unary("cos_inplace", c.ggml_cos_inplace, a, ctx)


def abs(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Take the absolute value of each element. C: ``ggml_abs``."""
    return _unary("abs", c.ggml_abs, a, ctx)


def abs_inplace(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`abs` in place: write the result over ``a``. C: ``ggml_abs_inplace``."""
    return _unary("abs_inplace", c.ggml_abs_inplace, a, ctx)


def sgn(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Return the sign of each element: -1, 0 or 1. C: ``ggml_sgn``."""
    return _unary("sgn", c.ggml_sgn, a, ctx)


def sgn_inplace(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`sgn` in place: write the result over ``a``. C: ``ggml_sgn_inplace``."""
    return _unary("sgn_inplace", c.ggml_sgn_inplace, a, ctx)


def neg(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Negate each element: ``-a``. C: ``ggml_neg``."""
    return _unary("neg", c.ggml_neg, a, ctx)


def neg_inplace(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`neg` in place: write the result over ``a``. C: ``ggml_neg_inplace``."""
    return _unary("neg_inplace", c.ggml_neg_inplace, a, ctx)


def step(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Return 1 where ``a > 0``, else 0. C: ``ggml_step``."""
    return _unary("step", c.ggml_step, a, ctx)


def step_inplace(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`step` in place: write the result over ``a``. C: ``ggml_step_inplace``."""
    return _unary("step_inplace", c.ggml_step_inplace, a, ctx)


def floor(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Round each element down to an integer. C: ``ggml_floor``."""
    return _unary("floor", c.ggml_floor, a, ctx)


def floor_inplace(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`floor` in place: write the result over ``a``. C: ``ggml_floor_inplace``."""
    return _unary("floor_inplace", c.ggml_floor_inplace, a, ctx)


def ceil(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Round each element up to an integer. C: ``ggml_ceil``."""
    return _unary("ceil", c.ggml_ceil, a, ctx)


def ceil_inplace(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`ceil` in place: write the result over ``a``. C: ``ggml_ceil_inplace``."""
    return _unary("ceil_inplace", c.ggml_ceil_inplace, a, ctx)


def round(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Round each element to the nearest integer, halves away from zero (numpy rounds halves to even).

    C: ``ggml_round``.
    """
    return _unary("round", c.ggml_round, a, ctx)


def round_inplace(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`round` in place: write the result over ``a``. C: ``ggml_round_inplace``."""
    return _unary("round_inplace", c.ggml_round_inplace, a, ctx)


def trunc(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Round each element towards zero. C: ``ggml_trunc``."""
    return _unary("trunc", c.ggml_trunc, a, ctx)


def trunc_inplace(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`trunc` in place: write the result over ``a``. C: ``ggml_trunc_inplace``."""
    return _unary("trunc_inplace", c.ggml_trunc_inplace, a, ctx)


def tanh(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Take the hyperbolic tangent of each element. C: ``ggml_tanh``."""
    return _unary("tanh", c.ggml_tanh, a, ctx)


def tanh_inplace(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`tanh` in place: write the result over ``a``. C: ``ggml_tanh_inplace``."""
    return _unary("tanh_inplace", c.ggml_tanh_inplace, a, ctx)


def sigmoid(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute the logistic sigmoid ``1 / (1 + e**-a)``. C: ``ggml_sigmoid``."""
    return _unary("sigmoid", c.ggml_sigmoid, a, ctx)


def sigmoid_inplace(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`sigmoid` in place: write the result over ``a``. C: ``ggml_sigmoid_inplace``."""
    return _unary("sigmoid_inplace", c.ggml_sigmoid_inplace, a, ctx)


def relu(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Replace negative elements by 0: ``max(a, 0)``. C: ``ggml_relu``."""
    return _unary("relu", c.ggml_relu, a, ctx)


def relu_inplace(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`relu` in place: write the result over ``a``. C: ``ggml_relu_inplace``."""
    return _unary("relu_inplace", c.ggml_relu_inplace, a, ctx)


def elu(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute the exponential linear unit: ``a`` where ``a > 0``, else ``e**a - 1``. Source: Clevert et al., 2015.

    C: ``ggml_elu``.
    """
    return _unary("elu", c.ggml_elu, a, ctx)


def elu_inplace(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`elu` in place: write the result over ``a``. C: ``ggml_elu_inplace``."""
    return _unary("elu_inplace", c.ggml_elu_inplace, a, ctx)


def softplus(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute ``log(1 + e**a)``. C: ``ggml_softplus``."""
    return _unary("softplus", c.ggml_softplus, a, ctx)


def softplus_inplace(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`softplus` in place: write the result over ``a``. C: ``ggml_softplus_inplace``."""
    return _unary("softplus_inplace", c.ggml_softplus_inplace, a, ctx)


def hardswish(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute ``a * min(max(a + 3, 0), 6) / 6``. C: ``ggml_hardswish``."""
    return _unary("hardswish", c.ggml_hardswish, a, ctx)


def hardsigmoid(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute ``min(max(a + 3, 0), 6) / 6``. C: ``ggml_hardsigmoid``."""
    return _unary("hardsigmoid", c.ggml_hardsigmoid, a, ctx)


def silu(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute ``a / (1 + e**-a)``, also known as swish. BF16 needs ggml 0.25.3. C: ``ggml_silu``."""
    return _newer_bf16("silu", c.ggml_silu, a, ctx)


def silu_inplace(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`silu` in place: write the result over ``a``. C: ``ggml_silu_inplace``."""
    return _newer_bf16("silu_inplace", c.ggml_silu_inplace, a, ctx)


def gelu(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute GELU in its tanh form ``a/2 (1 + tanh(sqrt(2/pi) (a + 0.044715 a**3)))``. BF16 needs ggml 0.25.3.

    Source: Hendrycks & Gimpel, 2016.

    C: ``ggml_gelu``.
    """
    return _newer_bf16("gelu", c.ggml_gelu, a, ctx)


def gelu_inplace(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`gelu` in place: write the result over ``a``. C: ``ggml_gelu_inplace``."""
    return _newer_bf16("gelu_inplace", c.ggml_gelu_inplace, a, ctx)


def gelu_erf(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute GELU in its exact form ``a/2 (1 + erf(a / sqrt(2)))``. BF16 needs ggml 0.25.3. C: ``ggml_gelu_erf``."""
    return _newer_bf16("gelu_erf", c.ggml_gelu_erf, a, ctx)


def gelu_erf_inplace(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`gelu_erf` in place: write the result over ``a``. C: ``ggml_gelu_erf_inplace``."""
    return _newer_bf16("gelu_erf_inplace", c.ggml_gelu_erf_inplace, a, ctx)


def gelu_quick(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute the approximation of GELU ``a / (1 + e**(-1.702 a))``. BF16 needs ggml 0.25.3. C: ``ggml_gelu_quick``."""
    return _newer_bf16("gelu_quick", c.ggml_gelu_quick, a, ctx)


def gelu_quick_inplace(a: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`gelu_quick` in place: write the result over ``a``. C: ``ggml_gelu_quick_inplace``."""
    return _newer_bf16("gelu_quick_inplace", c.ggml_gelu_quick_inplace, a, ctx)


def leaky_relu(a: Tensor, negative_slope: float = 0.01, *, inplace: bool = False, ctx: Context | None = None) -> Tensor:
    """Scale negative elements by ``negative_slope``. F32 or F16; ``inplace=True`` writes over ``a``.

    C: ``ggml_leaky_relu``.
    """
    ctx = result_context("leaky_relu", a, ctx=ctx)
    if a.dtype not in _F32_F16 or not a.is_contiguous:
        raise op_error("leaky_relu", "a must be contiguous F32 or F16", a=a)
    slope = check_real("leaky_relu", "negative_slope", negative_slope)
    return ctx.build(c.ggml_leaky_relu, a.ndim, a.ptr, slope, bool(inplace))


def clamp(a: Tensor, low: float, high: float, *, ctx: Context | None = None) -> Tensor:
    """Limit each element to the range from ``low`` to ``high``. F32 or F16.

    Raises
    ------
    ValueError
        If ``low`` is above ``high``, or ``a`` is of another type.
    LibraryMismatchError
        If ``a`` is not contiguous, and ggml is older than 0.27.

    C: ``ggml_clamp``.
    """
    low, high = _check_range("clamp", a, low, high)
    if not library.provides("ggml_clamp_inplace"):  # older versions always write over the operand
        a = dup(a, ctx=ctx)
    return _unary("clamp", c.ggml_clamp, a, ctx, low, high, types=_F32_F16)


def clamp_inplace(a: Tensor, low: float, high: float, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`clamp` in place: write the result over ``a``. C: ``ggml_clamp_inplace``."""
    low, high = _check_range("clamp_inplace", a, low, high)
    function = c.ggml_clamp_inplace if library.provides("ggml_clamp_inplace") else c.ggml_clamp
    return _unary("clamp_inplace", function, a, ctx, low, high, types=_F32_F16)


def _check_range(op: str, a: Tensor, low: float, high: float) -> tuple[float, float]:
    low, high = check_real(op, "low", low, infinite=True), check_real(op, "high", high, infinite=True)
    if low > high:
        raise ValueError(f"{op}: low {low} is above high {high}")
    if isinstance(a, Tensor) and not a.is_contiguous:  # older CPU kernels assume a constant distance between rows
        library.require(GGML_0_27, f"{op} of a tensor that is not contiguous (cont would make it so)")
    return low, high


def xielu(a: Tensor, alpha_n: float, alpha_p: float, beta: float, eps: float, *, ctx: Context | None = None) -> Tensor:
    """Compute the xIELU activation: ``p a**2 + beta a`` where ``a > 0``, else ``n (expm1(min(a, eps)) - a) + beta a``.

    Here ``p = log(1 + e**alpha_p)`` and ``n = beta + log(1 + e**alpha_n)``.

    Parameters
    ----------
    a
        Contiguous, F32, F16 or BF16.
    alpha_n, alpha_p, beta, eps
        Finite numbers; ``eps`` is below 0 and near it.

    Raises
    ------
    ValueError
        If ``a`` is not a contiguous float, or a number is not finite.

    C: ``ggml_xielu``. Source: Huang & Schlag, Deriving Activation Functions via Integration, 2024.
    """
    ctx = result_context("xielu", a, ctx=ctx)
    if a.dtype not in FLOATS or not a.is_contiguous:
        raise op_error("xielu", "a must be a contiguous float (use cont)", a=a)
    numbers = {"alpha_n": alpha_n, "alpha_p": alpha_p, "beta": beta, "eps": eps}
    return ctx.build(c.ggml_xielu, a.ndim, a.ptr, *(check_real("xielu", name, x) for name, x in numbers.items()))
