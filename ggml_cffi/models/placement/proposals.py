"""Proposals: tested options with which a model fits, or with which every layer is on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import ceil

from ggml_cffi.core import text
from ggml_cffi.core.device import gpus
from ggml_cffi.core.dtypes import block_size
from ggml_cffi.enums import Type
from ggml_cffi.models.placement.hypothetical import HypotheticalDevice, is_hypothetical, stand_ins
from ggml_cffi.models.placement.options import LoadOptions, SplitMode
from ggml_cffi.models.placement.placement import Placement
from ggml_cffi.models.placement.planner import Planner

_SMALLEST_CTX, _SMALLEST_BATCH = 256, 32
_SIZES = 12  # of one more device that are tried, each a quarter larger than the one before
_HALVINGS = 4  # of the difference between a size that is good and a smaller one that is not


@dataclass(frozen=True)
class Proposer:
    """Search for options with which a model would fit. A plan tests each proposal.

    Parameters
    ----------
    planner
        The planner with the options that were asked for.
    found
        Its placement.
    """

    planner: Planner
    found: Placement

    def proposals(self) -> list[str]:
        """Return proposals; see ``ModelPlan.proposals``."""
        planner, found = self.planner, self.found
        asked = bool(planner.proportions and planner.proportions[-1])  # for layers on the CPU
        on_cpu = _cpu_layers(found) and len(planner.backends) > 1 and not asked
        if found.fits and (not on_cpu or len(found.members) < len(planner.backends)):
            return []
        balances = [*self._balances()]
        proposals = [*balances, *self._splits(), *([*self._single_changes()] or self._smallest())]
        if found.split == "data":
            proposals += self._fewer_devices()
        elif not balances:
            proposals += self._more_devices()
        return proposals

    def _place(self, planner: Planner) -> Placement | None:
        """Return the placement of a planner if it fits; if the found one does too, only with every layer on a GPU."""
        other = planner.place()
        return other if other.fits and not (self.found.fits and _cpu_layers(other)) else None

    def _good(self, options: LoadOptions) -> bool:
        """Return whether the model fits with other sizes. A split that had to be timed is not timed again."""
        try:
            return self._place(self.planner.changed(options=options, split=self.found.split)) is not None
        except ValueError:  # the tensors exceed the limits of operations
            return False

    def _balances(self) -> Iterator[str]:
        """Yield the numbers of layers that fit, if the layers were divided in another way than by free memory."""
        if self.planner.proportions is None or self.found.split in ("data", "tensor"):
            return
        by_memory = self._place(self.planner.changed(balance="memory", split=self.found.split))
        if by_memory is None:
            return
        counts = [len(plan.layers) for plan in by_memory.devices]
        balance = counts if counts[-1] else counts[:-1]
        same = sum(balance) and self._place(self.planner.changed(balance=balance, split=self.found.split))
        yield f"balance={balance if same else 'memory'!r} ({self._layers(by_memory)})"

    def _splits(self) -> Iterator[str]:
        """Yield other splits."""
        if len(self.planner.backends) < 2:
            return
        others: tuple[SplitMode, ...] = ("layer", "tensor")
        for split in others:
            if split == self.found.split or (split == "layer" and self.found.split == "pipeline"):
                continue
            with suppress(ValueError):  # the model is too small for this number of devices
                other = self._place(self.planner.changed(split=split, balance="memory"))
                if other is not None:
                    and_balance = "" if self.planner.proportions is None else ", balance='memory'"
                    layers = f" ({self._layers(other)})" if split == "layer" else ""
                    yield f"split={split!r}{and_balance}{layers}"

    def _single_changes(self) -> Iterator[str]:
        """Yield options with one change: a smaller context, a quantized cache, smaller batches."""
        options = self.planner.options
        n_ctx = _largest(options.n_ctx, _SMALLEST_CTX, lambda n: self._good(replace(options, n_ctx=n)))
        if n_ctx:
            yield f"n_ctx={n_ctx}"
        for dtype in self._smaller_caches():
            if self._good(replace(options, kv_dtype=dtype)):
                yield f"kv_dtype={dtype.name.lower()!r}"
                break
        batch = min(options.n_batch, options.n_ctx)
        n_batch = _largest(batch, _SMALLEST_BATCH, lambda n: self._good(replace(options, n_batch=n)))
        if n_batch:
            yield f"n_batch={n_batch}"

    def _smallest(self) -> list[str]:
        """Return options with small sizes throughout, in case one change is not enough."""
        given = self.planner.options
        dtype = next(reversed(self._smaller_caches()), given.kv_dtype)
        options = replace(given, n_batch=min(given.n_batch, _SMALLEST_BATCH), kv_dtype=dtype)

        def fits(n: int) -> bool:
            return self._good(replace(options, n_ctx=n))

        n_ctx = options.n_ctx if fits(options.n_ctx) else _largest(options.n_ctx, _SMALLEST_CTX, fits)
        return [f"n_ctx={n_ctx}, kv_dtype={dtype.name.lower()!r}, n_batch={options.n_batch}"] if n_ctx else []

    def _smaller_caches(self) -> list[Type]:
        """Return types of the cache that take less memory."""
        architecture = self.planner.architecture
        if not architecture.causal or block_size(self.planner.options.kv_dtype) > 1:
            return []
        return [t for t in (Type.Q8_0, Type.Q4_0) if not any(n % block_size(t) for n in architecture.kv_sizes)]

    def _fewer_devices(self) -> Iterator[str]:
        """Yield the devices on which a replica fits, and the memory that each device needs for one."""
        replicas = self.found.replicas
        fitting = [i for i, replica in enumerate(replicas) if replica.fits]
        if fitting:
            backends = self.planner.backends
            if self._place(self.planner.changed(backends=[*(backends[i] for i in fitting), backends[-1]])):
                yield f"devices={self._as_given(fitting)!r}"
        needed = max(r.devices[0].needed + r.devices[0].reserve for r in replicas)

        def fits(free: int) -> bool:
            names = [r.devices[0].device for r in replicas]
            with stand_ins(self.planner.backends[-1:], *(HypotheticalDevice(n, free) for n in names)) as backends:
                return self._place(self.planner.changed(backends=backends)) is not None

        if len(self.planner.backends) > 1 and (free := _smallest_size(needed, fits)):
            yield f"devices with {text.size(free)} free each: every replica has all weights"

    def _as_given(self, numbers: Sequence[int]) -> list[str]:
        """Return some of the GPUs as arguments of ``plan``, hypothetical ones with their memory and the CPU's."""
        backends = self.planner.backends
        if not is_hypothetical(backends[-1]):
            return [backends[i].name for i in numbers]
        given = [str(each) for each in self.planner.chosen or ()]
        return [*(given[i] for i in numbers), *given[len(backends) - 1 :]]

    def _more_devices(self) -> Iterator[str]:
        """Yield the GPUs of the machine that are not in use; if none helps, the size of one more device."""
        planner, found = self.planner, self.found
        by_memory = "" if planner.proportions is None else ", balance='memory'"
        changes = planner.changed(split=found.split, balance="memory")

        def fits(device: HypotheticalDevice) -> bool:
            with stand_ins(planner.backends, device) as backends, suppress(ValueError):
                return self._place(changes.changed(backends=backends)) is not None
            return False  # the model is too small for this number of devices

        own = [b.device for b in planner.backends]
        others = [] if any(map(is_hypothetical, planner.backends)) else [d for d in gpus() if d not in own]
        names = [d.name for d in own if not d.is_cpu]
        helpful = [d for d in others if fits(HypotheticalDevice(d.name, d.memory().free))]
        for device in helpful:
            yield f"devices={[*names, device.name]!r}{by_memory}"
        if helpful:
            return
        if found.fits:  # the new device would hold the CPU's layers
            missing = found.devices[-1].weight_bytes + found.devices[-1].cache_bytes
        else:
            missing = sum(plan.missing for plan in found.devices)
        free = _smallest_size(missing, lambda free: fits(HypotheticalDevice("one more", free)))
        if free:
            yield f"one more device with {text.size(free)} free{by_memory}"

    def _layers(self, found: Placement) -> str:
        n = self.planner.architecture.n_layers
        each = [f"{len(plan.layers)} of {n} layers on {plan.device}" for plan in found.devices if plan.layers]
        return ", ".join(each)


def _cpu_layers(found: Placement) -> bool:
    """Return whether the CPU has layers, as only stages of layers can have them beside GPUs."""
    return found.split not in ("data", "tensor") and bool(found.devices[-1].layers)


def _largest(n: int, smallest: int, good: Callable[[int], bool]) -> int | None:
    """Return the largest power of two from ``smallest`` to below ``n`` that is ``good``, None if none is."""
    tried = 1 << (n - 1).bit_length() >> 1
    while tried >= smallest:
        if good(tried):
            return tried
        tried //= 2
    return None


def _smallest_size(start: int, good: Callable[[int], bool]) -> int | None:
    """Return about the smallest size from ``start`` that is ``good``, None if none of :data:`_SIZES` rising ones is.

    The size is what :func:`~ggml_cffi.core.text.size` writes.
    """
    low, high = start, _written(max(start, 1 << 20))
    for _ in range(_SIZES):
        if good(high):
            break
        low, high = high, _written(high * 5 // 4)
    else:
        return None
    for _ in range(_HALVINGS):
        middle = _written((low + high) // 2)
        low, high = (low, middle) if good(middle) else (middle, high)
    return high


def _written(size: int) -> int:
    """Return the next larger size that has one decimal in GiB or MiB."""
    step = (1 << 30 if size >= 1 << 30 else 1 << 20) / 10
    return ceil(ceil(size / step) * step)
