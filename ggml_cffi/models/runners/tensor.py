"""A model whose layers several devices share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy.typing as npt

from ggml_cffi.core.backend import Backend
from ggml_cffi.core.device import Device
from ggml_cffi.core.dry_run import DryRunContext
from ggml_cffi.core.op_sets import VIEWS
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import BackendBufferUsage as Usage
from ggml_cffi.enums import Type
from ggml_cffi.files.gguf.reader import GGUFTensor, TensorInfo
from ggml_cffi.models.architectures.base import Architecture, LayerCache
from ggml_cffi.models.placement.scratch import scratch_bytes
from ggml_cffi.models.runners.base import Batch, Logits, Runner, n_rows
from ggml_cffi.models.runners.stage import Layers, Stage
from ggml_cffi.models.runners.weights import DevicePlacement, Progress, is_across
from ggml_cffi.parallel.program import ParallelProgram
from ggml_cffi.parallel.shard import spec_for
from ggml_cffi.parallel.tensor_parallel import TensorParallel, check_devices
from ggml_cffi.scheduler.scheduler import Scheduler


class TensorRunner(Runner):
    """Weights and cache of one model, on several devices that compute every layer together.

    Each device has some heads and some of the feed-forward part of every layer, with its part of the cache, and some
    rows of the output head; norms and embeddings are on all.

    Parameters
    ----------
    architecture
        The model.
    devices
        GPUs, or the CPU alone; default all GPUs.
    n_ctx
        Rows of the KV cache, which are rounded up.
    n_batch
        Most tokens of one run.
    kv_dtype
        Type of keys and values in the cache.
    whole_attention
        Have every device compute all heads, and share the feed-forward part alone: the devices wait for one another
        half as often, and hold more.
    half_above, threads, n_threads
        As for :class:`TensorParallel`.
    weights
        By name, in place of the file's.
    progress
        Called with bytes done and bytes in all while weights are loaded.

    Raises
    ------
    ValueError
        If the devices cannot share a model, or this one is too small for so many.
    OutOfMemoryError
        If a device has no room.
    """

    def __init__(
        self,
        architecture: Architecture,
        devices: Iterable[Backend | Device | str] | None = None,
        n_ctx: int = 4096,
        n_batch: int = 512,
        kv_dtype: Type = Type.F16,
        progress: Progress | None = None,
        *,
        whole_attention: bool = False,
        half_above: int | None = None,
        threads: bool | None = None,
        n_threads: int | None = None,
        weights: Mapping[str, npt.ArrayLike | GGUFTensor] | None = None,
    ) -> None:
        self.architecture, self.n_batch = architecture, n_batch
        self.n_rows = n_rows(n_ctx)
        self.group = TensorParallel(devices, half_above=half_above, threads=threads, n_threads=n_threads)
        """The devices."""
        try:
            backends = self.group.backends
            shares = architecture.tensor_parallel(len(backends), whole_attention=whole_attention)
            self.cuts = shares.cuts
            """How weights are cut."""
            source = _named(architecture) if weights is None else weights
            self.weights = self.group.weights(source, self.cuts, progress=progress)
            """By name, the part of each device."""
            # The CPU's flash attention sums in F16: see is_across.
            self._across = is_across(backends[0], kv_dtype)
            self.caches = [self._new_cache(i, kv_dtype) for i in range(architecture.n_layers)]
            parts = [{name: t[r] for name, t in self.weights.items()} for r in range(len(backends))]
            caches = [[layer[r] for layer in self.caches] for r in range(len(backends))]
            layers = Layers(architecture, range(architecture.n_layers), parts, caches, shares.summed)
            self.stage = Stage(layers, self.group)
            """What computes."""
            self.placement = _shares(layers, backends, self.stage.reserve(n_batch, self.n_rows))
        except BaseException:
            self.close()
            raise

    def _new_cache(self, i: int, dtype: Type) -> list[LayerCache]:
        """Keys and values of layer ``i``: for each device rows for as many heads as its projections have."""
        k, v = ([_cache_shape(self.n_rows, w) for w in self.weights[f"blk.{i}.attn_{x}.weight"]] for x in "kv")
        if self._across:
            v = [shape[::-1] for shape in v]
        keys, values = self.group.zeros(k, dtype, name=f"cache_k.{i}"), self.group.zeros(v, dtype, name=f"cache_v.{i}")
        return [LayerCache(*pair, self._across) for pair in zip(keys, values, strict=True)]

    def run(self, batch: Batch) -> Logits:
        """Logits ``(n_out, n_vocab)`` of the tokens of ``batch`` that are wanted, until the next run.

        Raises
        ------
        ValueError
            If ids or rows are out of range.
        ClosedError
            If the model is closed.
        """
        self.check_open()
        batch.check(self.architecture.n_vocab, self.n_rows)
        return self.stage.run(batch)

    def assignment(self) -> list[tuple[Tensor, Backend]]:
        """What the last run computed, in order, one device after the other."""
        self.check_open()
        return [(t, backend) for t, backend in self.stage.assignment() if t.op not in VIEWS]

    @property
    def programs(self) -> tuple[ParallelProgram, ...]:
        """The graphs that are kept, the last used last."""
        return self.stage.programs

    @property
    def scheduler(self) -> Scheduler:
        """There is none: ValueError."""
        self.check_open()
        raise ValueError("devices that share every layer have no scheduler: load the model with split='layer' for it")

    @property
    def closed(self) -> bool:
        """Whether the model is closed."""
        return self.group.closed

    def close(self) -> None:
        """Free weights, cache and devices."""
        if hasattr(self, "stage"):
            self.stage.close()
        self.group.close()


def _named(architecture: Architecture) -> dict[str, Any]:
    """The weights of a model's file. The output head is a weight of its own: it is cut, and the embeddings are not."""
    file = architecture.file
    found = {name: file[name] for name in architecture.shapes}
    found["output.weight"] = file[architecture.output_tensor]
    return found


def _cache_shape(n_rows: int, projection: Tensor) -> tuple[int, int]:
    return n_rows, projection.shape[0]


def _shares(layers: Layers, backends: Sequence[Backend], sizes: Sequence[int]) -> list[DevicePlacement]:
    """What each device holds, with so many bytes of intermediate results."""
    found = []
    for backend, weights, caches, compute in zip(backends, layers.weights, layers.caches, sizes, strict=True):
        cache_bytes = sum(cache.k.nbytes + cache.v.nbytes for cache in caches)
        weight_bytes = sum(t.nbytes for t in weights.values())
        found.append(DevicePlacement(backend, [*layers.layers], weight_bytes, cache_bytes, compute))
        found[-1].has_output = found[-1].has_embeddings = True
    return found


def measure(
    architecture: Architecture,
    backends: Sequence[Backend],
    n_ctx: int,
    n_batch: int,
    kv_dtype: Type,
    *,
    whole_attention: bool,
) -> list[DevicePlacement]:
    """What a :class:`TensorRunner` would hold on each device. Nothing is allocated; errors as there."""
    check_devices([b.device for b in backends])
    n, across = len(backends), is_across(backends[0], kv_dtype)
    shares = architecture.tensor_parallel(n, whole_attention=whole_attention)
    rows, layers = n_rows(n_ctx), range(architecture.n_layers)
    shapes = {name: t.shape for name, t in _named(architecture).items()}
    parts: list[dict[str, Tensor]] = []
    caches: list[list[LayerCache]] = []
    with ExitStack() as stack:
        for r, backend in enumerate(backends):
            context = stack.enter_context(DryRunContext())
            kinds = {name: _info(architecture, name).dtype for name in shapes}
            cut = {name: spec_for(name, shares.cuts).shapes(kinds[name], shape, n)[r] for name, shape in shapes.items()}
            parts.append({name: context.new_tensor(kinds[name], shape, name=name) for name, shape in cut.items()})
            context.alloc(backend.buffer_type, usage=Usage.WEIGHTS)
            caches.append([])
            for i in layers:
                k, v = (_cache_shape(rows, parts[r][f"blk.{i}.attn_{x}.weight"]) for x in "kv")
                pair = context.new_tensor(kv_dtype, k), context.new_tensor(kv_dtype, v[::-1] if across else v)
                caches[r].append(LayerCache(*pair, across))
            context.alloc(backend.buffer_type)
        found = Layers(architecture, layers, parts, caches, shares.summed)
        with found.measure(backends, (n_batch, rows, 1)) as traced:
            held = _shares(found, backends, traced.arena_sizes)
            for share, plan in zip(held, traced.plans, strict=True):
                if not share.backend.device.is_cpu:
                    share.scratch_bytes = scratch_bytes(plan.node_pointers())
            return held


def _info(architecture: Architecture, name: str) -> TensorInfo:
    return architecture.info(architecture.output_tensor if name == "output.weight" else name)
