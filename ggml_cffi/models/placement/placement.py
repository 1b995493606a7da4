"""A placement: the device of each layer, and the bytes that each device is to hold."""

from __future__ import annotations

from dataclasses import dataclass

from ggml_cffi.core import text
from ggml_cffi.models.placement.options import SplitMode
from ggml_cffi.models.runners.stage_spec import StageSpec
from ggml_cffi.models.runners.weights import DevicePlacement


@dataclass(frozen=True)
class DevicePlan:
    """Layers and bytes that one device is to hold."""

    device: str
    layers: tuple[int, ...]
    weight_bytes: int
    mapped_bytes: int
    """Part of ``weight_bytes`` that is mapped from the file: the system can drop these pages and read them again."""
    cache_bytes: int
    compute_bytes: int
    """Bytes of intermediates, the scheduler's copies included; in pipeline stages also of inputs."""
    input_bytes: int
    workspace_bytes: int
    """Estimate of the memory that a GPU's backend allocates itself."""
    free: int
    """Free memory that the device reports."""
    reserve: int
    """Part of ``free`` that stays free."""
    has_output: bool
    has_embeddings: bool

    @classmethod
    def of(cls, placement: DevicePlacement, free: int, reserve: int = 0, input_bytes: int = 0) -> DevicePlan:
        """Return the plan for the contents of a device with ``free`` bytes, of which ``reserve`` stay free."""
        return cls(
            device=placement.device,
            layers=tuple(placement.layers),
            weight_bytes=placement.weight_bytes,
            mapped_bytes=placement.mapped_bytes,
            cache_bytes=placement.cache_bytes,
            compute_bytes=placement.compute_bytes,
            input_bytes=input_bytes,
            workspace_bytes=placement.workspace_bytes,
            free=free,
            reserve=reserve,
            has_output=placement.has_output,
            has_embeddings=placement.has_embeddings,
        )

    @property
    def total(self) -> int:
        """All bytes on the device."""
        return self.weight_bytes + self.cache_bytes + self.compute_bytes + self.input_bytes + self.workspace_bytes

    @property
    def available(self) -> int:
        """Free bytes without the reserve."""
        return max(self.free - self.reserve, 0)

    @property
    def needed(self) -> int:
        """Bytes of free memory that the contents need: all but mapped weights."""
        return self.total - self.mapped_bytes

    @property
    def missing(self) -> int:
        """Bytes that the device lacks."""
        return max(self.needed - self.available, 0)

    @property
    def fits(self) -> bool:
        """True if the device has enough free memory besides the reserve."""
        return not self.missing

    @property
    def contents(self) -> str:
        """Layers and ends of the model on the device, as text; ``-`` for nothing."""
        parts = [text.ranges(self.layers)] if self.layers else []
        return " + ".join([*parts, *["output"] * self.has_output, *["embeddings"] * self.has_embeddings]) or "-"


@dataclass(frozen=True)
class Placement:
    """The decision about the device of each layer."""

    layer_devices: list[int]
    """For each layer the number of its device; empty if devices share every layer."""
    op_offload: bool
    """True if GPUs compute large batches with weights of the CPU."""
    devices: list[DevicePlan]
    """The devices in order, the CPU last."""
    stages: tuple[StageSpec, ...] = ()
    """Stages of a pipeline runner, with devices numbered as in ``members``; empty if the model needs a scheduler."""
    split: SplitMode = "layer"
    members: tuple[int, ...] = ()
    """Numbers of the backends that take part."""
    replicas: tuple[Placement, ...] = ()
    """Placement of each replica, if each device has the whole model."""
    whole_attention: bool = False
    """True if devices share every layer, and each of them computes all heads."""
    reason: str = ""
    """The reason for the choice of the split, if there was a choice."""

    @property
    def fits(self) -> bool:
        """True if every device has enough free memory."""
        return all(device.fits for device in self.devices)
