"""Reasons of a placement: a sentence for each decision."""

from __future__ import annotations

from collections.abc import Iterator

from ggml_cffi.core import text
from ggml_cffi.core.device import same_cards
from ggml_cffi.models.placement.hypothetical import is_hypothetical
from ggml_cffi.models.placement.place import layer_bytes, layer_cache_bytes
from ggml_cffi.models.placement.placement import DevicePlan, Placement
from ggml_cffi.models.placement.planner import Planner
from ggml_cffi.models.runners.base import kv_slots_for


def reasons(planner: Planner, placement: Placement) -> Iterator[str]:
    """Yield a sentence for each decision."""
    if placement.reason:
        yield placement.reason
        for device, card in same_cards().items():
            if any(backend.device == device for backend in planner.backends):
                yield f"{device.name} is the card of {card.name}, by {device.backend_name}."
    if any(map(is_hypothetical, planner.backends[:-1])):
        yield "The plan assumes that its hypothetical GPUs support every type and read host memory."
    if placement.split in ("data", "tensor"):
        held = "the whole model"
        if placement.split == "tensor":
            heads = "all" if placement.whole_attention else "some"
            held = f"{heads} heads and some feed-forward columns of every layer"
        yield f"Each of {', '.join(s.device for s in placement.devices if s.layers)} has {held}."
        return
    yield from _layers(planner, placement)
    yield from _ends(planner, placement)
    *_, cpu = placement.devices
    if not placement.op_offload and cpu.weight_bytes:
        yield "GPUs do not compute with weights of the CPU: one has no room for copies of them."
    if not any(plan.compute_bytes for plan in placement.devices):
        yield "The memory of a run was not counted: weights and caches alone are too large."
    if cpu.total > cpu.free and cpu.fits:
        yield f"{cpu.device} reads its weights from the file again and again: they are larger than its memory."


def _layers(planner: Planner, placement: Placement) -> Iterator[str]:
    """Yield a sentence for each device that has layers, or could have some."""
    *gpus, cpu = placement.devices
    n = planner.architecture.n_layers
    if not gpus:
        yield f"{cpu.device} has all {n} layers: it is the only device."
        return
    proportions = planner.proportions
    total = sum(proportions or [])
    for i, plan in enumerate(placement.devices):
        if len(placement.members) < len(planner.backends):  # one device has the whole model
            reason = "it has room for all" if plan.layers else ""
        elif planner.given and proportions:
            reason = f"its part is {proportions[i] / total:.0%}, as requested" if plan.layers or plan is not cpu else ""
        elif plan is cpu and not (proportions and proportions[i]):
            reason = "the GPUs have no room for them" if plan.layers else ""
        elif proportions:
            reason = f"its part is {proportions[i] / total:.0%} by measured speed, within what fits"
        else:
            reason = _by_memory(planner, plan, spilled=bool(cpu.layers))
        if reason:
            yield f"{plan.device} has {len(plan.layers)} of {n} layers: {reason}."


def _by_memory(planner: Planner, plan: DevicePlan, *, spilled: bool) -> str:
    """Return the reason for the layers of a GPU without given proportions. ``spilled``: the CPU has layers."""
    options = planner.options
    cache = layer_cache_bytes(planner.architecture, options.kv_dtype, kv_slots_for(options.n_ctx))
    sizes = layer_bytes(planner.architecture, cache)
    if len(plan.layers) == len(sizes):
        return "it has room for all"
    following = sizes[plan.layers[0] - 1] if plan.layers and plan.layers[0] else min(sizes)
    if spilled or plan.available - plan.needed < following:
        fit = "as many as fit" if plan.layers else "none fits"
        return f"{fit} in {text.size(plan.available)}, its free memory without a reserve of {text.size(plan.reserve)}"
    return f"its part by free memory, {text.size(plan.free)}"


def _ends(planner: Planner, placement: Placement) -> Iterator[str]:
    """Yield a sentence for the device of the embeddings, and one for the device of the output head."""
    architecture, devices = planner.architecture, placement.devices
    first, last = (devices[placement.layer_devices[i]] for i in (0, -1))
    for plan in devices:
        if plan.has_embeddings:
            dtype = architecture.tensor_info("token_embd.weight").dtype.name
            reason = "where the first layer is" if plan is first else f"since {first.device} cannot look up {dtype}"
            yield f"The embeddings are on {plan.device}, {reason}."
        if plan.has_output:
            dtype = architecture.tensor_info(architecture.output_tensor).dtype.name
            reason = (
                "where the last layer is"
                if plan is last
                else f"since {last.device} cannot multiply by weights in {dtype}"
            )
            tied = ""
            if architecture.output_tensor == "token_embd.weight":
                tied = ": the embeddings" if plan.has_embeddings else ": a copy of the embeddings"
            yield f"The output is on {plan.device}, {reason}{tied}."
