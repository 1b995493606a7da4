"""Gradients of operations: the gradient of an operand from that of the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.context import Context
from ggml_cffi.core.shapes import check_shape, ne_of
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.ops._operands import (
    broadcasts,
    check_result,
    check_start,
    need_dense,
    need_elements,
    need_int_rows,
    need_rows,
    op_error,
    result_context,
)
from ggml_cffi.ops._parameters import INT_MAX, check_integer, check_real
from ggml_cffi.ops.rope import RopeMode, build_rope
from ggml_cffi.ops.rows import limit_row_numbers

__all__ = [
    "get_rows_back",
    "repeat_back",
    "rms_norm_back",
    "rope_ext_back",
    "rope_multi_back",
    "silu_back",
    "soft_max_ext_back",
    "soft_max_ext_back_inplace",
]


def repeat_back(grad: Tensor, shape: Sequence[int], *, ctx: Context | None = None) -> Tensor:
    """Compute the gradient of :func:`repeat` for its operand: sum the repetitions in ``grad`` down to ``shape``.

    Parameters
    ----------
    grad
        F32 with contiguous rows.
    shape
        Shape of the operand of ``repeat``: each size divides that of ``grad``.

    Returns
    -------
    Tensor
        Of that shape, F32.

    Raises
    ------
    ValueError
        If the shapes or types do not fit, or there are no elements.

    C: ``ggml_repeat_back``.
    """
    ctx = result_context("repeat_back", grad, ctx=ctx)
    sizes = check_shape(shape)
    ne = ne_of(sizes)
    need_rows("repeat_back", grad=grad)
    need_elements("repeat_back", grad=grad)
    if not broadcasts(grad.ne, ne):
        raise op_error("repeat_back", f"the sizes of grad are not multiples of {sizes}", grad=grad)
    if max(grad.ne) > INT_MAX:
        raise op_error("repeat_back", "grad has a size of more than 2**31 - 1", grad=grad)
    check_start("repeat_back", grad=grad)
    return ctx.build(c.ggml_repeat_back, len(sizes), grad.ptr, _of_shape(ne))


def get_rows_back(grad: Tensor, rows: Tensor, n_rows: int, *, ctx: Context | None = None) -> Tensor:
    """Compute the gradient of :func:`get_rows` for its table: add row ``i`` of ``grad`` to row ``rows[i]`` of zeros.

    Parameters
    ----------
    grad
        ``(m, k)``, F32 or F16 with contiguous rows.
    rows
        ``(m,)``, contiguous I32, as for ``get_rows``. Values must be 0 to ``n_rows - 1``: they are checked when they
        are set.
    n_rows
        Number of rows of the table.

    Returns
    -------
    Tensor
        ``(n_rows, k)``, F32.

    Raises
    ------
    ValueError
        If the shapes or types do not fit, there are no elements, or ``rows`` holds values out of range already.

    C: ``ggml_get_rows_back``.
    """
    op = "get_rows_back"
    ctx = result_context(op, grad, rows, ctx=ctx)
    n_rows = check_integer(op, "n_rows", n_rows, 1)
    need_rows(op, Type.F32, Type.F16, grad=grad)
    if rows.dtype is not Type.I32 or not rows.head.dense:
        raise op_error(op, "rows must be contiguous I32 (use cont)", grad=grad, rows=rows)
    if grad.ndim != 2 or rows.shape != grad.shape[:1]:
        raise op_error(op, "grad must be a matrix, and rows a vector with one number per row", a=grad, rows=rows)
    need_elements(op, grad=grad)
    if max(grad.ne) > INT_MAX:
        raise op_error(op, "grad has a size of more than 2**31 - 1", grad=grad)
    ne = (grad.ne[0], n_rows, 1, 1)
    check_result(op, ne)
    limit_row_numbers(op, rows, n_rows)
    return ctx.build(c.ggml_get_rows_back, 2, grad.ptr, rows.ptr, _of_shape(ne))


def _of_shape(ne: tuple[int, ...]) -> Any:
    """Return a C tensor for builders that read nothing but its sizes."""
    return c.ffi.new("struct ggml_tensor *", {"ne": ne})


def silu_back(grad: Tensor, x: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute the gradient of :func:`silu` for its operand: ``grad * s * (1 + x * (1 - s))`` with ``s = sigmoid(x)``.

    Parameters
    ----------
    grad, x
        Gradient of the result, and the operand. One shape and type, F32 or F16, contiguous.

    Returns
    -------
    Tensor
        Of their shape and type.

    Raises
    ------
    ValueError
        If shapes, types or layouts do not fit.

    C: ``ggml_silu_back``.
    """
    ctx = result_context("silu_back", grad, x, ctx=ctx)
    if grad.shape != x.shape or grad.dtype is not x.dtype:
        raise op_error("silu_back", "grad and x differ in shape or type", grad=grad, x=x)
    if x.dtype not in (Type.F32, Type.F16) or not grad.head.dense or not x.head.dense:
        raise op_error("silu_back", "grad and x must be contiguous F32 or F16 (use cont)", grad=grad, x=x)
    need_int_rows("silu_back", x=x)
    check_start("silu_back", grad=grad, x=x)
    return ctx.build(c.ggml_silu_back, x.ndim, grad.ptr, x.ptr)


def rms_norm_back(grad: Tensor, x: Tensor, eps: float = 1e-6, *, ctx: Context | None = None) -> Tensor:
    """Compute the gradient of :func:`rms_norm` for its operand.

    With means along the last axis: ``(grad - x * mean(x * grad) / (mean(x**2) + eps)) / sqrt(mean(x**2) + eps)``.

    Parameters
    ----------
    grad, x
        Gradient of the result, and the operand. One shape, contiguous F32.
    eps
        As for ``rms_norm``.

    Raises
    ------
    ValueError
        If shapes, types or ``eps`` do not fit.

    C: ``ggml_rms_norm_back``.
    """
    op = "rms_norm_back"
    ctx = result_context(op, grad, x, ctx=ctx)
    if grad.shape != x.shape:
        raise op_error(op, "grad and x differ in shape", grad=grad, x=x)
    need_dense(op, grad=grad, x=x)
    need_int_rows(op, x=x)
    check_start(op, grad=grad, x=x)
    return ctx.build(c.ggml_rms_norm_back, x.ndim, grad.ptr, x.ptr, check_real(op, "eps", eps, lowest=0.0))


def soft_max_ext_back(grad: Tensor, y: Tensor, *, scale: float = 1.0, ctx: Context | None = None) -> Tensor:
    """Compute the gradient of :func:`soft_max_ext` for its operand: ``scale * y * (grad - sum(y * grad))`` along the
    last axis.

    Parameters
    ----------
    grad, y
        Gradient of the result, and the result. One shape, contiguous F32.
    scale
        As for ``soft_max_ext``. Its ``max_bias`` must have been 0.

    Raises
    ------
    ValueError
        If shapes, types or ``scale`` do not fit.

    C: ``ggml_soft_max_ext_back``.
    """
    op = "soft_max_ext_back"
    ctx = result_context(op, grad, y, ctx=ctx)
    _check_soft_max(op, grad, y)
    return ctx.build(c.ggml_soft_max_ext_back, y.ndim, grad.ptr, y.ptr, check_real(op, "scale", scale), 0.0)


def soft_max_ext_back_inplace(grad: Tensor, y: Tensor, *, scale: float = 1.0, ctx: Context | None = None) -> Tensor:
    """Compute :func:`soft_max_ext_back` in place: write the result over ``grad``.

    C: ``ggml_soft_max_ext_back_inplace``.
    """
    op = "soft_max_ext_back_inplace"
    ctx = result_context(op, grad, y, ctx=ctx)
    _check_soft_max(op, grad, y)
    return ctx.build(c.ggml_soft_max_ext_back_inplace, grad.ndim, grad.ptr, y.ptr, check_real(op, "scale", scale), 0.0)


def _check_soft_max(op: str, grad: Tensor, y: Tensor) -> None:
    if grad.shape != y.shape:
        raise op_error(op, "grad and y differ in shape", grad=grad, y=y)
    need_dense(op, grad=grad, y=y)
    need_int_rows(op, y=y)
    check_start(op, grad=grad, y=y)


def rope_ext_back(
    a: Tensor,
    positions: Tensor,
    freq_factors: Tensor | None = None,
    *,
    n_dims: int,
    offset: int = 0,
    mode: RopeMode = RopeMode.NORMAL,
    n_ctx_orig: int = 0,
    freq_base: float = 10000.0,
    freq_scale: float = 1.0,
    ext_factor: float = 0.0,
    attn_factor: float = 1.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    ctx: Context | None = None,
) -> Tensor:
    """Compute the gradient of :func:`rope_ext` for its operand: rotate each pair of ``a`` back.

    Parameters
    ----------
    a
        Gradient of the result, ``(..., n_tokens, n_heads, head_size)``, F32 or F16, contiguous rows of even size.
    positions, n_dims, offset, mode, n_ctx_orig, freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow
        As for ``rope_ext``.
    freq_factors
        ``(head_size / 2,)`` or longer, F32.

    Raises
    ------
    ValueError
        If shapes, types or parameters do not fit.

    C: ``ggml_rope_ext_back``, ``ggml_rope_set_offset``.
    """
    numbers = (freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow)
    op, function = "rope_ext_back", c.ggml_rope_ext_back
    return build_rope(op, function, a, positions, freq_factors, n_dims, mode, n_ctx_orig, numbers, ctx, offset=offset)


def rope_multi_back(
    a: Tensor,
    positions: Tensor,
    freq_factors: Tensor | None = None,
    *,
    n_dims: int,
    offset: int = 0,
    sections: Sequence[int],
    mode: RopeMode = RopeMode.MROPE,
    n_ctx_orig: int = 0,
    freq_base: float = 10000.0,
    freq_scale: float = 1.0,
    ext_factor: float = 0.0,
    attn_factor: float = 1.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    ctx: Context | None = None,
) -> Tensor:
    """Compute the gradient of :func:`rope_multi` for its operand: rotate each pair of ``a`` back.

    Parameters
    ----------
    a
        Gradient of the result, ``(..., n_tokens, n_heads, head_size)``, F32 or F16, contiguous rows of even size.
    positions
        ``(4 * n_tokens,)``, I32.
    freq_factors
        ``(head_size / 2,)`` or longer, F32.
    n_dims
        Number of rotated elements of a head; even. Half of the head for ``RopeMode.VISION``.
    offset, sections, mode, n_ctx_orig, freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow
        As for ``rope_multi``.

    Raises
    ------
    ValueError
        If shapes, types or parameters do not fit.

    C: ``ggml_rope_multi_back``, ``ggml_rope_set_offset``.
    """
    numbers = (freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow)
    op, function = "rope_multi_back", c.ggml_rope_multi_back
    return build_rope(
        op, function, a, positions, freq_factors, n_dims, mode, n_ctx_orig, numbers, ctx, sections, offset=offset
    )
