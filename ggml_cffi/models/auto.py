"""Which split suits a model and its devices best: timed on a few of its layers, and remembered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np

from ggml_cffi.backend import Backend
from ggml_cffi.models import calibrate
from ggml_cffi.models.architecture import Architecture
from ggml_cffi.models.arrange import Arrangement, Wish, main_dtype
from ggml_cffi.models.runner import Batch, Runner
from ggml_cffi.models.staged import StagedRunner
from ggml_cffi.models.weights import layer_of
from ggml_cffi.parallel.tensor_runner import TensorRunner

_FEW, _MORE = 1, 3  # layers that are timed: the difference is what a layer takes
_PROMPT = 8  # batches of a long prompt
_LARGEST = 512  # tokens of a batch that is timed
_LARGEST_IN_SOFTWARE = 16
_RUNS = 5


@dataclass(frozen=True)
class Costs:
    """Seconds that a run takes."""

    layer: float
    ends: float
    """What comes before the first layer and after the last, and what handing over takes."""

    def of(self, n_layers: float) -> float:
        """A whole run through so many layers."""
        return n_layers * self.layer + self.ends


#: What users wait for: tokens/s by name.
Rates = Mapping[str, float]


def choose(
    architecture: Architecture,
    backends: Sequence[Backend],
    wish: Wish,
    n_texts: int,
    possible: Mapping[str, Arrangement],
) -> Arrangement:
    """The split whose worst case is best, with the reason.

    For each possible split the rates are reckoned of reading a prompt of one batch and of eight, and of decoding
    ``n_texts`` texts at once. Of each rate a split has some part of the best that any split has; the one is chosen
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
    rates = {name: _rates(architecture, found, timer, wish, n_texts) for name, found in possible.items()}
    best = {case: max(rate[case] for rate in rates.values()) for case in next(iter(rates.values()))}
    worst = {name: min(rate[case] / best[case] for case in best) for name, rate in rates.items()}
    chosen = max(possible, key=lambda name: round(worst[name], 2))
    cases = "; ".join(
        f"{name} {', '.join(f'{case} {rate:,.0f}' for case, rate in found.items())}" for name, found in rates.items()
    )
    why = f"Of the splits, {chosen} has {worst[chosen]:.0%} of the best speed or more in each case. "
    return replace(possible[chosen], why=f"{why}Tokens/s reckoned from a few layers: {cases}.")


def _rates(architecture: Architecture, found: Arrangement, timer: Timer, wish: Wish, n_texts: int) -> Rates:
    n, batch = architecture.n_layers, min(wish.n_batch, wish.n_ctx)
    replicas = max(len(found.replicas), 1)
    kind = "tensor" if found.split == "tensor" else "one"
    whole = found.whole_attention

    def seconds(tokens: int) -> float:
        return timer.costs(kind, tokens, whole_attention=whole).of(n)

    decode = seconds(-(-n_texts // replicas))
    read, long = batch / seconds(batch), batch / seconds(batch)
    stages = len([share for share in found.shares if share.layers]) if found.staged and not found.replicas else 1
    if stages > 1:
        handing = timer.costs("one", 1).layer * (stages - 1)  # about what a layer takes for a token
        decode += handing
        read = batch / (seconds(batch) + handing)
        if found.split == "pipeline":
            # Each stage has its part of the layers; a batch comes out as often as one goes through a stage.
            slots = (_PROMPT + stages - 1) / _PROMPT
            long = batch * stages / (seconds(batch) * slots)
            half = seconds(max(batch // stages, 1))
            read = max(read, batch / (half * (2 * stages - 1) / stages))
    # Several texts come to several replicas, one text to one of them.
    busy = min(replicas, n_texts)
    return {"prompt": busy * read, "long prompt": busy * long, "decode": n_texts / decode}


class Timer:
    """Times runs through a few layers of a model, on the first GPU or on all together. What is measured is remembered
    for the devices' descriptions, the sizes of a layer and the version of ggml.
    """

    def __init__(self, architecture: Architecture, backends: Sequence[Backend], wish: Wish) -> None:
        self._architecture, self._backends, self._wish = architecture, backends, wish
        self._software = any("llvmpipe" in b.device.description for b in backends)

    def costs(self, kind: str, tokens: int, *, whole_attention: bool = False) -> Costs:
        """Of a run with so many tokens: on ``"one"`` GPU, or on all that share every layer (``"tensor"``)."""
        largest = min(_LARGEST_IN_SOFTWARE if self._software else _LARGEST, self._wish.n_batch)
        timed = min(tokens, largest)
        gpus = self._backends[:-1]
        used = gpus if kind == "tensor" else gpus[:1]
        architecture = self._architecture
        devices = " + ".join(b.device.description for b in used)
        sizes = f"{architecture.name} {architecture.n_embd} {architecture.kv_sizes} {main_dtype(architecture).name}"
        how = f"{kind}{' whole attention' if whole_attention else ''}, {timed} tokens"

        def measured() -> list[float]:
            most = min(_MORE, architecture.n_layers)
            few, more = (self._measure(used, layers, timed, whole_attention) for layers in (_FEW, most))
            layer = max((more - few) / (most - _FEW), 1e-9) if most > _FEW else few
            return [layer, max(few - _FEW * layer, 0.0)]

        layer, ends = calibrate.remembered(f"layers on {devices}, {sizes}, {how}", measured)
        scale = tokens / timed  # larger batches take as long for each token
        return Costs(layer * scale, ends * scale)

    def _measure(self, used: Sequence[Backend], n_layers: int, tokens: int, whole_attention: bool) -> float:
        shallow = _shallow(self._architecture, n_layers)
        n_ctx = max(tokens, 1)
        with self._opened(shallow, used, n_ctx, tokens, whole_attention) as runner:
            positions = np.arange(tokens, dtype=np.int32)
            mask = np.where(np.arange(runner.n_rows) <= positions[:, None], np.float16(0), np.float16(-np.inf))
            last = np.array([tokens - 1], np.int32)
            batch = Batch(np.zeros(tokens, np.int32), positions, positions.astype(np.int64), mask, last)
            return _best(lambda: runner.run(batch))

    @contextmanager
    def _opened(
        self, shallow: Architecture, used: Sequence[Backend], n_ctx: int, n_batch: int, whole_attention: bool
    ) -> Iterator[Runner]:
        kind = self._wish.kv_dtype
        runner: Runner
        if len(used) > 1:
            runner = TensorRunner(shallow, used, n_ctx, n_batch, kind, whole_attention=whole_attention)
        else:
            both = [*used, self._backends[-1]]
            runner = StagedRunner(shallow, both, n_ctx, n_batch, kind, where=[0] * shallow.n_layers)
        with runner:
            yield runner


def _shallow(architecture: Architecture, n_layers: int) -> Architecture:
    """The first layers of a model, and its ends."""
    made = copy(architecture)
    made.n_layers = n_layers
    made.shapes = {name: shape for name, shape in architecture.shapes.items() if (layer_of(name) or 0) < made.n_layers}
    return made


def _best(run: Callable[[], object]) -> float:
    run()  # shaders are compiled in the first run
    times = []
    for _ in range(_RUNS):
        began = perf_counter()
        run()
        times.append(perf_counter() - began)
    return min(times)
