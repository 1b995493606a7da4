"""Values of tensors: set and read at any time, by C's names.

The context keeps the values of a tensor without memory. The scheduler that allocates the tensor writes them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ggml_cffi.core import dtypes
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.flat._checks import require
from ggml_cffi.flat._objects import FlatContext

__all__ = ["ggml_get_f32", "ggml_get_i32", "ggml_set_f32", "ggml_set_i32"]


def ggml_set_f32(tensor: Tensor, values: npt.ArrayLike) -> None:
    """Set all values of a tensor, converted to its type. The tensor need not have memory.

    Parameters
    ----------
    tensor
        An input, or a contiguous view of one.
    values
        A flat array of all values, with the axis of ``ne0`` fastest; an array of the tensor's numpy shape; or one
        number for all elements.

    Raises
    ------
    ValueError
        If the number of values differs, the tensor is computed, or row numbers are out of range for an operation.
    TypeError
        If the values cannot be stored in the tensor's type.
    """
    t, array = require(tensor, Tensor), dtypes.as_array(values)
    if array.ndim and array.shape != t.shape:
        if array.ndim > 1 or array.size != t.size:
            raise ValueError(f"{t!r} takes {t.size} values, flat or of shape {t.shape}, not {array.shape}")
        array = array.reshape(t.shape)
    data = dtypes.to_bytes(array if array.shape == t.shape else np.full(t.shape, array), t.dtype)
    _synchronize(t)
    root = t if not t.ptr.view_src else _viewed(t)
    if t.is_allocated or not root.is_leaf or not t.is_contiguous:
        t.set_bytes(data)
        return
    raw = data.reshape(-1).view(np.uint8)
    if t.dtype in dtypes.INTEGERS:
        t.check_row_numbers(raw)
    whole = root.context.pending_data(root)
    kept = np.zeros(root.nbytes, np.uint8) if whole is None else whole.reshape(-1).view(np.uint8).copy()
    kept[t.memory_offset() : t.memory_offset() + raw.size] = raw
    root.context.set_on_alloc(root, kept)


def ggml_set_i32(tensor: Tensor, values: npt.ArrayLike) -> None:
    """Set all values of a tensor; see :func:`ggml_set_f32`. The tensor's type decides how they are stored."""
    ggml_set_f32(tensor, values)


def ggml_get_f32(tensor: Tensor) -> npt.NDArray[np.float32]:
    """Return all values as a flat array with the axis of ``ne0`` fastest, as R's binding does.

    ``.reshape(tensor.shape)`` gives the result numpy's shape. The call waits for a run that was started asynchronously.

    Raises
    ------
    ValueError
        If there are no values yet, or the tensor is an intermediate of a graph (see :func:`ggml_set_output`).
    """
    return _values(tensor).astype(np.float32).reshape(-1)


def ggml_get_i32(tensor: Tensor) -> npt.NDArray[np.int32]:
    """Return all values of an integer tensor; see :func:`ggml_get_f32`."""
    t = require(tensor, Tensor)
    if t.dtype not in dtypes.INTEGERS:
        raise ValueError(f"{t!r} is not an integer tensor: use ggml_get_f32")
    return _values(t).astype(np.int32).reshape(-1)


def _values(tensor: Tensor) -> npt.NDArray[Any]:
    t = require(tensor, Tensor)
    _synchronize(t)
    if not t.is_allocated and t.is_contiguous:
        root = t if not t.ptr.view_src else _viewed(t)
        kept = root.context.pending_data(root)
        if kept is not None:
            raw = kept.reshape(-1).view(np.uint8)[t.memory_offset() : t.memory_offset() + t.nbytes]
            if dtypes.has_numpy(t.dtype):
                return raw.view(dtypes.numpy_dtype(t.dtype))
            return dtypes.from_bytes(raw, t.dtype, t.size)
    return t.numpy()


def _viewed(t: Tensor) -> Tensor:
    """Return the tensor that ``t`` is a view of, in the context that holds it."""
    pointer = t.ptr.view_src
    for ctx in t.context.reachable():
        for found in ctx.tensors():
            if found.ptr == pointer:
                return found
    raise ValueError(f"{t!r} is a view of a tensor whose context is gone")


def _synchronize(t: Tensor) -> None:
    """Wait for runs that use tensors of the same contexts: C would read or write in the middle of a run."""
    for ctx in t.context.reachable():
        if isinstance(ctx, FlatContext):
            for scheduler in list(ctx.running):
                if not scheduler.closed:
                    scheduler.synchronize()
                ctx.running.discard(scheduler)
