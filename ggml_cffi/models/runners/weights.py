"""Which layer goes where, and getting it there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ggml_cffi import c, ops
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.buffer import Buffer
from ggml_cffi.core.context import Context
from ggml_cffi.core.dry_run import DryRunContext
from ggml_cffi.core.dtypes import INTEGERS, INTERNAL, block_size, row_size
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.core.upload import Job, upload
from ggml_cffi.enums import BackendBufferUsage as Usage
from ggml_cffi.enums import Type
from ggml_cffi.files.gguf.reader import TensorInfo
from ggml_cffi.models.architectures.base import Architecture, LayerCache

#: Called with bytes done and bytes in all while weights are loaded.
Progress = Callable[[int, int], None]

# Part of a GPU's free memory that weights and caches may take; the rest is for intermediate results.
_USABLE = 0.85
_NO_CACHE = INTEGERS | INTERNAL | {Type.F64}


@dataclass
class DevicePlacement:
    """What one device holds."""

    backend: Backend
    layers: list[int] = field(default_factory=list)
    weight_bytes: int = 0
    cache_bytes: int = 0
    compute_bytes: int = 0
    scratch_bytes: int = 0
    """What a GPU's backend takes by itself: reckoned, only in plans."""
    mapped_bytes: int = 0
    """Of ``weight_bytes``, those that are the file's own pages: the system drops them when it needs the memory."""
    has_output: bool = False
    has_embeddings: bool = False


def room_for_layers(architecture: Architecture, backends: Sequence[Backend]) -> list[int]:
    """For each backend the bytes of layers, with their caches, that it has room for; the CPU, the last, for none.

    The first GPU keeps room for the embeddings, the last one for the output.
    """
    room = [0 if b.device.is_cpu else int(b.device.memory().free * _USABLE) for b in backends]
    gpus = [i for i, b in enumerate(backends) if not b.device.is_cpu]
    if gpus:
        room[gpus[-1]] -= architecture.info(architecture.output_tensor).nbytes
        room[gpus[0]] -= architecture.info("token_embd.weight").nbytes
    return [max(n, 0) for n in room]


def split_layers(
    architecture: Architecture,
    backends: Sequence[Backend],
    layer_cache: int,
    *,
    parts: Sequence[float] | None = None,
    room: Sequence[float] | None = None,
) -> list[int]:
    """For each layer, the index of its backend: GPUs in proportion to their free memory, the CPU for what is left.

    Layers that no GPU has room for are the first ones, next to the embeddings, which the CPU then holds too.

    Parameters
    ----------
    layer_cache
        Bytes of one layer's cache.
    parts
        How much of the layers each backend is to have, in proportion; default its room.
    room
        Bytes of layers that each backend may hold; the last one takes what is left, whatever it says there. Default
        :func:`room_for_layers`.
    """
    if room is None:
        room = room_for_layers(architecture, backends)
    if parts is None:
        parts = room
    sizes = layer_bytes(architecture, layer_cache)
    left, total = float(sum(sizes)), float(sum(parts))
    # From the last layer down: each GPU takes its part of what is left, the last GPU the layers next to the output.
    where = [len(backends) - 1] * architecture.n_layers
    layer = architecture.n_layers - 1
    for gpu in reversed(range(len(backends) - 1)):
        share = left * parts[gpu] / total if total > 0 else 0.0
        taken = 0
        # Until half of the next layer is over its part.
        while layer >= 0 and taken + sizes[layer] <= room[gpu] and taken + sizes[layer] / 2 <= share:
            taken += sizes[layer]
            where[layer] = gpu
            layer -= 1
        left, total = left - taken, total - parts[gpu]
    return where


def layer_bytes(architecture: Architecture, layer_cache: int) -> list[int]:
    """Bytes of each layer: weights, and a cache of ``layer_cache`` bytes."""
    sizes = [layer_cache] * architecture.n_layers
    for name, info in architecture.file.tensors.items():
        layer = layer_of(name)
        if layer is not None and layer < len(sizes):
            sizes[layer] += info.nbytes
    return sizes


def cache_bytes(architecture: Architecture, kind: Type, n_rows: int) -> int:
    """Bytes of one layer's keys and values; 0 for an encoder, which keeps none."""
    return sum(n_rows * row_size(kind, size) for size in architecture.kv_sizes) if architecture.causal else 0


def layer_of(name: str) -> int | None:
    """The layer number in a tensor's name, ``blk.7.attn_q.weight`` -> 7."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blk" and len(parts) > 2 and parts[1].isdigit() else None


class Weights:
    """The weights and caches of a model on their devices.

    On the CPU, weights are the file's own pages; for other devices they are streamed from the mapping.

    Parameters
    ----------
    architecture
        The model.
    backends
        The preferred first, the CPU last.
    n_ctx
        Rows of the caches.
    kv_dtype
        Their type.
    progress
        Called while weights are loaded.
    where
        For each layer the index of its backend; default :func:`split_layers`.
    context
        What is to hold the tensors. With a :class:`~ggml_cffi.core.dry_run.DryRunContext` nothing is loaded.
    """

    def __init__(
        self,
        architecture: Architecture,
        backends: Sequence[Backend],
        n_ctx: int,
        kv_dtype: Type = Type.F16,
        progress: Progress | None = None,
        *,
        where: Sequence[int] | None = None,
        context: Context | None = None,
    ) -> None:
        self.architecture = architecture
        self.tensors: dict[str, Tensor] = {}
        """Name to weight. ``output.weight`` is there even where it is tied to the embeddings."""
        self.cache: list[LayerCache] = []
        self.placement = [DevicePlacement(b) for b in backends]
        self.context = Context() if context is None else context
        try:
            self._place(n_ctx, kv_dtype, where)
            if not self._sketched:
                self._load(progress)
        except BaseException:
            self.context.close()
            raise

    @property
    def _sketched(self) -> bool:
        return isinstance(self.context, DryRunContext)

    def _place(self, n_ctx: int, kind: Type, where: Sequence[int] | None) -> None:
        architecture = self.architecture
        check_cache(kind, architecture.kv_sizes)
        if where is None:
            backends = [share.backend for share in self.placement]
            where = split_layers(architecture, backends, cache_bytes(architecture, kind, n_ctx))
        self.where = list(where)
        """For each layer the index of its share."""
        last = len(self.placement) - 1
        # The embeddings go to the first layer, so that no token needs the CPU; the head goes to the last. What an
        # encoder adds to the embeddings goes with them.
        self.first = self.where[0]
        """The index of the share that has the embeddings."""
        head = self.where[-1] if architecture.causal else self.first
        if not _can_look_up(self.placement[self.first].backend, architecture.info("token_embd.weight")):
            self.first = last
        if architecture.causal and not _can_multiply(
            self.placement[head].backend, architecture.info(architecture.output_tensor)
        ):
            head = last
        self.head = head
        """The index of the share that has the output head."""
        self._pending: list[tuple[Tensor, TensorInfo, int]] = []
        for name in architecture.shapes:
            layer = layer_of(name)
            target = self.where[layer] if layer is not None else self.first if name == "token_embd.weight" else head
            self._add(name, architecture.info(name), target)
        self.placement[head].has_output = architecture.causal
        self.placement[self.first].has_embeddings = True
        if architecture.causal and "output.weight" not in self.tensors:
            if head == self.first:
                self.tensors["output.weight"] = self.tensors["token_embd.weight"]
            else:
                self._add("output.weight", architecture.info("token_embd.weight"), head)
        size_k, size_v = architecture.kv_sizes
        for layer, target in enumerate(self.where):
            self.placement[target].layers.append(layer)
            if architecture.causal:
                across = is_across(self.placement[target].backend, kind)
                shape = (size_v, n_ctx) if across else (n_ctx, size_v)
                k = self.context.new_tensor(kind, (n_ctx, size_k), name=f"cache_k.{layer}")
                v = self.context.new_tensor(kind, shape, name=f"cache_v.{layer}")
                self.cache.append(LayerCache(k, v, across))
                self.placement[target].cache_bytes += k.nbytes + v.nbytes
        for i, share in enumerate(self.placement):
            kept = [self.cache[layer] for layer in share.layers if self.cache]
            caches = [t for cache in kept for t in (cache.k, cache.v)]
            streamed = [
                t
                for t, info, target in self._pending
                if target == i and (self._sketched or not self._mapped(share, info))
            ]
            if caches:
                self.context.alloc(share.backend.buffer_type, caches)
            if streamed:
                self.context.alloc(share.backend.buffer_type, streamed, usage=Usage.WEIGHTS)

    def _add(self, name: str, info: TensorInfo, target: int) -> None:
        tensor = self.context.new_tensor(info.dtype, info.shape, name=name)
        self.tensors[name] = tensor
        self._pending.append((tensor, info, target))
        self.placement[target].weight_bytes += info.nbytes
        if self._mapped(self.placement[target], info):
            self.placement[target].mapped_bytes += info.nbytes

    def _mapped(self, share: DevicePlacement, info: TensorInfo) -> bool:
        return share.backend.device.is_cpu and info.offset % 32 == 0

    def _load(self, progress: Progress | None) -> None:
        file = self.architecture.file
        mappings: dict[int, Buffer] = {}
        jobs: list[Job] = []
        mapped = 0
        # In the file's order, so that a disk reads ahead.
        for tensor, info, target in sorted(self._pending, key=lambda entry: (entry[1].part, entry[1].offset)):
            if not self._mapped(self.placement[target], info):
                jobs.append(Job(tensor, file.raw(info.name)))
                continue
            if info.part not in mappings:
                mappings[info.part] = Buffer.over(file.map_of(info), usage=Usage.WEIGHTS)
                self.context.adopt(mappings[info.part])
            self.context.put(tensor, mappings[info.part], mappings[info.part].base + info.offset)
            mapped += info.nbytes
        total = mapped + sum(job.data.size for job in jobs)
        if progress and mapped:
            progress(mapped, total)
        report = None if progress is None else (lambda done, _: progress(mapped + done, total))
        upload(jobs, [share.backend for share in self.placement], report)
        del self._pending

    def close(self) -> None:
        """Free everything."""
        self.tensors.clear()
        self.cache.clear()
        self.context.close()


def _can_look_up(backend: Backend, table: TensorInfo) -> bool:
    """Whether a backend can look up rows of a tensor: of its type, and of its size."""
    with Context() as context:
        rows = ops.get_rows(context.new_tensor(table.dtype, table.shape), context.new_tensor(Type.I32, (1,)))
        return bool(c.ggml_backend_dev_supports_op(backend.device.ptr, rows.ptr))


def _can_multiply(backend: Backend, weight: TensorInfo) -> bool:
    """Whether a backend can multiply by a tensor."""
    with Context() as context:
        x = context.new_tensor(Type.F32, (1, weight.shape[-1]))
        product = ops.mul_mat(context.new_tensor(weight.dtype, weight.shape), x)
        return bool(c.ggml_backend_dev_supports_op(backend.device.ptr, product.ptr))


def is_across(backend: Backend, kind: Type) -> bool:
    """Whether values are cached transposed, for attention by two products.

    On the CPU, whose flash attention sums F16 values in F16. A quantized cache has only flash attention.
    """
    return backend.device.is_cpu and block_size(kind) == 1


def check_cache(kind: Type, sizes: tuple[int, int]) -> None:
    """Raise ``ValueError`` if keys and values of so many elements cannot be kept as ``kind``."""
    if kind in _NO_CACHE:
        raise ValueError(f"kv_dtype {kind.name} cannot hold keys and values; F16, F32, BF16 and quantized types can")
    block = block_size(kind)
    if any(size % block for size in sizes):
        raise ValueError(
            f"kv_dtype {kind.name} has blocks of {block}: keys and values of {sizes} elements do not fit them"
        )
