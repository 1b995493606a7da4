"""Which split suits a model and its devices best: timed on the model, or on many of its layers, and remembered."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from copy import copy
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np

from ggml_cffi.core.backend import Backend
from ggml_cffi.models.architectures.base import Architecture
from ggml_cffi.models.placement import calibration as calibrate
from ggml_cffi.models.placement.arrange import Arrangement, Wish, main_dtype
from ggml_cffi.models.runners.base import Batch, Runner
from ggml_cffi.models.runners.pipeline import StagedRunner
from ggml_cffi.models.runners.tensor import TensorRunner
from ggml_cffi.models.runners.weights import layer_bytes, layer_of

_FEW, _MORE = 1, 3  # layers on a device that are timed at least: the difference is what a layer takes
_MOST_BYTES = 24 << 30  # of layers that are timed
_PROMPT = 8  # batches of a long prompt
_LARGEST = 512  # tokens of a batch that is timed
_LARGEST_IN_SOFTWARE = 16
_RUNS = 5
_LEAST = 1.0  # seconds of runs: GPUs need a while until they are at speed


@dataclass(frozen=True)
class Use:
    """What a model is loaded for."""

    n_sequences: int = 1
    """Texts that grow at once."""
    expect: tuple[int, int] | None = None
    """Tokens of a prompt, and of what is added to it; None if all may come."""

    def __post_init__(self) -> None:
        if self.n_sequences < 1:
            raise ValueError(f"n_sequences must be at least 1, not {self.n_sequences}")
        if self.expect is not None and (len(self.expect) != 2 or min(self.expect) < 0 or not any(self.expect)):
            raise ValueError(f"expect is a number of tokens of a prompt and one of an answer, not {self.expect!r}")


@dataclass(frozen=True)
class Costs:
    """Seconds that something takes."""

    layer: float
    ends: float
    """What comes before the first layer and after the last, and what handing over takes."""

    def of(self, n_layers: float) -> float:
        """Through so many layers."""
        return n_layers * self.layer + self.ends


#: What users wait for: tokens/s by name.
Rates = Mapping[str, float]


def choose(
    architecture: Architecture,
    backends: Sequence[Backend],
    wish: Wish,
    use: Use,
    possible: Mapping[str, Arrangement],
) -> Arrangement:
    """The split that is best for what is expected, with the reason; without an expectation, the one whose worst case
    is best.

    For each possible split the rates are reckoned of reading a prompt of one batch and of eight, and of decoding
    ``n_sequences`` texts at once. Of each rate a split has some part of the best that any split has; the one is chosen
    whose smallest part is largest.

    Parameters
    ----------
    possible
        Arrangements that fit, by name of the split, the simplest first.
    """
    if len(possible) == 1:
        ((name, only),) = possible.items()
        return replace(only, why=f"Of the splits, {name} is the only one that is possible.")
    timer = Timer(architecture, backends, wish)
    rates = {name: _rates(architecture, found, timer, wish, use) for name, found in possible.items()}
    best = {case: max(rate[case] for rate in rates.values()) for case in next(iter(rates.values()))}
    worst = {name: min(rate[case] / best[case] for case in best) for name, rate in rates.items()}
    chosen = max(possible, key=lambda name: round(worst[name], 2))
    cases = "; ".join(
        f"{name} {', '.join(f'{case} {rate:,.0f}' for case, rate in found.items())}" for name, found in rates.items()
    )
    why = f"Of the splits, {chosen} has {worst[chosen]:.0%} of the best speed or more in each case. "
    return replace(possible[chosen], why=f"{why}Tokens/s, timed: {cases}.")


def _rates(architecture: Architecture, found: Arrangement, timer: Timer, wish: Wish, use: Use) -> Rates:
    batch, replicas = min(wish.n_batch, wish.n_ctx), max(len(found.replicas), 1)
    stages = 1 if found.replicas or not found.staged else len([s for s in found.devices if s.layers])
    kind = "tensor" if found.split == "tensor" else "pipeline" if stages > 1 else "one"

    def seconds(n: int, n_batch: int) -> float:
        return timer.costs(kind, n, n_batch, whole_attention=found.whole_attention).of(architecture.n_layers)

    together = -(-use.n_sequences // replicas)  # texts of one replica
    decode = seconds(together, together)
    if use.expect is not None:
        prompt, answer = use.expect
        time = answer * decode + (together * seconds(prompt, batch) if prompt else 0.0)
        return {f"{prompt:,} + {answer:,}": use.n_sequences * (prompt + answer) / time}
    # Several texts come to several replicas, one text to one of them.
    busy, long = min(replicas, use.n_sequences), min(_PROMPT * batch, wish.n_ctx)
    return {
        "prompt": busy * batch / seconds(batch, batch),
        "long prompt": busy * long / seconds(long, batch),
        "decode": use.n_sequences / decode,
    }


class Timer:
    """Times runs through a few layers of a model. What is measured is remembered for the devices' descriptions, the
    sizes of a layer and the version of ggml.
    """

    def __init__(self, architecture: Architecture, backends: Sequence[Backend], wish: Wish) -> None:
        self._architecture, self._backends, self._wish = architecture, backends, wish
        self._software = any("llvmpipe" in b.device.description for b in backends)

    def costs(self, kind: str, n: int, n_batch: int, *, whole_attention: bool = False) -> Costs:
        """Of ``n`` tokens in batches of so many.

        Parameters
        ----------
        kind
            ``"one"``: on the first GPU. ``"pipeline"``: by all GPUs in turn, each with some layers, batches in flight.
            ``"tensor"``: by all that share every layer.
        """
        largest = _LARGEST_IN_SOFTWARE if self._software else _LARGEST
        # Larger batches take as long for each token, and longer prompts for each batch.
        batch = min(n, n_batch, largest)
        timed = min(-(-n * batch // min(n, n_batch)), _PROMPT * batch)
        used = self._backends[:1] if kind == "one" else self._backends[:-1]
        stages, n_layers = len(used) if kind == "pipeline" else 1, self._architecture.n_layers
        more = min(n_layers, max(self._most_layers(), stages * _MORE))

        def measured() -> list[float]:
            most = self._measure(kind, used, more, timed, batch, whole_attention)
            if more == n_layers:
                return [most / n_layers, 0.0]
            few = stages * _FEW
            least = self._measure(kind, used, few, timed, batch, whole_attention)
            layer = max((most - least) / (more - few), 1e-9)
            return [layer, max(least - few * layer, 0.0)]

        how = f"{kind}{' whole attention' if whole_attention else ''}, {timed} tokens by {batch}"
        layer, ends = calibrate.remembered(f"{more} layers of {self._what(used)}, {how}", measured)
        return Costs(layer * n / timed, ends * n / timed)

    def _most_layers(self) -> int:
        """How many layers can be timed in reasonable time: all of most models."""
        sizes = layer_bytes(self._architecture, 0)
        return 0 if self._software else _MOST_BYTES * len(sizes) // max(sum(sizes), 1)

    def _what(self, used: Sequence[Backend]) -> str:
        """What a measurement holds for."""
        a = self._architecture
        devices = " + ".join(b.device.description for b in used)
        return f"{a.n_layers} on {devices}, {a.name} {a.n_embd} {a.kv_sizes} {a.n_vocab} {main_dtype(a).name}"

    def _measure(
        self, kind: str, used: Sequence[Backend], n_layers: int, n: int, n_batch: int, whole_attention: bool
    ) -> float:
        shallow = _shallow(self._architecture, n_layers)
        given = shallow, [*used, self._backends[-1]], n, n_batch, self._wish.kv_dtype
        runner: Runner
        if kind == "tensor":
            runner = TensorRunner(shallow, used, *given[2:], whole_attention=whole_attention)
        else:
            runner = StagedRunner(*given, where=[i * len(used) // n_layers for i in range(n_layers)])
        with runner:
            return _best(lambda: _run(runner, n), 0.0 if self._software else _LEAST)


def _run(runner: Runner, n: int) -> None:
    """A text of ``n`` tokens."""
    batches = (_batch(runner, start, end) for start, end in runner.ranges(0, n))
    if len(runner.ranges(0, n)) == 1:
        runner.run(next(batches))
        return
    with closing(runner.run_all(batches)) as results:
        deque(results, maxlen=0)


def _batch(runner: Runner, start: int, end: int) -> Batch:
    """Some of a text's tokens."""
    positions = np.arange(start, end, dtype=np.int32)
    mask = np.where(np.arange(runner.n_kv(end)) <= positions[:, None], np.float16(0), np.float16(-np.inf))
    near = mask if runner.architecture.window else None
    last = np.array([end - start - 1], np.int32)
    return Batch(np.zeros(end - start, np.int32), positions, positions.astype(np.int64), mask, last, near)


def _shallow(architecture: Architecture, n_layers: int) -> Architecture:
    """The first layers of a model, and its ends."""
    made = copy(architecture)
    made.n_layers = n_layers
    made.shapes = {name: shape for name, shape in architecture.shapes.items() if (layer_of(name) or 0) < made.n_layers}
    return made


def _best(run: Callable[[], object], least: float) -> float:
    """Seconds of the quickest of some runs, which take so many seconds at least."""
    run()  # shaders are compiled in the first run
    times: list[float] = []
    while len(times) < _RUNS or sum(times) < least:
        began = perf_counter()
        run()
        times.append(perf_counter() - began)
    return min(times)
