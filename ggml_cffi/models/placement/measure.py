"""Dry run: the bytes that each device would hold, counted without allocating them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise, product

from ggml_cffi.core.backend import Backend
from ggml_cffi.core.buffer import BufferType
from ggml_cffi.core.dry_run import DryRunContext
from ggml_cffi.core.dtypes import type_size
from ggml_cffi.core.repack import repacked_memories
from ggml_cffi.core.transfer import shares_host_memory, whole_pages
from ggml_cffi.enums import Type
from ggml_cffi.models.architectures.base import Architecture
from ggml_cffi.models.placement.hypothetical import is_hypothetical
from ggml_cffi.models.placement.options import LoadOptions
from ggml_cffi.models.placement.placement import DevicePlan
from ggml_cffi.models.placement.workspace import workspace_bytes
from ggml_cffi.models.runners.base import kv_slots_for
from ggml_cffi.models.runners.buckets import Key
from ggml_cffi.models.runners.embedding import Embedder
from ggml_cffi.models.runners.link import is_linked, link_bytes
from ggml_cffi.models.runners.pipeline import can_pipeline
from ggml_cffi.models.runners.scheduled import (
    can_attend_to_ranges,
    kv_length,
    largest_graphs,
    logits_graph,
    untiled_batch,
)
from ggml_cffi.models.runners.stage import StageGraph
from ggml_cffi.models.runners.stage_spec import StageSpec, n_slots_for
from ggml_cffi.models.runners.weights import Weights, layer_of
from ggml_cffi.parallel.rank import AllGather, Rank
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.scheduler import Scheduler

_OFFLOADED_BATCH = 32  # tokens from which ggml computes with the CPU's weights on a GPU


def measure(
    architecture: Architecture,
    backends: Sequence[Backend],
    options: LoadOptions,
    stages: Sequence[StageSpec],
    *,
    op_offload: bool = True,
    whole_attention: bool = False,
    pipeline: bool | None = None,
) -> tuple[list[DevicePlan], bool]:
    """Return the plan of each device for the largest batch, and whether a pipeline runner can compute the model.

    Parameters
    ----------
    stages
        Layers and their devices.
    op_offload
        True if GPUs compute large batches with weights of the CPU, through a scheduler.
    whole_attention
        As for :class:`~ggml_cffi.models.runners.PipelineRunner`.
    pipeline
        True for a pipeline runner; default True if GPUs can compute these stages.

    Notes
    -----
    If the CPU lacks the memory for its caches, intermediates count as 0 bytes: the caches alone are too large.

    A scheduler cannot tell hypothetical GPUs from the CPU. If the CPU has layers beside them, the intermediates of each
    device are counted alone.
    """
    dry_runs: list[DryRunContext] = []

    def new_context() -> DryRunContext:
        dry_runs.append(DryRunContext())
        return dry_runs[-1]

    n_slots = kv_slots_for(options.n_ctx)
    weights = Weights(
        architecture,
        backends,
        n_slots,
        options.kv_dtype,
        stages,
        whole_attention=whole_attention,
        repack=options.repacks(backends, architecture.weight_bytes),
        context=DryRunContext(),
    )
    hypothetical = any(is_hypothetical(b) for b in backends if not b.device.is_cpu)
    key = min(options.n_batch, options.n_ctx), n_slots, 1
    try:
        if pipeline is None and hypothetical:
            pipeline = architecture.causal and not weights.placement[-1].layers
        elif pipeline is None:
            pipeline = can_pipeline(weights)
        if pipeline:
            _measure_stages(weights, key)
        elif weights.placement[-1].cache_bytes <= backends[-1].device.memory().free:
            # Else the graph may be larger than operations can be.
            if hypothetical and architecture.causal:
                _measure_apart(weights, key, op_offload=op_offload)
            else:
                with Scheduler(backends, op_offload=op_offload) as scheduler:
                    _measure_scheduled(weights, scheduler, options, new_context)
    finally:
        weights.close()
    inputs: Counter[BufferType] = sum((context.taken for context in dry_runs), start=Counter())
    plans = []
    for backend, placement in zip(backends, weights.placement, strict=True):
        if not hypothetical:
            input_bytes = inputs.pop(backend.buffer_type, 0)
        else:  # all have the CPU's buffer type; the inputs of an encoder are where its first layer is
            input_bytes = inputs.total() if 0 in placement.layers else 0
        free = backend.device.memory().free
        reserve = options.reserve_of(free, is_cpu=backend.device.is_cpu)
        plans.append(DevicePlan.of(placement, free, reserve, input_bytes))
    return plans, pipeline


def _measure_stages(weights: Weights, key: Key) -> None:
    """Count the intermediate tensors of a pipeline runner."""
    used = [[weights.backends[i] for i in stage.devices] for stage in weights.stages]
    links = [is_linked(before, after) for before, after in pairwise(used)]  # after each stage but the last
    n_slots = n_slots_for(weights.stages)
    arenas: Counter[int] = Counter()  # the stages of a device share its largest
    blocks: Counter[int] = Counter()  # of host memory; later ones are no smaller
    for k, stage in enumerate(weights.stages):
        receives, sends = k > 0 and links[k - 1], k < len(links) and links[k]
        graph = StageGraph.of(weights, stage)
        with graph.measure(used[k], key, receives=receives, sends=sends) as traced:
            devices = [weights.backends[i].device for i in stage.devices]
            for i, size, graphs in zip(stage.devices, traced.arena_bytes, traced.step_graphs, strict=True):
                placement = weights.placement[i]
                arenas[i] = max(arenas[i], size)
                if receives:
                    placement.compute_bytes += n_slots * link_bytes(key[0], weights.architecture.n_embd)
                if len(devices) == 1 and not shares_host_memory(devices[0]):
                    blocks[i] = max(blocks[i], whole_pages(traced.host_bytes))
                    placement.compute_bytes += n_slots * blocks[i]  # for batches in flight
                if not placement.is_cpu:
                    workspace = workspace_bytes(graphs.node_pointers())
                    placement.workspace_bytes = max(placement.workspace_bytes, workspace)
    for i, size in arenas.items():
        weights.placement[i].compute_bytes += size


def _measure_apart(weights: Weights, key: Key, *, op_offload: bool) -> None:
    """Count the intermediate tensors of each stage by a scheduler of its one device alone."""
    workspace = 0
    largest = largest_graphs(key[0], key[1], ranges=False, untiled=untiled_batch(weights))
    for stage, (each, _) in product(weights.stages, largest):
        (device,) = stage.devices
        size, scratch = _measure_stage(StageGraph.of(weights, stage), weights.backends[device], each)
        placement, workspace = weights.placement[device], max(workspace, scratch)
        placement.compute_bytes = max(placement.compute_bytes, size)
    for placement in weights.placement[:-1]:
        placement.workspace_bytes = workspace if placement.layers else 0
    if op_offload and key[0] >= _OFFLOADED_BATCH:
        _count_offloaded(weights, key[0])


def _measure_stage(graph: StageGraph, backend: Backend, key: Key) -> tuple[int, int]:
    """Return the bytes of a stage's inputs and intermediates on one device, and those of its workspace."""
    rank = Rank(0, 1)
    rank.context.close()
    with DryRunContext() as context, Scheduler([backend]) as scheduler:
        rank.context = context
        inputs = [context.new_tensor(dtype, shape) for shape, dtype in graph.input_types(*key)]
        context.alloc(backend.buffer_type, inputs)
        result = graph.trace(rank, *inputs)
        with Graph(result.part if isinstance(result, AllGather) else result) as built:
            size = scheduler.reserve_size(built)[backend] + sum(t.nbytes for t in inputs)
            return size, workspace_bytes(built.node_pointers())


def _count_offloaded(weights: Weights, n_batch: int) -> None:
    """Count the parts of the CPU's layers that the first GPU computes: intermediates, and the largest copy of a weight.

    ggml copies neither repacked weights, with which the CPU multiplies itself, nor the output head, since the graph has
    one output. If all products are the CPU's, the GPU multiplies by the weights of norms only.
    """
    first, cpu = weights.placement[0], weights.placement[-1]
    factors = [t for name, t in weights.by_device[-1].items() if t.ndim > 1 and layer_of(name) is not None]
    repacked = repacked_memories().values()
    copied = [t.nbytes for t in factors if t.buffer_type not in repacked]
    row = weights.architecture.n_embd * type_size(Type.F32)
    hidden = 2 * n_batch * row  # to the GPU and back
    if copied:
        first.compute_bytes = max(first.compute_bytes, cpu.compute_bytes) + max(copied) + hidden
    else:
        first.compute_bytes = max(first.compute_bytes, hidden + row)
    if len(copied) == len(factors):
        cpu.compute_bytes = hidden


def _measure_scheduled(
    weights: Weights, scheduler: Scheduler, options: LoadOptions, new_context: Callable[[], DryRunContext]
) -> None:
    """Count the intermediate tensors of a scheduled runner, by the scheduler's own count."""
    architecture = weights.architecture
    if not architecture.causal:
        embedder = Embedder(architecture, weights, scheduler, options.n_ctx, options.n_batch, context=new_context)
        with embedder:
            sizes, workspace = embedder.reserve_size(), 0
    else:
        n_batch, n_slots = min(options.n_batch, options.n_ctx), kv_slots_for(options.n_ctx)
        ranges = can_attend_to_ranges(weights.backends, weights.layer_devices, op_offload=scheduler.op_offload)
        sizes, workspace = dict.fromkeys(weights.backends, 0), 0
        largest = largest_graphs(n_batch, n_slots, ranges=ranges, untiled=untiled_batch(weights))
        for i, (key, n_ranges) in enumerate(largest):
            with DryRunContext() if i else new_context() as context:  # all graphs have the inputs of the first
                inputs, result = logits_graph(context, weights, *key, n_ranges=n_ranges)
                kv_length(inputs, n_slots, n_ranges)
                with Graph(result) as graph:
                    for backend, size in scheduler.reserve_size(graph).items():
                        sizes[backend] = max(sizes[backend], size)
                    workspace = max(workspace, workspace_bytes(graph.node_pointers()))
    # The scheduler puts an encoder for hypothetical devices on the first one. Each may have to hold all intermediates.
    hypothetical = is_hypothetical(weights.backends[0])
    for backend, placement in zip(weights.backends, weights.placement, strict=True):
        placement.compute_bytes = max(sizes.values()) * bool(placement.layers) if hypothetical else sizes[backend]
        if placement.layers and not placement.is_cpu:
            placement.workspace_bytes = workspace
