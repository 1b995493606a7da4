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
from ggml_cffi.models.runners.sizes import fill

_TYPES = {
    "tokens": Type.I32,
    "positions": Type.I32,
    "kv_slots": Type.I64,
    "output_ids": Type.I32,
    "query_ids": Type.I32,
    "result_ids": Type.I32,
    "mask": Type.F16,
    "window_mask": Type.F16,
}
_MASKS = ("mask", "window_mask")


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
    n_kv
        Number of KV slots of the masks while the graph is built, if their memory is for more.
    """

    def __init__(
        self, context: Context, backend: Backend, shapes: dict[str, tuple[int, ...]], n_kv: int | None = None
    ) -> None:
        buffer_type, self._backend = backend.buffer_type, backend
        self.tensors: dict[str, Tensor] = {}
        """The inputs by name."""
        self._arrays: dict[str, npt.NDArray[Any]] = {}
        alignment = max(buffer_type.alignment, 32)
        offsets: dict[str, int] = {}
        size = 0
        self._nbytes = {name: prod(shape) * dtypes.type_size(_TYPES[name]) for name, shape in shapes.items()}
        for name, nbytes in self._nbytes.items():
            offsets[name] = size
            size += -(-nbytes // alignment) * alignment
        self._all = context.new_tensor(Type.I8, (size,), name="inputs")
        (buffer,) = context.alloc(buffer_type, [self._all])
        self._offsets, self._staging = offsets, np.empty(0, np.uint8)
        self._set_args: tuple[Any, ...] = ()
        self._rows = {name: shape[0] for name, shape in shapes.items()}
        for name, shape in shapes.items():
            if n_kv is not None and name in _MASKS:
                shape = (*shape[:-1], n_kv)
            tensor = context.new_tensor(_TYPES[name], shape, name=name)
            context.put(tensor, buffer, buffer.base + offsets[name])
            self.tensors[name] = tensor

    def _make_staging(self) -> None:
        """Allocate host memory for all inputs, which a GPU can read. A device in host memory needs none.

        The first write allocates it, because dry runs write nothing.
        """
        size = self._all.nbytes
        if self._backend.buffer_type.is_host:
            self._staging = np.frombuffer(c.ffi.buffer(self._all.ptr.data, size), np.uint8)
        else:
            self._staging = pinned((size,), np.uint8, device=self._backend.device)
            self._set_args = (self._backend.ptr, self._all.ptr, c.ffi.from_buffer(self._staging), 0, size)
        for name, offset in self._offsets.items():
            raw = self._staging[offset : offset + self._nbytes[name]]
            self._arrays[name] = raw.view(dtypes.numpy_dtype(_TYPES[name]))

    def masks(self) -> list[Tensor]:
        """Return the attention masks."""
        return [tensor for name, tensor in self.tensors.items() if name in _MASKS]

    def set(self, values: dict[str, npt.NDArray[Any]]) -> None:
        """Write the values of the inputs on this device. The last token is repeated if there are fewer tokens."""
        if not self._arrays:
            self._make_staging()
        for name, array in self._arrays.items():
            given = values[name]
            if given.ndim == 2:  # a mask, which may have fewer KV slots now
                n_kv = given.shape[1]
                array = array[: self._rows[name] * n_kv].reshape(-1, n_kv)
            fill(array, given)
        if self._set_args:
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
    n_ranges
        Number of ranges of KV slots, each for one token; 0 if all tokens attend to the same slots.
    built_n_kv
        Number of KV slots of the masks while the graph is built, if it is less than ``n_kv``.
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
        n_ranges: int = 0,
        built_n_kv: int | None = None,
    ) -> None:
        each: dict[str, tuple[int, ...]] = {"positions": (n,), "kv_slots": (n,)}
        if n_ranges:
            each |= {"query_ids": (n_ranges,), "result_ids": (n,)}
        mask = (n_ranges, 1, 1, n_kv) if n_ranges else (n, n_kv)
        each |= {"mask": mask, "window_mask": mask} if window else {"mask": mask}
        last = layer_devices[-1]
        shapes: dict[int, dict[str, tuple[int, ...]]] = {i: dict(each) for i in dict.fromkeys(layer_devices)}
        shapes.setdefault(embedding_device, {})["tokens"] = (n,)
        shapes[last]["output_ids"] = (n_out,)
        self._devices = {i: DeviceInputs(context, backends[i], found, built_n_kv) for i, found in shapes.items()}
        ends = self._devices[embedding_device].tensors["tokens"], self._devices[last].tensors["output_ids"]
        own = {i: _inputs(self._devices[i], *ends) for i in dict.fromkeys(layer_devices)}
        self.inputs = replace(own[layer_devices[0]], layers=tuple(own[i] for i in layer_devices))
        """Tensors from which the architecture builds its graph."""

    @property
    def masks(self) -> list[Tensor]:
        """The attention masks on every device."""
        return [mask for device in self._devices.values() for mask in device.masks()]

    def set(self, values: dict[str, npt.NDArray[Any]]) -> None:
        """Write the inputs on every device. The last token is repeated if the graph has more tokens."""
        for device in self._devices.values():
            device.set(values)


def _inputs(device: DeviceInputs, tokens: Tensor, output_ids: Tensor) -> Inputs:
    t = device.tensors
    return Inputs(
        tokens,
        t["positions"],
        t["kv_slots"],
        t["mask"],
        output_ids,
        t.get("window_mask"),
        query_ids=t.get("query_ids"),
        result_ids=t.get("result_ids"),
    )
