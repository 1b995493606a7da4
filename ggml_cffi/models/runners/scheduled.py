"""Scheduled runner: ggml's scheduler runs the graph, for layers on the CPU and on remote devices."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from math import prod
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
from ggml_cffi.models.runners.base import MAX_SEQUENCES, RANGE_STEP, Batch, Logits, Runner, kv_slots_for
from ggml_cffi.models.runners.buckets import Key, bucket, cpu_bucket, output_bucket
from ggml_cffi.models.runners.inputs import GraphInputs, InputMemory, input_memory
from ggml_cffi.models.runners.kv_length import KVLength
from ggml_cffi.models.runners.stage_spec import stages_of
from ggml_cffi.models.runners.weights import Weights
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.scheduler import Scheduler

_FEWEST_GRAPHS = 8  # graphs to keep, however large they are
_METADATA = 256 << 20  # bytes of all kept graphs: more of them are closed
_TENSOR_METADATA = 1000  # bytes of a kept graph for each of its tensors, in C and in Python
_SMALL_RESULT = 16 << 20  # largest bytes of a result for which the runner keeps memory
_QUEUED = 16  # batches of a prompt that one call computes: few enough that a caller can stop soon
_CPU_BATCH = 256  # tokens of a batch of one sequence on the CPU, except the last one


class _ResultMemory:
    """Host memory for results: two blocks for each backend, one of which is read while the other one is written."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[Backend, int], npt.NDArray[np.float32]] = {}

    def take(self, backend: Backend, slot: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """Return an array of a shape in block ``slot``: in pinned memory if a GPU writes to it."""
        size, block = prod(shape), self._blocks.get((backend, slot))
        if block is None or block.size < size:
            on_cpu = backend.device.is_cpu
            block = np.empty(size, np.float32) if on_cpu else pinned((size,), device=backend.device)
            self._blocks[backend, slot] = block
        return block[:size].reshape(shape)


class _BatchContext(Context):
    """A context whose inputs have no values yet: the runner writes them before each run."""

    __slots__ = ()
    readable = False


class _BatchGraph(Closing):
    """The graph for batches of up to some number of tokens, which is replayed for each of them."""

    def __init__(
        self,
        scheduler: Scheduler,
        graph: Graph,
        inputs: GraphInputs,
        length: KVLength,
        memory: _ResultMemory,
    ) -> None:
        self.scheduler, self.graph, self.inputs = scheduler, graph, inputs
        self._length, self._memory = length, memory
        (self._result,) = graph.outputs
        self._backend: Backend | None = None
        self._transfers: dict[int, tuple[npt.NDArray[np.float32], tuple[Any, ...]]] = {}

    def move(self, start: int, stride: int) -> None:
        """Change the KV slots that the next run reads, after :meth:`alloc`; not on a device that replays a graph."""
        self._length.move(start, stride)

    def alloc(self, n_kv: int, *, wait: bool) -> None:
        """Allocate the graph for a number of KV slots, unless it is allocated.

        A change of the number needs another allocation: ggml's scheduler gives each an identity, and CUDA's backend
        replays what it captured as long as the identity is the same.
        """
        if self._backend is None:  # now for all KV slots, so that later no device needs more memory
            self.scheduler.alloc(self.graph, wait=wait)
            self._backend = self.scheduler.backend_of(self._result)
        if self.scheduler.graph is not self.graph or n_kv != self._length.n_kv:
            self._length.move(0, 0)  # as it was when the scheduler saved the places, which it now restores
            self._length.set(n_kv)
            self.scheduler.alloc(self.graph, wait=wait)

    def start(self, slot: int) -> npt.NDArray[np.float32]:
        """Start a run with the inputs that were written to ``slot``.

        Returns
        -------
        numpy.ndarray
            Memory that has the result once the scheduler is synchronized, until the next run with that slot.
        """
        assert self._backend is not None
        self.inputs.send(slot)
        if self._result.nbytes > _SMALL_RESULT:
            self.scheduler.compute(self.graph)
            result: npt.NDArray[np.float32] = self._result.numpy()
            return result
        if slot not in self._transfers:
            out = self._memory.take(self._backend, slot, self._result.shape)
            self._transfers[slot] = out, (self._result.ptr, c.ffi.from_buffer(out), 0, out.nbytes)
        out, transfer = self._transfers[slot]
        self.scheduler.compute_async(self.graph)
        # Tensor.get_async without its checks, which cannot fail for an allocated graph.
        with self._backend.lock:
            c.ggml_backend_tensor_get_async(self._backend.ptr, *transfer)
        return out

    def close(self) -> None:
        """Free the graph."""
        if self.scheduler.graph is self.graph:
            self.scheduler.reset()
        self.graph.close()
        self._result.context.close()


def logits_graph(
    context: Context,
    weights: Weights,
    n: int,
    n_kv: int,
    n_out: int,
    memory: Mapping[int, InputMemory] | None = None,
    n_ranges: int = 0,
) -> tuple[GraphInputs, Tensor]:
    """Build the graph for ``n`` tokens, ``n_kv`` KV slots and ``n_out`` outputs. Return its inputs and the logits.

    ``memory`` is that of the inputs; see :class:`~ggml_cffi.models.runners.inputs.GraphInputs`. With ranges of KV
    slots, the graph is built for :data:`RANGE_STEP`, since ggml refuses views that have more elements in all than the
    cache: change the number to ``n_kv`` before it is allocated.
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
        memory=memory,
        n_ranges=n_ranges,
        built_n_kv=RANGE_STEP if n_ranges else None,
    )
    tensors = weights.tensors
    hidden = architecture.hidden(tensors, [cache for (cache,) in weights.caches], inputs.inputs)
    result = architecture.logits(tensors, hidden)
    result.name = "logits"
    return inputs, result


def kv_length(inputs: GraphInputs, n_kv: int, n_ranges: int = 0) -> KVLength:
    """Return the tensors of a graph of :func:`logits_graph` that depend on the KV slots, changed to ``n_kv`` slots."""
    built = RANGE_STEP if n_ranges else n_kv
    length = KVLength(inputs.kv_views, inputs.masks, built, inputs.kv_results, ranges=n_ranges > 0)
    length.set(n_kv)
    return length


def can_attend_to_ranges(backends: Sequence[Backend], layer_devices: Sequence[int], *, op_offload: bool) -> bool:
    """Return whether a scheduled runner computes attention over ranges of KV slots: on this machine's CPU only.

    A GPU that computes large batches gets copies of the views of the cache, in the layout of the allocation only.
    """
    users = backends if op_offload else [backends[i] for i in layer_devices]
    return all(b.device.is_cpu and not b.device.is_remote for b in users)


def untiled_batch(weights: Weights) -> int:
    """Return the largest number of tokens of a graph that has scores although larger ones have none.

    A CPU attends to long prompts tile by tile. 0 stands for no such graph.
    """
    tiled = next((cache for made in weights.caches for cache in made if cache.v_transposed and cache.tiled), None)
    fewest = 0 if tiled is None else weights.architecture.tiled_rows(tiled.k.dtype)
    return next((n for n in range(fewest - 1, 0, -1) if cpu_bucket(n) < fewest), 0)


def largest_graphs(n_batch: int, n_slots: int, *, ranges: bool, untiled: int = 0) -> list[tuple[Key, int]]:
    """Return the sizes of the graphs that take the most memory for intermediates.

    One is for a long prompt, and one for the prompt of :func:`untiled_batch` if that is shorter. With ranges of KV
    slots, a batch of one token of each sequence takes more memory, for attention and for its outputs, if prompts have
    small batches. It is counted for :data:`MAX_SEQUENCES` sequences.

    Returns
    -------
    list
        For each graph its numbers of tokens, KV slots and outputs, and that of its ranges.
    """
    prompts = (n_batch, untiled) if 0 < untiled < n_batch else (n_batch,)
    found = [((n, n_slots, 1), 0) for n in prompts]
    if ranges:
        n = min(MAX_SEQUENCES, n_batch)
        found.append(((n, n_slots, n), min(2 * n, n_batch, n_slots // RANGE_STEP)))
    return found


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
    repack
        True to repack weights of the CPU, as for :class:`~ggml_cffi.models.runners.weights.Weights`.
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
        repack: bool = False,
    ) -> None:
        self.architecture, self.n_batch, self.n_slots = architecture, n_batch, kv_slots_for(n_ctx)
        stages = stages_of([0] * architecture.n_layers if layer_devices is None else layer_devices)
        self.n_built = 0
        """Number of graphs built so far."""
        self._graphs: LRU[tuple[int, int, int], _BatchGraph] = LRU(_FEWEST_GRAPHS)
        self._inputs: dict[int, InputMemory] = {}
        self._results = _ResultMemory()
        self._closed = False
        self._computing, self.abort_lock = False, RLock()
        self._cpu = None if shared_cpu else next((b for b in backends if b.device.is_cpu), None)
        self.weights = Weights(architecture, backends, self.n_slots, kv_dtype, stages, progress, repack=repack)
        self._bucket = cpu_bucket if any(backends[i].device.is_cpu for i in self.weights.layer_devices) else bucket
        self.attends_to_ranges = can_attend_to_ranges(backends, self.weights.layer_devices, op_offload=op_offload)
        if all(backend.device.is_cpu for backend in backends):
            # Larger batches are not faster on a processor: the first tokens would also read the last tokens' KV slots.
            self.best_prefill_batch = _CPU_BATCH
        elif not any(backend.device.is_remote for backend in backends):
            self.n_queued_batches = _QUEUED
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

    def batch_ranges(self, start: int, end: int) -> list[tuple[int, int]]:
        if self.best_prefill_batch is None:
            return super().batch_ranges(start, end)
        size = min(self.n_batch, self.best_prefill_batch)
        return [*pairwise([*range(start, end, size), end])]

    def run(self, batch: Batch, meanwhile: Callable[[], object] | None = None) -> Logits:
        self.architecture.check_decoder()
        if meanwhile is not None:  # now: the CPU computes in the thread that submits
            meanwhile()
        with self.scheduler.lock:  # embeddings are computed with the same scheduler
            logits = self._start(batch, self._write(batch, 0), 0)
            self._scheduler.synchronize()
            return logits

    def run_all(self, batches: Iterable[Batch]) -> Generator[Logits, None, None]:
        if self.n_queued_batches == 1:
            yield from map(self.run, batches)
            return
        self.architecture.check_decoder()
        started: Logits | None = None
        try:
            for i, batch in enumerate(batches):  # a batch is built and written while devices compute the one before
                with self.scheduler.lock:
                    graph = self._write(batch, i % 2, wait=False)
                    self._scheduler.synchronize()
                    done, started = started, None
                    started = self._start(batch, graph, i % 2)
                if done is not None:
                    yield done
            self.scheduler.synchronize()
            if started is not None:
                yield started
        finally:
            if not self._closed:
                self._scheduler.synchronize()

    def _write(self, batch: Batch, slot: int, *, wait: bool = True) -> _BatchGraph:
        """Return the graph for a batch, allocated, with the inputs in host memory."""
        n_ranges = 0 if batch.query_ids is None else len(batch.query_ids)
        graph = self.allocated((len(batch.tokens), batch.mask.shape[1], len(batch.output_ids)), n_ranges, wait=wait)
        if self.attends_to_ranges:
            graph.move(batch.kv_start, batch.kv_stride)
        values = vars(batch)
        graph.inputs.write(values if batch.window_mask is not None else values | {"window_mask": batch.mask}, slot)
        return graph

    def _start(self, batch: Batch, graph: _BatchGraph, slot: int) -> Logits:
        """Start the run of a batch. The result is there after the scheduler has synchronized."""
        with self._abortable():
            return graph.start(slot)[: len(batch.output_ids)]

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

    def allocated(self, key: Key, n_ranges: int = 0, *, wait: bool = True) -> _BatchGraph:
        """Return the graph for at least these numbers of tokens, KV slots and outputs, allocated for the KV slots.

        Graphs are kept, the last used ones if there are very many.

        Parameters
        ----------
        n_ranges
            Number of ranges of KV slots, 0 if all tokens attend to one.
        wait
            False to allocate the graph while devices compute another one.
        """
        n, n_kv, n_out = key
        n_rows = min(self._bucket(n), self.n_batch)
        sizes = n_rows, output_bucket(n, n_out, n_rows), n_ranges
        graph = self._graphs.get(sizes, lambda: self._build(*sizes))
        graph.alloc(n_kv, wait=wait)
        return graph

    def _build(self, n: int, n_out: int, n_ranges: int) -> _BatchGraph:
        weights = self.weights
        if not self._inputs:
            self._inputs = input_memory(
                weights.backends,
                weights.layer_devices,
                weights.embedding_devices[0],
                self.n_batch,
                self.n_slots,
                window=self.architecture.window > 0,
            )
        self.n_built += 1
        context, n_kv = _BatchContext(), self.n_slots
        graph: Graph | None = None
        try:
            inputs, result = logits_graph(context, weights, n, n_kv, n_out, self._inputs, n_ranges)
            graph = Graph(result)
            length = kv_length(inputs, n_kv, n_ranges)
            built = _BatchGraph(self._scheduler, graph, inputs, length, self._results)
        except BaseException:
            for part in (graph, context):
                if part is not None:
                    part.close()
            raise
        self._graphs.size = max(_METADATA // (_TENSOR_METADATA * graph.n_tensors), _FEWEST_GRAPHS)
        return built

    def _reserve(self) -> None:
        """Allocate memory for the largest batch now, and keep its graph, which long prompts use."""
        untiled = untiled_batch(self.weights)
        largest = largest_graphs(self.n_batch, self.n_slots, ranges=self.attends_to_ranges, untiled=untiled)
        for key, n_ranges in reversed(largest):
            self.allocated(key, n_ranges)
        sizes = self._scheduler.buffer_sizes()
        for backend, placement in zip(self.weights.backends, self.placement, strict=True):
            placement.compute_bytes = sizes[backend]

    def close(self) -> None:
        """Free graphs, weights, caches and scheduler. The backends stay open."""
        self._closed = True
        self._graphs.clear()
        self._scheduler.close()
        for memory in self._inputs.values():
            memory.close()
        self.weights.close()
