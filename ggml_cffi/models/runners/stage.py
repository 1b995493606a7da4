"""A pipeline stage: some layers of a model on one or several devices of their own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ggml_cffi.core.backend import Backend
from ggml_cffi.core.handle import Closing
from ggml_cffi.core.lru import LRU
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.models.architectures.base import Architecture, Inputs, KVView, LayerCache
from ggml_cffi.models.runners.base import Batch
from ggml_cffi.models.runners.buckets import Key, bucket, fill, output_bucket, shortened
from ggml_cffi.models.runners.kv_length import KVLength
from ggml_cffi.models.runners.link import Link
from ggml_cffi.models.runners.stage_spec import StageSpec
from ggml_cffi.models.runners.weights import Weights
from ggml_cffi.parallel.group import Group
from ggml_cffi.parallel.program import ParallelProgram
from ggml_cffi.parallel.rank import AllGather, Rank
from ggml_cffi.parallel.trace import ParallelTrace

_PROGRAMS = 64  # largest number of kept programs


class StageGraph:
    """The graph of neighbouring layers, with the embeddings before the first layer and the output head after the last.

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
    all_reduced
        Parts of a layer that are all-reduced; see :class:`~ggml_cffi.models.architectures.base.TensorParallelSpec`.
    """

    def __init__(
        self,
        architecture: Architecture,
        layers: range,
        weights: Sequence[Mapping[str, Tensor]],
        caches: Sequence[Sequence[LayerCache]],
        all_reduced: Collection[str] = (),
    ) -> None:
        self.architecture, self.layers, self.weights, self.caches = architecture, layers, weights, caches
        self.is_first, self.is_last = layers.start == 0, layers.stop == architecture.n_layers
        self.is_resizable = not any(own[i].v_transposed for own in caches for i in layers)
        """True if one graph serves all numbers of KV slots, and batches with fewer tokens than it has."""
        self._all_reduced = all_reduced

    @classmethod
    def of(cls, weights: Weights, stage: StageSpec) -> StageGraph:
        """Return the graph of one stage of a model."""
        own = [weights.by_device[device] for device in stage.devices]
        # Lists are indexed by the number of the layer. The entries of other stages' layers are not used.
        caches = [
            [each[rank if i in stage.layers else 0] for i, each in enumerate(weights.caches)]
            for rank in range(len(stage.devices))
        ]
        all_reduced = weights.tensor_parallel(stage).all_reduced
        return cls(weights.architecture, stage.layers, own, caches, all_reduced)

    def input_types(self, n: int, n_kv: int, n_out: int) -> list[tuple[tuple[int, ...], Type]]:
        """Return the shape and the type of each input."""
        start = ((n,), Type.I32) if self.is_first else ((n, self.architecture.n_embd), Type.F32)
        found: list[tuple[tuple[int, ...], Type]] = [start, ((n,), Type.I32), ((n,), Type.I64)]
        if self.is_last:
            found.append(((n_out,), Type.I32))
        return found + [((n, n_kv), Type.F16)] * self.n_masks

    @property
    def n_masks(self) -> int:
        """Number of masks. They are the last inputs."""
        return 2 if self.architecture.window else 1

    def input_values(self, batch: Batch) -> list[npt.NDArray[Any]]:
        """Return the inputs for a batch without the first one: tokens, or the result of the previous stage."""
        found: list[npt.NDArray[Any]] = [batch.positions, batch.kv_slots]
        if self.is_last:
            found.append(batch.output_ids)
        found.append(batch.mask)
        if self.architecture.window:
            found.append(batch.mask if batch.window_mask is None else batch.window_mask)
        return found

    def trace(self, rank: Rank, *inputs: Tensor, kv_views: list[KVView] | None = None) -> Tensor | AllGather:
        """Build the graph of one device: to logits ``(n_out, n_vocab)``, or the next stage's input ``(n, n_embd)``.

        ``kv_views`` receives the views that :class:`KVLength` needs.
        """
        architecture, weights, cache = self.architecture, self.weights[rank.index], self.caches[rank.index]
        start, positions, kv_slots, *more = inputs
        output_ids = more.pop(0) if self.is_last else positions  # only the last layer reads it
        mask, window_mask = more[0], more[1] if len(more) > 1 else None
        sums = dict.fromkeys(self._all_reduced, rank.all_reduce)
        views = [] if kv_views is None else kv_views
        given = Inputs(start, positions, kv_slots, mask, output_ids, window_mask, sums=sums, kv_views=views)
        x = architecture.embed(weights, given) if self.is_first else start
        x = architecture.build_layers(self.layers, x, weights, cache, given)
        if not self.is_last:
            return x
        logits = architecture.logits(weights, architecture.final_norm(weights, x))
        logits.name = "logits"
        return rank.all_gather(logits)

    def measure(
        self, backends: Sequence[Backend], key: Key, *, receives: bool = False, sends: bool = False
    ) -> ParallelTrace:
        """Return the graph without memory, with the number of bytes that it needs.

        Parameters
        ----------
        receives, sends
            True if the stage has a :class:`~ggml_cffi.models.runners.link.Link` from the previous, to the next stage.
        """
        n = len(backends)
        return ParallelTrace(
            backends,
            [Rank(r, n) for r in range(n)],
            self.trace,
            self.input_types(*key),
            receives=receives,
            sends=sends,
        )


class StageProgram(Closing):
    """The traced program of a stage, for batches up to some number of tokens.

    Parameters
    ----------
    graph
        The graph of the layers.
    group
        The devices.
    key
        Sizes of the graph.
    slot
        Number of the block of host memory for inputs and results, after ``first_block``, and of the slot of the links.
    receives, sends
        Links from the previous stage and to the next one, if there are any.
    first_block
        Number of the first block of host memory of this stage; other stages of the group use others.
    """

    def __init__(
        self,
        graph: StageGraph,
        group: Group,
        key: Key,
        slot: int,
        receives: Link | None = None,
        sends: Link | None = None,
        *,
        first_block: int = 0,
    ) -> None:
        n = len(group.backends)
        ranks = [Rank(r, n, group.half_above) for r in range(n)]
        views: list[KVView] = []
        trace = partial(graph.trace, kv_views=views)
        self.graph = graph
        self.program = ParallelProgram(
            group,
            ranks,
            trace,
            graph.input_types(*key),
            first_block + slot,
            ahead=not graph.is_first,
            source=None if receives is None else receives.buffers[slot],
            target=None if sends is None else sends.buffers[slot],
        )
        """The program."""
        masks = [mask for own in self.program.inputs for mask in own[-graph.n_masks :]]
        self._length = KVLength(views, masks, key[1])
        self._masks = self.program.input_arrays[-graph.n_masks :]  # for all KV slots
        self._n_start = int(receives is None)  # arrays of the first input
        self.seconds = 0.0
        """The shortest time of a batch in flight; 0 before the first."""
        self._lengths: set[int] = set()  # with which the program ran, or is about to run

    def write(self, batch: Batch) -> None:
        """Write all inputs of a batch that do not depend on the previous stage."""
        arrays, n_kv = self.program.input_arrays, batch.mask.shape[1]
        if n_kv != self._length.n_kv:
            self._length.set(n_kv)
            arrays[-len(self._masks) :] = [shortened(mask, n_kv) for mask in self._masks]
            self.program.shorten_last_input(arrays[-1].nbytes)
        if n_kv not in self._lengths:  # flash attention may need more scratch memory than before
            self._lengths.add(n_kv)
            self.program.renew()
        for target, values in zip(arrays[self._n_start :], self.graph.input_values(batch), strict=True):
            fill(target, values)

    def write_start(self, batch: Batch, x: npt.NDArray[np.float32] | None) -> None:
        """Write the first input: tokens, or ``x``, the result of the previous stage. With a link, it is there."""
        if self._n_start:
            fill(self.program.input_arrays[0], batch.tokens if x is None else x[: len(batch.tokens)])

    def close(self) -> None:
        """Free the program."""
        self.program.close()


class Stage(Closing):
    """A pipeline stage with its devices.

    Parameters
    ----------
    graph
        The graph of the layers.
    group
        The devices, which several stages may share. The caller closes it.
    receives, sends
        Links from the previous stage and to the next one, if there are any. The second is closed with this object.
    number
        Number of the stage among those that share the group.
    n_slots
        Number of batches for which it has memory for inputs and results.
    """

    def __init__(
        self,
        graph: StageGraph,
        group: Group,
        receives: Link | None = None,
        sends: Link | None = None,
        *,
        number: int = 0,
        n_slots: int = 2,
    ) -> None:
        self.graph, self.group, self.receives, self.sends, self.n_slots = graph, group, receives, sends, n_slots
        self._first_block = number * n_slots
        self.n_built = 0
        """Number of programs built so far."""
        self._n_batch = self._n_slots = 0
        self._programs: LRU[tuple[Key, int], StageProgram] = LRU(_PROGRAMS)
        self._prepared: tuple[Batch, StageProgram] | None = None  # inputs are written

    def reserve(self, n_batch: int, n_slots: int) -> None:
        """Allocate memory for the largest batch now, so that loading fails if there is too little.

        Raises
        ------
        OutOfMemoryError
            If a device has too little memory.
        """
        self._n_batch, self._n_slots = n_batch, n_slots
        self._new_program((n_batch, n_slots, 1), 0).close()
        if self.group.mirrors:
            for slot in range(1, self.n_slots):  # as large as the first: batches in flight use all
                self.group.host_block(1, self._first_block + slot)

    def key_of(self, batch: Batch) -> Key:
        """Return the sizes of the graph that computes a batch."""
        n, n_kv, n_out = len(batch.tokens), batch.mask.shape[1], len(batch.output_ids)
        if not self.graph.is_resizable:
            return n, n_kv, n_out
        is_exact = self.receives is not None and self.receives.is_exact
        n_rows = n if is_exact else min(bucket(n), self._n_batch)
        return n_rows, self._n_slots, output_bucket(n, n_out, n_rows)

    def prepare(self, batch: Batch, slot: int = 0) -> StageProgram:
        """Return the program for a batch, after writing all inputs that do not depend on the previous stage.

        Parameters
        ----------
        slot
            Number of the block of host memory for inputs and results. One is written while a program uses another.
        """
        program = self.write(batch, slot)
        self._prepared = batch, program
        return program

    def write(self, batch: Batch, slot: int) -> StageProgram:
        """Do as :meth:`prepare`, for a caller that runs the program itself."""
        program = self.program(batch, slot)
        program.write(batch)
        return program

    def prepare_and_record(self, batch: Batch) -> None:
        """Prepare a batch, and record the beginning of its program ahead; see ``RecordAhead.record``."""
        self.prepare(batch).program.record()

    def run(
        self,
        batch: Batch,
        x: npt.NDArray[np.float32] | None = None,
        *,
        meanwhile: Callable[[], object] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Compute a batch. The result is valid until the next run.

        Parameters
        ----------
        x
            Result of the previous stage, None for the first stage.
        meanwhile
            Called while the device computes. It must not wait for locks that another thread may hold.
        """
        program = self._ready(batch, x)
        program.compute(meanwhile)
        return self._result(program, batch)

    def submit(self, batch: Batch) -> Callable[[], npt.NDArray[np.float32]]:
        """Begin to compute a batch, of tokens or of what is in the link.

        Call :meth:`finish` afterwards, and then what this returns for the result, which is valid until the next run.
        """
        program = self._ready(batch, None)
        program.submit()
        return partial(self._result, program, batch)

    def _result(self, program: ParallelProgram, batch: Batch) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = program.result()
        return found[: len(batch.output_ids)] if self.graph.is_last else found

    def run_and_poll(
        self,
        batch: Batch,
        x: npt.NDArray[np.float32] | None,
        meanwhile: Callable[[], object],
        finish: Callable[[], object],
    ) -> npt.NDArray[np.float32]:
        """Compute a batch, and return the result once it is in host memory.

        The device may not be done by then: call :meth:`finish` afterwards, also after an exception.

        Parameters
        ----------
        batch, x, meanwhile
            As for :meth:`run`.
        finish
            Called after a timeout. It must call :meth:`finish` of this stage.
        """
        return self._ready(batch, x).submit_and_poll(meanwhile, finish)

    def finish(self, *, if_free: bool = False) -> None:
        """Wait for the device. With ``if_free``, return at once if another thread holds it."""
        self.group.executor.finish(if_free=if_free)

    def _ready(self, batch: Batch, x: npt.NDArray[np.float32] | None) -> ParallelProgram:
        """Return the program for a batch, after writing all inputs."""
        if self._prepared is None or self._prepared[0] is not batch:
            self.prepare(batch)
        assert self._prepared is not None
        (_, program), self._prepared = self._prepared, None
        program.write_start(batch, x)
        return program.program

    def program(self, batch: Batch, slot: int = 0) -> StageProgram:
        """Return the program for a batch. The last few programs are kept."""
        key = self.key_of(batch)
        return self._programs.get((key, slot), lambda: self._new_program(key, slot))

    def _new_program(self, key: Key, slot: int) -> StageProgram:
        self.n_built += 1
        with self.group.lock:  # the group's memory may grow, and its other stages have threads of their own
            return StageProgram(
                self.graph, self.group, key, slot, self.receives, self.sends, first_block=self._first_block
            )

    @property
    def programs(self) -> tuple[ParallelProgram, ...]:
        """The kept programs, from the least to the most recently used."""
        return tuple(each.program for each in self._programs.values)

    def assignment(self) -> list[tuple[Tensor, Backend]]:
        """Return the nodes that the last run computed, each with its backend."""
        if not self.programs:
            return []
        each = zip(self.programs[-1].step_graphs, self.group.backends, strict=True)
        return [(t, backend) for graphs, backend in each for graph in graphs.graphs for t in graph.nodes]

    def clear(self) -> None:
        """Close the programs."""
        self._prepared = None
        self._programs.clear()

    def close(self) -> None:
        """Free programs and memory."""
        self.clear()
        if self.sends is not None:
            self.sends.close()
