"""Weights and KV caches of a model on its devices: whole tensors, or shards if several devices share a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product, takewhile

import numpy as np

from ggml_cffi import c
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.buffer import Buffer, BufferType
from ggml_cffi.core.context import Context
from ggml_cffi.core.device import Device
from ggml_cffi.core.dry_run import DryRunContext
from ggml_cffi.core.dtypes import INTEGERS, INTERNAL, block_size, type_size
from ggml_cffi.core.handle import Closing
from ggml_cffi.core.progress import Progress
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.core.upload import Job, upload
from ggml_cffi.enums import BackendBufferUsage as Usage
from ggml_cffi.enums import Type
from ggml_cffi.files.gguf import TensorInfo
from ggml_cffi.models.architectures.base import Architecture, LayerCache, TensorParallelSpec, joined_name
from ggml_cffi.models.runners.queries import (
    can_attend,
    can_look_up,
    can_multiply,
    repacked_memory_for,
    writes_at_once,
)
from ggml_cffi.models.runners.stage_spec import StageSpec
from ggml_cffi.parallel.shard import MIRROR, ShardSpec, shard_bytes, spec_for

_NO_CACHE = INTEGERS | INTERNAL | {Type.F64}

#: Weights that every layer reads: each device with layers has a copy.
_OF_ALL_LAYERS = frozenset({"rope_freqs.weight"})


@dataclass
class DevicePlacement:
    """Layers and bytes that one device holds."""

    device: str
    """Name of the device."""
    is_cpu: bool = False
    layers: list[int] = field(default_factory=list)
    weight_bytes: int = 0
    cache_bytes: int = 0
    compute_bytes: int = 0
    workspace_bytes: int = 0
    """Estimate of the memory that a GPU's backend allocates itself, only in plans."""
    mapped_bytes: int = 0
    """Part of ``weight_bytes`` that is mapped from the file: the system can drop these pages and read them again."""
    has_output: bool = False
    has_embeddings: bool = False


def layer_of(name: str) -> int | None:
    """Return the layer number in a tensor's name, ``blk.7.attn_q.weight`` -> 7, None without one."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blk" and len(parts) > 2 and parts[1].isdigit() else None


@dataclass
class _Source:
    """A tensor of the file, and the tensors that receive its values or shards of them."""

    info: TensorInfo
    spec: ShardSpec
    devices: tuple[int, ...]
    tensors: list[Tensor]


class Weights(Closing):
    """Weights and KV caches of a model on their devices.

    On the CPU, weights are mapped pages of the file. The weights of other devices are streamed from the mapped file.

    Parameters
    ----------
    architecture
        The model.
    backends
        The backends, the preferred first, the CPU last if it takes part.
    n_slots
        KV slots of the caches.
    kv_dtype
        Type of keys and values.
    stages
        Layers and their devices, in order, every layer once.
    progress
        Called while weights are loaded.
    whole_attention
        True if each device of a stage computes all heads, and only the feed-forward part is sharded.
    repack
        True to repack weights of the CPU for which that makes products faster. Others are mapped pages of the file.
    context
        Context of the tensors. With a :class:`~ggml_cffi.core.dry_run.DryRunContext` nothing is loaded.

    Raises
    ------
    ValueError
        If the caches cannot have this type, or the model is too small for the devices of a stage.
    OutOfMemoryError
        If a device has too little memory.
    """

    def __init__(
        self,
        architecture: Architecture,
        backends: Sequence[Backend],
        n_slots: int,
        kv_dtype: Type,
        stages: Sequence[StageSpec],
        progress: Progress | None = None,
        *,
        whole_attention: bool = False,
        repack: bool = False,
        context: Context | None = None,
    ) -> None:
        check_cache_dtype(kv_dtype, architecture.kv_sizes)
        self.architecture, self.backends, self.stages = architecture, tuple(backends), tuple(stages)
        self.layer_devices = [stage.devices[0] for stage in self.stages for _ in stage.layers]
        """For each layer the number of its device, or of the first one if several share the layer."""
        self.by_device: list[dict[str, Tensor]] = [{} for _ in backends]
        """For each device its weights, or its shards of them, by name; ``output.weight`` also if it is tied."""
        self._transposes: dict[Device, bool] = {}  # True for devices without flash attention for this model
        self.caches: list[list[LayerCache]] = []
        """For each layer the keys and values: one entry for each device of its stage."""
        self.placement = [DevicePlacement(b.name, b.device.is_cpu) for b in backends]
        """Contents of each device."""
        self.context = Context() if context is None else context
        self._is_on_cpu = all(backend.device.is_cpu for backend in backends)
        self._dry = isinstance(self.context, DryRunContext)
        self._whole_attention, self._repack = whole_attention, repack
        self._repackable: dict[tuple[Type, tuple[int, ...]], BufferType | None] = {}
        self._specs: dict[int, TensorParallelSpec] = {}
        self._sources: list[_Source] = []
        self._joined: dict[Tensor, list[Tensor]] = {}  # with their parts
        self._mapped: set[Tensor] = set()  # pages of the file
        self._repacked: dict[Tensor, BufferType] = {}
        try:
            self._place_weights()
            self._join_weights()
            self._place_caches(n_slots, kv_dtype)
            self._alloc()
            if not self._dry:
                self._load(progress)
        except BaseException:
            self.close()
            raise

    @property
    def is_whole(self) -> bool:
        """True if no tensor is sharded."""
        return all(len(stage.devices) == 1 for stage in self.stages)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All weights by name; only valid if :attr:`is_whole`."""
        return {name: t for own in self.by_device for name, t in own.items()}

    def tensor_parallel(self, stage: StageSpec) -> TensorParallelSpec:
        """Return the division of a stage's layers among its devices."""
        n = len(stage.devices)
        if n == 1:
            return TensorParallelSpec({}, frozenset())
        if n not in self._specs:
            self._specs[n] = self.architecture.tensor_parallel(n, whole_attention=self._whole_attention)
        return self._specs[n]

    # ------------------------------------------------------------------ places

    def _place_weights(self) -> None:
        """Make the tensors of all weights.

        The embeddings are placed on the device of the first layer, so that no token needs the CPU, and the output head
        on the device of the last layer. An encoder adds other tensors to the embeddings, which are placed beside them.
        """
        architecture, first = self.architecture, self.stages[0]
        last = self.stages[-1] if architecture.causal else first
        self.embedding_devices = first.devices
        """Numbers of the devices that have the embeddings."""
        self.output_devices = last.devices
        """Numbers of the devices that have the output head."""
        cpu = len(self.backends) - 1
        if not self._can(first, can_look_up, architecture.tensor_info("token_embd.weight")):
            self.embedding_devices = (cpu,)
        if architecture.causal and not self._can(
            last, can_multiply, architecture.tensor_info(architecture.output_tensor)
        ):
            self.output_devices = (cpu,)
        of_layer = {layer: stage for stage in self.stages for layer in stage.layers}
        for name in architecture.shapes:
            layer, info = layer_of(name), architecture.tensor_info(name)
            if layer is not None:
                self._add(name, info, of_layer[layer].devices)
            elif name in _OF_ALL_LAYERS:
                for devices in dict.fromkeys(stage.devices for stage in self.stages):
                    self._add(name, info, devices)
            else:
                at_start = name == "token_embd.weight"
                self._add(name, info, self.embedding_devices if at_start else self.output_devices)
        if architecture.causal and "output.weight" not in architecture.shapes:
            info, (device, *others) = architecture.tensor_info("token_embd.weight"), self.output_devices
            is_repacked = self.backends[device].device.is_cpu and self._repacked_memory("output.weight", info)
            if self.output_devices == self.embedding_devices and not others and not is_repacked:
                self.by_device[device]["output.weight"] = self.by_device[device]["token_embd.weight"]
            else:
                self._add("output.weight", info, self.output_devices)
        for device in self.output_devices:
            self.placement[device].has_output = architecture.causal
        for device in self.embedding_devices:
            self.placement[device].has_embeddings = True

    def _can(self, stage: StageSpec, check: Callable[[Backend, TensorInfo], bool], info: TensorInfo) -> bool:
        """Return whether the device of a stage can use a tensor. Return True for several devices without a check."""
        return len(stage.devices) > 1 or check(self.backends[stage.devices[0]], info)

    def _add(self, name: str, info: TensorInfo, devices: tuple[int, ...]) -> None:
        spec = MIRROR
        if len(devices) > 1:
            spec = spec_for(name, self.tensor_parallel(StageSpec(range(0), devices)).shards)
        dtype = _device_type(info)
        shapes = spec.shapes(dtype, info.shape, len(devices))
        tensors = [self.context.new_tensor(dtype, shape, name=name) for shape in shapes]
        self._sources.append(_Source(info, spec, devices, tensors))
        memory = None
        if len(devices) == 1 and self.backends[devices[0]].device.is_cpu:
            if memory := self._repacked_memory(name, info):
                self._repacked[tensors[0]] = memory
            elif info.offset % 32 == 0 and dtype is info.dtype:
                self._mapped.update(tensors)
                self.placement[devices[0]].mapped_bytes += tensors[0].nbytes
        for device, tensor in zip(devices, tensors, strict=True):
            self.by_device[device][name] = tensor
            self.placement[device].weight_bytes += memory.alloc_size(tensor) if memory else tensor.nbytes

    def _repacked_memory(self, name: str, info: TensorInfo) -> BufferType | None:
        """Return the memory for a tensor on the CPU that is a weight of products only, and faster if it is repacked."""
        if not self._repack or (layer_of(name) is None and name != "output.weight"):
            return None
        key = info.dtype, info.shape
        if key not in self._repackable:
            self._repackable[key] = repacked_memory_for(*key)
        return self._repackable[key]

    def _join_weights(self) -> None:
        """Make one tensor of weights that multiply the same tokens; see :attr:`Architecture.joined`.

        Beside GPUs, the CPU has mapped weights as they are: the scheduler copies them, and parts of results, to a GPU
        for large batches, and each copy would be as large as the whole.
        """
        architecture = self.architecture
        groups = architecture.joined + (architecture.joined_on_cpu if self._is_on_cpu else ())
        for own, backend in zip(self.by_device, self.backends, strict=True):
            for layer, names in product(range(architecture.n_layers), groups):
                self._join(own, layer, names, backend.buffer_type.alignment)

    def _join(self, own: dict[str, Tensor], layer: int, names: Sequence[str], alignment: int) -> None:
        """Join the first weights that have one type and one kind of memory, if there are several, and their biases."""
        weights, biases = (
            [t for name in names if (t := own.get(f"blk.{layer}.{name}.{kind}")) is not None]
            for kind in ("weight", "bias")
        )
        kinds = [(t.dtype, self._repacked.get(t), t in self._mapped) for t in weights]
        weights = weights[: len(list(takewhile(lambda kind: kind == kinds[0], kinds)))]
        if weights and weights[0] in self._mapped:
            weights = weights[: self._n_adjacent(layer, names[: len(weights)]) if self._is_on_cpu else 0]
        if len(weights) < 2 or len(biases) not in (0, len(names)) or any(t in self._mapped for t in biases):
            return
        joined = {"weight": weights, "bias": biases[: len(weights)]}
        if any(self._size(t) % alignment for parts in joined.values() for t in parts):
            return  # each part begins where a tensor may begin
        if any(t.shape[0] * type_size(Type.F32) % alignment for t in weights):
            return  # so do the results, of which operations read views
        for kind, parts in joined.items():
            if parts:
                shape = (sum(t.shape[0] for t in parts), *parts[0].shape[1:])
                name = joined_name(layer, names[: len(parts)], kind)
                own[name] = whole = self.context.new_tensor(parts[0].dtype, shape, name=name)
                self._joined[whole] = parts
                if parts[0] in self._repacked:
                    self._repacked[whole] = self._repacked[parts[0]]
                if parts[0] in self._mapped:
                    self._mapped.add(whole)

    def _n_adjacent(self, layer: int, names: Sequence[str]) -> int:
        """Return how many of the weights, from the first, follow one another in the file."""
        infos = [self.architecture.tensor_info(f"blk.{layer}.{name}.weight") for name in names]
        follows = (a.part == b.part and a.offset + a.nbytes == b.offset for a, b in pairwise(infos))
        return 1 + len(list(takewhile(bool, follows)))

    def _size(self, part: Tensor) -> int:
        """Return the bytes that a part of a joined tensor takes in the whole."""
        memory = self._repacked.get(part)
        return memory.alloc_size(part) if memory else part.nbytes

    def _place_caches(self, n_slots: int, dtype: Type) -> None:
        """Make the tensors of all caches."""
        for stage in self.stages:
            for layer in stage.layers:
                made = []
                for device in stage.devices:
                    placement = self.placement[device]
                    placement.layers.append(layer)
                    if self.architecture.causal:
                        made.append(self._new_cache(layer, device, n_slots, dtype, shared=len(stage.devices) > 1))
                        placement.cache_bytes += made[-1].k.nbytes + made[-1].v.nbytes
                if self.architecture.causal:
                    self.caches.append(made)

    def _new_cache(self, layer: int, device: int, n_slots: int, dtype: Type, *, shared: bool) -> LayerCache:
        """Make keys and values of a layer, for the heads that the device has."""
        size_k, size_v = self.architecture.kv_sizes
        if shared:
            own = self.by_device[device]
            size_k, size_v = (own[f"blk.{layer}.attn_{x}.weight"].shape[0] for x in "kv")
        backend = self.backends[device]
        transposed = self._is_v_transposed(backend, dtype)
        shape = (size_v, n_slots) if transposed else (n_slots, size_v)
        k = self.context.new_tensor(dtype, (n_slots, size_k), name=f"cache_k.{layer}")
        v = self.context.new_tensor(dtype, shape, name=f"cache_v.{layer}")
        together = writes_at_once(backend) and self.architecture.writes_at_once(layer, self.by_device[device])
        if transposed or not together or k.shape != v.shape or k.nbytes % backend.buffer_type.alignment:
            return LayerCache(k, v, transposed, tiled=backend.device.is_cpu)
        both = self.context.new_tensor(dtype, (2, *k.shape), name=f"cache.{layer}")
        self._joined[both] = [k, v]
        return LayerCache(k, v, both=both)

    def _is_v_transposed(self, backend: Backend, dtype: Type) -> bool:
        """Return whether a device stores the values in its cache transposed, for attention as two products.

        The CPU does, because its flash attention sums F16 values in F16, and so does a device that has no flash
        attention for heads of this size. A quantized cache needs flash attention.
        """
        if backend.device not in self._transposes:
            self._transposes[backend.device] = backend.device.is_cpu or not can_attend(
                backend, self.architecture, dtype
            )
        return self._transposes[backend.device] and block_size(dtype) == 1

    def _alloc(self) -> None:
        """Allocate all tensors that are not mapped from the file."""
        for device, backend in enumerate(self.backends):
            caches = [
                t
                for cache in self._caches_on(device)
                for t in ((cache.k, cache.v) if cache.both is None else (cache.both,))
            ]
            own = dict.fromkeys(self.by_device[device].values())
            parts = {t for whole in own if whole in self._joined for t in self._joined[whole]}
            streamed = [t for t in own if t.size and t not in parts and (self._dry or t not in self._mapped)]
            by_memory: dict[BufferType, list[Tensor]] = {}
            for t in streamed:
                by_memory.setdefault(self._repacked.get(t, backend.buffer_type), []).append(t)
            if caches:
                self._alloc_joined(backend.buffer_type, caches, Usage.ANY)
            for memory, tensors in by_memory.items():
                self._alloc_joined(memory, tensors, Usage.WEIGHTS)

    def _alloc_joined(self, memory: BufferType, tensors: Sequence[Tensor], usage: Usage) -> None:
        """Allocate tensors, and the parts of joined ones in the memory of these."""
        buffers = {buffer.ptr: buffer for buffer in self.context.alloc(memory, tensors, usage=usage)}
        for whole in tensors:
            address = c.ffi.cast("char *", whole.ptr.data)
            for part in self._joined.get(whole, ()):
                self.context.put(part, buffers[whole.ptr.buffer], address)
                address += self._size(part)

    def _caches_on(self, device: int) -> Iterator[LayerCache]:
        for stage in self.stages:
            if self.caches and device in stage.devices:
                rank = stage.devices.index(device)
                yield from (self.caches[layer][rank] for layer in stage.layers)

    # ------------------------------------------------------------------ loading

    def _load(self, progress: Progress | None) -> None:
        """Map and stream the weights from the file."""
        file = self.architecture.file
        mappings: dict[int, Buffer] = {}
        jobs: list[Job] = []
        mapped = 0
        wholes = {parts[0]: (whole,) for whole, parts in self._joined.items()}
        # In the order of the file, so that a disk can read ahead.
        for source in sorted(self._sources, key=lambda source: (source.info.part, source.info.offset)):
            info = source.info
            if source.tensors[0] not in self._mapped:
                dtype, raw = _device_type(info), file.raw(info.name)
                if dtype is not info.dtype:
                    raw = np.ascontiguousarray(file.array(info.name), np.float32).view(np.uint8)
                pieces = shard_bytes(dtype, info.shape, raw, source.spec, len(source.devices))
                jobs += [Job(t, data) for t, data in zip(source.tensors, pieces, strict=True) if data.size]
                continue
            if info.part not in mappings:
                mappings[info.part] = Buffer.over(file.map_of(info), usage=Usage.WEIGHTS)
                self.context.adopt(mappings[info.part])
            (tensor,) = source.tensors
            for t in (tensor, *wholes.get(tensor, ())):
                self.context.put(t, mappings[info.part], mappings[info.part].base + info.offset)
            mapped += info.nbytes
        total = mapped + sum(job.data.size for job in jobs)
        if progress and mapped:
            progress(mapped, total)
        report = None if progress is None else (lambda done, _: progress(mapped + done, total))
        upload(jobs, self.backends, report)
        self._sources.clear()

    def close(self) -> None:
        """Free weights and caches."""
        self.by_device = [{} for _ in self.backends]
        self.caches.clear()
        self._sources.clear()
        self.context.close()


def _device_type(info: TensorInfo) -> Type:
    """Return the type in which devices hold a tensor: that of the file; F32 for norms and biases, which are small."""
    return Type.F32 if len(info.shape) == 1 else info.dtype


def check_cache_dtype(dtype: Type, sizes: tuple[int, int]) -> None:
    """Raise ``ValueError`` if keys and values with these numbers of elements cannot be stored as ``dtype``."""
    if dtype in _NO_CACHE:
        raise ValueError(f"kv_dtype {dtype.name} cannot hold keys and values: use F16, F32, BF16 or a quantized type")
    block = block_size(dtype)
    if any(size % block for size in sizes):
        raise ValueError(
            f"kv_dtype {dtype.name} has blocks of {block}, but keys and values have {sizes} elements: use F16"
        )
