"""What a model would take, and where, before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from ggml_cffi.core import text as _text
from ggml_cffi.core.backend import Backend, open_backends
from ggml_cffi.core.device import Device, gpus
from ggml_cffi.core.dtypes import as_type, block_size
from ggml_cffi.enums import Type
from ggml_cffi.errors import OutOfMemoryError
from ggml_cffi.files.gguf.reader import GGUFFile
from ggml_cffi.models.architectures.base import Architecture
from ggml_cffi.models.architectures.registry import architecture_of, context_of
from ggml_cffi.models.placement.arrange import (
    SPLITS,
    Arrangement,
    Balance,
    DevicePlan,
    Wish,
    arrange,
    arrange_one,
    arrange_parts,
    arrange_replicas,
    parts_of,
)
from ggml_cffi.models.placement.auto import Use, choose
from ggml_cffi.models.runners.weights import check_cache

_USABLE = 0.85
_SMALLEST_CTX, _SMALLEST_BATCH = 256, 32
_ANY_USE = Use()


@dataclass(frozen=True)
class ModelPlan:
    """What each device would hold. Printed, a table. Made by :func:`plan`."""

    path: str
    n_ctx: int
    n_batch: int
    kv_dtype: str
    split: str
    devices: tuple[DevicePlan, ...]
    """The devices in order, the CPU last."""
    reasons: tuple[str, ...]
    """Why everything is where it is, a sentence for each decision."""
    proposals: tuple[str, ...]
    """What would fit, if this does not; what would keep every layer on a GPU, if some are on the CPU for lack of room.
    Each was tried, but for devices that are not there."""

    @property
    def fits(self) -> bool:
        """Whether :func:`~ggml_cffi.models.load` would load it."""
        return all(share.fits for share in self.devices)

    def table(self) -> str:
        """The devices, with bytes of each kind."""
        rows = [("device", "layers", "weights", "KV cache", "compute", "inputs", "scratch", "total", "free", "fits")]
        for s in self.devices:
            sizes = (s.weight_bytes, s.cache_bytes, s.compute_bytes, s.input_bytes, s.scratch_bytes, s.total, s.free)
            fits = "yes" if s.fits else f"no: {_text.size(s.missing)} too few"
            rows.append((s.device, s.what, *map(_text.size, sizes), fits))  # type: ignore[arg-type]
        return _text.table(rows, right=range(2, 9))

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        found = asdict(self) | {"fits": self.fits}
        for share, entry in zip(self.devices, found["devices"], strict=True):
            entry |= {"total": share.total, "fits": share.fits}
        return found

    def __str__(self) -> str:
        head = f"{os.path.basename(self.path)}: context {self.n_ctx:,}, batch {self.n_batch:,}, cache {self.kv_dtype}"
        head += f", split {self.split}"
        parts = [f"{head}: {'fits' if self.fits else 'does not fit'}", self.table(), "\n".join(self.reasons)]
        if self.proposals:
            title = "Every layer would be on a GPU with:" if self.fits else "These would fit:"
            parts.append("\n".join([title, *(f"- {proposal}" for proposal in self.proposals)]))
        return _text.clean(parts[0]) + "\n" + "\n\n".join(parts[1:])


def plan(
    path: str | os.PathLike[str],
    devices: Sequence[Device | str] | None = None,
    split: str = "layer",
    n_ctx: int | None = None,
    *,
    n_batch: int = 512,
    kv_dtype: Type | str = Type.F16,
    balance: Balance = "memory",
    n_sequences: int = 1,
    expect: tuple[int, int] | None = None,
) -> ModelPlan:
    """What :func:`~ggml_cffi.models.load` would put where, and how many bytes it takes. Allocates none of it, but that
    ``split="auto"`` loads the model for a moment, to time it, if that is not known yet.

    Parameters
    ----------
    path
        A GGUF file.
    devices, split, n_ctx, n_batch, kv_dtype, balance, n_sequences, expect
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
    use = Use(n_sequences, expect)
    with GGUFFile(path) as file:
        architecture = architecture_of(file)
        wish = Wish(context_of(architecture, n_ctx), n_batch, as_type(kv_dtype))
        backends = open_backends(devices)
        try:
            planner = Planner(architecture, backends, wish, balance, devices, split, use)
            return planner.plan(planner.arrange())
        finally:
            for backend in backends:
                backend.close()


def check_options(split: str, n_batch: int) -> None:
    """Raise ValueError if a model cannot be loaded so."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not known; {', '.join(map(repr, SPLITS))} are")
    if n_batch < 1:
        raise ValueError(f"n_batch must be at least 1, not {n_batch}")


class Planner:
    """Arranges one model on some devices, and says why, and what else could be done.

    Raises
    ------
    ValueError
        If the cache or the balance is not possible, or what is expected does not fit the context.
    """

    def __init__(
        self,
        architecture: Architecture,
        backends: Sequence[Backend],
        wish: Wish,
        balance: Balance = "memory",
        chosen: Sequence[Device | str] | None = None,
        split: str = "layer",
        use: Use = _ANY_USE,
    ) -> None:
        check_cache(wish.kv_dtype, architecture.kv_sizes)
        self.architecture, self.backends, self.wish, self.balance = architecture, backends, wish, balance
        self.split, self.use = split, use
        if use.expect is not None and sum(use.expect) > wish.n_ctx:
            raise ValueError(f"{use.expect} tokens are expected, {sum(use.expect)} together, but n_ctx is {wish.n_ctx}")
        if split in ("data", "tensor") and balance != "memory":
            raise ValueError(f"split {split!r} gives every device the same: balance is for layers")
        self._parts, self._given = parts_of(balance, architecture, backends, chosen)

    def arrange(self, wish: Wish | None = None) -> Arrangement:
        """Share the layers out."""
        given = self.architecture, self.backends, wish or self.wish
        if self.split == "tensor":
            return arrange_parts(*given)
        if self.split == "data":
            return arrange_replicas(*given)
        if self.split == "auto":
            return choose(*given, self.use, self._possible(*given))
        return replace(arrange(*given, self._parts, strict=self._given), split=self.split)

    def _possible(self, architecture: Architecture, backends: Sequence[Backend], wish: Wish) -> dict[str, Arrangement]:
        """The splits that fit, the simplest first. By layers, also on the CPU, if there is no other or none fits."""
        layer = arrange(architecture, backends, wish, self._parts, strict=self._given)
        gpus = range(len(backends) - 1)
        if len(gpus) < 2 or not architecture.causal:
            return {"layer": layer}
        found = {}
        roomiest = max(gpus, key=lambda i: backends[i].device.memory().free)
        found["one"] = arrange_one(architecture, backends, wish, roomiest)
        found["pipeline"] = replace(layer, split="pipeline")
        if self.use.n_sequences > 1:
            found["data"] = arrange_replicas(architecture, backends, wish)
        # What cannot be in stages cannot share layers either: the devices do not read the host's memory.
        found = {name: a for name, a in found.items() if a.fits and a.staged}
        if layer.staged or found:
            with suppress(ValueError):  # a model that is too small for so many
                parts = arrange_parts(architecture, backends, wish)
                found |= {"tensor": parts} if parts.fits else {}
        return found or {"layer": layer}

    def arrange_or_raise(self) -> Arrangement:
        """As :meth:`arrange`.

        Raises
        ------
        OutOfMemoryError
            If it does not fit. The message says what is missing, and what would fit.
        """
        found = self.arrange()
        if found.fits:
            return found
        lacking = "; ".join(
            f"{s.device} lacks {_text.size(s.missing)} of {_text.size(s.total - s.mapped_bytes)}"
            for s in found.devices
            if not s.fits
        )
        proposals = "; ".join(self.proposals(found))
        name = os.path.basename(self.architecture.file.path)
        raise OutOfMemoryError(f"{name} does not fit: {lacking}. Nothing was allocated. These would fit: {proposals}")

    def plan(self, found: Arrangement, *, propose: bool = True) -> ModelPlan:
        """All that there is to say about an arrangement; proposals take the time of many."""
        return ModelPlan(
            path=os.fspath(self.architecture.file.path),
            n_ctx=self.wish.n_ctx,
            n_batch=min(self.wish.n_batch, self.wish.n_ctx),
            kv_dtype=self.wish.kv_dtype.name,
            split=found.split,
            devices=tuple(found.devices),
            reasons=tuple(self.reasons(found)),
            proposals=tuple(self.proposals(found)) if propose else (),
        )

    # ------------------------------------------------------------------ why

    def reasons(self, found: Arrangement) -> Iterator[str]:
        """A sentence for each decision."""
        if found.why:
            yield found.why
        if found.split in ("data", "tensor"):
            what = "the whole model"
            if found.split == "tensor":
                what = (
                    f"{'all' if found.whole_attention else 'some'} heads and some feed-forward columns of every layer"
                )
            yield f"Each of {', '.join(s.device for s in found.devices if s.layers)} has {what}."
            return
        *gpus, cpu = found.devices
        backends = [self.backends[i] for i in found.members]
        n = self.architecture.n_layers
        for share, backend in zip(found.devices, backends, strict=True):
            if share.layers and (gpus or not backend.device.is_cpu):
                yield f"{share.device} has {len(share.layers)} of {n} layers: {self._why(share, found)}."
        if not gpus:
            yield f"{cpu.device} has all {n} layers: it is the only device."
        for share, backend in zip(found.devices, backends, strict=True):
            if share.has_embeddings:
                beside = found.where[0] == backends.index(backend)
                why = "where the first layer is" if beside else "since the first layer's device cannot look them up"
                yield f"The embeddings are on {share.device}, {why}."
            if share.has_output:
                yield f"The output is on {share.device}, where the last layer is."
        if not found.op_offload:
            yield "GPUs do not compute with weights of the CPU: one has no room for copies of them."
        if not any(share.compute_bytes for share in found.devices):
            yield "What a run takes was not counted: weights and caches alone are too large."
        if cpu.total > cpu.free and cpu.fits:
            yield f"{cpu.device} reads its weights from the file again and again: they are larger than its memory."

    def _why(self, share: DevicePlan, found: Arrangement) -> str:
        i = found.devices.index(share)
        if len(found.members) < len(self.backends):
            return "it has room for all"
        if self._given and self._parts:
            return f"its part is {self._parts[i] / sum(self._parts):.0%}, as was asked"
        is_cpu = i == len(found.devices) - 1
        if self._parts and self._parts[i]:
            return f"its part is {self._parts[i] / sum(self._parts):.0%} by measured speed, within what fits"
        if is_cpu:
            return "the GPUs have no room for them"
        return f"its part by free memory, {_text.size(share.free)}"

    # ------------------------------------------------------------------ what else

    def proposals(self, found: Arrangement) -> list[str]:
        """What would fit, each tried; see :attr:`ModelPlan.proposals`."""
        if found.fits and found.split in ("data", "tensor"):
            return []
        if len(found.members) < len(self.backends) and found.fits:
            return []
        *gpus, cpu = found.devices
        asked = bool(self._parts and self._parts[-1])  # for layers on the CPU
        if found.fits and (not gpus or not cpu.layers or asked):
            return []

        def good(wish: Wish) -> bool:
            try:
                other = self.arrange(wish)
            except ValueError:  # larger than operations can be
                return False
            return other.fits and (not found.fits or not other.devices[-1].layers)

        proposals = []
        if self._given:
            by_memory = arrange(self.architecture, self.backends, self.wish)
            if by_memory.fits:
                proposals.append(f"balance='memory': {self._layers(by_memory)}")
        alone = [*self._changes(self.wish, good)]
        proposals += alone or self._together(good)
        proposals += self._more(found)
        return proposals

    def _changes(self, wish: Wish, good: Callable[[Wish], bool]) -> Iterator[str]:
        """One thing changed: a smaller context, a quantized cache, smaller batches."""
        n_ctx = _largest(wish.n_ctx, _SMALLEST_CTX, lambda n: good(replace(wish, n_ctx=n)))
        if n_ctx:
            yield f"n_ctx={n_ctx}"
        for kind in self._smaller_caches():
            if good(replace(wish, kv_dtype=kind)):
                yield f"kv_dtype={kind.name.lower()!r}"
                break
        batch = min(wish.n_batch, wish.n_ctx)
        n_batch = _largest(batch, _SMALLEST_BATCH, lambda n: good(replace(wish, n_batch=n)))
        if n_batch:
            yield f"n_batch={n_batch}"

    def _together(self, good: Callable[[Wish], bool]) -> list[str]:
        """Everything small, where one change is not enough."""
        kind = next(reversed(self._smaller_caches()), self.wish.kv_dtype)
        wish = Wish(self.wish.n_ctx, min(self.wish.n_batch, _SMALLEST_BATCH), kind)

        def fits(n: int) -> bool:
            return good(replace(wish, n_ctx=n))

        n_ctx = wish.n_ctx if fits(wish.n_ctx) else _largest(wish.n_ctx, _SMALLEST_CTX, fits)
        return [f"n_ctx={n_ctx}, kv_dtype={kind.name.lower()!r}, n_batch={wish.n_batch}"] if n_ctx else []

    def _smaller_caches(self) -> list[Type]:
        """Types for the cache that take less."""
        if not self.architecture.causal or block_size(self.wish.kv_dtype) > 1:
            return []
        return [t for t in (Type.Q8_0, Type.Q4_0) if not any(n % block_size(t) for n in self.architecture.kv_sizes)]

    def _more(self, found: Arrangement) -> Iterator[str]:
        """More devices: those of the machine that were left out, else one that there would have to be."""
        used = {b.device for b in self.backends}
        others = [d for d in gpus() if d not in used]
        for device in others:
            yield f"{device.name} as well, which has {_text.size(device.memory().free)} free"
        if others:
            return
        if found.fits:  # what is on the CPU would be there
            cpu = found.devices[-1]
            missing = cpu.weight_bytes + cpu.cache_bytes
        else:
            missing = sum(share.missing for share in found.devices)
        compute = max(share.compute_bytes + share.input_bytes + share.scratch_bytes for share in found.devices)
        yield f"one more device with {_text.size(int(missing / _USABLE) + compute)} free"

    def _layers(self, found: Arrangement) -> str:
        n = self.architecture.n_layers
        *gpus, cpu = found.devices
        each = [f"{len(s.layers)} of {n} layers on {s.device}" for s in gpus if s.layers]
        return ", ".join([*each, *([f"the rest on the {cpu.device}"] if cpu.layers else [])])


def _largest(n: int, smallest: int, good: Callable[[int], bool]) -> int | None:
    """The largest power of two below ``n``, and not below ``smallest``, that is good; None if none is."""
    tried = 1 << (n - 1).bit_length() >> 1
    while tried >= smallest:
        if good(tried):
            return tried
        tried //= 2
    return None
