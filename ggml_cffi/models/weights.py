"""Which layer goes where, and getting it there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ggml_cffi import c, ops
from ggml_cffi.backend import Backend
from ggml_cffi.buffer import Buffer
from ggml_cffi.context import Context
from ggml_cffi.dtypes import INTEGERS, INTERNAL, block_size, row_size
from ggml_cffi.enums import BackendBufferUsage as Usage
from ggml_cffi.enums import Type
from ggml_cffi.gguf import GGUFFile, TensorInfo
from ggml_cffi.models.architecture import Architecture, LayerCache
from ggml_cffi.tensor import Tensor

#: Called with bytes done and bytes in all while weights are loaded.
Progress = Callable[[int, int], None]

# Share of a GPU's free memory that weights and caches may take; the rest is for intermediate results.
_USABLE = 0.85
_NO_CACHE = INTEGERS | INTERNAL | {Type.F64}


@dataclass
class Share:
    """What one device holds."""

    backend: Backend
    layers: list[int] = field(default_factory=list)
    weight_bytes: int = 0
    cache_bytes: int = 0
    compute_bytes: int = 0
    has_output: bool = False
    has_embeddings: bool = False


def split_layers(architecture: Architecture, backends: Sequence[Backend], layer_cache: int) -> list[int]:
    """For each layer, the index of its backend: GPUs in proportion to their free memory, the CPU for what is left.

    Layers that no GPU has room for are the first ones, next to the embeddings, which the CPU then holds too.
    """
    gpus = [i for i, b in enumerate(backends) if not b.device.is_cpu]
    cpu = len(backends) - 1
    if not gpus:
        return [cpu] * architecture.n_layers
    sizes = [layer_cache] * architecture.n_layers
    for name, info in architecture.file.tensors.items():
        layer = layer_of(name)
        if layer is not None and layer < len(sizes):
            sizes[layer] += info.nbytes
    room = {i: int(backends[i].device.memory().free * _USABLE) for i in gpus}
    room[gpus[-1]] -= architecture.info(architecture.output_tensor).nbytes
    room[gpus[0]] -= architecture.info("token_embd.weight").nbytes
    total, wanted = max(sum(room.values()), 1), sum(sizes)
    # From the last layer down: each GPU takes its share, the last GPU the layers next to the output.
    where = [cpu] * architecture.n_layers
    layer = architecture.n_layers - 1
    for order, gpu in enumerate(reversed(gpus)):
        share = wanted * room[gpu] / total
        taken = 0
        while layer >= 0 and taken + sizes[layer] <= room[gpu]:
            # The last GPU asked takes all that fits; the others stop when half of the next layer is over their share.
            if order < len(gpus) - 1 and taken + sizes[layer] / 2 > share:
                break
            taken += sizes[layer]
            where[layer] = gpu
            layer -= 1
    return where


def layer_of(name: str) -> int | None:
    """The layer number in a tensor's name, ``blk.7.attn_q.weight`` -> 7."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blk" and len(parts) > 2 and parts[1].isdigit() else None


class Weights:
    """The weights and caches of a model on their devices.

    On the CPU, weights are the file's own pages; for other devices they are streamed from the mapping.
    """

    def __init__(
        self,
        architecture: Architecture,
        backends: Sequence[Backend],
        n_ctx: int,
        kv_dtype: Type = Type.F16,
        progress: Progress | None = None,
    ) -> None:
        self.architecture = architecture
        self.tensors: dict[str, Tensor] = {}
        """Name to weight. ``output.weight`` is there even where it is tied to the embeddings."""
        self.cache: list[LayerCache] = []
        self.shares = [Share(b) for b in backends]
        self.context = Context()
        try:
            self._place(n_ctx, kv_dtype)
            self._load(progress)
        except BaseException:
            self.context.close()
            raise

    def _place(self, n_ctx: int, kind: Type) -> None:
        architecture = self.architecture
        _check_cache(kind, architecture.kv_sizes)
        per_layer = sum(n_ctx * row_size(kind, size) for size in architecture.kv_sizes)
        self.where = split_layers(architecture, [s.backend for s in self.shares], per_layer)
        last = len(self.shares) - 1
        # The embeddings go to the first layer, so that no token needs the CPU; the head goes to the last. What an
        # encoder adds to the embeddings goes with them.
        self.first = self.where[0]
        head = self.where[-1] if architecture.causal else self.first
        if not _can_look_up(self.shares[self.first].backend, architecture.info("token_embd.weight")):
            self.first = last
        if architecture.causal and not _can_multiply(
            self.shares[head].backend, architecture.info(architecture.output_tensor)
        ):
            head = last
        self._pending: list[tuple[Tensor, TensorInfo, int]] = []
        for name in architecture.shapes:
            layer = layer_of(name)
            target = self.where[layer] if layer is not None else self.first if name == "token_embd.weight" else head
            self._add(name, architecture.info(name), target)
        self.shares[head].has_output = architecture.causal
        self.shares[self.first].has_embeddings = True
        if architecture.causal and "output.weight" not in self.tensors:
            if head == self.first:
                self.tensors["output.weight"] = self.tensors["token_embd.weight"]
            else:
                self._add("output.weight", architecture.info("token_embd.weight"), head)
        size_k, size_v = architecture.kv_sizes
        for layer, target in enumerate(self.where):
            self.shares[target].layers.append(layer)
            if architecture.causal:
                across = is_across(self.shares[target].backend, kind)
                shape = (size_v, n_ctx) if across else (n_ctx, size_v)
                k = self.context.new_tensor(kind, (n_ctx, size_k), name=f"cache_k.{layer}")
                v = self.context.new_tensor(kind, shape, name=f"cache_v.{layer}")
                self.cache.append(LayerCache(k, v, across))
                self.shares[target].cache_bytes += k.nbytes + v.nbytes
        for i, share in enumerate(self.shares):
            kept = [self.cache[layer] for layer in share.layers if self.cache]
            caches = [t for cache in kept for t in (cache.k, cache.v)]
            streamed = [t for t, info, target in self._pending if target == i and not self._mapped(share, info)]
            if caches:
                self.context.alloc(share.backend.buffer_type, caches)
            if streamed:
                self.context.alloc(share.backend.buffer_type, streamed, usage=Usage.WEIGHTS)

    def _add(self, name: str, info: TensorInfo, target: int) -> None:
        tensor = self.context.new_tensor(info.dtype, info.shape, name=name)
        self.tensors[name] = tensor
        self._pending.append((tensor, info, target))
        self.shares[target].weight_bytes += info.nbytes

    def _mapped(self, share: Share, info: TensorInfo) -> bool:
        return share.backend.device.is_cpu and info.offset % 32 == 0

    def _load(self, progress: Progress | None) -> None:
        file = self.architecture.file
        mappings: dict[int, Buffer] = {}
        total, done = sum(info.nbytes for _, info, _ in self._pending), 0
        # In the file's order, so that a disk reads ahead.
        for tensor, info, target in sorted(self._pending, key=lambda entry: (entry[1].part, entry[1].offset)):
            if self._mapped(self.shares[target], info):
                if info.part not in mappings:
                    mappings[info.part] = Buffer.over(file.map_of(info), usage=Usage.WEIGHTS)
                    self.context.adopt(mappings[info.part])
                self.context.put(tensor, mappings[info.part], mappings[info.part].base + info.offset)
            else:
                tensor.set_bytes(_raw(file, info))
            done += info.nbytes
            if progress:
                progress(done, total)
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


def _check_cache(kind: Type, sizes: tuple[int, int]) -> None:
    if kind in _NO_CACHE:
        raise ValueError(f"kv_dtype {kind.name} cannot hold keys and values; F16, F32, BF16 and quantized types can")
    block = block_size(kind)
    if any(size % block for size in sizes):
        raise ValueError(
            f"kv_dtype {kind.name} has blocks of {block}: keys and values of {sizes} elements do not fit them"
        )


def _raw(file: GGUFFile, info: TensorInfo) -> memoryview:
    return memoryview(file.map_of(info))[info.offset : info.offset + info.nbytes]
