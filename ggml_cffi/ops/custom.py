"""Operations written in Python.

The function gets numpy views of the result and of the operands, and fills the result. It runs on the CPU; the
scheduler copies operands from other devices. An exception in the function stops the run, and the call that started the
run raises it.

The views show ggml's own memory, which is valid during the call only. A function that keeps a view, not a copy, stops
the run with a ``RuntimeError``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt

from ggml_cffi import c
from ggml_cffi.core import dtypes
from ggml_cffi.core.context import Context
from ggml_cffi.core.dtypes import as_type, has_numpy
from ggml_cffi.core.shapes import check_shape, ne_of
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.ops._operands import check_result, op_error, result_context

__all__ = [
    "custom_4d",
    "custom_inplace",
    "map_custom1",
    "map_custom1_inplace",
    "map_custom2",
    "map_custom2_inplace",
    "map_custom3",
    "map_custom3_inplace",
]

_MAX_OPERANDS = 9
Function = Callable[..., object]


class Call:
    """A Python function that ggml calls, with the first exception that it raised."""

    def __init__(self, op: str, function: Function, n_tasks: int | None, ndims: Sequence[int], first: int) -> None:
        self.op = op
        self.function = function
        self.n_tasks = n_tasks
        self.ndims = ndims
        self.first = first  # index in C of the function's first operand
        self.error: BaseException | None = None
        self.stop: Callable[[], None] | None = None

        cdecl = f"ggml_custom{op[10] if op.startswith('map') else ''}_op_t"
        self.callback = c.ffi.callback(cdecl, self._called, onerror=self._failed)
        """C callback, which ggml calls on its own threads."""

    def _failed(self, _kind: Any, error: BaseException, _trace: Any) -> None:
        """Store an exception of :meth:`_called`, also that of a signal before its first line, and stop the run."""
        self.error = error
        if self.stop is not None:
            self.stop()

    def _called(self, *arguments: Any) -> None:
        *tensors, part, parts, _data = arguments
        # ggml calls the function on every thread, also beyond the number of tasks.
        parts = parts if self.n_tasks is None else min(parts, self.n_tasks)
        if part >= parts or self.error is not None:
            return
        if len(tensors) == 1:  # C passes the result only, which refers to its operands
            end = self.first + len(self.ndims) - 1
            tensors += [tensors[0].src[i] for i in range(self.first, end)]
        views = [_view(p, ndim) for p, ndim in zip(tensors, self.ndims, strict=True)]
        for operand in views[1:]:
            operand.flags.writeable = False
        held = [sys.getrefcount(view) for view in views]
        self.function(*views) if self.n_tasks == 1 else self.function(*views, part, parts)
        if [sys.getrefcount(view) for view in views] != held:
            raise RuntimeError(f"{self.op}: the function kept a view of ggml's memory: keep a copy instead")


def _view(pointer: Any, ndim: int) -> npt.NDArray[Any]:
    shape = tuple(pointer.ne[i] for i in reversed(range(ndim)))
    strides = tuple(pointer.nb[i] for i in reversed(range(ndim)))
    memory = c.ffi.buffer(pointer.data, c.ggml_nbytes(pointer))
    return np.ndarray(shape, dtypes.numpy_dtype(Type(pointer.type)), memory, 0, strides)


def _build(
    op: str,
    function: Function,
    operands: Sequence[Tensor],
    n_tasks: int | None,
    ctx: Context | None,
    *,
    out: Tensor | tuple[Type, tuple[int, ...]],
) -> Tensor:
    """Build the node. ``out`` is a tensor to write over, or the type and shape of the result."""
    written = (out,) if isinstance(out, Tensor) else ()
    if not callable(function):
        raise TypeError(f"{op}: a function is needed, not {type(function).__name__}")
    ctx = result_context(op, *written, *operands, ctx=ctx)
    for t in (*written, *operands):
        if not has_numpy(t.dtype):
            raise op_error(op, f"numpy has no {t.dtype.name}: cast it to F32 first", a=t)
    dtype, shape = (out.dtype, out.shape) if isinstance(out, Tensor) else out
    if op.endswith("_inplace") and dtype in dtypes.INTEGERS:
        raise TypeError(f"{op}: integers, which may be checked row numbers, cannot be written in place")
    if not has_numpy(dtype):
        raise TypeError(f"{op}: numpy has no {dtype.name}: make the result F32 and cast it")
    tasks = -1 if n_tasks is None else index(n_tasks)
    if n_tasks is not None and not 1 <= tasks <= c.GGML_MAX_N_THREADS:
        raise ValueError(f"{op}: n_tasks must be 1 to {c.GGML_MAX_N_THREADS}, or None for all threads, not {n_tasks}")
    ndims = [len(shape), *(t.ndim for t in operands)]
    first = len(written) if op.startswith("custom") else 0
    call = Call(op, function, None if n_tasks is None else tasks, ndims, first)
    if op.startswith("map"):
        arguments: tuple[Any, ...] = (*(t.ptr for t in operands), call.callback, tasks, c.NULL)
    else:
        pointers = c.ffi.new("struct ggml_tensor *[]", [t.ptr for t in operands])
        kind = (written[0].ptr,) if written else (dtype, *ne_of(shape))
        arguments = (*kind, pointers, len(operands), call.callback, tasks, c.NULL)
    result = ctx.build(getattr(c, f"ggml_{op}"), len(shape), *arguments)
    ctx.calls[result.ptr] = call
    return result


def map_custom1(a: Tensor, function: Function, *, n_tasks: int | None = 1, ctx: Context | None = None) -> Tensor:
    """Compute a tensor of ``a``'s shape and type with ``function(out, a)``.

    Parameters
    ----------
    a
        Tensor of a type that numpy has.
    function
        Function of numpy views: of the result, to be filled, and of ``a``, read-only.
    n_tasks
        Number of calls that share the work, each on a thread of the backend; None for one call per thread. Unless
        ``n_tasks`` is 1, the function also gets the index of the call and the number of calls: ``function(out, a, i,
        n)``. There are fewer calls if the backend has fewer threads.

    Raises
    ------
    ValueError
        If numpy lacks the type, or ``n_tasks`` is below 1.
    TypeError
        If ``function`` cannot be called.

    C: ``ggml_map_custom1``.
    """
    return _build("map_custom1", function, (a,), n_tasks, ctx, out=_like(a))


def map_custom2(
    a: Tensor, b: Tensor, function: Function, *, n_tasks: int | None = 1, ctx: Context | None = None
) -> Tensor:
    """Compute a tensor as :func:`map_custom1` does, with ``function(out, a, b)``; ``b`` may have any shape.

    C: ``ggml_map_custom2``.
    """
    return _build("map_custom2", function, (a, b), n_tasks, ctx, out=_like(a))


def map_custom3(
    a: Tensor, b: Tensor, c: Tensor, function: Function, *, n_tasks: int | None = 1, ctx: Context | None = None
) -> Tensor:
    """Compute a tensor as :func:`map_custom1` does, with ``function(out, a, b, c)``. C: ``ggml_map_custom3``."""
    return _build("map_custom3", function, (a, b, c), n_tasks, ctx, out=_like(a))


def map_custom1_inplace(
    a: Tensor, function: Function, *, n_tasks: int | None = 1, ctx: Context | None = None
) -> Tensor:
    """Compute :func:`map_custom1` in place: ``out`` is ``a`` itself. C: ``ggml_map_custom1_inplace``."""
    return _build("map_custom1_inplace", function, (a,), n_tasks, ctx, out=_like(a))


def map_custom2_inplace(
    a: Tensor, b: Tensor, function: Function, *, n_tasks: int | None = 1, ctx: Context | None = None
) -> Tensor:
    """Compute :func:`map_custom2` in place: ``out`` is ``a`` itself. C: ``ggml_map_custom2_inplace``."""
    return _build("map_custom2_inplace", function, (a, b), n_tasks, ctx, out=_like(a))


def map_custom3_inplace(
    a: Tensor, b: Tensor, c: Tensor, function: Function, *, n_tasks: int | None = 1, ctx: Context | None = None
) -> Tensor:
    """Compute :func:`map_custom3` in place: ``out`` is ``a`` itself. C: ``ggml_map_custom3_inplace``."""
    return _build("map_custom3_inplace", function, (a, b, c), n_tasks, ctx, out=_like(a))


def custom_4d(
    function: Function,
    operands: Sequence[Tensor],
    shape: Sequence[int],
    dtype: Type | str | npt.DTypeLike = Type.F32,
    *,
    n_tasks: int | None = 1,
    ctx: Context | None = None,
) -> Tensor:
    """Compute a tensor of any shape with ``function(out, *operands)``.

    Parameters
    ----------
    operands
        Up to 9 tensors. If there are none, ``ctx`` must be given.
    shape, dtype
        Shape and type of the result.

    Other parameters and errors as for :func:`map_custom1`. C: ``ggml_custom_4d``.
    """
    sizes, kind = check_shape(shape), as_type(dtype)
    _check_operands("custom_4d", operands, _MAX_OPERANDS)
    check_result("custom_4d", ne_of(sizes), kind)
    return _build("custom_4d", function, operands, n_tasks, ctx, out=(kind, sizes))


def custom_inplace(
    a: Tensor,
    function: Function,
    operands: Sequence[Tensor] = (),
    *,
    n_tasks: int | None = 1,
    ctx: Context | None = None,
) -> Tensor:
    """Write over ``a`` with ``function(a, *operands)``, with up to 8 operands. C: ``ggml_custom_inplace``."""
    _check_operands("custom_inplace", operands, _MAX_OPERANDS - 1)
    if not isinstance(a, Tensor):
        raise TypeError(f"custom_inplace: a Tensor is needed, not {type(a).__name__}")
    return _build("custom_inplace", function, operands, n_tasks, ctx, out=a)


def _like(a: Tensor) -> tuple[Type, tuple[int, ...]]:
    if not isinstance(a, Tensor):
        raise TypeError(f"custom operations take tensors, not {type(a).__name__}")
    return a.dtype, a.shape


def _check_operands(op: str, operands: Sequence[Tensor], limit: int) -> None:
    if isinstance(operands, Tensor) or not isinstance(operands, Sequence):
        raise TypeError(f"{op}: operands must be a sequence of tensors")
    if len(operands) > limit:
        raise ValueError(f"{op}: at most {limit} operands, not {len(operands)}")
