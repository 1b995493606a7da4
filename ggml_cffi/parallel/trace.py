"""Trace of a function for several devices: a graph for each step of each device, and the memory that they need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ggml_cffi import c
from ggml_cffi.core import dtypes
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.handle import Closing
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.core.unified import are_peers
from ggml_cffi.enums import Type
from ggml_cffi.parallel.arena import assign_offsets
from ggml_cffi.parallel.executors import choose_step_maker
from ggml_cffi.parallel.rank import DIRECT, AllGather, Rank
from ggml_cffi.parallel.step_graphs import StepGraphs

_ALIGNMENT = 256  # bytes: the alignment of tensors in shared memory; no device needs more

#: Shape and type of an input array.
Signature = Sequence[tuple[tuple[int, ...], Type]]


class ParallelTrace(Closing):
    """The trace of a parallel function for one signature: graphs without memory, and the memory that they need.

    Parameters
    ----------
    backends
        The backends, one for each rank.
    ranks
        The ranks, one for each backend.
    function
        The function to trace.
    inputs
        Shape and type of each array.
    ahead
        True to make steps that can be recorded ahead; see :mod:`ggml_cffi.parallel.executors.record_ahead`.
    receives
        True if another program writes the first input into memory of the device.
    sends
        True if the results go into memory of another device.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        ranks: Sequence[Rank],
        function: Callable[..., Any],
        inputs: Signature,
        *,
        ahead: bool = False,
        receives: bool = False,
        sends: bool = False,
    ) -> None:
        self.backends = tuple(backends)
        self._n_received, self._sends = int(receives), sends
        self.sums_on_devices = len(ranks) > 1 and are_peers([b.device for b in backends])
        """True if partial sums are in the devices' own memory, where their peers read them."""
        self.ranks = list(ranks)
        """The traces, one for each device."""
        for rank in self.ranks:
            rank.reads_peers = self.sums_on_devices
        self.step_graphs: list[StepGraphs] = []
        """Graphs of each device."""
        try:
            self._layout = InputLayout(inputs[self._n_received :])
            self.inputs = [
                [rank.context.new_tensor(dtype, shape, name=f"input {i}") for i, (shape, dtype) in enumerate(inputs)]
                for rank in self.ranks
            ]
            """Inputs of each device."""
            self._trace(function, ahead)
            self._measure()
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ tracing

    def _trace(self, function: Callable[..., Any], ahead: bool) -> None:
        """Trace the function on each rank, add the transfer of results to host memory, and build the graphs."""
        found = [function(rank, *own) for rank, own in zip(self.ranks, self.inputs, strict=True)]
        self._single = not isinstance(found[0], tuple)
        results = [list(r) if isinstance(r, tuple) else [r] for r in found]
        self._check(results)
        self._axes = [r.axis if isinstance(r, AllGather) else None for r in results[0]]
        self._outputs: list[list[tuple[Tensor, Tensor]]] = []  # of each rank, with their places in host memory
        for rank, own in zip(self.ranks, results, strict=True):
            # If all ranks have a result, the first rank writes it.
            parts = [
                r.part if isinstance(r, AllGather) else r for r in own if rank.index == 0 or isinstance(r, AllGather)
            ]
            self._outputs.append([(t, rank.context.new_tensor(t.dtype, t.shape, name="result")) for t in parts])
        # Of all inputs of a rank, from host memory to its device: source, target, and the node that copies.
        self._copies: list[tuple[Tensor, Tensor, Tensor]] = []
        devices = [backend.device for backend in self.backends]
        for rank, outputs in zip(self.ranks, self._outputs, strict=True):
            first = []
            if self._layout.size:
                source, target = (rank.context.new_tensor(Type.I32, (self._layout.size // 4,)) for _ in range(2))
                first.append(rank.context.build(c.ggml_cpy, 1, source.ptr, target.ptr))
                self._copies.append((source, target, first[0]))
            maker = choose_step_maker(devices, ahead=ahead)
            self.step_graphs.append(StepGraphs(rank, first, outputs, maker, side_by_side=not devices[0].is_cpu))

    def _check(self, results: Sequence[Sequence[Any]]) -> None:
        for rank, own in zip(self.ranks, results, strict=True):
            for r in own:
                if not isinstance(r, Tensor | AllGather):
                    raise TypeError(f"the function returned {r!r}: return tensors, or rank.all_gather(tensor)")
                t = r.part if isinstance(r, AllGather) else r
                if not dtypes.has_numpy(t.dtype) or not t.size or rank.context not in t.context.reachable():
                    raise ValueError(
                        f"{t!r} cannot be a result of rank {rank.index}: a result has elements, a type that numpy has "
                        "(use cast), and is computed in rank.context"
                    )
            mine = [s.partial.shape for s in rank.all_reduces], [type(r) for r in own]
            first = [s.partial.shape for s in self.ranks[0].all_reduces], [type(r) for r in results[0]]
            if mine != first:
                raise ValueError(
                    f"rank {rank.index} all-reduces {mine[0]} and returns {len(mine[1])} results, rank 0 {first[0]} "
                    f"and {len(first[1])}: all ranks must do the same"
                )

    # ------------------------------------------------------------------ memory

    def _measure(self) -> None:
        layout, all_reduces = self._layout, self.ranks[0].all_reduces
        self._slot = max((aligned(s.slots[0].nbytes) for s in all_reduces), default=0)
        # Each all-reduce has slots of its own, which nothing else reads or writes in a run. Large all-reduces alternate
        # between two sets: the devices read one and write the other.
        large = any(s.keeps_partial or s.partial.nbytes > DIRECT for s in all_reduces)
        self._sets = min(2, len(all_reduces)) if large else len(all_reduces)
        at = layout.size
        if not self.sums_on_devices:
            at += self._sets * len(self.ranks) * self._slot
        self._result_offsets: list[int] = []  # of each rank's results
        for outputs in self._outputs:
            self._result_offsets.append(at)
            at += 0 if self._sends else sum(aligned(target.nbytes) for _, target in outputs)
        self.host_bytes = max(at, 1)
        """Bytes of host memory that all devices share."""
        self.arena_bytes: list[int] = []
        """Bytes of inputs and intermediate tensors on each device."""
        self._offsets: list[list[int]] = []
        self._slots_at: list[int] = []  # of each rank's partial sums in its arena
        for graphs, backend in zip(self.step_graphs, self.backends, strict=True):
            buffer_type = backend.buffer_type
            lifetimes = graphs.lifetimes()
            alignment = max(buffer_type.alignment, _ALIGNMENT)
            sizes = [aligned(c.ggml_backend_buft_get_alloc_size(buffer_type.ptr, p), alignment) for p in lifetimes]
            offsets, total = assign_offsets(sizes, list(lifetimes.values()))
            self._offsets.append(offsets)
            size = aligned(layout.size + total, alignment)
            self._slots_at.append(size)
            self.arena_bytes.append(max(size + self._sets * self._slot * self.sums_on_devices, alignment))

    def _slot_place(self, k: int, r: int) -> int:
        """Return the offset at which rank ``r`` writes its partial sum of all-reduce ``k``.

        The offset is in the rank's arena if :attr:`sums_on_devices`, else in host memory.
        """
        number = k % self._sets
        if self.sums_on_devices:
            return self._slots_at[r] + number * self._slot
        return self._layout.size + (number * len(self.ranks) + r) * self._slot

    def close(self) -> None:
        """Free the graphs."""
        for graphs in self.step_graphs:
            graphs.close()
        for rank in self.ranks:
            rank.context.close()


class InputLayout:
    """Offsets of the inputs that come from host memory, the same there and on each device."""

    def __init__(self, inputs: Signature) -> None:
        self.offsets: list[int] = []
        self.size = 0
        """Bytes of all inputs."""
        for shape, dtype in inputs:
            self.offsets.append(self.size)
            self.size += aligned(int(np.prod(shape, dtype=np.int64)) * dtypes.type_size(dtype))


def aligned(size: int, alignment: int = _ALIGNMENT) -> int:
    """Return ``size`` rounded up to a multiple of ``alignment``."""
    return -(-size // alignment) * alignment
