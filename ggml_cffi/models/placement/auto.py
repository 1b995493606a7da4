"""Choice of the best split and backend for a model and its workload, by timing the model or many of its layers.

The file of :mod:`~ggml_cffi.models.placement.calibration` stores the times.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from copy import copy
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np

from ggml_cffi.core.backend import Backend
from ggml_cffi.files.gguf.remote import is_url
from ggml_cffi.models.architectures.base import Architecture
from ggml_cffi.models.placement import calibration
from ggml_cffi.models.placement.options import LoadOptions, Workload
from ggml_cffi.models.placement.place import layer_bytes, main_dtype
from ggml_cffi.models.placement.placement import Placement
from ggml_cffi.models.runners.base import Batch, Runner, n_kv_for
from ggml_cffi.models.runners.pipeline import PipelineRunner
from ggml_cffi.models.runners.stage_spec import StageSpec, interleave, stages_of
from ggml_cffi.models.runners.weights import layer_of

_FEW, _MORE = 1, 3  # least numbers of layers on a device to time: the difference gives the time of a layer
_MOST_BYTES = 24 << 30  # of layers that are timed
_PROMPT = 8  # batches of a long prompt
_LARGEST = 512  # tokens of a batch that is timed
_LARGEST_IN_SOFTWARE = 16
_RUNS = 5
_LEAST = 1.0  # least seconds of all runs: GPUs need a while to reach their speed

#: Tokens/s by the name of a case.
Rates = Mapping[str, float]


@dataclass(frozen=True)
class Costs:
    """Seconds to compute some tokens."""

    layer: float
    ends: float
    """Time before the first layer and after the last one, and for submitting work."""

    def of(self, n_layers: float) -> float:
        """Return the seconds for ``n_layers`` layers."""
        return n_layers * self.layer + self.ends


@dataclass(frozen=True)
class Candidate:
    """A placement among which the fastest is chosen."""

    name: str
    """Name of the split, such as ``"pipeline"``, with that of the backend if several are compared."""
    placement: Placement
    """The placement, which fits."""
    backends: Sequence[Backend]
    """The devices, the CPU last."""


def choose_fastest(
    architecture: Architecture,
    options: LoadOptions,
    workload: Workload,
    candidates: Sequence[Candidate],
) -> Candidate:
    """Return the candidate that is best for the expected tokens, with the reason in its placement.

    Without expected tokens, three rates are computed for each candidate: prefill of one batch, prefill of eight
    batches, and decode of ``n_sequences`` sequences at once. Each rate is divided by the best rate of all candidates.
    The candidate whose smallest fraction is the largest is chosen, the first one of equals.
    """
    if len(candidates) == 1:
        (only,) = candidates
        reason = f"Of the splits, {only.name} is the only one that is possible."
        return replace(only, placement=replace(only.placement, reason=reason))
    rates = []
    for each in candidates:
        timer = Timer(architecture, each.backends, options)
        rates.append(_rates(architecture, each.placement, timer, options, workload))
    best = {case: max(rate[case] for rate in rates) for case in rates[0]}
    worst = [round(min(rate[case] / best[case] for case in best), 2) for rate in rates]
    number = worst.index(max(worst))
    chosen = candidates[number]
    cases = "; ".join(
        f"{each.name} {', '.join(f'{case} {rate:,.0f}' for case, rate in found.items())}"
        for each, found in zip(candidates, rates, strict=True)
    )
    several = "backends and splits" if len({id(each.backends) for each in candidates}) > 1 else "splits"
    reason = f"Of the {several}, {chosen.name} has {worst[number]:.0%} of the best speed or more in each case. "
    return replace(chosen, placement=replace(chosen.placement, reason=f"{reason}Tokens/s, timed: {cases}."))


def _rates(
    architecture: Architecture, found: Placement, timer: Timer, options: LoadOptions, workload: Workload
) -> Rates:
    """Return tokens/s of a placement: for the expected tokens, or for each case."""
    batch, replicas = min(options.n_batch, options.n_ctx), max(len(found.replicas), 1)
    stages = 1 if found.replicas or not found.stages else len([d for d in found.devices if d.layers])
    split = "tensor" if found.split == "tensor" else "pipeline" if stages > 1 else "one"

    def seconds(n: int, n_batch: int) -> float:
        return timer.costs(split, n, n_batch, whole_attention=found.whole_attention).of(architecture.n_layers)

    per_replica = -(-workload.n_sequences // replicas)
    decode = seconds(per_replica, per_replica)
    if workload.expected_tokens is not None:
        prompt, answer = workload.expected_tokens
        time = answer * decode + (per_replica * seconds(prompt, batch) if prompt else 0.0)
        return {f"{prompt:,} + {answer:,}": workload.n_sequences * (prompt + answer) / time}
    # Several sequences keep several replicas busy, one sequence keeps one busy.
    busy, long = min(replicas, workload.n_sequences), min(_PROMPT * batch, options.n_ctx)
    return {
        "prompt": busy * batch / seconds(batch, batch),
        "long prompt": busy * long / seconds(long, batch),
        "decode": workload.n_sequences / decode,
    }


class Timer:
    """Timer of runs through a few layers of a model.

    Results are stored by the devices' descriptions and backends, the sizes of a layer and the version of ggml.
    """

    def __init__(self, architecture: Architecture, backends: Sequence[Backend], options: LoadOptions) -> None:
        self._architecture, self.backends, self._options = architecture, backends, options
        self._software = any("llvmpipe" in b.device.description for b in backends)

    def costs(self, split: str, n: int, n_batch: int, *, whole_attention: bool = False) -> Costs:
        """Return the seconds to compute ``n`` tokens in batches of ``n_batch``.

        Parameters
        ----------
        split
            ``"one"``: on the first GPU. ``"pipeline"``: each GPU has some layers, with batches in flight.
            ``"tensor"``: all GPUs share every layer.
        """
        largest = _LARGEST_IN_SOFTWARE if self._software else _LARGEST
        # Larger batches take the same time per token, and longer prompts the same time per batch.
        batch = min(n, n_batch, largest)
        timed = min(-(-n * batch // min(n, n_batch)), _PROMPT * batch)
        used = self.backends[:1] if split == "one" else self.backends[:-1]
        stages, n_layers = len(used) if split == "pipeline" else 1, self._architecture.n_layers
        more = min(n_layers, max(self._most_layers(), stages * _MORE))

        def measured() -> list[float]:
            most = self._measure(split, used, more, timed, batch, whole_attention)
            if more == n_layers:
                return [most / n_layers, 0.0]
            few = stages * _FEW
            least = self._measure(split, used, few, timed, batch, whole_attention)
            layer = max((most - least) / (more - few), 1e-9)
            return [layer, max(least - few * layer, 0.0)]

        case = f"{split}{' whole attention' if whole_attention else ''}, {timed} tokens by {batch}"
        layer, ends = calibration.remembered(f"{more} layers of {self._description(used)}, {case}", measured)
        return Costs(layer * n / timed, ends * n / timed)

    def _most_layers(self) -> int:
        """Return the number of layers that can be timed in reasonable time; all layers for most models."""
        sizes = layer_bytes(self._architecture, 0)
        return 0 if self._software else _MOST_BYTES * len(sizes) // max(sum(sizes), 1)

    def _description(self, used: Sequence[Backend]) -> str:
        """Return a text with the model and the devices for which a measurement is valid."""
        a = self._architecture
        devices = " + ".join(f"{b.device.description}, {b.device.backend_name}" for b in used)
        return f"{a.n_layers} on {devices}, {a.name} {a.n_embd} {a.kv_sizes} {a.n_vocab} {main_dtype(a).name}"

    def _measure(
        self, split: str, used: Sequence[Backend], n_layers: int, n: int, n_batch: int, whole_attention: bool
    ) -> float:
        """Return the seconds to compute ``n`` tokens through the first layers."""
        file = self._architecture.file
        if is_url(file.path) or file.missing_bytes:
            raise ValueError("split 'auto' times the model, whose data is not here: choose another split")
        shallow = _shallow(self._architecture, n_layers)
        if split == "tensor":
            stages: tuple[StageSpec, ...] = (StageSpec(range(n_layers), tuple(range(len(used)))),)
        else:
            stages = stages_of(interleave([i * len(used) // n_layers for i in range(n_layers)]))
        backends = [*used, self.backends[-1]]
        dtype = self._options.kv_dtype
        with PipelineRunner(
            shallow, backends, n, n_batch, dtype, stages=stages, whole_attention=whole_attention
        ) as runner:
            return _best(lambda: _run(runner, n), 0.0 if self._software else _LEAST)


def _run(runner: Runner, n: int) -> None:
    """Compute a sequence of ``n`` tokens."""
    ranges = runner.batch_ranges(0, n)
    batches = (_batch(runner, start, end) for start, end in ranges)
    if len(ranges) == 1:
        runner.run(next(batches))
        return
    with closing(runner.run_all(batches)) as results:
        deque(results, maxlen=0)


def _batch(runner: Runner, start: int, end: int) -> Batch:
    """Return some of a sequence's tokens as a batch."""
    positions = np.arange(start, end, dtype=np.int32)
    mask = np.where(np.arange(n_kv_for(end, runner.n_slots)) <= positions[:, None], np.float16(0), np.float16(-np.inf))
    last = np.array([end - start - 1], np.int32)
    return Batch(np.zeros(end - start, np.int32), positions, positions.astype(np.int64), mask, last)


def _shallow(architecture: Architecture, n_layers: int) -> Architecture:
    """Return a model of the first layers, with the embeddings and the output head."""
    made = copy(architecture)
    made.n_layers = n_layers
    made.shapes = {name: shape for name, shape in architecture.shapes.items() if (layer_of(name) or 0) < made.n_layers}
    return made


def _best(run: Callable[[], object], least: float) -> float:
    """Return the seconds of the fastest run, after runs that take at least ``least`` seconds together."""
    run()  # the first run compiles shaders
    times: list[float] = []
    while len(times) < _RUNS or sum(times) < least:
        began = perf_counter()
        run()
        times.append(perf_counter() - began)
    return min(times)
