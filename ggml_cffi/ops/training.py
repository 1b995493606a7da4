"""Losses, and the steps of optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.buffer import read_only
from ggml_cffi.core.context import Context
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import TensorFlag, Type
from ggml_cffi.ops._check import fail, home
from ggml_cffi.ops._operands import need_dense, need_elements, need_int, need_int_rows
from ggml_cffi.ops._window import check_start

__all__ = [
    "count_equal",
    "cross_entropy_loss",
    "cross_entropy_loss_back",
    "opt_step_adamw",
    "opt_step_sgd",
]


def cross_entropy_loss(logits: Tensor, labels: Tensor, *, ctx: Context | None = None) -> Tensor:
    """``-sum(labels * log_softmax(logits))`` over the number of rows: the mean cross-entropy of the rows.

    Parameters
    ----------
    logits
        ``(..., n_classes)``, contiguous F32.
    labels
        The probability of each class, of the same shape: one-hot rows for known classes. Contiguous F32.

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
    ctx = home(op, logits, labels, ctx=ctx)
    _check_loss(op, logits, labels)
    return ctx.build(c.ggml_cross_entropy_loss, 0, logits.ptr, labels.ptr)


def cross_entropy_loss_back(grad: Tensor, logits: Tensor, labels: Tensor, *, ctx: Context | None = None) -> Tensor:
    """The gradient of :func:`cross_entropy_loss` for its logits: ``grad * (softmax(logits) - labels) / n_rows``.

    It is that of labels whose rows sum to 1.

    Parameters
    ----------
    grad
        The gradient of the loss: one element, F32.
    logits, labels
        The operands of the loss.

    Returns
    -------
    Tensor
        Of the logits' shape, F32.

    Raises
    ------
    ValueError
        If shapes, types or layouts do not fit, or there are no elements.

    C: ``ggml_cross_entropy_loss_back``.
    """
    op = "cross_entropy_loss_back"
    ctx = home(op, grad, logits, labels, ctx=ctx)
    _check_loss(op, logits, labels)
    if grad.dtype is not Type.F32 or not grad.head.dense or grad.size != 1:
        raise fail(op, "grad must be one F32", grad=grad)
    return ctx.build(c.ggml_cross_entropy_loss_back, logits.ndim, grad.ptr, logits.ptr, labels.ptr)


def _check_loss(op: str, logits: Tensor, labels: Tensor) -> None:
    if logits.shape != labels.shape:
        raise fail(op, "logits and labels differ in shape", logits=logits, labels=labels)
    need_dense(op, logits=logits, labels=labels)
    need_elements(op, logits=logits, labels=labels)
    need_int_rows(op, logits=logits)


def count_equal(a: Tensor, b: Tensor, *, ctx: Context | None = None) -> Tensor:
    """How many elements of ``a`` equal those of ``b`` at the same place.

    Parameters
    ----------
    a, b
        Of one shape with one or two axes, I32. (ggml's CPU code is wrong for more axes: reshape first.)

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
    ctx = home("count_equal", a, b, ctx=ctx)
    if a.shape != b.shape:
        raise fail("count_equal", "a and b differ in shape", a=a, b=b)
    if a.dtype is not Type.I32 or b.dtype is not Type.I32:
        raise fail("count_equal", "a and b must be I32", a=a, b=b)
    if a.ndim > 2:
        raise fail("count_equal", "a and b must have at most two axes (use reshape)", a=a, b=b)
    need_elements("count_equal", a=a, b=b)
    need_int("count_equal", a=a)
    check_start("count_equal", a=a, b=b)
    return ctx.build(c.ggml_count_equal, 0, a.ptr, b.ptr)


def opt_step_adamw(
    a: Tensor, grad: Tensor, m: Tensor, v: Tensor, params: Tensor, *, ctx: Context | None = None
) -> Tensor:
    """One step of AdamW: writes over the weights ``a`` and their moments ``m`` and ``v``.

    ``m = beta1 * m + (1 - beta1) * grad``, ``v = beta2 * v + (1 - beta2) * grad**2``, then
    ``a = (1 - alpha * wd) * a - alpha * (m * c1) / (sqrt(v * c2) + eps)``.

    ``a``, ``m`` and ``v`` are kept from step to step, so they must have memory before this call (``Context.alloc``),
    all on one device. Whatever else uses them in the same graph may run before the step or after it.

    Parameters
    ----------
    a
        The weights: not computed and no view, contiguous F32.
    grad
        Their gradient, of the same shape, contiguous F32.
    m, v
        Running means of the gradient and of its square, as ``a``; zero before the first step.
    params
        ``(7,)``, F32: ``alpha`` (the learning rate), ``beta1``, ``beta2``, ``eps``, ``wd`` (the weight decay), and what
        step ``t``, counted from 1, corrects the moments with: ``c1 = 1 / (1 - beta1**t)``, ``c2 = 1 / (1 - beta2**t)``.

    Returns
    -------
    Tensor
        A view of ``a``, to be an output of the graph.

    Raises
    ------
    ValueError
        If shapes, types or layouts do not fit, or ``a``, ``m`` and ``v`` are not in writable memory of one device.

    C: ``ggml_opt_step_adamw``. Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization, 2019.
    """
    op = "opt_step_adamw"
    ctx = home(op, a, grad, m, v, params, ctx=ctx)
    _check_step(op, grad, params, 7, a=a, m=m, v=v)
    return _step(ctx, c.ggml_opt_step_adamw, a, grad.ptr, m.ptr, v.ptr, params.ptr)


def opt_step_sgd(a: Tensor, grad: Tensor, params: Tensor, *, ctx: Context | None = None) -> Tensor:
    """One step of gradient descent: writes ``(1 - alpha * wd) * a - alpha * grad`` over the weights ``a``.

    Parameters
    ----------
    a
        The weights: not computed and no view, contiguous F32, with memory.
    grad
        Their gradient, of the same shape, contiguous F32.
    params
        ``(2,)``, F32: ``alpha`` (the learning rate) and ``wd`` (the weight decay).

    Returns
    -------
    Tensor
        A view of ``a``, to be an output of the graph.

    Raises
    ------
    ValueError
        If shapes, types or layouts do not fit, or ``a`` is not in writable memory.

    C: ``ggml_opt_step_sgd``.
    """
    op = "opt_step_sgd"
    ctx = home(op, a, grad, params, ctx=ctx)
    _check_step(op, grad, params, 2, a=a)
    return _step(ctx, c.ggml_opt_step_sgd, a, grad.ptr, params.ptr)


def _check_step(op: str, grad: Tensor, params: Tensor, n: int, **written: Tensor) -> None:
    need_dense(op, **written, grad=grad, params=params)
    if any(t.shape != grad.shape for t in written.values()):
        raise fail(op, f"{', '.join(written)} and grad differ in shape", **written, grad=grad)
    if params.shape != (n,):
        raise fail(op, f"params must be of shape ({n},)", params=params)
    if len({t.ptr for t in written.values()}) < len(written):
        raise fail(op, f"{', '.join(written)} must be different tensors", **written)
    need_int_rows(op, grad=grad)
    check_start(op, grad=grad, params=params)
    for name, t in written.items():
        if not t.is_leaf or t.ptr.view_src:
            raise fail(op, f"{name} must be neither computed nor a view", **written)
        # Where they have none yet, the scheduler could give each its own device, and a step would write to copies.
        if not t.is_allocated:
            raise fail(op, f"{name} must have memory: it is kept from step to step (use Context.alloc)", **written)
        if t.ptr.buffer in read_only:
            raise fail(op, f"{name} is in memory that is read-only", **written)
    if len({t.buffer_type for t in written.values()}) > 1:
        raise fail(op, f"{', '.join(written)} must be in memory of one device", **written)


def _step(ctx: Context, function: Callable[..., Any], a: Tensor, *args: Any) -> Tensor:
    # The builder insists on ggml's mark of trainable weights. It would have graphs list them among their nodes, and
    # nothing here uses it: take it away again.
    pointer, flags = a.ptr, a.ptr.flags
    pointer.flags = flags | TensorFlag.PARAM
    try:
        return ctx.build(function, a.ndim, pointer, *args)
    finally:
        pointer.flags = flags
