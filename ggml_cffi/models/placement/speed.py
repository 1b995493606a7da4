"""Estimate of a model's speed from the calibration of its devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ggml_cffi.core.backend import Backend
from ggml_cffi.core.dtypes import block_size, type_size
from ggml_cffi.models.architectures.base import Architecture
from ggml_cffi.models.placement import calibration
from ggml_cffi.models.placement.hypothetical import is_hypothetical
from ggml_cffi.models.placement.place import layer_bytes, main_dtype
from ggml_cffi.models.placement.placement import Placement


@dataclass(frozen=True)
class SpeedEstimate:
    """Estimated tokens/s of one sequence, from products alone: attention and transfers between devices come on top."""

    prefill: float
    decode: float

    def __str__(self) -> str:
        return (
            f"Estimate from calibrated products, without attention: prefill {self.prefill:,.0f} tokens/s, "
            f"decode {self.decode:,.1f} tokens/s."
        )


def estimate_speed(
    architecture: Architecture, backends: Sequence[Backend], found: Placement, *, measure: bool = False
) -> SpeedEstimate | None:
    """Return the speed of a placement, None for an encoder, or if a device with layers is not calibrated.

    Parameters
    ----------
    measure
        True to calibrate devices that are not. Hypothetical devices cannot be.
    """
    if not architecture.causal:
        return None
    dtype = main_dtype(architecture)
    used: list[tuple[Backend, float]] = []  # with the multiplied weights, as if all were of the main type
    for backend, nbytes in zip(_backends_of(backends, found), _multiplied_bytes(architecture, found), strict=True):
        if nbytes:
            used.append((backend, nbytes * block_size(dtype) / type_size(dtype)))
    decode, prefill = [], []
    for backend, elements in used:
        speed = calibration.known_speed(backend, dtype)
        if speed is None and measure and not is_hypothetical(backend):
            speed = calibration.speed(backend, dtype)
        if speed is None:
            return None
        decode.append(elements * speed.decode)
        prefill.append(elements * speed.prefill)
    # Replicas, and devices that share every layer, compute at the same time, and so do stages with batches in flight.
    in_turn = found.split not in ("data", "tensor")
    in_flight = not in_turn or (found.split == "pipeline" and found.stages)
    return SpeedEstimate(
        prefill=1 / (max(prefill) if in_flight else sum(prefill)), decode=1 / (sum(decode) if in_turn else max(decode))
    )


def _backends_of(backends: Sequence[Backend], found: Placement) -> list[Backend]:
    """Return the backend of each device of a placement."""
    members = found.members or range(len(found.devices))
    return [backends[i] for i in members]


def _multiplied_bytes(architecture: Architecture, found: Placement) -> list[float]:
    """Return for each device the bytes of the weights by which it multiplies: all but embeddings."""
    layers = layer_bytes(architecture, 0)
    output = architecture.tensor_info(architecture.output_tensor).nbytes
    if found.split == "tensor":  # norms and embeddings count little
        whole = sum(layers) + output
        return [whole / len(found.devices)] * len(found.devices)
    return [sum(layers[i] for i in plan.layers) + output * plan.has_output for plan in found.devices]
