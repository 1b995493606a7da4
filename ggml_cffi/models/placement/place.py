"""The decision about the device of each layer.

:func:`split_layers` divides the layers in given proportions, within the capacity of each device. :func:`place_layers`
measures the result by a dry run and lowers the capacity of a device that lacks memory, until all fits. Loading and
planning both use this module, so that their results are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf, isfinite

from ggml_cffi.core.backend import Backend
from ggml_cffi.core.device import DeviceLike
from ggml_cffi.core.dtypes import row_size
from ggml_cffi.core.unified import are_peers
from ggml_cffi.enums import Type
from ggml_cffi.models.architectures.base import Architecture
from ggml_cffi.models.placement import calibration
from ggml_cffi.models.placement.measure import measure
from ggml_cffi.models.placement.options import Balance, LoadOptions, SplitMode
from ggml_cffi.models.placement.placement import Placement
from ggml_cffi.models.runners.base import kv_slots_for
from ggml_cffi.models.runners.stage_spec import StageSpec, interleave, stages_of
from ggml_cffi.models.runners.weights import layer_of
from ggml_cffi.parallel.tensor_parallel import check_devices

_STEPS = 60  # of a binary search: each halves an interval of floats


def split_layers(sizes: Sequence[int], proportions: Sequence[float], capacity: Sequence[float]) -> list[int]:
    """Return for each layer the number of its device.

    Neighbouring layers stay together: the CPU, the last device, has the first layers, and the last GPU the last ones.
    Each device's number of bytes is in proportion to its number, rounded as by Sainte-Laguë, as far as its capacity
    allows. Other devices take the layers for which it has no room. The CPU takes the layers that fit no GPU.

    Parameters
    ----------
    sizes
        Bytes of each layer.
    proportions
        Proportion of the bytes for each device.
    capacity
        Bytes of layers that each GPU may hold; the CPU's number is not used.
    """
    cpu, total = len(proportions) - 1, sum(sizes)

    def divide(scale: float) -> tuple[list[int], bool]:
        """Give each GPU ``scale`` times its proportion. Return True if the CPU then has no more than its part."""
        layer_devices = [cpu] * len(sizes)
        layer = len(sizes) - 1
        for gpu in reversed(range(cpu)):
            taken = 0
            # Until half of the next layer would exceed the part of this GPU.
            while (
                layer >= 0
                and taken + sizes[layer] <= capacity[gpu]
                and taken + sizes[layer] / 2 <= scale * proportions[gpu]
            ):
                taken += sizes[layer]
                layer_devices[layer] = gpu
                layer -= 1
        rest = sum(sizes[: layer + 1])
        return layer_devices, layer < 0 or rest - sizes[layer] / 2 <= scale * proportions[cpu]

    # The largest scale that makes a difference fills the GPUs. The smallest one that is enough is in proportion.
    low, high = 0.0, total / min((part for part in proportions if part), default=1.0)
    found, enough = divide(high)
    if not enough:
        return found
    for _ in range(_STEPS):
        middle = (low + high) / 2
        tried, enough = divide(middle)
        if enough:
            found, high = tried, middle
        else:
            low = middle
    return found


def place_layers(
    architecture: Architecture,
    backends: Sequence[Backend],
    options: LoadOptions,
    proportions: Sequence[float] | None = None,
    *,
    strict: bool = False,
    split: SplitMode = "layer",
) -> Placement:
    """Place as many layers on GPUs as fit there together with intermediates, and the rest on the CPU.

    Parameters
    ----------
    proportions
        One for each backend; default free memory.
    strict
        True to keep to ``proportions`` even if they do not fit.
    split
        ``"layer"``, or ``"pipeline"``: GPUs that hold all layers then have them at several places.
    """
    sizes = layer_bytes(architecture, layer_cache_bytes(architecture, options.kv_dtype, kv_slots_for(options.n_ctx)))
    available = _available(backends, options)
    if proportions is None:
        proportions = _room_for_layers(architecture, available)

    def fit(capacity: list[float]) -> Placement:
        """Lower the capacity of devices that lack memory, until all fit."""
        op_offload = True
        while True:
            layer_devices = split_layers(sizes, proportions, capacity)
            orders = [layer_devices]
            if split == "pipeline" and len(backends) - 1 not in layer_devices:
                orders.insert(0, interleave(layer_devices))
            # The second order takes less memory, and is for a scheduler too, which has one batch at a time.
            for layer_devices in orders:
                stages = stages_of(layer_devices)
                plans, pipeline = measure(architecture, backends, options, stages, op_offload=op_offload)
                over = [i for i, plan in enumerate(plans[:-1]) if not plan.fits]
                if pipeline and not over:
                    break
            full = [i for i in over if plans[i].layers and not strict]
            if full:
                for i in full:  # at least one layer fewer, until none is left
                    capacity[i] = max(sum(sizes[layer] for layer in plans[i].layers) - plans[i].missing, 0)
            elif over and op_offload:
                op_offload = False  # a GPU without layers need not take part
            else:
                members = tuple(range(len(backends)))
                return Placement(layer_devices, op_offload, plans, stages if pipeline else (), split, members)

    found = fit([inf] * len(backends) if strict else available)
    # The embeddings are beside the CPU's first layers, so that the first GPU may now have room for more layers.
    while not strict and not proportions[-1] and found.devices[-1].layers:
        room = [sum(sizes[i] for i in plan.layers) + plan.available - plan.needed for plan in found.devices]
        wider: list[float] = [max(n, 0) for n in room]
        if split_layers(sizes, proportions, wider) == found.layer_devices:
            break
        other = fit(wider)
        if len(other.devices[-1].layers) >= len(found.devices[-1].layers):
            break
        found = other
    return found


def _available(backends: Sequence[Backend], options: LoadOptions) -> list[float]:
    """Return the free bytes of each GPU without the reserve; 0 for the CPU, the last."""
    free = [backend.device.memory().free for backend in backends[:-1]]
    return [*(float(max(n - options.reserve_of(n, is_cpu=False), 0)) for n in free), 0.0]


def _room_for_layers(architecture: Architecture, available: Sequence[float]) -> list[float]:
    """Return the bytes for layers if the first GPU has the embeddings, and the last one the output head."""
    room = list(available)
    if len(room) > 1:
        room[0] -= architecture.tensor_info("token_embd.weight").nbytes
        if len(room) > 2 or architecture.output_tensor != "token_embd.weight":  # one GPU has tied tensors once
            room[-2] -= architecture.tensor_info(architecture.output_tensor).nbytes
    # A GPU whose memory the ends would fill has layers if other devices hold the ends: its part is small, not 0.
    return [max(n, 1.0) if has else 0.0 for n, has in zip(room, available, strict=True)]


def place_on_one(
    architecture: Architecture, backends: Sequence[Backend], options: LoadOptions, device: int
) -> Placement:
    """Place the whole model on one backend, by its number. The CPU, which follows it, holds nothing."""
    cpu = len(backends) - 1
    members = (device, cpu) if device != cpu else (cpu,)
    own = [backends[k] for k in members]
    return replace(place_layers(architecture, own, options, [1.0, 0.0][: len(own)], strict=True), members=members)


def place_replicas(architecture: Architecture, backends: Sequence[Backend], options: LoadOptions) -> Placement:
    """Place the whole model on every GPU, or on the CPU if there is no GPU."""
    cpu = len(backends) - 1
    replicas = [place_on_one(architecture, backends, options, i) for i in range(cpu) or [cpu]]
    first = replicas[0]
    plans = [replica.devices[0] for replica in replicas]
    if cpu:
        plans.append(first.devices[-1])
    return replace(first, devices=plans, split="data", members=(), replicas=tuple(replicas))


def place_shards(architecture: Architecture, backends: Sequence[Backend], options: LoadOptions) -> Placement:
    """Place a shard of every layer on each GPU: of the feed-forward part, and of attention if all heads do not fit.

    Raises
    ------
    ValueError
        If the model is an encoder, the devices cannot share layers, or the model is too small for this number of
        devices.
    """
    if not architecture.causal:
        raise ValueError(f"{architecture.name!r} is an encoder: split='tensor' is for decoders; use 'layer' or 'data'")
    members = tuple(range(len(backends) - 1)) or (0,)
    own = [backends[i] for i in members]
    check_devices([backend.device for backend in own])
    stages = (StageSpec(range(architecture.n_layers), tuple(range(len(own)))),)
    # With whole attention there are half as many sums, which pays where the sums go through memory of the host.
    ways = (False,) if are_peers([backend.device for backend in own]) else (True, False)
    for whole_attention in ways:
        plans, _ = measure(architecture, own, options, stages, whole_attention=whole_attention, pipeline=True)
        if all(plan.fits for plan in plans):
            break
    return Placement([], False, plans, stages, "tensor", members, whole_attention=whole_attention)


# ---------------------------------------------------------------------- sizes and proportions


def layer_bytes(architecture: Architecture, layer_cache_bytes: int) -> list[int]:
    """Return the bytes of each layer: its weights, and ``layer_cache_bytes`` for its cache."""
    sizes = [layer_cache_bytes] * architecture.n_layers
    for name, info in architecture.file.tensors.items():
        layer = layer_of(name)
        if layer is not None and layer < len(sizes):
            sizes[layer] += info.nbytes
    return sizes


def layer_cache_bytes(architecture: Architecture, dtype: Type, n_slots: int) -> int:
    """Return the bytes of one layer's keys and values; 0 for an encoder, which keeps none."""
    return sum(n_slots * row_size(dtype, size) for size in architecture.kv_sizes) if architecture.causal else 0


def main_dtype(architecture: Architecture) -> Type:
    """Return the type of most bytes of the layers' weights."""
    total: dict[Type, int] = {}
    for name in architecture.shapes:
        info = architecture.tensor_info(name)
        if layer_of(name) is not None:
            total[info.dtype] = total.get(info.dtype, 0) + info.nbytes
    return max(total, key=lambda dtype: total[dtype])


def proportions_of(
    balance: Balance,
    architecture: Architecture,
    backends: Sequence[Backend],
    chosen: Sequence[DeviceLike] | None,
) -> tuple[list[float] | None, bool]:
    """Return the proportions for a balance (None for free memory), and whether the caller gave numbers.

    The CPU takes part if it is among the devices that were ``chosen``, or has a number of its own.

    Raises
    ------
    ValueError
        If there is no such balance, or there is not one number for each device.
    """
    if isinstance(balance, str):
        if balance == "memory":
            return None, False
        if balance != "speed":
            raise ValueError(f"balance {balance!r} does not exist: use 'memory', 'speed' or a sequence of numbers")
        dtype = main_dtype(architecture)
        named = len(backends) == (0 if chosen is None else len(chosen))
        timed = [b for b in backends if named or not b.device.is_cpu]
        return [1 / calibration.seconds(b, dtype) if b in timed else 0.0 for b in backends], False
    numbers = [float(number) for number in balance]
    if len(numbers) == len(backends) - 1:
        numbers.append(0.0)
    if len(numbers) != len(backends) or not all(isfinite(n) and n >= 0 for n in numbers) or not sum(numbers):
        names = ", ".join(b.name for b in backends)
        raise ValueError(f"balance {list(balance)} is not one number of 0 or more for each of {names}, not all 0")
    return numbers, True
