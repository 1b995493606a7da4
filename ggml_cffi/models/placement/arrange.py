"""Which device holds which layers, and what each of them then takes: measured, without taking it.

Loading and planning both ask :func:`arrange`, so that they cannot disagree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite

from ggml_cffi.core import text as _text
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.buffer import BufferType
from ggml_cffi.core.device import Device
from ggml_cffi.core.dry_run import DryRunContext
from ggml_cffi.enums import Type
from ggml_cffi.models.architectures.base import Architecture
from ggml_cffi.models.placement import calibration as calibrate
from ggml_cffi.models.placement.scratch import scratch_bytes
from ggml_cffi.models.runners import tensor as tensor_runner
from ggml_cffi.models.runners.base import n_rows
from ggml_cffi.models.runners.embedding import Embedder
from ggml_cffi.models.runners.pipeline import layers_of, stages_of
from ggml_cffi.models.runners.scheduled import logits
from ggml_cffi.models.runners.weights import (
    DevicePlacement,
    Weights,
    cache_bytes,
    layer_bytes,
    layer_of,
    room_for_layers,
    split_layers,
)
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.scheduler import Scheduler

#: How layers are shared out: by free ``"memory"``, by measured ``"speed"``, or in given proportions.
Balance = str | Sequence[float]

#: How a model is split over devices.
SPLITS = ("layer", "pipeline", "data", "tensor", "auto")


@dataclass(frozen=True)
class DevicePlan:
    """What one device is to hold, in bytes."""

    device: str
    layers: tuple[int, ...]
    weight_bytes: int
    mapped_bytes: int
    """Of ``weight_bytes``, those that are the file's own pages: the system drops them when it needs the memory."""
    cache_bytes: int
    compute_bytes: int
    """Of intermediate results: what the scheduler's own reserve says, its copies included; in stages also of inputs."""
    input_bytes: int
    scratch_bytes: int
    """What a GPU's backend takes by itself: reckoned."""
    free: int
    """What the device says that it has free."""
    has_output: bool
    has_embeddings: bool

    @classmethod
    def of(cls, share: DevicePlacement, input_bytes: int = 0) -> DevicePlan:
        """A share as a plan has it, with what its device has free now."""
        return cls(
            device=share.backend.name,
            layers=tuple(share.layers),
            weight_bytes=share.weight_bytes,
            mapped_bytes=share.mapped_bytes,
            cache_bytes=share.cache_bytes,
            compute_bytes=share.compute_bytes,
            input_bytes=input_bytes,
            scratch_bytes=share.scratch_bytes,
            free=share.backend.device.memory().free,
            has_output=share.has_output,
            has_embeddings=share.has_embeddings,
        )

    @property
    def total(self) -> int:
        """All that is on the device."""
        return self.weight_bytes + self.cache_bytes + self.compute_bytes + self.input_bytes + self.scratch_bytes

    @property
    def missing(self) -> int:
        """Bytes that the device has too few; mapped weights need none."""
        return max(self.total - self.mapped_bytes - self.free, 0)

    @property
    def fits(self) -> bool:
        """Whether the device has room for it."""
        return not self.missing

    @property
    def what(self) -> str:
        """Layers and ends of the model that are here, ``-`` for nothing."""
        parts = [_text.ranges(self.layers)] if self.layers else []
        return " + ".join([*parts, *["output"] * self.has_output, *["embeddings"] * self.has_embeddings]) or "-"


@dataclass(frozen=True)
class Wish:
    """What is asked of a model."""

    n_ctx: int
    n_batch: int
    kv_dtype: Type


@dataclass(frozen=True)
class Arrangement:
    """Layers on devices."""

    where: list[int]
    """For each layer the index of its backend."""
    op_offload: bool
    """Whether GPUs compute large batches with weights of the CPU."""
    devices: list[DevicePlan]
    """The devices in order, the CPU last."""
    staged: bool = False
    """Whether the model is on GPUs whole, each of which computes its layers without a scheduler."""
    split: str = "layer"
    members: tuple[int, ...] = ()
    """The backends that take part, by number."""
    replicas: tuple[Arrangement, ...] = ()
    """Of each replica, where several devices have the whole model each."""
    whole_attention: bool = False
    """Where devices compute every layer together: whether each computes all heads."""
    why: str = ""
    """Why this split was chosen, if it was."""

    @property
    def fits(self) -> bool:
        """Whether every device has room."""
        return all(share.fits for share in self.devices)


def measure(
    architecture: Architecture, backends: Sequence[Backend], where: Sequence[int], wish: Wish, *, op_offload: bool
) -> tuple[list[DevicePlan], bool]:
    """What each device would hold, counted for the largest batch, and whether GPUs compute in stages. Nothing is
    allocated.

    Where the CPU has no room for its caches, there is nothing more to count: a run then takes 0 bytes here.
    """
    rows, sketches = n_rows(wish.n_ctx), list[DryRunContext]()

    def sketch() -> DryRunContext:
        sketches.append(DryRunContext())
        return sketches[-1]

    weights = Weights(architecture, backends, rows, wish.kv_dtype, where=where, context=DryRunContext())
    sizes, own = dict.fromkeys(backends, 0), dict.fromkeys(backends, 0)
    batch = min(wish.n_batch, wish.n_ctx)
    try:
        stages = stages_of(weights)
        if stages:
            for i, layers in stages:
                with layers_of(weights, layers).measure([backends[i]], (batch, rows, 1)) as traced:
                    (sizes[backends[i]],) = traced.arena_sizes
                    own[backends[i]] = scratch_bytes(traced.plans[0].node_pointers())
        elif weights.placement[-1].cache_bytes <= backends[-1].device.memory().free:
            # Else it is hopeless, and the graph may be larger than operations can be.
            with Scheduler(backends, op_offload=op_offload) as scheduler:
                sizes, scratch = _scheduled(architecture, weights, scheduler, wish, sketch)
                own |= {s.backend: scratch for s in weights.placement if s.layers and not s.backend.device.is_cpu}
    finally:
        weights.close()
    inputs: Counter[BufferType] = sum((s.taken for s in sketches), start=Counter())
    for share in weights.placement:
        share.compute_bytes, share.scratch_bytes = sizes[share.backend], own[share.backend]
    shares = [DevicePlan.of(share, inputs.pop(share.backend.buffer_type, 0)) for share in weights.placement]
    return shares, bool(stages)


def _scheduled(
    architecture: Architecture, weights: Weights, scheduler: Scheduler, wish: Wish, sketch: Callable[[], DryRunContext]
) -> tuple[dict[Backend, int], int]:
    """Bytes of intermediate results, by the scheduler's own count, and what a GPU takes by itself."""
    if not architecture.causal:
        with Embedder(architecture, weights, scheduler, wish.n_ctx, wish.n_batch, context=sketch) as embedder:
            return embedder.reserve_size(), 0
    with sketch() as context:
        _inputs, result = logits(context, weights, min(wish.n_batch, wish.n_ctx), n_rows(wish.n_ctx), 1)
        with Graph(result) as graph:
            return scheduler.reserve_size(graph), scratch_bytes(graph.node_pointers())


def arrange(
    architecture: Architecture,
    backends: Sequence[Backend],
    wish: Wish,
    parts: Sequence[float] | None = None,
    *,
    strict: bool = False,
) -> Arrangement:
    """Share the layers out: as many on GPUs as fit beside what they compute with, the rest on the CPU.

    Parameters
    ----------
    parts
        Proportions, one for each backend; default by free memory.
    strict
        Keep to ``parts`` where they do not fit.
    """
    per_layer = cache_bytes(architecture, wish.kv_dtype, n_rows(wish.n_ctx))
    sizes = layer_bytes(architecture, per_layer)
    room: list[float] = [inf] * len(backends) if strict else [*room_for_layers(architecture, backends)]
    parts, op_offload = room if parts is None else parts, True
    while True:
        where = split_layers(architecture, backends, per_layer, parts=parts, room=room)
        shares, staged = measure(architecture, backends, where, wish, op_offload=op_offload)
        over = [i for i, share in enumerate(shares[:-1]) if not share.fits]
        full = [i for i in over if shares[i].layers and not strict]
        if full:
            for i in full:  # at least one layer less, until there is none
                room[i] = max(sum(sizes[layer] for layer in shares[i].layers) - shares[i].missing, 0)
        elif over and op_offload:
            op_offload = False  # a GPU that holds no layers need not take part
        else:
            return Arrangement(where, op_offload, shares, staged, members=tuple(range(len(backends))))


def arrange_one(architecture: Architecture, backends: Sequence[Backend], wish: Wish, i: int) -> Arrangement:
    """The whole model on the ``i``-th backend; the CPU, which is behind it, holds nothing."""
    cpu = len(backends) - 1
    members = (i, cpu) if i != cpu else (cpu,)
    own = [backends[k] for k in members]
    return replace(arrange(architecture, own, wish, [1.0, 0.0][: len(own)], strict=True), members=members)


def arrange_replicas(architecture: Architecture, backends: Sequence[Backend], wish: Wish) -> Arrangement:
    """The whole model on every GPU; on the CPU where there is none."""
    cpu = len(backends) - 1
    found = [arrange_one(architecture, backends, wish, i) for i in range(cpu) or [cpu]]
    first = found[0]
    shares = [replica.devices[0] for replica in found]
    if cpu:
        shares.append(first.devices[-1])
    return Arrangement(first.where, first.op_offload, shares, first.staged, "data", (), tuple(found))


def arrange_parts(architecture: Architecture, backends: Sequence[Backend], wish: Wish) -> Arrangement:
    """A part of every layer on each GPU: of the feed-forward part, and of attention too where that is needed to fit.

    Raises
    ------
    ValueError
        If the devices cannot share layers, or the model is too small for so many.
    """
    members = tuple(range(len(backends) - 1)) or (0,)
    own = [backends[i] for i in members]
    for whole in (True, False):
        held = tensor_runner.measure(
            architecture, own, wish.n_ctx, min(wish.n_batch, wish.n_ctx), wish.kv_dtype, whole_attention=whole
        )
        shares = [DevicePlan.of(share) for share in held]
        if all(share.fits for share in shares):
            break
    return Arrangement([], False, shares, split="tensor", members=members, whole_attention=whole)


def main_dtype(architecture: Architecture) -> Type:
    """The type that most bytes of the layers' weights have."""
    total: dict[Type, int] = {}
    for name in architecture.shapes:
        info = architecture.info(name)
        if layer_of(name) is not None:
            total[info.dtype] = total.get(info.dtype, 0) + info.nbytes
    return max(total, key=lambda kind: total[kind])


def parts_of(
    balance: Balance,
    architecture: Architecture,
    backends: Sequence[Backend],
    chosen: Sequence[Device | str] | None,
) -> tuple[list[float] | None, bool]:
    """The proportions that a balance means, None for free memory, and whether they were given.

    The CPU takes part where it is among the devices that were ``chosen``, or has a number of its own.

    Raises
    ------
    ValueError
        If there is no such balance, or the numbers are not one for each device.
    """
    if isinstance(balance, str):
        if balance == "memory":
            return None, False
        if balance != "speed":
            raise ValueError(f"balance {balance!r} is not known; 'memory', 'speed' and a sequence of numbers are")
        kind = main_dtype(architecture)
        named = len(backends) == (0 if chosen is None else len(chosen))
        timed = [b for b in backends if named or not b.device.is_cpu]
        return [1 / calibrate.seconds(b, kind) if b in timed else 0.0 for b in backends], False
    parts = [float(part) for part in balance]
    if len(parts) == len(backends) - 1:
        parts.append(0.0)
    if len(parts) != len(backends) or not all(isfinite(part) and part >= 0 for part in parts) or not sum(parts):
        names = ", ".join(b.name for b in backends)
        raise ValueError(f"balance {list(balance)} is not one number of 0 or more for each of {names}, not all 0")
    return parts, True
