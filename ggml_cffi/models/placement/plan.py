"""Plans: reports of the device of each layer and the bytes on each device, before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from ggml_cffi.core import text
from ggml_cffi.core.backend import Backend, open_backends
from ggml_cffi.core.device import DeviceLike, DevicesLike, device_list
from ggml_cffi.core.dtypes import as_type
from ggml_cffi.enums import Type
from ggml_cffi.errors import OutOfMemoryError
from ggml_cffi.files.gguf.reader import GGUFFile
from ggml_cffi.models.architectures.base import Architecture
from ggml_cffi.models.architectures.registry import architecture_of, context_of
from ggml_cffi.models.placement.auto import choose_split
from ggml_cffi.models.placement.options import Balance, LoadOptions, SplitMode, Workload, check_options
from ggml_cffi.models.placement.place import place_layers, place_on_one, place_replicas, place_shards, proportions_of
from ggml_cffi.models.placement.placement import DevicePlan, Placement
from ggml_cffi.models.placement.proposals import Proposer
from ggml_cffi.models.placement.reasons import reasons
from ggml_cffi.models.runners.weights import check_cache_dtype

_ANY_WORKLOAD = Workload()


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
    has layers for lack of memory. Each was tried, apart from devices that the machine does not have."""

    @property
    def fits(self) -> bool:
        """True if :func:`~ggml_cffi.models.load` would load the model."""
        return all(device.fits for device in self.devices)

    def table(self) -> str:
        """Return a table of the devices, with bytes of each kind."""
        head = ("device", "layers", "weights", "KV cache", "compute", "inputs", "workspace", "total", "free", "fits")
        rows = [head]
        for d in self.devices:
            sizes = (d.weight_bytes, d.cache_bytes, d.compute_bytes, d.input_bytes, d.workspace_bytes, d.total, d.free)
            fits = "yes" if d.fits else f"no: {text.size(d.missing)} too few"
            rows.append((d.device, d.contents, *map(text.size, sizes), fits))  # type: ignore[arg-type]
        return text.table(rows, right=range(2, 9))

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as a dictionary that JSON can hold."""
        found = asdict(self) | {"fits": self.fits}
        for device, entry in zip(self.devices, found["devices"], strict=True):
            entry |= {"total": device.total, "fits": device.fits}
        return found

    def __str__(self) -> str:
        head = f"{os.path.basename(self.path)}: context {self.n_ctx:,}, batch {self.n_batch:,}, cache {self.kv_dtype}"
        head += f", split {self.split}"
        parts = [f"{head}: {'fits' if self.fits else 'does not fit'}", self.table(), "\n".join(self.reasons)]
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
) -> ModelPlan:
    """Return the placement that :func:`~ggml_cffi.models.load` would choose for a model, with its bytes.

    Nothing is allocated, with one exception: ``split="auto"`` loads the model for a moment to time it, unless a file
    has the times already.

    Parameters
    ----------
    path
        A GGUF file.
    devices, split, n_ctx, n_batch, kv_dtype, balance, n_sequences, expected_tokens
        As for :func:`~ggml_cffi.models.load`.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    FormatError
        If the file is malformed, or its architecture is unknown.
    ValueError
        If a device does not exist or a parameter is out of range.

    Examples
    --------
    >>> print(models.plan("model.gguf", n_ctx=8192))  # doctest: +SKIP
    """
    check_options(split, n_batch)
    chosen = None if devices is None else device_list(devices)
    workload = Workload(n_sequences, expected_tokens)
    with GGUFFile(path) as file:
        architecture = architecture_of(file)
        options = LoadOptions(context_of(architecture, n_ctx), n_batch, as_type(kv_dtype))
        backends = open_backends(chosen)
        try:
            planner = Planner(architecture, backends, options, balance, chosen, split, workload)
            return planner.plan(planner.place())
        finally:
            for backend in backends:
                backend.close()


class Planner:
    """Planner of one model on some devices, which also reports reasons and alternatives.

    Raises
    ------
    ValueError
        If the cache or the balance is not possible, or the expected tokens do not fit the context.
    """

    def __init__(
        self,
        architecture: Architecture,
        backends: Sequence[Backend],
        options: LoadOptions,
        balance: Balance = "memory",
        chosen: Sequence[DeviceLike] | None = None,
        split: SplitMode = "layer",
        workload: Workload = _ANY_WORKLOAD,
    ) -> None:
        check_cache_dtype(options.kv_dtype, architecture.kv_sizes)
        self.architecture, self.backends, self.options, self.balance = architecture, backends, options, balance
        self.split, self.workload = split, workload
        expected = workload.expected_tokens
        if expected is not None and sum(expected) > options.n_ctx:
            raise ValueError(
                f"expected_tokens {expected} are {sum(expected)} together, but n_ctx is {options.n_ctx}: use a larger "
                "context"
            )
        if split in ("data", "tensor") and balance != "memory":
            raise ValueError(f"split {split!r} gives all devices the same: balance is for layers")
        self._proportions, self._given = proportions_of(balance, architecture, backends, chosen)

    def place(self, options: LoadOptions | None = None) -> Placement:
        """Return the placement for the split, with ``options`` in place of the planner's own if given."""
        given = self.architecture, self.backends, options or self.options
        if self.split == "tensor":
            return place_shards(*given)
        if self.split == "data":
            return place_replicas(*given)
        if self.split == "auto":
            return choose_split(*given, self.workload, self._candidates(*given))
        return replace(place_layers(*given, self._proportions, strict=self._given), split=self.split)

    def _candidates(
        self, architecture: Architecture, backends: Sequence[Backend], options: LoadOptions
    ) -> dict[str, Placement]:
        """Return the splits that fit, the simplest first. If none fits, return the split by layers, also on the CPU."""
        layer = place_layers(architecture, backends, options, self._proportions, strict=self._given)
        gpus = range(len(backends) - 1)
        if len(gpus) < 2 or not architecture.causal:
            return {"layer": layer}
        found = {}
        roomiest = max(gpus, key=lambda i: backends[i].device.memory().free)
        found["one"] = place_on_one(architecture, backends, options, roomiest)
        found["pipeline"] = replace(layer, split="pipeline")
        if self.workload.n_sequences > 1:
            found["data"] = place_replicas(architecture, backends, options)
        # Devices that cannot be stages cannot share layers either, because they do not read host memory.
        found = {name: placement for name, placement in found.items() if placement.fits and placement.stages}
        if layer.stages or found:
            with suppress(ValueError):  # the model is too small for this number of devices
                shards = place_shards(architecture, backends, options)
                found |= {"tensor": shards} if shards.fits else {}
        return found or {"layer": layer}

    def place_or_raise(self) -> Placement:
        """Return the placement for the split.

        Raises
        ------
        OutOfMemoryError
            If it does not fit. The message has the missing bytes, and options that fit.
        """
        found = self.place()
        if found.fits:
            return found
        lacking = "; ".join(
            f"{d.device} lacks {text.size(d.missing)} of {text.size(d.total - d.mapped_bytes)}"
            for d in found.devices
            if not d.fits
        )
        proposals = "; ".join(self.proposals(found))
        name = os.path.basename(self.architecture.file.path)
        raise OutOfMemoryError(f"{name} does not fit: {lacking}. Nothing was allocated. These would fit: {proposals}")

    def plan(self, found: Placement, *, propose: bool = True) -> ModelPlan:
        """Return the report of a placement. With ``propose`` it takes the time of many placements."""
        sentences = reasons(self.architecture, self.backends, found, self._proportions, given=self._given)
        return ModelPlan(
            path=os.fspath(self.architecture.file.path),
            n_ctx=self.options.n_ctx,
            n_batch=min(self.options.n_batch, self.options.n_ctx),
            kv_dtype=self.options.kv_dtype.name,
            split=found.split,
            devices=tuple(found.devices),
            reasons=tuple(sentences),
            proposals=tuple(self.proposals(found)) if propose else (),
        )

    def proposals(self, found: Placement) -> list[str]:
        """Return options that would fit; see :attr:`ModelPlan.proposals`."""
        proposer = Proposer(self.architecture, self.backends, self.options, self.place, self._proportions, self._given)
        return proposer.proposals(found)
