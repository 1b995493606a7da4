"""Losses, and steps of optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.buffer import read_only
from ggml_cffi.core.context import Context
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import TensorFlag, Type
from ggml_cffi.ops._operands import (
    check_start,
    need_dense,
    need_elements,
    need_int,
    need_int_rows,
    op_error,
    result_context,
)

__all__ = [
    "count_equal",
    "cross_entropy_loss",
    "cross_entropy_loss_back",
    "opt_step_adamw",
    "opt_step_sgd",
]


def cross_entropy_loss(logits: Tensor, labels: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute the mean cross-entropy of the rows: ``-sum(labels * log_softmax(logits))`` over the number of rows.

    Parameters
    ----------
    logits
        ``(..., n_classes)``, contiguous F32.
    labels
        Probability of each class, in the same shape: one-hot rows for known classes. Contiguous F32.

    Returns
    -------
    Tensor
        A scalar of shape ``()``, F32.

    Raises
    ------
    ValueError
        If shapes, types or layouts do not fit, or there are no elements.

    C: ``ggml_cross_entropy_loss``.
    """
    op = "cross_entropy_loss"
    ctx = result_context(op, logits, labels, ctx=ctx)
    _check_loss(op, logits, labels)
    return ctx.build(c.ggml_cross_entropy_loss, 0, logits.ptr, labels.ptr)


def cross_entropy_loss_back(grad: Tensor, logits: Tensor, labels: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Compute the gradient of :func:`cross_entropy_loss` for its logits: ``grad * (softmax(logits) - labels) /
    n_rows``.

    The formula assumes that the rows of ``labels`` sum to 1.

    Parameters
    ----------
    grad
        Gradient of the loss: one element, F32.
    logits, labels
        Operands of the loss.

    Returns
    -------
    Tensor
        Shape of the logits, F32.

    Raises
    ------
    ValueError
        If shapes, types or layouts do not fit, or there are no elements.

    C: ``ggml_cross_entropy_loss_back``.
    """
    op = "cross_entropy_loss_back"
    ctx = result_context(op, grad, logits, labels, ctx=ctx)
    _check_loss(op, logits, labels)
    if grad.dtype is not Type.F32 or not grad.head.dense or grad.size != 1:
        raise op_error(op, "grad must be one F32", grad=grad)
    return ctx.build(c.ggml_cross_entropy_loss_back, logits.ndim, grad.ptr, logits.ptr, labels.ptr)


def _check_loss(op: str, logits: Tensor, labels: Tensor) -> None:
    if logits.shape != labels.shape:
        raise op_error(op, "logits and labels differ in shape", logits=logits, labels=labels)
    need_dense(op, logits=logits, labels=labels)
    need_elements(op, logits=logits, labels=labels)
    need_int_rows(op, logits=logits)


def count_equal(a: Tensor, b: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Count the elements of ``a`` that equal those of ``b`` at the same place.

    Parameters
    ----------
    a, b
        One shape with one or two axes, I32. (ggml's CPU code is wrong for more axes: reshape first.)

    Returns
    -------
    Tensor
        A scalar of shape ``()``, I64.

    Raises
    ------
    ValueError
        If shapes or types do not fit, or there are no elements.

    C: ``ggml_count_equal``.
    """
    ctx = result_context("count_equal", a, b, ctx=ctx)
    if a.shape != b.shape:
        raise op_error("count_equal", "a and b differ in shape", a=a, b=b)
    if a.dtype is not Type.I32 or b.dtype is not Type.I32:
        raise op_error("count_equal", "a and b must be I32", a=a, b=b)
    if a.ndim > 2:
        raise op_error("count_equal", "a and b must have at most two axes (use reshape)", a=a, b=b)
    need_elements("count_equal", a=a, b=b)
    need_int("count_equal", a=a)
    check_start("count_equal", a=a, b=b)
    return ctx.build(c.ggml_count_equal, 0, a.ptr, b.ptr)


def opt_step_adamw(
    a: Tensor, grad: Tensor, m: Tensor, v: Tensor, params: Tensor, *, ctx: Context | None = None
) -> Tensor:
    """Perform one step of AdamW: write over the weights ``a`` and their moments ``m`` and ``v``.

    ``m = beta1 * m + (1 - beta1) * grad``, ``v = beta2 * v + (1 - beta2) * grad**2``, then
    ``a = (1 - alpha * wd) * a - alpha * (m * c1) / (sqrt(v * c2) + eps)``.

    ``a``, ``m`` and ``v`` persist from step to step, so they must have memory on one device before this call (use
    ``Context.alloc``). Other nodes of the graph that use them may run before or after the step.

    Parameters
    ----------
    a
        Weights, neither computed nor a view; contiguous F32.
    grad
        Gradient of the weights, in the same shape; contiguous F32.
    m, v
        Running means of the gradient and of its square, shaped as ``a``; zero before the first step.
    params
        ``(7,)``, F32: ``alpha`` (the learning rate), ``beta1``, ``beta2``, ``eps``, ``wd`` (the weight decay), and the
        corrections of the moments at step ``t``, counted from 1: ``c1 = 1 / (1 - beta1**t)``,
        ``c2 = 1 / (1 - beta2**t)``.

    Returns
    -------
    Tensor
        View of ``a``; make it an output of the graph.

    Raises
    ------
    ValueError
        If shapes, types or layouts do not fit, or ``a``, ``m`` and ``v`` are not in writable memory of one device.

    C: ``ggml_opt_step_adamw``. Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization, 2019.
    """
    op = "opt_step_adamw"
    ctx = result_context(op, a, grad, m, v, params, ctx=ctx)
    _check_step(op, grad, params, 7, a=a, m=m, v=v)
    return _step(ctx, c.ggml_opt_step_adamw, a, grad.ptr, m.ptr, v.ptr, params.ptr)


def opt_step_sgd(a: Tensor, grad: Tensor, params: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Perform one step of gradient descent: write ``(1 - alpha * wd) * a - alpha * grad`` over the weights ``a``.

    Parameters
    ----------
    a
        Weights, neither computed nor a view; contiguous F32, with memory.
    grad
        Gradient of the weights, in the same shape; contiguous F32.
    params
        ``(2,)``, F32: ``alpha`` (the learning rate) and ``wd`` (the weight decay).

    Returns
    -------
    Tensor
        View of ``a``; make it an output of the graph.

    Raises
    ------
    ValueError
        If shapes, types or layouts do not fit, or ``a`` is not in writable memory.

    C: ``ggml_opt_step_sgd``.
    """
    op = "opt_step_sgd"
    ctx = result_context(op, a, grad, params, ctx=ctx)
    _check_step(op, grad, params, 2, a=a)
    return _step(ctx, c.ggml_opt_step_sgd, a, grad.ptr, params.ptr)


def _check_step(op: str, grad: Tensor, params: Tensor, n: int, **written: Tensor) -> None:
    need_dense(op, **written, grad=grad, params=params)
    if any(t.shape != grad.shape for t in written.values()):
        raise op_error(op, f"{', '.join(written)} and grad differ in shape", **written, grad=grad)
    if params.shape != (n,):
        raise op_error(op, f"params must be of shape ({n},)", params=params)
    if len({t.ptr for t in written.values()}) < len(written):
        raise op_error(op, f"{', '.join(written)} must be different tensors", **written)
    need_int_rows(op, grad=grad)
    check_start(op, grad=grad, params=params)
    for name, t in written.items():
        if not t.is_leaf or t.ptr.view_src:
            raise op_error(op, f"{name} must be neither computed nor a view", **written)
        # The scheduler could give tensors without memory to different devices, and a step would write to copies.
        if not t.is_allocated:
            raise op_error(
                op, f"{name} persists from step to step: give it memory first (use Context.alloc)", **written
            )
        if t.ptr.buffer in read_only:
            raise op_error(op, f"{name} is in read-only memory", **written)
    if len({t.buffer_type for t in written.values()}) > 1:
        raise op_error(op, f"{', '.join(written)} must be in memory of one device", **written)


def _step(ctx: Context, function: Callable[..., Any], a: Tensor, *args: Any) -> Tensor:
    # The builder requires ggml's PARAM flag. Graphs list tensors with the flag among their nodes, which nothing here
    # needs, so the flag is removed again.
    pointer, flags = a.ptr, a.ptr.flags
    pointer.flags = flags | TensorFlag.PARAM
    try:
        return ctx.build(function, a.ndim, pointer, *args)
    finally:
        pointer.flags = flags
