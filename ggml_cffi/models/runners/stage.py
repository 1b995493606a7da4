"""Some layers of a model on some devices of their own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ggml_cffi.core.backend import Backend
from ggml_cffi.core.handle import Closing
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.models.architectures.base import Architecture, Inputs, LayerCache
from ggml_cffi.models.runners.base import Batch
from ggml_cffi.parallel.group import Group
from ggml_cffi.parallel.program import ParallelProgram, ParallelTrace
from ggml_cffi.parallel.rank import AllGather, Rank

_PROGRAMS = 32  # graphs that are kept

#: Tokens, cache rows that they look at, tokens whose results are wanted.
Key = tuple[int, int, int]


def key_of(batch: Batch) -> Key:
    """What the graph for a batch depends on."""
    return len(batch.tokens), batch.mask.shape[1], len(batch.wanted)


class Layers:
    """The graph of some neighbouring layers, with what comes before the first and after the last of all.

    Parameters
    ----------
    architecture
        The model.
    layers
        Numbers of the layers.
    weights
        For each device its weights by name.
    caches
        For each device the caches of all layers.
    summed
        The parts of a layer whose contributions several devices add up; see
        :class:`~ggml_cffi.models.architectures.base.TensorParallelSpec`.
    """

    def __init__(
        self,
        architecture: Architecture,
        layers: range,
        weights: Sequence[Mapping[str, Tensor]],
        caches: Sequence[Sequence[LayerCache]],
        summed: Collection[str] = (),
    ) -> None:
        self.architecture, self.layers, self.weights, self.caches = architecture, layers, weights, caches
        self.is_first, self.is_last = layers.start == 0, layers.stop == architecture.n_layers
        self._summed = summed

    def inputs(self, n: int, n_kv: int, n_out: int) -> list[tuple[tuple[int, ...], Type]]:
        """Shape and type of each input."""
        start = ((n,), Type.I32) if self.is_first else ((n, self.architecture.n_embd), Type.F32)
        found: list[tuple[tuple[int, ...], Type]] = [start, ((n,), Type.I32), ((n,), Type.I64), ((n, n_kv), Type.F16)]
        if self.architecture.window:
            found.append(((n, n_kv), Type.F16))
        if self.is_last:
            found.append(((n_out,), Type.I32))
        return found

    def values(self, batch: Batch) -> list[npt.NDArray[Any]]:
        """What :meth:`inputs` are for a batch, but the first of them: tokens, or what came out of the layers before."""
        found: list[npt.NDArray[Any]] = [batch.positions, batch.rows, batch.mask]
        if self.architecture.window:
            found.append(batch.mask if batch.near is None else batch.near)
        if self.is_last:
            found.append(batch.wanted)
        return found

    def trace(self, rank: Rank, *inputs: Tensor) -> Tensor | AllGather:
        """The graph of one device: logits ``(n_out, n_vocab)``, or what goes into the next layer ``(n, n_embd)``."""
        architecture, weights, cache = self.architecture, self.weights[rank.index], self.caches[rank.index]
        start, positions, rows, mask, *more = inputs
        near = more.pop(0) if architecture.window else None
        wanted = more.pop() if self.is_last else positions  # which is not looked at before the last layer
        sums = dict.fromkeys(self._summed, rank.all_reduce)
        given = Inputs(start, positions, rows, mask, wanted, near, sums=sums)
        x = architecture.embed(weights, given) if self.is_first else start
        x = architecture.through(self.layers, x, weights, cache, given)
        if not self.is_last:
            return x
        logits = architecture.logits(weights, architecture.finish(weights, x))
        logits.name = "logits"
        return rank.all_gather(logits)

    def measure(self, backends: Sequence[Backend], key: Key) -> ParallelTrace:
        """The graph without memory, which says how much it would take."""
        n = len(backends)
        return ParallelTrace(backends, [Rank(r, n) for r in range(n)], self.trace, self.inputs(*key))


class Stage(Closing):
    """Layers with devices to compute them.

    Parameters
    ----------
    layers
        What to compute.
    group
        The devices; closed with this.
    """

    def __init__(self, layers: Layers, group: Group) -> None:
        self.layers, self.group = layers, group
        self._programs: OrderedDict[tuple[Key, int], ParallelProgram] = OrderedDict()
        self._prepared: tuple[Batch, ParallelProgram] | None = None  # whose inputs are written

    def reserve(self, n_batch: int, n_rows: int) -> list[int]:
        """Make room for the largest batch now, so that too little memory is found while loading.

        Returns
        -------
        list
            Bytes of intermediate results, with the inputs, on each device.

        Raises
        ------
        OutOfMemoryError
            If a device has not enough.
        """
        self._made((n_batch, n_rows, 1)).close()
        return self.group.arena_sizes()

    def prepare(self, batch: Batch, slot: int = 0) -> ParallelProgram:
        """The graph for a batch, with all inputs that are known before the layers before have computed it.

        Parameters
        ----------
        slot
            Which of two pieces of host memory has inputs and results: one can be written while a graph uses the other.
        """
        program = self.program(key_of(batch), slot)
        for put, value in zip(program.puts[1:], self.layers.values(batch), strict=True):
            put[...] = value
        self._prepared = batch, program
        return program

    def prepare_ahead(self, batch: Batch) -> None:
        """As :meth:`prepare`, and have the device record what it can; see ``Executor.record``."""
        self.prepare(batch).record()

    def run(
        self,
        batch: Batch,
        x: npt.NDArray[np.float32] | None = None,
        *,
        meanwhile: Callable[[], object] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Compute a batch. The result lies where the next run writes its own.

        Parameters
        ----------
        x
            What came out of the layers before, if there are any.
        meanwhile
            Called while the device computes; it must not wait for what another thread may hold.
        """
        program = self._ready(batch, x)
        program.compute(meanwhile)
        return program.result()

    def hand_over(
        self,
        batch: Batch,
        x: npt.NDArray[np.float32] | None,
        meanwhile: Callable[[], object],
        finish: Callable[[], object],
    ) -> npt.NDArray[np.float32]:
        """As :meth:`run`, but the result as soon as it has arrived. The device may not be done then: call
        :meth:`finish`, also after an exception. ``finish`` is called where it is not seen to arrive, and calls that.
        """
        return self._ready(batch, x).hand_over(meanwhile, finish)

    def finish(self, *, if_free: bool = False) -> None:
        """Wait for the device; with ``if_free`` not while another thread uses it."""
        self.group.executor.finish(if_free=if_free)

    def _ready(self, batch: Batch, x: npt.NDArray[np.float32] | None) -> ParallelProgram:
        """The graph for a batch, with all inputs."""
        if self._prepared is None or self._prepared[0] is not batch:
            self.prepare(batch)
        assert self._prepared is not None
        (_, program), self._prepared = self._prepared, None
        program.puts[0][...] = batch.tokens if x is None else x
        return program

    def program(self, key: Key, slot: int = 0) -> ParallelProgram:
        """The graph for batches of a size; the last few are kept."""
        found = self._programs.get((key, slot))
        if found is None:
            found = self._programs[key, slot] = self._made(key, slot)
            if len(self._programs) > _PROGRAMS:
                _, oldest = self._programs.popitem(last=False)
                oldest.close()
        else:
            self._programs.move_to_end((key, slot))
        return found

    def _made(self, key: Key, slot: int = 0) -> ParallelProgram:
        group = self.group
        n = len(group.backends)
        ranks = [Rank(r, n, group.half_above) for r in range(n)]
        inputs, ahead = self.layers.inputs(*key), not self.layers.is_first
        return ParallelProgram(group, ranks, self.layers.trace, inputs, slot, ahead=ahead)

    @property
    def programs(self) -> tuple[ParallelProgram, ...]:
        """The graphs that are kept, the last used last."""
        return tuple(self._programs.values())

    def assignment(self) -> list[tuple[Tensor, Backend]]:
        """What the last run computed, and where."""
        if not self._programs:
            return []
        plans = self.programs[-1].plans
        each = zip(plans, self.group.backends, strict=True)
        return [(t, backend) for plan, backend in each for graph in plan.graphs for t in graph.nodes]

    def clear(self) -> None:
        """Give the graphs up."""
        self._prepared = None
        for program in self._programs.values():
            program.close()
        self._programs.clear()

    def close(self) -> None:
        """Free graphs and memory."""
        self.clear()
        self.group.close()
