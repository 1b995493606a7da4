"""Inputs of a model's graph: one block of memory on each device, written at once.

Even a small transfer to a GPU takes tens of microseconds, and a copy from one GPU to another takes longer.
Therefore each device has its own positions, KV slots and masks, side by side in one buffer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ggml_cffi import c
from ggml_cffi.core import dtypes
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.context import Context
from ggml_cffi.core.handle import Closing
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.core.transfer import pinned
from ggml_cffi.enums import Type
from ggml_cffi.models.architectures.base import Inputs, KVResult, KVView
from ggml_cffi.models.runners.buckets import fill, shortened

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
_ORDER = tuple(_TYPES)  # in memory; the masks come last, since their size depends on the KV slots in use
_MASKS = _ORDER[-2:]

#: Shape of each input, by name.
Shapes = Mapping[str, tuple[int, ...]]


class InputMemory(Closing):
    """Memory for the inputs on one device, which all graphs of a runner use in turn.

    Parameters
    ----------
    backend
        Backend of the device.
    shapes
        Largest shape of each input.
    context
        Context that owns the memory. Default one that closes with this object.
    """

    def __init__(self, backend: Backend, shapes: Shapes, context: Context | None = None) -> None:
        self.backend = backend
        self.context = Context() if context is None else context
        """Context that owns the memory."""
        self._is_own = context is None
        alignment = max(backend.buffer_type.alignment, 32)
        self.offsets: dict[str, int] = {}
        """Offset of each input in bytes. One place never holds two inputs, so that its values are always valid."""
        size = 0
        for name in sorted(shapes, key=_ORDER.index):
            self.offsets[name] = size
            size += -(-prod(shapes[name]) * dtypes.type_size(_TYPES[name]) // alignment) * alignment
        self.whole = self.context.new_tensor(Type.I8, (size,), name="inputs")
        """All bytes."""
        (self.buffer,) = self.context.alloc(backend.buffer_type, [self.whole])
        self._host: dict[int, npt.NDArray[np.uint8]] = {}

    def host(self, slot: int) -> npt.NDArray[np.uint8]:
        """Return a block of host memory for all bytes, which a GPU can read. Dry runs write nothing, and need none."""
        if slot not in self._host:
            self._host[slot] = pinned((self.whole.nbytes,), np.uint8, device=self.backend.device)
        return self._host[slot]

    def close(self) -> None:
        """Free the memory, unless another object owns it."""
        if self._is_own:
            self.context.close()


class DeviceInputs:
    """The inputs of one graph on one device.

    Parameters
    ----------
    context
        Context of the tensors.
    shapes
        Shape of each input.
    memory
        Memory of the inputs.
    built_n_kv
        Number of KV slots of the masks while the graph is built, if it is less than in ``shapes``.
    """

    def __init__(self, context: Context, shapes: Shapes, memory: InputMemory, built_n_kv: int | None = None) -> None:
        self._memory, self._shapes = memory, dict(shapes)
        self._written: dict[int, tuple[int, dict[str, npt.NDArray[Any]], list[tuple[Any, ...]]]] = {}
        self.tensors: dict[str, Tensor] = {}
        """The inputs by name."""
        for name, shape in shapes.items():
            if built_n_kv is not None and name in _MASKS:
                shape = (*shape[:-1], built_n_kv)
            tensor = context.new_tensor(_TYPES[name], shape, name=name)
            owner = None if memory.context is context else memory.context
            context.put(tensor, memory.buffer, memory.buffer.base + memory.offsets[name], owner=owner)
            self.tensors[name] = tensor

    def write(self, values: Mapping[str, npt.NDArray[Any]], slot: int) -> None:
        """Write the values of a batch, which may be smaller than the graph, to a block of host memory."""
        n_kv = values["mask"].shape[1]
        if slot not in self._written or self._written[slot][0] != n_kv:
            self._written[slot] = n_kv, *self._layout(n_kv, slot)
        for name, array in self._written[slot][1].items():
            fill(array, values[name])

    def _layout(self, n_kv: int, slot: int) -> tuple[dict[str, npt.NDArray[Any]], list[tuple[Any, ...]]]:
        """Return the arrays in a block of host memory, and the arguments of the transfers to the device."""
        block, offsets, memory = self._memory.host(slot), self._memory.offsets, self._memory
        arrays: dict[str, npt.NDArray[Any]] = {}
        ends = [0]
        for name in sorted(self._shapes, key=_ORDER.index):
            shape, dtype = self._shapes[name], _TYPES[name]
            raw = block[offsets[name] : offsets[name] + prod(shape) * dtypes.type_size(dtype)]
            array = raw.view(dtypes.numpy_dtype(dtype)).reshape(shape)
            arrays[name] = shortened(array, n_kv) if name in _MASKS else array
            ends.append(offsets[name] + arrays[name].nbytes)
        ranges = [(0, ends[-1])]
        if _MASKS[1] in arrays:  # between the two masks may be many bytes that no run reads
            ranges = [(0, ends[-2]), (offsets[_MASKS[1]], ends[-1])]
        pointers = memory.backend.ptr, memory.whole.ptr
        return arrays, [(*pointers, c.ffi.from_buffer(block[a:b]), a, b - a) for a, b in ranges]

    def send(self, slot: int) -> None:
        """Copy what was written last from a block of host memory to the device."""
        # Tensor.set_async without its checks: nothing else writes these inputs. The run follows in the same queue.
        with self._memory.backend.lock:
            for transfer in self._written[slot][2]:
                c.ggml_backend_tensor_set_async(*transfer)


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
    memory
        Memory of the inputs on each device, by the number of its backend; see :func:`input_memory`. Default memory of
        this graph only, which ``context`` owns.
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
        memory: Mapping[int, InputMemory] | None = None,
        n_ranges: int = 0,
        built_n_kv: int | None = None,
    ) -> None:
        shapes = _shapes(layer_devices, embedding_device, n, n_kv, n_out, window=window, n_ranges=n_ranges)
        if memory is None:
            memory = {i: InputMemory(backends[i], found, context) for i, found in shapes.items()}
        self._devices = {i: DeviceInputs(context, found, memory[i], built_n_kv) for i, found in shapes.items()}
        last = layer_devices[-1]
        ends = self._devices[embedding_device].tensors["tokens"], self._devices[last].tensors["output_ids"]
        self.kv_views: list[KVView] = []
        """Views of the caches, once the graph is built."""
        self.kv_results: list[KVResult] = []
        """Intermediates of attention that depend on the KV slots, once the graph is built."""
        own = {
            i: _inputs(self._devices[i], *ends, self.kv_views, self.kv_results) for i in dict.fromkeys(layer_devices)
        }
        self.inputs = replace(own[layer_devices[0]], layers=tuple(own[i] for i in layer_devices))
        """Tensors from which the architecture builds its graph."""

    @property
    def masks(self) -> list[Tensor]:
        """Attention masks of all devices."""
        return [d.tensors[name] for d in self._devices.values() for name in _MASKS if name in d.tensors]

    def write(self, values: Mapping[str, npt.NDArray[Any]], slot: int = 0) -> None:
        """Write the values of a batch to host memory. One block is written while the other one is copied."""
        for device in self._devices.values():
            device.write(values, slot)

    def send(self, slot: int = 0) -> None:
        """Copy the values in host memory to every device."""
        for device in self._devices.values():
            device.send(slot)

    def set(self, values: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write the values of a batch, and copy them to every device."""
        self.write(values)
        self.send()


def input_memory(
    backends: Sequence[Backend],
    layer_devices: Sequence[int],
    embedding_device: int,
    n: int,
    n_kv: int,
    *,
    window: bool,
) -> dict[int, InputMemory]:
    """Return memory for the inputs of all graphs of up to ``n`` tokens and ``n_kv`` KV slots, by number of the backend.

    The other parameters are those of :class:`GraphInputs`.
    """
    found: dict[int, InputMemory] = {}
    try:
        for i, shapes in _shapes(layer_devices, embedding_device, n, n_kv, n, window=window).items():
            found[i] = InputMemory(backends[i], shapes | {"query_ids": (n,), "result_ids": (n,)})
    except BaseException:
        for memory in found.values():
            memory.close()
        raise
    return found


def _shapes(
    layer_devices: Sequence[int],
    embedding_device: int,
    n: int,
    n_kv: int,
    n_out: int,
    *,
    window: bool,
    n_ranges: int = 0,
) -> dict[int, dict[str, tuple[int, ...]]]:
    """Return the shapes of the inputs on each device, by number of its backend."""
    each: dict[str, tuple[int, ...]] = {"positions": (n,), "kv_slots": (n,)}
    if n_ranges:
        each |= {"query_ids": (n_ranges,), "result_ids": (n,)}
    mask = (n_ranges, 1, 1, n_kv) if n_ranges else (n, n_kv)
    each |= {"mask": mask, "window_mask": mask} if window else {"mask": mask}
    shapes: dict[int, dict[str, tuple[int, ...]]] = {i: dict(each) for i in dict.fromkeys(layer_devices)}
    shapes.setdefault(embedding_device, {})["tokens"] = (n,)
    shapes[layer_devices[-1]]["output_ids"] = (n_out,)
    return shapes


def _inputs(
    device: DeviceInputs, tokens: Tensor, output_ids: Tensor, views: list[KVView], results: list[KVResult]
) -> Inputs:
    t = device.tensors
    return Inputs(
        tokens,
        t["positions"],
        t["kv_slots"],
        t["mask"],
        output_ids,
        t.get("window_mask"),
        kv_views=views,
        kv_results=results,
        query_ids=t.get("query_ids"),
        result_ids=t.get("result_ids"),
    )
