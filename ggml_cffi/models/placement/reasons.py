"""Reasons of a placement: a sentence for each decision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ggml_cffi.core import text
from ggml_cffi.core.backend import Backend
from ggml_cffi.models.architectures.base import Architecture
from ggml_cffi.models.placement.placement import DevicePlan, Placement


def reasons(
    architecture: Architecture,
    backends: Sequence[Backend],
    placement: Placement,
    proportions: Sequence[float] | None,
    *,
    given: bool,
) -> Iterator[str]:
    """Yield a sentence for each decision.

    Parameters
    ----------
    proportions
        Proportions of the layers by which they were divided, None for free memory.
    given
        True if the caller gave the proportions.
    """
    if placement.reason:
        yield placement.reason
    if placement.split in ("data", "tensor"):
        held = "the whole model"
        if placement.split == "tensor":
            heads = "all" if placement.whole_attention else "some"
            held = f"{heads} heads and some feed-forward columns of every layer"
        yield f"Each of {', '.join(s.device for s in placement.devices if s.layers)} has {held}."
        return
    *gpus, cpu = placement.devices
    own = [backends[i] for i in placement.members]
    n = architecture.n_layers
    for i, (plan, backend) in enumerate(zip(placement.devices, own, strict=True)):
        if plan.layers and (gpus or not backend.device.is_cpu):
            reason = (
                "it has room for all"
                if len(own) < len(backends)
                else _reason(plan, proportions[i] / sum(proportions) if proportions else 0.0, given, plan is cpu)
            )
            yield f"{plan.device} has {len(plan.layers)} of {n} layers: {reason}."
    if not gpus:
        yield f"{cpu.device} has all {n} layers: it is the only device."
    for i, plan in enumerate(placement.devices):
        if plan.has_embeddings:
            beside = placement.layer_devices[0] == i
            reason = "where the first layer is" if beside else "since the first layer's device cannot look them up"
            yield f"The embeddings are on {plan.device}, {reason}."
        if plan.has_output:
            yield f"The output is on {plan.device}, where the last layer is."
    if not placement.op_offload:
        yield "GPUs do not compute with weights of the CPU: one has no room for copies of them."
    if not any(plan.compute_bytes for plan in placement.devices):
        yield "The memory of a run was not counted: weights and caches alone are too large."
    if cpu.total > cpu.free and cpu.fits:
        yield f"{cpu.device} reads its weights from the file again and again: they are larger than its memory."


def _reason(plan: DevicePlan, part: float, given: bool, is_cpu: bool) -> str:
    """Return the reason for the layers of a device. ``part`` is its proportion, 0 without one."""
    if given:
        return f"its part is {part:.0%}, as requested"
    if part:
        return f"its part is {part:.0%} by measured speed, within what fits"
    if is_cpu:
        return "the GPUs have no room for them"
    return f"its part by free memory, {text.size(plan.free)}"
