"""Scheduled runner: ggml's scheduler runs the graph, for layers on the CPU and on remote devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from threading import RLock
from typing import Any

import numpy as np
import numpy.typing as npt

from ggml_cffi import c
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.context import Context
from ggml_cffi.core.handle import Closing
from ggml_cffi.core.lru import LRU
from ggml_cffi.core.progress import Progress
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.core.transfer import pinned
from ggml_cffi.enums import Type
from ggml_cffi.errors import AbortedError
from ggml_cffi.models.architectures.base import Architecture
from ggml_cffi.models.runners.base import KV_STEP, RANGE_STEP, Batch, Logits, Runner, kv_slots_for
from ggml_cffi.models.runners.inputs import GraphInputs
from ggml_cffi.models.runners.kv_length import KVLength
from ggml_cffi.models.runners.sizes import Buckets
from ggml_cffi.models.runners.weights import Weights, stages_of
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.scheduler import Scheduler

_GRAPHS = 4  # largest number of kept graphs
_CPU_GRAPHS = 64  # the same for a runner whose graphs serve batches of several sizes
_CPU_BUCKETS = Buckets(4, 16)  # a repeated token takes as long as another: at most 3 of 128
_CPU_BATCH = 128  # tokens of a batch of one sequence on the CPU
_SMALL_RESULT = 16 << 20  # largest bytes of a result for which a graph keeps memory

#: Sizes on which a graph depends: tokens, KV slots that attention reads, tokens with an output, ranges of KV slots.
Key = tuple[int, int, int, int]


class _BatchGraph(Closing):
    """The graph for batches of one size, which is replayed for each of them.

    Parameters
    ----------
    length
        The tensors to change if batches with fewer KV slots, and other ones, use the graph too.
    n_kv
        Largest number of KV slots.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        context: Context,
        inputs: GraphInputs,
        result: Tensor,
        length: KVLength | None,
        n_kv: int,
    ) -> None:
        self.scheduler, self.context, self.inputs, self.result = scheduler, context, inputs, result
        self._length, self._n_kv = length, n_kv
        self.graph = Graph(result)
        self._out: npt.NDArray[np.float32] | None = None
        self._backend: Backend | None = None
        self._get: tuple[Any, ...] = ()

    def alloc(self) -> None:
        """Allocate the graph, and memory for a small result: pinned if a GPU writes to it."""
        if self._length is not None:
            self._length.set(self._n_kv)
            self._length.move(0, 0)
        self.scheduler.alloc(self.graph)
        if self._backend is not None:
            return
        backend, result = self.scheduler.backend_of(self.result), self.result
        if result.nbytes <= _SMALL_RESULT:
            on_cpu = backend.device.is_cpu
            self._backend = backend
            self._out = np.empty(result.shape, np.float32) if on_cpu else pinned(result.shape, device=backend.device)
            self._get = (result.ptr, c.ffi.from_buffer(self._out), 0, result.nbytes)

    def write(self, batch: Batch) -> None:
        """Write the inputs, after :meth:`alloc`."""
        if self._length is not None:
            self._length.set(batch.mask.shape[1])
            self._length.move(batch.kv_start, batch.kv_stride)
        values = vars(batch)
        self.inputs.set(values if batch.window_mask is not None else values | {"window_mask": batch.mask})

    def compute(self) -> npt.NDArray[np.float32]:
        """Compute, and return the result, which the next run overwrites."""
        if self._out is None or self._backend is None:
            self.scheduler.compute(self.graph)
            result: npt.NDArray[np.float32] = self.result.numpy()
            return result
        # Tensor.numpy and Tensor.get_async without their checks, which cannot fail for an allocated graph.
        if self._backend.device.is_cpu:
            self.scheduler.compute(self.graph)
            c.ggml_backend_tensor_get(*self._get)
            return self._out
        self.scheduler.compute_async(self.graph)
        with self._backend.lock:
            c.ggml_backend_tensor_get_async(self._backend.ptr, *self._get)
        self.scheduler.synchronize()
        return self._out

    def close(self) -> None:
        """Free the graph."""
        if self.scheduler.graph is self.graph:
            self.scheduler.reset()
        self.graph.close()
        self.context.close()


def logits_graph(
    context: Context, weights: Weights, n: int, n_kv: int, n_out: int, n_ranges: int = 0
) -> tuple[GraphInputs, Tensor]:
    """Build the graph for ``n`` tokens, ``n_kv`` KV slots and ``n_out`` outputs. Return its inputs and the logits.

    With ranges of KV slots, the graph is built for :data:`RANGE_STEP` slots, since ggml refuses views that have more
    elements in all than the cache: change the number to ``n_kv`` before it is allocated.
    """
    architecture = weights.architecture
    inputs = GraphInputs(
        context,
        weights.backends,
        weights.layer_devices,
        weights.embedding_devices[0],
        n,
        n_kv,
        n_out,
        window=architecture.window > 0,
        n_ranges=n_ranges,
        built_n_kv=RANGE_STEP if n_ranges else n_kv,
    )
    tensors = weights.tensors
    hidden = architecture.hidden(tensors, [cache for (cache,) in weights.caches], inputs.inputs)
    result = architecture.logits(tensors, hidden)
    result.name = "logits"
    return inputs, result


class ScheduledRunner(Runner):
    """A model whose layers are each on one device, computed through one scheduler over all devices.

    Parameters
    ----------
    architecture
        The model.
    backends
        Backends of the devices, the preferred first, the CPU last.
    n_ctx
        Tokens of the context; the KV cache has as many slots, rounded up.
    n_batch
        Largest number of tokens in one run.
    kv_dtype
        Type of keys and values in the cache.
    progress
        Called with bytes done and bytes in all while weights are loaded.
    layer_devices
        For each layer the number of its backend. Default the first backend for all.
    op_offload
        True if GPUs compute large batches with weights that are in host memory.
    compute_bytes
        Bytes of intermediates on each backend, if they are known. A CPU without GPUs then allocates them in the first
        run. GPUs allocate them now, so that loading fails if there is too little memory.
    shared_cpu
        True if other runners use the same backend of the CPU. :meth:`abort` would stop their runs too.
    """

    def __init__(
        self,
        architecture: Architecture,
        backends: Sequence[Backend],
        n_ctx: int,
        n_batch: int,
        kv_dtype: Type = Type.F16,
        progress: Progress | None = None,
        *,
        layer_devices: Sequence[int] | None = None,
        op_offload: bool = True,
        compute_bytes: Sequence[int] | None = None,
        shared_cpu: bool = False,
    ) -> None:
        self.architecture, self.n_batch, self.n_slots = architecture, n_batch, kv_slots_for(n_ctx)
        stages = stages_of([0] * architecture.n_layers if layer_devices is None else layer_devices)
        devices = [backends[device].device for stage in stages for device in stage.devices]
        self.attends_to_ranges = all(device.is_cpu and not device.is_remote for device in devices)
        self._graphs: LRU[Key, _BatchGraph] = LRU(_CPU_GRAPHS if self.attends_to_ranges else _GRAPHS)
        self.n_built = 0
        """Number of graphs built so far."""
        self._closed = False
        self._computing, self.abort_lock = False, RLock()
        self._cpu = None if shared_cpu else next((b for b in backends if b.device.is_cpu), None)
        self.weights = Weights(architecture, backends, self.n_slots, kv_dtype, stages, progress)
        if all(backend.device.is_cpu for backend in backends):
            # Larger batches are not faster on a processor: the first tokens would also read the last tokens' KV slots.
            self.best_prefill_batch = _CPU_BATCH
        try:
            self._scheduler = Scheduler(backends, op_offload=op_offload)
        except BaseException:
            self.weights.close()
            raise
        try:
            if architecture.causal and (compute_bytes is None or len(backends) > 1):
                self._reserve()
            elif compute_bytes is not None:
                self.placement[0].compute_bytes = compute_bytes[0]
        except BaseException:
            self.close()
            raise

    @property
    def closed(self) -> bool:
        """True once the model is closed."""
        return self._closed

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler over all devices."""
        self.check_open()
        return self._scheduler

    def assignment(self) -> list[tuple[Tensor, Backend]]:
        return self.scheduler.assignment()

    def run(self, batch: Batch) -> Logits:
        self.architecture.check_decoder()
        with self.scheduler.lock:  # embeddings are computed with the same scheduler
            return self._compute(batch)

    def _compute(self, batch: Batch) -> Logits:
        graph = self.allocated(self._key_of(batch))
        graph.write(batch)
        with self._abortable():
            return graph.compute()[: len(batch.output_ids)]

    def _key_of(self, batch: Batch) -> Key:
        """Return the sizes of the graph that computes a batch."""
        n, n_kv, n_out = len(batch.tokens), batch.mask.shape[1], len(batch.output_ids)
        if not self.attends_to_ranges:
            return n, n_kv, n_out, 0
        n_rows, n_out = _CPU_BUCKETS.sizes(n, n_out, self.n_batch)
        n_kv = min(max(1 << (n_kv - 1).bit_length(), KV_STEP), self.n_slots)
        return n_rows, n_kv, n_out, 0 if batch.query_ids is None else len(batch.query_ids)

    def batch_ranges(self, start: int, end: int) -> list[tuple[int, int]]:
        step = min(self.best_prefill_batch or self.n_batch, self.n_batch)
        if not self.attends_to_ranges:
            return super().batch_ranges(start, end)
        return [*pairwise([*range(start, end, step), end])]  # whole batches share a graph, without repeated tokens

    @contextmanager
    def _abortable(self) -> Iterator[None]:
        """Let :meth:`abort` stop what the block computes, and nothing else."""
        with self.abort_lock:
            if self.abort_requested and self._cpu is not None:
                raise AbortedError("the run was stopped before it began")
            self._computing = True
        try:
            yield
        except AbortedError:
            self._scheduler.synchronize()  # GPUs may still compute
            raise
        finally:
            with self.abort_lock:
                self._computing = False

    def abort(self) -> None:
        super().abort()
        if self._computing and self._cpu is not None:
            self._cpu.abort()

    def allocated(self, key: Key) -> _BatchGraph:
        """Return the graph for these sizes, allocated. The last few are kept."""
        found = self._graphs.get(key, lambda: self._build(key))
        if self._scheduler.graph is not found.graph:
            found.alloc()
        return found

    def _build(self, key: Key) -> _BatchGraph:
        _, n_kv, _, n_ranges = key
        context = Context()
        self.n_built += 1
        try:
            inputs, result = logits_graph(context, self.weights, *key)
            length = None
            if self.attends_to_ranges:
                rows = inputs.masks + inputs.inputs.kv_rows
                built = RANGE_STEP if n_ranges else n_kv
                length = KVLength(inputs.inputs.kv_views, rows, built, ranges=n_ranges > 0)
            return _BatchGraph(self._scheduler, context, inputs, result, length, n_kv)
        except BaseException:
            context.close()
            raise

    def _reserve(self) -> None:
        """Allocate memory for the largest batch now."""
        with self._build((self.n_batch, self.n_slots, 1, 0)) as largest:
            sizes = self._scheduler.reserve(largest.graph)
        for backend, placement in zip(self.weights.backends, self.placement, strict=True):
            placement.compute_bytes = sizes[backend]

    def close(self) -> None:
        """Free graphs, weights, caches and scheduler. The backends stay open."""
        self._closed = True
        self._graphs.clear()
        self._scheduler.close()
        self.weights.close()
