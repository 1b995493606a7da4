"""Inputs of a model's graph: one buffer on each device, written at once.

Even a small transfer to a GPU takes tens of microseconds, and a copy from one GPU to another takes longer.
Therefore each device has its own positions, KV slots and masks, side by side in one buffer.
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
    "kv_slots": Type.I64,
    "output_ids": Type.I32,
    "mask": Type.F16,
    "window_mask": Type.F16,
}


class DeviceInputs:
    """Some inputs on one device.

    Parameters
    ----------
    context
        Context of the tensors.
    backend
        Backend of the device.
    shapes
        Shape of each input, by name.
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
        self._all = context.new_tensor(Type.I8, (size,), name="inputs")
        (buffer,) = context.alloc(buffer_type, [self._all])
        self._offsets, self._staging = offsets, np.empty(0, np.uint8)
        self._set_args: tuple[Any, ...] = ()
        for name, shape in shapes.items():
            tensor = context.new_tensor(_TYPES[name], shape, name=name)
            context.put(tensor, buffer, buffer.base + offsets[name])
            self.tensors[name] = tensor

    def _make_staging(self) -> None:
        """Allocate host memory for all inputs, which a GPU can read.

        The first write allocates it, because dry runs write nothing.
        """
        self._staging = pinned((self._all.nbytes,), np.uint8, device=self._backend.device)
        self._set_args = (self._backend.ptr, self._all.ptr, c.ffi.from_buffer(self._staging), 0, self._all.nbytes)
        for name, tensor in self.tensors.items():
            raw = self._staging[self._offsets[name] : self._offsets[name] + tensor.nbytes]
            self._arrays[name] = raw.view(dtypes.numpy_dtype(tensor.dtype)).reshape(tensor.shape)

    def set(self, values: dict[str, npt.NDArray[Any]]) -> None:
        """Write the values of the inputs on this device."""
        if not self._arrays:
            self._make_staging()
        for name, array in self._arrays.items():
            array[...] = values[name]
        # Tensor.set_async without its checks: nothing else writes these inputs. The run follows in the same queue.
        with self._backend.lock:
            c.ggml_backend_tensor_set_async(*self._set_args)


class GraphInputs:
    """Inputs of one graph, on all devices.

    Parameters
    ----------
    context
        Context of the tensors.
    backends
        Backends of the devices.
    layer_devices
        For each layer the number of its backend.
    embedding_device
        Number of the backend that has the embeddings.
    n, n_kv, n_out
        Numbers of tokens, of KV slots that attention reads, and of tokens with an output.
    window
        True if some layers have a sliding window.
    """

    def __init__(
        self,
        context: Context,
        backends: Sequence[Backend],
        layer_devices: Sequence[int],
        embedding_device: int,
        n: int,
        n_kv: int,
        n_out: int,
        *,
        window: bool,
    ) -> None:
        each: dict[str, tuple[int, ...]] = {"positions": (n,), "kv_slots": (n,), "mask": (n, n_kv)}
        if window:
            each["window_mask"] = (n, n_kv)
        last = layer_devices[-1]
        shapes: dict[int, dict[str, tuple[int, ...]]] = {i: dict(each) for i in dict.fromkeys(layer_devices)}
        shapes.setdefault(embedding_device, {})["tokens"] = (n,)
        shapes[last]["output_ids"] = (n_out,)
        self._devices = {i: DeviceInputs(context, backends[i], found) for i, found in shapes.items()}
        ends = self._devices[embedding_device].tensors["tokens"], self._devices[last].tensors["output_ids"]
        own = {i: _inputs(self._devices[i], *ends) for i in dict.fromkeys(layer_devices)}
        self.inputs = replace(own[layer_devices[0]], layers=tuple(own[i] for i in layer_devices))
        """Tensors from which the architecture builds its graph."""

    def set(self, values: dict[str, npt.NDArray[Any]]) -> None:
        """Write the inputs on every device."""
        for device in self._devices.values():
            device.set(values)


def _inputs(device: DeviceInputs, tokens: Tensor, output_ids: Tensor) -> Inputs:
    t = device.tensors
    return Inputs(tokens, t["positions"], t["kv_slots"], t["mask"], output_ids, t.get("window_mask"))
