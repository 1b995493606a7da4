"""Plans: reports of the device of each layer and the bytes on each device, before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ggml_cffi.core import text
from ggml_cffi.core.backend import Backend, open_backends
from ggml_cffi.core.device import DevicesLike, device_list
from ggml_cffi.core.dtypes import as_type
from ggml_cffi.enums import Type
from ggml_cffi.errors import OutOfMemoryError
from ggml_cffi.files.gguf.reader import GGUFFile
from ggml_cffi.models.architectures.registry import architecture_of, context_of
from ggml_cffi.models.hub import header_path
from ggml_cffi.models.placement.backend_choice import place_on_devices
from ggml_cffi.models.placement.hypothetical import open_hypothetical, parse_devices
from ggml_cffi.models.placement.options import (
    Balance,
    LoadOptions,
    SplitMode,
    Workload,
    check_kv_slots,
    check_options,
    parse_reserve,
)
from ggml_cffi.models.placement.placement import DevicePlan, Placement
from ggml_cffi.models.placement.planner import Planner
from ggml_cffi.models.placement.proposals import Proposer
from ggml_cffi.models.placement.reasons import reasons
from ggml_cffi.models.placement.speed import SpeedEstimate, estimate_speed


@dataclass(frozen=True)
class ModelPlan:
    """Report of the layers and bytes that each device would hold, made by :func:`plan`. ``str(plan)`` has a table."""

    path: str
    n_ctx: int
    n_batch: int
    kv_dtype: str
    split: str
    devices: tuple[DevicePlan, ...]
    """The devices in order, the CPU last."""
    reasons: tuple[str, ...]
    """A sentence for each decision."""
    proposals: tuple[str, ...]
    """Options with which the model fits, if this plan does not fit; or with which every layer is on a GPU, if the CPU
    has layers for lack of memory. A plan has tested each, with hypothetical devices in place of devices that are not in
    use."""
    speed: SpeedEstimate | None = None
    """Estimate of the tokens per second, if all devices with layers are calibrated; None if not."""
    missing_file_bytes: int = 0
    """Bytes of tensors that are not in the file: it can be planned, but not loaded."""

    @property
    def fits(self) -> bool:
        """True if :func:`~ggml_cffi.models.load` would load the model."""
        return all(device.fits for device in self.devices)

    def table(self) -> str:
        """Return a table of the devices, with bytes of each kind."""
        parts = ("weights", "KV cache", "compute", "inputs", "workspace", "total", "reserve", "free")
        rows: list[tuple[str, ...]] = [("device", "layers", *parts, "fits")]
        for d in self.devices:
            sizes = d.weight_bytes, d.cache_bytes, d.compute_bytes, d.input_bytes, d.workspace_bytes, d.total
            fits = "yes" if d.fits else f"no: {text.size(d.missing)} too few"
            rows.append((d.device, d.contents, *map(text.size, (*sizes, d.reserve, d.free)), fits))
        return text.table(rows, right=range(2, 10))

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as a dictionary that JSON can hold."""
        found = asdict(self) | {"fits": self.fits}
        for device, entry in zip(self.devices, found["devices"], strict=True):
            entry |= {"total": device.total, "missing": device.missing, "fits": device.fits}
        return found

    def __str__(self) -> str:
        head = f"{os.path.basename(self.path)}: context {self.n_ctx:,}, batch {self.n_batch:,}, cache {self.kv_dtype}"
        head += f", split {self.split}"
        sentences = [*self.reasons, *([str(self.speed)] if self.speed else [])]
        if self.missing_file_bytes:
            sentences.append(
                f"The file lacks {text.size(self.missing_file_bytes)} of its tensors: it can be planned, not loaded."
            )
        parts = [f"{head}: {'fits' if self.fits else 'does not fit'}", self.table(), "\n".join(sentences)]
        if self.proposals:
            title = "Every layer would be on a GPU with:" if self.fits else "These would fit:"
            parts.append("\n".join([title, *(f"- {proposal}" for proposal in self.proposals)]))
        return text.clean(parts[0]) + "\n" + "\n\n".join(parts[1:])


def plan(
    path: str | os.PathLike[str],
    devices: DevicesLike | None = None,
    split: SplitMode = "layer",
    n_ctx: int | None = None,
    *,
    n_batch: int = 512,
    kv_dtype: Type | str = Type.F16,
    balance: Balance = "memory",
    n_sequences: int = 1,
    expected_tokens: tuple[int, int] | None = None,
    reserve: int | str | None = None,
    measure_speed: bool = False,
    kv_slots: int | None = None,
    repack: bool | None = None,
) -> ModelPlan:
    """Return the placement that :func:`~ggml_cffi.models.load` would choose for a model, with its bytes.

    Nothing is allocated, with two exceptions, unless a file has the times already: ``split="auto"`` loads the model for
    a moment to time it, and ``balance="speed"`` and ``measure_speed=True`` time products on the devices.

    Parameters
    ----------
    path
        A GGUF file, its URL (``https://``), or its address on the Hugging Face hub (``hf://``). The header is enough:
        the data of the tensors may be missing, and of a URL or an address nothing else is read.
    devices
        As for :func:`~ggml_cffi.models.load`. Or the devices of another machine, with their free memory: ``"24G"``
        (GiB), or a name and a size. ``["24G", "24G", "CPU:64G"]`` is two GPUs and a CPU. No GPU is opened for them.
        Without the CPU, the plan is for this machine's memory.
    split, n_ctx, n_batch, kv_dtype, balance, n_sequences, expected_tokens, reserve, kv_slots, repack
        As for :func:`~ggml_cffi.models.load`. Hypothetical devices cannot be timed for ``split="auto"`` and
        ``balance="speed"``.
    measure_speed
        True to calibrate devices for :attr:`ModelPlan.speed`. Else the estimate is there if an earlier call, or a load
        with ``balance="speed"``, calibrated all of them for the model's type of weights. A hypothetical device has the
        speed of the calibrated device with the description that is its name, such as ``"NVIDIA H200:141G"``.

    Raises
    ------
    FileNotFoundError, OSError
        If there is no such file, or its server cannot be reached.
    FormatError
        If the file is malformed, or its architecture is unknown.
    ValueError
        If a device does not exist or a parameter is out of range, the model is an encoder and ``split`` is
        ``"tensor"``, or ``split="auto"`` would time a model whose data is not here.

    Examples
    --------
    >>> print(models.plan("model.gguf", n_ctx=8192))  # doctest: +SKIP
    """
    check_options(split, n_batch)
    chosen = None if devices is None else device_list(devices)
    workload, kept = Workload(n_sequences, expected_tokens), parse_reserve(reserve)
    hypothetical = parse_devices(chosen)
    with GGUFFile(header_path(path), header_only=True) as file:
        architecture = architecture_of(file)
        n_slots = check_kv_slots(kv_slots, context_of(architecture, n_ctx))
        options = LoadOptions(n_slots, n_batch, as_type(kv_dtype), kept, repack)

        def planner_of(opened: Sequence[Backend]) -> Planner:
            return Planner(architecture, opened, options, balance, chosen, split, workload)

        opened = open_hypothetical(hypothetical) if hypothetical else open_backends(chosen)
        compare = split == "auto" and not hypothetical
        planner, found = place_on_devices(planner_of, opened, chosen, compare=compare)
        try:
            return report(planner, found, measure_speed=measure_speed)
        finally:
            for backend in planner.backends:
                backend.close()


def check_fits(planner: Planner, found: Placement) -> None:
    """Raise an error if a planner's placement does not fit.

    Raises
    ------
    OutOfMemoryError
        The message has the missing bytes, and options that fit.
    """
    if found.fits:
        return
    lacking = "; ".join(
        f"{d.device} lacks {text.size(d.missing)} of {text.size(d.needed)}"
        + (f" beside a reserve of {text.size(d.reserve)}" if d.reserve else "")
        for d in found.devices
        if not d.fits
    )
    proposals = "; ".join(Proposer(planner, found).proposals())
    name = os.path.basename(planner.architecture.file.path)
    end = f" These would fit: {proposals}" if proposals else ""
    raise OutOfMemoryError(f"{name} does not fit: {lacking}. Nothing was allocated.{end}")


def report(planner: Planner, found: Placement, *, propose: bool = True, measure_speed: bool = False) -> ModelPlan:
    """Return the report of a placement. With ``propose`` it takes the time of many placements."""
    architecture, options = planner.architecture, planner.options
    return ModelPlan(
        path=os.fspath(architecture.file.path),
        n_ctx=options.n_ctx,
        n_batch=min(options.n_batch, options.n_ctx),
        kv_dtype=options.kv_dtype.name,
        split=found.split,
        devices=tuple(found.devices),
        reasons=tuple(reasons(planner, found)),
        proposals=tuple(Proposer(planner, found).proposals()) if propose else (),
        speed=estimate_speed(architecture, planner.backends, found, measure=measure_speed),
        missing_file_bytes=architecture.file.missing_bytes,
    )
