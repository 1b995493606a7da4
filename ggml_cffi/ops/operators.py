"""Implementation of the operators of :class:`~ggml_cffi.core.tensor.Tensor`, with numpy's meaning.

The other operand may be a number or an array. An array becomes a constant in the context of the result; its values are
written when the graph gets memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from math import prod
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt

from ggml_cffi.core import dtypes
from ggml_cffi.core.known_names import hint
from ggml_cffi.core.operators import refuse_comparison
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Op, Type
from ggml_cffi.ops import elementwise, reduce, unary
from ggml_cffi.ops import shape as shapes
from ggml_cffi.ops._operands import op_error, result_context
from ggml_cffi.ops.matmul import mul_mat

_LARGEST_PRODUCT = 64  # integer exponents up to here are computed by products


def as_tensor(value: Any, beside: Tensor) -> Any:
    """Return ``value`` as a tensor: itself, or a constant in the context of ``beside``; None if it cannot be one."""
    if isinstance(value, Tensor):
        return value
    array = _numbers(value)
    if array is None or array.ndim > 4:
        return None
    dtype = beside.dtype if beside.dtype in (Type.F16, Type.BF16) else Type.F32
    return beside.context.constant(array, dtype)


def _as_number(value: Any) -> float | None:
    """Return ``value`` as a float if it is a plain number or an array without axes, else None."""
    if isinstance(value, Tensor) or np.ndim(value):
        return None
    array = _numbers(value)
    return None if array is None else float(array)


def _numbers(value: Any) -> npt.NDArray[Any] | None:
    """Return ``value`` as an array, None if it does not consist of numbers."""
    try:
        array = dtypes.as_array(value)
    except TypeError:
        return None
    return array if array.dtype.kind in "fiub" else None


def _constant(values: npt.ArrayLike, dtype: Type, *operands: Tensor) -> Tensor:
    """Return the values of a result that ggml's operations cannot compute, as a constant: one without elements, or from
    operands without elements.
    """
    return result_context("constant", *operands).constant(values, dtype)


def _broadcast(op: str, a: Tensor, b: Tensor) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(a.shape, b.shape)
    except ValueError:
        raise op_error(op, "shapes do not broadcast by numpy's rules", a=a, b=b) from None


def _with_axes(t: Tensor, ndim: int) -> Tensor:
    """Return ``t`` with leading axes of size 1: the same memory with ``ndim`` axes."""
    return t if t.ndim == ndim else Tensor(t.context, t.ptr, ndim)


def _repeated(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    t = _with_axes(t, len(shape))
    return t if t.shape == shape else shapes.repeat(t, shape)


def _contiguous_rows(t: Tensor) -> Tensor:
    """Return ``t`` if its rows are contiguous, else a contiguous copy."""
    return t if t.nb[0] == dtypes.type_size(t.dtype) else shapes.cont(t)


def _arithmetic(op: str, function: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    shape = _broadcast(op, a, b)
    if 0 in shape:
        return _constant(np.empty(shape), a.dtype, a, b)
    if op in ("add", "mul") and prod(b.shape) > prod(a.shape):
        a, b = b, a  # ggml repeats the second operand, so the larger comes first
    return function(_contiguous_rows(_repeated(a, shape)), _with_axes(b, len(shape)))


def add(a: Tensor, b: Any) -> Any:
    """Compute ``a + b``."""
    number = _as_number(b)
    if number is not None and a.dtype is Type.F32 and a.is_contiguous:
        return elementwise.scale_bias(a, 1.0, number)
    other = as_tensor(b, a)
    return NotImplemented if other is None else _arithmetic("add", elementwise.add, a, other)


def sub(a: Any, b: Any) -> Any:
    """Compute ``a - b``; one of them is a tensor."""
    tensor = a if isinstance(a, Tensor) else b
    number = _as_number(b) if isinstance(a, Tensor) else _as_number(a)
    if number is not None and tensor.dtype is Type.F32 and tensor.is_contiguous:
        if tensor is a:
            return elementwise.scale_bias(a, 1.0, -number)
        return elementwise.scale_bias(b, -1.0, number)
    x, y = as_tensor(a, tensor), as_tensor(b, tensor)
    return NotImplemented if x is None or y is None else _arithmetic("sub", elementwise.sub, x, y)


def mul(a: Tensor, b: Any) -> Any:
    """Compute ``a * b``."""
    number = _as_number(b)
    if number is not None and a.dtype is Type.F32 and a.is_contiguous:
        return elementwise.scale(a, number)
    other = as_tensor(b, a)
    return NotImplemented if other is None else _arithmetic("mul", elementwise.mul, a, other)


def div(a: Any, b: Any) -> Any:
    """Compute ``a / b``; one of them is a tensor."""
    tensor = a if isinstance(a, Tensor) else b
    number = _as_number(b) if isinstance(a, Tensor) else None
    if number and tensor.dtype is Type.F32 and tensor.is_contiguous:
        return elementwise.scale(tensor, 1.0 / number)
    x, y = as_tensor(a, tensor), as_tensor(b, tensor)
    return NotImplemented if x is None or y is None else _arithmetic("div", elementwise.div, x, y)


def power(a: Any, b: Any) -> Any:
    """Compute ``a ** b``; one of them is a tensor."""
    number = _as_number(b) if isinstance(a, Tensor) else None
    if number is not None and number.is_integer() and abs(number) <= _LARGEST_PRODUCT:
        return _integer_power(a, int(number))
    if number == 0.5:
        return unary.sqrt(_contiguous_rows(a))
    if isinstance(a, Tensor):
        logarithm: Any = unary.log(_contiguous_rows(a))
    else:
        base = _numbers(a)
        if base is None:
            return NotImplemented
        with np.errstate(divide="ignore", invalid="ignore"):
            logarithm = np.log(base.astype(np.float64))
    product = mul(b, logarithm) if isinstance(b, Tensor) else mul(logarithm, b)
    return product if product is NotImplemented else unary.exp(_contiguous_rows(product))


def _integer_power(a: Tensor, n: int) -> Tensor:
    """Compute ``a ** n`` by products: exact signs, and the powers of 0."""
    if n == 0:
        return _constant(np.ones(a.shape), a.dtype, a)
    result, square = None, _contiguous_rows(a)
    rest = abs(n)
    while True:
        if rest & 1:
            result = square if result is None else elementwise.mul(result, square)
        rest >>= 1
        if not rest:
            break
        square = elementwise.mul(square, square)
    return result if n > 0 else div(1.0, result)  # type: ignore[return-value]


def neg(a: Tensor) -> Tensor:
    """Compute ``-a``."""
    return unary.neg(_contiguous_rows(a))


def absolute(a: Tensor) -> Tensor:
    """Compute ``abs(a)``."""
    return unary.abs(_contiguous_rows(a))


def universal(ufunc: np.ufunc, method: str, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Compute one of numpy's functions of which an operand is a tensor.

    Raises
    ------
    TypeError
        If there is no such operation.
    """
    name = ufunc.__name__
    if method == "__call__" and not options:
        if name in _COMPARISONS:
            refuse_comparison()
        if name in _BINARY:
            a, b = inputs
            swap = name in ("add", "multiply") and not isinstance(a, Tensor)
            return _BINARY[name](b, a) if swap else _BINARY[name](a, b)
        if name in _UNARY:
            return _UNARY[name](_contiguous_rows(inputs[0]))
        if name in ("maximum", "minimum"):
            tensor, other = inputs if isinstance(inputs[0], Tensor) else inputs[::-1]
            number = _as_number(other)
            if number is not None:
                low, high = (number, np.inf) if name == "maximum" else (-np.inf, number)
                return unary.clamp(_contiguous(tensor), low, high)
    raise TypeError(f"numpy.{name} does not take tensors{hint(name)}")


def matmul(a: Any, b: Any) -> Any:
    """Compute ``a @ b`` by numpy's rules: vectors, matrices, and stacks of matrices that broadcast.

    ``x @ w.T`` uses ``w`` without a copy; any other right-hand side is transposed into a copy.
    """
    tensor = a if isinstance(a, Tensor) else b
    x, y = as_tensor(a, tensor), as_tensor(b, tensor)
    if x is None or y is None:
        return NotImplemented
    if not x.ndim or not y.ndim:
        raise op_error("matmul", "a and b must have axes (use * to multiply by a number)", a=x, b=y)
    left = shapes.reshape(_contiguous(x), (1, -1)) if x.ndim == 1 else x
    right = shapes.reshape(_contiguous(y), (-1, 1)) if y.ndim == 1 else y
    if left.shape[-1] != right.shape[-2]:
        raise op_error("matmul", "inner sizes differ", a=x, b=y)
    batch = np.broadcast_shapes(left.shape[:-2], right.shape[:-2]) if _batches_broadcast(left, right) else None
    if batch is None:
        raise op_error("matmul", "the stacks do not broadcast", a=x, b=y)
    shape = list(batch)
    if x.ndim > 1:
        shape.append(left.shape[-2])
    if y.ndim > 1:
        shape.append(right.shape[-1])
    if not left.size or not right.size:
        return _constant(np.zeros(shape), Type.F32, x, y)
    turned = _swapped(right)
    out = mul_mat(turned, _contiguous_rows(_repeated(left, (*batch, *left.shape[-2:]))))
    return out if out.shape == tuple(shape) else shapes.reshape(out, shape)


def _batches_broadcast(a: Tensor, b: Tensor) -> bool:
    sizes = zip(a.shape[:-2][::-1], b.shape[:-2][::-1], strict=False)
    return all(m == n or m == 1 or n == 1 for m, n in sizes)


def _contiguous(t: Tensor) -> Tensor:
    return t if t.is_contiguous else shapes.cont(t)


def _swapped(t: Tensor) -> Tensor:
    """Return ``t`` with its last two axes swapped and contiguous rows."""
    if t.op is Op.TRANSPOSE:
        source = Tensor(t.context, t.ptr.src[0], t.ndim)
        if source.nb[0] == dtypes.type_size(source.dtype) and source.nb[0] <= source.nb[1]:
            return source
    return shapes.cont(shapes.transpose(t))


def total(op: str, a: Tensor, axis: int | None, keepdims: bool) -> Tensor:
    """Compute the sum or the mean over all elements, or along one axis."""
    if a.dtype is not Type.F32:
        raise op_error(op, "a must be F32", a=a)
    n = a.ndim
    if axis is not None and not -n <= index(axis) < n:
        raise IndexError(f"{op}: axis {axis} is not one of {n}")
    if not a.size:
        with warnings.catch_warnings():  # numpy warns of the mean of nothing, which is NaN
            warnings.simplefilter("ignore")
            return _constant(getattr(np.empty(a.shape), op)(axis, keepdims=keepdims), Type.F32, a)
    if axis is None:
        out = reduce.sum(_contiguous(a))
        if op == "mean":
            out = elementwise.scale(out, 1.0 / max(a.size, 1))
        return shapes.reshape(out, (1,) * n) if keepdims else Tensor(out.context, out.ptr, 0)
    axis = index(axis) % n
    order = [i for i in range(n) if i != axis] + [axis]
    moved = a if axis == n - 1 else shapes.cont(shapes.permute(a, order))
    out = (reduce.sum_rows if op == "sum" else reduce.mean)(_contiguous_rows(moved))
    shape = [1 if i == axis else m for i, m in enumerate(a.shape)]
    return shapes.reshape(out, shape if keepdims else [m for i, m in enumerate(a.shape) if i != axis])


def item(a: Tensor, key: Any) -> Tensor:
    """Return ``a[key]`` for integers, slices, ``...`` and None: a view.

    Steps are possible for all axes but the last. An integer on the last axis needs a copy, since ggml's rows have no
    gaps.
    """
    sizes, strides = a.shape, a.nb[: a.ndim][::-1]
    keys = _expand_key(a, key)
    if None in keys:
        return _with_new_axes(item(a, tuple(k for k in keys if k is not None)), keys)
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
        raise op_error("item", "the rows of a must be contiguous for indexing (use cont)", a=a)
    kept = [m for m, k in zip(shape, keys, strict=True) if isinstance(k, slice)]
    if 0 in kept:
        return _constant(np.empty(kept), a.dtype, a)
    out = shapes.view(a, shape, strides=steps, offset=offset)
    if len(kept) == len(shape):
        return out
    if keys and not isinstance(keys[-1], slice):
        return shapes.reshape(shapes.cont(out), kept)
    # Axes of size 1 before the last are dropped from the shape; the memory is the same.
    kept_steps = [s for s, k in zip(steps, keys, strict=True) if isinstance(k, slice)]
    return shapes.view(a, kept, strides=kept_steps, offset=offset)


def _expand_key(a: Tensor, key: Any) -> list[Any]:
    keys = list(key) if isinstance(key, tuple) else [key]
    if any(isinstance(k, bool | list | np.ndarray | Tensor) for k in keys):
        raise TypeError("index tensors by integers, slices, None and ...; get_rows(a, rows) selects rows by number")
    dots = [i for i, k in enumerate(keys) if k is Ellipsis]
    missing = a.ndim - sum(k is not None for k in keys) + len(dots)
    if len(dots) > 1 or missing < 0:
        raise IndexError(f"too many indices for {a.ndim} axes: {key!r}")
    at = dots[0] if dots else len(keys)
    return [*keys[:at], *[slice(None)] * missing, *keys[at + 1 :]]


def _with_new_axes(a: Tensor, keys: list[Any]) -> Tensor:
    """Return a view of ``a`` with an axis of size 1 for each None among ``keys``. Integers have removed their axes."""
    kept = [k for k in keys if k is None or isinstance(k, slice)]
    if len(kept) > 4:
        raise IndexError(f"the result has {len(kept)} axes; ggml has at most 4")
    sizes, strides = list(a.shape), list(a.nb[: a.ndim][::-1])
    unit = dtypes.type_size(a.dtype)
    for at, k in enumerate(kept):
        if k is None:
            strides.insert(at, sizes[at] * strides[at] if at < len(sizes) else unit)
            sizes.insert(at, 1)
    return shapes.view(a, sizes, strides=strides)


def swapped(a: Tensor, axis1: int, axis2: int) -> Tensor:
    """Return ``a`` with two axes interchanged."""
    n = a.ndim
    for axis in (axis1, axis2):
        if not -n <= index(axis) < n:
            raise IndexError(f"swapaxes: axis {axis} is not one of {n}")
    order = list(range(n))
    order[axis1], order[axis2] = order[axis2], order[axis1]
    return permuted(a, order)


def reshaped(a: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the elements of ``a`` in another shape."""
    return shapes.reshape(a, sizes) if a.size else _constant(np.empty(a.shape).reshape(sizes), a.dtype, a)


def permuted(a: Tensor, axes: Sequence[int]) -> Tensor:
    """Return ``a`` with its axes in another order; in reverse order if ``axes`` is empty."""
    if not a.size:
        return _constant(np.empty(a.shape).transpose(axes or None), a.dtype, a)
    if not axes and a.ndim == 2:
        return shapes.transpose(a)  # matrix products look for this operation
    return shapes.permute(a, axes or range(a.ndim)[::-1])


# ---------------------------------------------------------------------- numpy's functions, by their names

_COMPARISONS = ("less", "less_equal", "greater", "greater_equal", "equal", "not_equal")
_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "absolute": unary.abs,
    "ceil": unary.ceil,
    "cos": unary.cos,
    "exp": unary.exp,
    "expm1": unary.expm1,
    "floor": unary.floor,
    "log": unary.log,
    "negative": unary.neg,
    "sign": unary.sgn,
    "sin": unary.sin,
    "sqrt": unary.sqrt,
    "square": unary.sqr,
    "tanh": unary.tanh,
    "trunc": unary.trunc,
}
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": add,
    "divide": div,
    "float_power": power,
    "matmul": matmul,
    "multiply": mul,
    "power": power,
    "subtract": sub,
}
