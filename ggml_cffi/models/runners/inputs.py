"""The inputs of a model's graph: one piece of memory on each device, written at once.

A transfer to a GPU takes tens of microseconds however little it moves, and a copy from one GPU to another more: so each
device has positions, rows and masks of its own, all in one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ggml_cffi import c
from ggml_cffi.core import dtypes
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.context import Context
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.core.transfer import pinned
from ggml_cffi.enums import Type
from ggml_cffi.models.architectures.base import Inputs

_TYPES = {
    "tokens": Type.I32,
    "positions": Type.I32,
    "rows": Type.I64,
    "wanted": Type.I32,
    "mask": Type.F16,
    "near": Type.F16,
}


class Place:
    """Some inputs on one device.

    Parameters
    ----------
    context
        Where the tensors belong.
    backend
        The device, which computes with them.
    shapes
        Name of each input, and its shape.
    """

    def __init__(self, context: Context, backend: Backend, shapes: dict[str, tuple[int, ...]]) -> None:
        buffer_type, self._backend = backend.buffer_type, backend
        self.tensors: dict[str, Tensor] = {}
        """The inputs by name."""
        self._arrays: dict[str, npt.NDArray[Any]] = {}
        alignment = max(buffer_type.alignment, 32)
        offsets: dict[str, int] = {}
        size = 0
        for name, shape in shapes.items():
            offsets[name] = size
            nbytes = prod(shape) * dtypes.type_size(_TYPES[name])
            size += -(-nbytes // alignment) * alignment
        self._whole = context.new_tensor(Type.I8, (size,), name="inputs")
        (buffer,) = context.alloc(buffer_type, [self._whole])
        self._offsets, self._staging = offsets, np.empty(0, np.uint8)
        self._put: tuple[Any, ...] = ()
        for name, shape in shapes.items():
            tensor = context.new_tensor(_TYPES[name], shape, name=name)
            context.put(tensor, buffer, buffer.base + offsets[name])
            self.tensors[name] = tensor

    def _stage(self) -> None:
        """Host memory for all inputs, which a GPU reads by itself: made when it is first written, since graphs are
        measured too.
        """
        self._staging = pinned((self._whole.nbytes,), np.uint8, device=self._backend.device)
        self._put = (self._backend.ptr, self._whole.ptr, c.ffi.from_buffer(self._staging), 0, self._whole.nbytes)
        for name, tensor in self.tensors.items():
            raw = self._staging[self._offsets[name] : self._offsets[name] + tensor.nbytes]
            self._arrays[name] = raw.view(dtypes.numpy_dtype(tensor.dtype)).reshape(tensor.shape)

    def set(self, values: dict[str, npt.NDArray[Any]]) -> None:
        """Write those of the values that are inputs here."""
        if not self._arrays:
            self._stage()
        for name, array in self._arrays.items():
            array[...] = values[name]
        # As Tensor.set_async, without its checks: nobody else writes these. The run comes after it in the same queue.
        with self._backend.lock:
            c.ggml_backend_tensor_set_async(*self._put)


class Feed:
    """The inputs of one graph.

    Parameters
    ----------
    context
        Where the tensors belong.
    backends
        The devices.
    where
        For each layer the index of its backend.
    first
        The index of the backend that holds the embeddings.
    n, n_kv, n_out
        Tokens, cache rows that they look at, tokens whose results are wanted.
    window
        Whether there are layers with a sliding window.
    """

    def __init__(
        self,
        context: Context,
        backends: Sequence[Backend],
        where: Sequence[int],
        first: int,
        n: int,
        n_kv: int,
        n_out: int,
        *,
        window: bool,
    ) -> None:
        each: dict[str, tuple[int, ...]] = {"positions": (n,), "rows": (n,), "mask": (n, n_kv)}
        if window:
            each["near"] = (n, n_kv)
        shapes: dict[int, dict[str, tuple[int, ...]]] = {i: dict(each) for i in dict.fromkeys(where)}
        shapes.setdefault(first, {})["tokens"] = (n,)
        shapes[where[-1]]["wanted"] = (n_out,)
        self._places = {i: Place(context, backends[i], found) for i, found in shapes.items()}
        ends = self._places[first].tensors["tokens"], self._places[where[-1]].tensors["wanted"]
        own = {i: _inputs(self._places[i], *ends) for i in dict.fromkeys(where)}
        self.inputs = replace(own[where[0]], layers=tuple(own[i] for i in where))
        """What the architecture builds its graph from."""

    def set(self, values: dict[str, npt.NDArray[Any]]) -> None:
        """Write the inputs, on every device."""
        for place in self._places.values():
            place.set(values)


def _inputs(place: Place, tokens: Tensor, wanted: Tensor) -> Inputs:
    t = place.tensors
    return Inputs(tokens, t["positions"], t["rows"], t["mask"], wanted, t.get("near"))
