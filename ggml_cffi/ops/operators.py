"""What the operators of :class:`~ggml_cffi.core.tensor.Tensor` do: numpy's meaning, built from the operations.

Scalars and arrays may stand beside tensors. Arrays become constants of the result's context: their values are written
when the graph is given memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from operator import index
from typing import Any

import numpy as np

from ggml_cffi.core import dtypes
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Op, Type
from ggml_cffi.ops import elementwise, reduce, unary
from ggml_cffi.ops import shape as shapes
from ggml_cffi.ops._check import fail
from ggml_cffi.ops.matmul import mul_mat


def as_tensor(value: Any, beside: Tensor) -> Any:
    """``value`` as a tensor that fits ``beside``: itself, or a constant of its context; None if it cannot be one."""
    if isinstance(value, Tensor):
        return value
    array = np.asarray(value)
    if array.dtype.kind not in "fiub" or array.ndim > 4:
        return None
    dtype = beside.dtype if beside.dtype in (Type.F16, Type.BF16) else Type.F32
    return beside.context.constant(array, dtype)


def _scalar(value: Any) -> float | None:
    """``value`` as a float, if it is a plain number or an array of no axes."""
    if isinstance(value, Tensor) or np.ndim(value):
        return None
    array = np.asarray(value)
    return float(array) if array.dtype.kind in "fiub" else None


def _broadcast(op: str, a: Tensor, b: Tensor) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(a.shape, b.shape)
    except ValueError:
        raise fail(op, "shapes do not broadcast by numpy's rules", a=a, b=b) from None


def _padded(t: Tensor, ndim: int) -> Tensor:
    """``t`` with axes of size 1 put before its own: the same memory, another number of axes."""
    return t if t.ndim == ndim else Tensor(t.context, t.ptr, ndim)


def _stretched(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    t = _padded(t, len(shape))
    return t if t.shape == shape else shapes.repeat(t, shape)


def _rows(t: Tensor) -> Tensor:
    """``t`` with contiguous rows, copied if need be."""
    return t if t.nb[0] == dtypes.type_size(t.dtype) else shapes.cont(t)


def _arithmetic(op: str, function: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    shape = _broadcast(op, a, b)
    if op in ("add", "mul") and prod(b.shape) > prod(a.shape):
        a, b = b, a  # the larger first: ggml repeats the second
    return function(_rows(_stretched(a, shape)), _padded(b, len(shape)))


def add(a: Tensor, b: Any) -> Any:
    """``a + b``"""
    number = _scalar(b)
    if number is not None and a.dtype is Type.F32 and a.is_contiguous:
        return elementwise.scale_bias(a, 1.0, number)
    other = as_tensor(b, a)
    return NotImplemented if other is None else _arithmetic("add", elementwise.add, a, other)


def sub(a: Any, b: Any) -> Any:
    """``a - b``, either of them a tensor."""
    tensor = a if isinstance(a, Tensor) else b
    number = _scalar(b) if isinstance(a, Tensor) else _scalar(a)
    if number is not None and tensor.dtype is Type.F32 and tensor.is_contiguous:
        if tensor is a:
            return elementwise.scale_bias(a, 1.0, -number)
        return elementwise.scale_bias(b, -1.0, number)
    x, y = as_tensor(a, tensor), as_tensor(b, tensor)
    return NotImplemented if x is None or y is None else _arithmetic("sub", elementwise.sub, x, y)


def mul(a: Tensor, b: Any) -> Any:
    """``a * b``"""
    number = _scalar(b)
    if number is not None and a.dtype is Type.F32 and a.is_contiguous:
        return elementwise.scale(a, number)
    other = as_tensor(b, a)
    return NotImplemented if other is None else _arithmetic("mul", elementwise.mul, a, other)


def div(a: Any, b: Any) -> Any:
    """``a / b``, either of them a tensor."""
    tensor = a if isinstance(a, Tensor) else b
    number = _scalar(b) if isinstance(a, Tensor) else None
    if number and tensor.dtype is Type.F32 and tensor.is_contiguous:
        return elementwise.scale(tensor, 1.0 / number)
    x, y = as_tensor(a, tensor), as_tensor(b, tensor)
    return NotImplemented if x is None or y is None else _arithmetic("div", elementwise.div, x, y)


def neg(a: Tensor) -> Tensor:
    """``-a``"""
    return unary.neg(_rows(a))


def matmul(a: Any, b: Any) -> Any:
    """``a @ b`` as numpy has it: vectors, matrices, and stacks of matrices that broadcast.

    ``x @ w.T`` reads ``w`` as it lies; other right-hand sides are transposed into a copy.
    """
    tensor = a if isinstance(a, Tensor) else b
    x, y = as_tensor(a, tensor), as_tensor(b, tensor)
    if x is None or y is None:
        return NotImplemented
    if not x.ndim or not y.ndim:
        raise fail("matmul", "a and b must have axes (multiply by numbers with *)", a=x, b=y)
    left = shapes.reshape(_contiguous(x), (1, -1)) if x.ndim == 1 else x
    right = shapes.reshape(_contiguous(y), (-1, 1)) if y.ndim == 1 else y
    if left.shape[-1] != right.shape[-2]:
        raise fail("matmul", "inner sizes differ", a=x, b=y)
    turned = _turned(right)
    batch = np.broadcast_shapes(left.shape[:-2], turned.shape[:-2]) if _batches_fit(left, turned) else None
    if batch is None:
        raise fail("matmul", "the stacks do not broadcast", a=x, b=y)
    out = mul_mat(turned, _rows(_stretched(left, (*batch, *left.shape[-2:]))))
    shape = list(batch)
    if x.ndim > 1:
        shape.append(left.shape[-2])
    if y.ndim > 1:
        shape.append(right.shape[-1])
    return out if out.shape == tuple(shape) else shapes.reshape(out, shape)


def _batches_fit(a: Tensor, b: Tensor) -> bool:
    sizes = zip(a.shape[:-2][::-1], b.shape[:-2][::-1], strict=False)
    return all(m == n or m == 1 or n == 1 for m, n in sizes)


def _contiguous(t: Tensor) -> Tensor:
    return t if t.is_contiguous else shapes.cont(t)


def _turned(t: Tensor) -> Tensor:
    """The last two axes swapped, rows contiguous."""
    if t.op is Op.TRANSPOSE:
        source = Tensor(t.context, t.ptr.src[0], t.ndim)
        if source.nb[0] == dtypes.type_size(source.dtype) and source.nb[0] <= source.nb[1]:
            return source
    return shapes.cont(shapes.transpose(t))


def total(op: str, a: Tensor, axis: int | None, keepdims: bool) -> Tensor:
    """Sum or mean over all elements, or along one axis."""
    if a.dtype is not Type.F32:
        raise fail(op, "a must be F32", a=a)
    n = a.ndim
    if axis is None:
        out = reduce.sum(_contiguous(a))
        if op == "mean":
            out = elementwise.scale(out, 1.0 / max(a.size, 1))
        return shapes.reshape(out, (1,) * n) if keepdims else Tensor(out.context, out.ptr, 0)
    if not -n <= index(axis) < n:
        raise IndexError(f"{op}: axis {axis} is not one of {n}")
    axis %= n
    order = [i for i in range(n) if i != axis] + [axis]
    moved = a if axis == n - 1 else shapes.cont(shapes.permute(a, order))
    out = (reduce.sum_rows if op == "sum" else reduce.mean)(_rows(moved))
    shape = [1 if i == axis else m for i, m in enumerate(a.shape)]
    return shapes.reshape(out, shape if keepdims else [m for i, m in enumerate(a.shape) if i != axis])


def item(a: Tensor, key: Any) -> Tensor:
    """``a[key]`` by integers, slices and ``...``: a view.

    Steps are for all axes but the last. An integer on the last axis takes a copy, since ggml's rows have no gaps.
    """
    sizes, strides = a.shape, a.nb[: a.ndim][::-1]
    keys = _full_key(a, key)
    offset, shape, steps = 0, [], []
    for axis, k in enumerate(keys):
        n, stride = sizes[axis], strides[axis]
        last = axis == a.ndim - 1
        if isinstance(k, slice):
            start, stop, step = k.indices(n)
            if step < 1 or (last and step != 1):
                raise IndexError(f"step {step} on axis {axis}: steps are positive, and 1 on the last axis")
            count = max(0, -(-(stop - start) // step))
        else:
            start, step, count = index(k), 1, 1
            if not -n <= start < n:
                raise IndexError(f"index {start} is out of range for axis {axis} with size {n}")
            start %= n
        block = dtypes.block_size(a.dtype) if last else 1
        if start % block:
            raise IndexError(f"{start} on the last axis is not the start of a block of {block} {a.dtype.name} elements")
        offset += start // block * stride if count else 0
        shape.append(count)
        steps.append(stride * step)
    if a.ndim and strides[-1] != dtypes.type_size(a.dtype):
        raise fail("item", "the rows of a must be contiguous to be cut (use cont)", a=a)
    out = shapes.view(a, shape, strides=steps, offset=offset)
    kept = [m for m, k in zip(shape, keys, strict=True) if isinstance(k, slice)]
    if len(kept) == len(shape):
        return out
    if keys and not isinstance(keys[-1], slice):
        return shapes.reshape(shapes.cont(out), kept)
    # Axes of size 1 before the last: left out of the description, the memory stays as it is.
    kept_steps = [s for s, k in zip(steps, keys, strict=True) if isinstance(k, slice)]
    return shapes.view(a, kept, strides=kept_steps, offset=offset)


def _full_key(a: Tensor, key: Any) -> list[Any]:
    keys = list(key) if isinstance(key, tuple) else [key]
    if any(k is None or isinstance(k, bool | list | np.ndarray | Tensor) for k in keys):
        raise TypeError("tensors are indexed by integers, slices and ...; rows by number are get_rows(a, rows)")
    dots = [i for i, k in enumerate(keys) if k is Ellipsis]
    missing = a.ndim - len(keys) + len(dots)
    if len(dots) > 1 or missing < 0:
        raise IndexError(f"too many indices for {a.ndim} axes: {key!r}")
    at = dots[0] if dots else len(keys)
    return [*keys[:at], *[slice(None)] * missing, *keys[at + 1 :]]


def permuted(a: Tensor, axes: Sequence[int]) -> Tensor:
    """``a`` with its axes in another order; all reversed for none."""
    return shapes.permute(a, axes or range(a.ndim)[::-1])
