"""Planner: the placement of one model for a split, and for changed options."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from ggml_cffi.core.backend import Backend
from ggml_cffi.core.device import DeviceLike
from ggml_cffi.models.architectures.base import Architecture
from ggml_cffi.models.placement.auto import Candidate, choose_fastest
from ggml_cffi.models.placement.hypothetical import is_hypothetical
from ggml_cffi.models.placement.options import Balance, LoadOptions, SplitMode, Workload
from ggml_cffi.models.placement.place import place_layers, place_on_one, place_replicas, place_shards, proportions_of
from ggml_cffi.models.placement.placement import Placement
from ggml_cffi.models.runners.weights import check_cache_dtype

_ANY_WORKLOAD = Workload()


class Planner:
    """Planner of one model on some devices.

    Raises
    ------
    ValueError
        If the cache or the balance is not possible, a device is a helper of the CPU, the expected tokens do not fit the
        context, or hypothetical devices would have to be timed.
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
        if helpers := [b.name for b in backends if not (b.device.is_gpu or b.device.is_cpu)]:
            raise ValueError(
                f"{', '.join(helpers)} only multiplies for the CPU and holds no layers: name GPUs or the CPU"
            )
        self.architecture, self.backends, self.options, self.balance = architecture, backends, options, balance
        self.split, self.workload = split, workload
        self.chosen = chosen
        """The devices as the caller gave them; None for all GPUs."""
        expected = workload.expected_tokens
        if expected is not None and sum(expected) > options.n_ctx:
            raise ValueError(
                f"expected_tokens {expected} are {sum(expected)} together, but n_ctx is {options.n_ctx}: use a larger "
                "context"
            )
        if split in ("data", "tensor") and not (isinstance(balance, str) and balance == "memory"):
            raise ValueError(f"split {split!r} gives all devices the same: balance is for layers")
        for option, value in (("split", split), ("balance", balance)):
            if isinstance(value, str) and value in ("auto", "speed") and any(map(is_hypothetical, backends)):
                raise ValueError(
                    f"{option} {value!r} times devices, and hypothetical ones cannot be timed: choose another"
                )
        self.proportions, self.given = proportions_of(balance, architecture, backends, chosen)
        """Proportions of the layers (None for free memory), and True if the caller gave them."""

    def changed(
        self,
        *,
        options: LoadOptions | None = None,
        split: SplitMode | None = None,
        balance: Balance | None = None,
        backends: Sequence[Backend] | None = None,
    ) -> Planner:
        """Return a planner of the same model with other options."""
        return Planner(
            self.architecture,
            self.backends if backends is None else backends,
            options or self.options,
            self.balance if balance is None else balance,
            self.chosen,
            split or self.split,
            self.workload,
        )

    def place(self) -> Placement:
        """Return the placement for the split."""
        given = self.architecture, self.backends, self.options
        if self.split == "tensor":
            return place_shards(*given)
        if self.split == "data":
            return place_replicas(*given)
        if self.split == "auto":
            candidates = [Candidate(name, found, self.backends) for name, found in self.candidates().items()]
            return choose_fastest(self.architecture, self.options, self.workload, candidates).placement
        return place_layers(*given, self.proportions, strict=self.given, split=self.split)

    def candidates(self) -> dict[str, Placement]:
        """Return the splits that fit, the simplest first. If none fits, return the split by layers, also on the CPU."""
        given = self.architecture, self.backends, self.options
        layer = place_layers(*given, self.proportions, strict=self.given)
        gpus = range(len(self.backends) - 1)
        if len(gpus) < 2 or not self.architecture.causal:
            return {"layer": layer}
        found = {}
        roomiest = max(gpus, key=lambda i: self.backends[i].device.memory().free)
        found["one"] = place_on_one(*given, roomiest)
        found["pipeline"] = place_layers(*given, self.proportions, strict=self.given, split="pipeline")
        if self.workload.n_sequences > 1:
            found["data"] = place_replicas(*given)
        # Devices that cannot be stages cannot share layers either, because they do not read host memory.
        found = {name: placement for name, placement in found.items() if placement.fits and placement.stages}
        if layer.stages or found:
            with suppress(ValueError):  # the model is too small for this number of devices
                shards = place_shards(*given)
                found |= {"tensor": shards} if shards.fits else {}
        return found or {"layer": layer}
