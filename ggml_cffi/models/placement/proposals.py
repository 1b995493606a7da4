"""Proposals: tested options with which a model fits, or with which every layer is on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ggml_cffi.core import text
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.device import gpus
from ggml_cffi.core.dtypes import block_size
from ggml_cffi.enums import Type
from ggml_cffi.models.architectures.base import Architecture
from ggml_cffi.models.placement.options import LoadOptions
from ggml_cffi.models.placement.place import USABLE, place_layers
from ggml_cffi.models.placement.placement import Placement

_SMALLEST_CTX, _SMALLEST_BATCH = 256, 32


@dataclass(frozen=True)
class Proposer:
    """Search for options with which a model would fit some devices."""

    architecture: Architecture
    backends: Sequence[Backend]
    options: LoadOptions
    place: Callable[[LoadOptions], Placement]
    """A function that places the model with other options."""
    proportions: Sequence[float] | None
    """Proportions of the layers, None for free memory."""
    given: bool
    """True if the caller gave the proportions."""

    def proposals(self, found: Placement) -> list[str]:
        """Return proposals for a placement; see ``ModelPlan.proposals``."""
        if found.fits and (found.split in ("data", "tensor") or len(found.members) < len(self.backends)):
            return []
        *on_gpus, cpu = found.devices
        asked = bool(self.proportions and self.proportions[-1])  # for layers on the CPU
        if found.fits and (not on_gpus or not cpu.layers or asked):
            return []

        def good(options: LoadOptions) -> bool:
            try:
                other = self.place(options)
            except ValueError:  # the tensors exceed the limits of operations
                return False
            return other.fits and (not found.fits or not other.devices[-1].layers)

        proposals = []
        if self.given:
            by_memory = place_layers(self.architecture, self.backends, self.options)
            if by_memory.fits:
                proposals.append(f"balance='memory': {self._layers(by_memory)}")
        proposals += [*self._single_changes(good)] or self._smallest(good)
        proposals += self._more_devices(found)
        return proposals

    def _single_changes(self, good: Callable[[LoadOptions], bool]) -> Iterator[str]:
        """Yield options with one change: a smaller context, a quantized cache, smaller batches."""
        options = self.options
        n_ctx = _largest(options.n_ctx, _SMALLEST_CTX, lambda n: good(replace(options, n_ctx=n)))
        if n_ctx:
            yield f"n_ctx={n_ctx}"
        for dtype in self._smaller_caches():
            if good(replace(options, kv_dtype=dtype)):
                yield f"kv_dtype={dtype.name.lower()!r}"
                break
        batch = min(options.n_batch, options.n_ctx)
        n_batch = _largest(batch, _SMALLEST_BATCH, lambda n: good(replace(options, n_batch=n)))
        if n_batch:
            yield f"n_batch={n_batch}"

    def _smallest(self, good: Callable[[LoadOptions], bool]) -> list[str]:
        """Return options with small sizes throughout, in case one change is not enough."""
        dtype = next(reversed(self._smaller_caches()), self.options.kv_dtype)
        options = LoadOptions(self.options.n_ctx, min(self.options.n_batch, _SMALLEST_BATCH), dtype)

        def fits(n: int) -> bool:
            return good(replace(options, n_ctx=n))

        n_ctx = options.n_ctx if fits(options.n_ctx) else _largest(options.n_ctx, _SMALLEST_CTX, fits)
        return [f"n_ctx={n_ctx}, kv_dtype={dtype.name.lower()!r}, n_batch={options.n_batch}"] if n_ctx else []

    def _smaller_caches(self) -> list[Type]:
        """Return types of the cache that take less memory."""
        if not self.architecture.causal or block_size(self.options.kv_dtype) > 1:
            return []
        return [t for t in (Type.Q8_0, Type.Q4_0) if not any(n % block_size(t) for n in self.architecture.kv_sizes)]

    def _more_devices(self, found: Placement) -> Iterator[str]:
        """Yield the GPUs of the machine that are not in use; if there are none, the size of one more device."""
        used = {b.device for b in self.backends}
        others = [d for d in gpus() if d not in used]
        for device in others:
            yield f"{device.name} as well, which has {text.size(device.memory().free)} free"
        if others:
            return
        if found.fits:  # the new device would hold the CPU's layers
            cpu = found.devices[-1]
            missing = cpu.weight_bytes + cpu.cache_bytes
        else:
            missing = sum(plan.missing for plan in found.devices)
        compute = max(plan.compute_bytes + plan.input_bytes + plan.workspace_bytes for plan in found.devices)
        yield f"one more device with {text.size(int(missing / USABLE) + compute)} free"

    def _layers(self, found: Placement) -> str:
        n = self.architecture.n_layers
        *on_gpus, cpu = found.devices
        each = [f"{len(plan.layers)} of {n} layers on {plan.device}" for plan in on_gpus if plan.layers]
        return ", ".join([*each, *([f"the rest on the {cpu.device}"] if cpu.layers else [])])


def _largest(n: int, smallest: int, good: Callable[[int], bool]) -> int | None:
    """Return the largest power of two from ``smallest`` to below ``n`` that is ``good``, None if none is."""
    tried = 1 << (n - 1).bit_length() >> 1
    while tried >= smallest:
        if good(tried):
            return tried
        tried //= 2
    return None
