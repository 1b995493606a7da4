"""Dry run: the bytes that each device would hold, counted without allocating them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from ggml_cffi.core.backend import Backend
from ggml_cffi.core.buffer import BufferType
from ggml_cffi.core.dry_run import DryRunContext
from ggml_cffi.models.architectures.base import Architecture
from ggml_cffi.models.placement.options import LoadOptions
from ggml_cffi.models.placement.placement import DevicePlan
from ggml_cffi.models.placement.workspace import workspace_bytes
from ggml_cffi.models.runners.base import kv_slots_for
from ggml_cffi.models.runners.embedding import Embedder
from ggml_cffi.models.runners.pipeline import can_pipeline
from ggml_cffi.models.runners.scheduled import logits_graph
from ggml_cffi.models.runners.stage import StageGraph
from ggml_cffi.models.runners.weights import StageSpec, Weights
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.scheduler import Scheduler


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
        context=DryRunContext(),
    )
    try:
        pipeline = can_pipeline(weights) if pipeline is None else pipeline
        if pipeline:
            _measure_stages(weights, (min(options.n_batch, options.n_ctx), n_slots, 1))
        elif weights.placement[-1].cache_bytes <= backends[-1].device.memory().free:
            # Else the graph may be larger than operations can be.
            with Scheduler(backends, op_offload=op_offload) as scheduler:
                _measure_scheduled(weights, scheduler, options, new_context)
    finally:
        weights.close()
    inputs: Counter[BufferType] = sum((context.taken for context in dry_runs), start=Counter())
    plans = [
        DevicePlan.of(placement, backend.device.memory().free, inputs.pop(backend.buffer_type, 0))
        for backend, placement in zip(backends, weights.placement, strict=True)
    ]
    return plans, pipeline


def _measure_stages(weights: Weights, key: tuple[int, int, int]) -> None:
    """Count the intermediate tensors of a pipeline runner."""
    for stage in weights.stages:
        own = [weights.placement[i] for i in stage.devices]
        with StageGraph.of(weights, stage).measure([weights.backends[i] for i in stage.devices], key) as traced:
            for placement, size, graphs in zip(own, traced.arena_bytes, traced.step_graphs, strict=True):
                placement.compute_bytes = size
                if not placement.is_cpu:
                    placement.workspace_bytes = workspace_bytes(graphs.node_pointers())


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
        with new_context() as context:
            _inputs, result = logits_graph(context, weights, n_batch, n_slots, 1)
            with Graph(result) as graph:
                sizes, workspace = scheduler.reserve_size(graph), workspace_bytes(graph.node_pointers())
    for backend, placement in zip(weights.backends, weights.placement, strict=True):
        placement.compute_bytes = sizes[backend]
        if placement.layers and not placement.is_cpu:
            placement.workspace_bytes = workspace
