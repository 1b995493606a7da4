"""A function traced for several devices, with memory, ready to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ggml_cffi import c
from ggml_cffi.core import dtypes
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.buffer import Buffer
from ggml_cffi.core.handle import Closing, Owner
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Op, Status, Type
from ggml_cffi.errors import AbortedError, GgmlError, UnsupportedOpError
from ggml_cffi.parallel.arena import arrange
from ggml_cffi.parallel.executors.arrivals import Arrivals
from ggml_cffi.parallel.rank import AllGather, Rank
from ggml_cffi.parallel.step_graphs import can_record_ahead
from ggml_cffi.parallel.step_plan import StepGraphs
from ggml_cffi.scheduler.checks import check_ops, for_the_cpu

if TYPE_CHECKING:
    from ggml_cffi.parallel.group import Group

_ALIGN = 256  # of what devices share; no device asks for more

#: Operations whose every number GPUs write once, complete.
_WRITTEN_ONCE = frozenset({Op.MUL_MAT, Op.ADD, Op.SUB, Op.MUL, Op.DIV, Op.SCALE, Op.UNARY, Op.GLU})


class ParallelTrace(Closing):
    """One signature of a parallel function: a graph for each step of each device, and what memory that takes.

    Parameters
    ----------
    backends
        One for each rank.
    ranks
        As many.
    function
        What to trace.
    inputs
        Shape and type of each array.
    ahead
        Whether the only device begins with what can be recorded ahead. Where there are several, they do so anyway.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        ranks: Sequence[Rank],
        function: Callable[..., Any],
        inputs: Sequence[tuple[tuple[int, ...], Type]],
        *,
        ahead: bool = False,
    ) -> None:
        self._hold = (ahead or len(ranks) > 1) and all(can_record_ahead(b.device) for b in backends)
        self.backends = tuple(backends)
        self.ranks = list(ranks)
        """What was traced, for each device."""
        self.plans: list[StepGraphs] = []  # the graphs of each device
        try:
            self._layout = _Layout(inputs)
            self.inputs = [self._new_inputs(rank, inputs) for rank in self.ranks]
            self._results(function)
            self._measure()
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ tracing

    def _new_inputs(self, rank: Rank, inputs: Sequence[tuple[tuple[int, ...], Type]]) -> list[Tensor]:
        return [rank.context.new_tensor(kind, shape, name=f"input {i}") for i, (shape, kind) in enumerate(inputs)]

    def _results(self, function: Callable[..., Any]) -> None:
        """Trace; have each rank write its results to host memory, and make the graphs."""
        found = [function(rank, *own) for rank, own in zip(self.ranks, self.inputs, strict=True)]
        self._single = not isinstance(found[0], tuple)
        results = [list(r) if isinstance(r, tuple) else [r] for r in found]
        self._check(results)
        self._axes = [r.axis if isinstance(r, AllGather) else None for r in results[0]]
        self._outputs: list[list[tuple[Tensor, Tensor]]] = []  # of each rank, with where they go
        for rank, own in zip(self.ranks, results, strict=True):
            # What all have is taken from the first.
            parts = [r.part if isinstance(r, AllGather) else r for r in own if rank.index == 0 or _is_part(r)]
            self._outputs.append([(t, rank.context.new_tensor(t.dtype, t.shape, name="result")) for t in parts])
        self._blobs: list[tuple[Tensor, Tensor]] = []
        in_levels = not self.backends[0].device.is_cpu
        for rank, outputs in zip(self.ranks, self._outputs, strict=True):
            first = []
            if self._layout.size:
                # All inputs in one copy, from host memory to the device's.
                source, target = (rank.context.new_tensor(Type.I32, (self._layout.size // 4,)) for _ in range(2))
                self._blobs.append((source, target))
                first.append(rank.context.build(c.ggml_cpy, 1, source.ptr, target.ptr))
            self.plans.append(StepGraphs(rank, first, outputs, in_levels=in_levels, hold=self._hold))

    def _check(self, results: Sequence[Sequence[Any]]) -> None:
        for rank, own in zip(self.ranks, results, strict=True):
            for r in own:
                if not isinstance(r, Tensor | AllGather):
                    raise TypeError(f"the function returned {r!r}: tensors are needed, or rank.all_gather(tensor)")
                t = r.part if isinstance(r, AllGather) else r
                if not dtypes.has_numpy(t.dtype) or not t.size or rank.context not in t.context.reachable():
                    raise ValueError(f"{t!r} is no result that rank {rank.index} could give: cast it, or compute it")
            mine = [s.partial.shape for s in rank.all_reduces], [type(r) for r in own]
            first = [s.partial.shape for s in self.ranks[0].all_reduces], [type(r) for r in results[0]]
            if mine != first:
                raise ValueError(
                    f"rank {rank.index} adds up {mine[0]} and returns {len(mine[1])} results, rank 0 {first[0]} and "
                    f"{len(first[1])}: all ranks must do the same"
                )

    # ------------------------------------------------------------------ memory

    def _measure(self) -> None:
        layout, sums = self._layout, self.ranks[0].all_reduces
        self._slot = max((_aligned(s.slots[0].nbytes) for s in sums), default=0)
        # Each sum has slots of its own, which nobody else writes or reads in a run. Where they are large, there are two
        # sets in turns: one is read, the other written.
        self._sets = 2 if any(s.keeps for s in sums) else len(sums)
        at = layout.size + self._sets * len(self.ranks) * self._slot
        self._ends: list[int] = []  # where each rank's results are
        for outputs in self._outputs:
            self._ends.append(at)
            at += sum(_aligned(target.nbytes) for _, target in outputs)
        self.block_size = max(at, 1)
        """Bytes of host memory that all devices share."""
        self.arena_sizes: list[int] = []
        """Bytes of each device's memory for inputs and intermediate results."""
        self._offsets: list[list[int]] = []
        for plan, backend in zip(self.plans, self.backends, strict=True):
            kind = backend.buffer_type
            spans = plan.spans()
            alignment = max(kind.alignment, _ALIGN)
            sizes = [_aligned(c.ggml_backend_buft_get_alloc_size(kind.ptr, p), alignment) for p in spans]
            offsets, total = arrange(sizes, list(spans.values()))
            self._offsets.append(offsets)
            self.arena_sizes.append(max(layout.size + total, alignment))

    def close(self) -> None:
        """Give the graphs up."""
        for plan in self.plans:
            plan.close()
        for rank in self.ranks:
            rank.context.close()


class ParallelProgram(ParallelTrace):
    """A function traced, with memory, ready to run. The programs of one group take turns: they use the same memory,
    but for that of the host, of which those with another ``slot`` use another piece.

    Parameters
    ----------
    group
        The devices, and their memory.
    ranks, function, inputs
        As for ``ParallelTrace``.
    slot
        As for ``Group.block``.
    ahead
        As for ``ParallelTrace``.
    """

    def __init__(
        self,
        group: Group,
        ranks: Sequence[Rank],
        function: Callable[..., Any],
        inputs: Sequence[tuple[tuple[int, ...], Type]],
        slot: int = 0,
        *,
        ahead: bool = False,
    ) -> None:
        self.executor = group.executor
        self._kept: list[Owner] = []
        super().__init__(group.backends, ranks, function, inputs, ahead=ahead)
        try:
            self._memory(group, slot)
        except BaseException:
            self.close()
            raise

    def _memory(self, group: Group, slot: int) -> None:
        layout = self._layout
        shared = group.block(self.block_size, slot)
        for r, (rank, plan, backend) in enumerate(zip(self.ranks, self.plans, self.backends, strict=True)):
            host = shared.buffers[backend.device]
            self._kept.append(host.owner)
            for k, s in enumerate(rank.all_reduces):
                for j, t in enumerate(s.slots):
                    _place(t.ptr, host, self._slot_offset(k, j))
            at = self._ends[r]
            for _, target in self._outputs[r]:
                _place(target.ptr, host, at)
                at += _aligned(target.nbytes)
            self._alloc(plan, backend, host, group.arena(r, self.arena_sizes[r]), r)
        memory = shared.memory
        self.puts = [
            np.ndarray(t.shape, dtypes.numpy_dtype(t.dtype), memory, offset)
            for t, offset in zip(self.inputs[0], layout.offsets, strict=True)
        ]
        """For each input, the array that a run reads: for callers that have checked what they write there."""
        self.takes = self._views(memory, self._ends)
        """For each result, its parts, until the next run of any program of the group with the same slot."""
        self._whole = [
            None if axis is None else _adjoining(parts, axis)
            for parts, axis in zip(self.takes, self._axes, strict=True)
        ]
        self.steps = [plan.steps for plan in self.plans]
        """C graphs of each device, for each step."""
        self._is_new = any(step.held for own in self.steps for step in own)
        self.arrivals = self._arrivals(memory)
        """Where partial sums are seen to arrive; None if they are not."""
        self.landing = self._landing()
        """Where the only result of the only device is seen to arrive; None if it is not."""

    def _views(self, memory: Any, ends: Sequence[int]) -> list[list[npt.NDArray[Any]]]:
        """For each result, the parts of it in host memory."""
        found: list[list[npt.NDArray[Any]]] = [[] for _ in self._axes]
        for r, outputs in enumerate(self._outputs):
            at = ends[r]
            which = [i for i, axis in enumerate(self._axes) if r == 0 or axis is not None]
            for i, (_, target) in zip(which, outputs, strict=True):
                found[i].append(np.ndarray(target.shape, dtypes.numpy_dtype(target.dtype), memory, at))
                at += _aligned(target.nbytes)
        return found

    def _arrivals(self, memory: Any) -> Arrivals | None:
        """The places of all sums, if all steps can be recorded ahead, and each number is written once: by a copy, or by
        an operation that does so.
        """
        sums, n = self.ranks[0].all_reduces, len(self.ranks)
        if not sums or any(s.keeps for s in sums) or any(step.rest for own in self.steps for step in own):
            return None
        for rank, plan in zip(self.ranks, self.plans, strict=True):
            if any(s.partial.ptr in plan.placed and s.partial.op not in _WRITTEN_ONCE for s in rank.all_reduces):
                return None
        return Arrivals(
            [
                [np.ndarray(s.partial.nbytes // 4, np.uint32, memory, self._slot_offset(k, r)) for r in range(n)]
                for k, s in enumerate(sums)
            ]
        )

    def _slot_offset(self, k: int, r: int) -> int:
        """Where in host memory rank ``r`` writes its part of sum ``k``."""
        return self._layout.size + (k % self._sets * len(self.ranks) + r) * self._slot

    def _landing(self) -> Arrivals | None:
        if len(self.ranks) > 1 or self.backends[0].device.is_cpu or len(self.takes) > 1:
            return None
        (t, _), part = self._outputs[0][0], self.takes[0][0]
        if part.dtype != np.float32 or (t.ptr in self.plans[0].placed and t.op not in _WRITTEN_ONCE):
            return None
        return Arrivals([[part.reshape(-1).view(np.uint32)]])

    def _alloc(self, plan: StepGraphs, backend: Backend, host: Buffer, buffer: Buffer, r: int) -> None:
        """Give every tensor of one rank memory, and check what its device is to do."""
        layout, kind = self._layout, backend.buffer_type
        self._kept.append(buffer.owner)
        for p, target in plan.placed.items():
            _place(p, host, int(c.ffi.cast("uintptr_t", target.ptr.data)) - host.base)
        if self._blobs:
            source, target = self._blobs[r]
            _place(source.ptr, host, 0)
            _place(target.ptr, buffer, 0)
        for t, offset in zip(self.inputs[r], layout.offsets, strict=True):
            if t.size:
                _place(t.ptr, buffer, offset)
        for p, offset in zip(plan.spans(), self._offsets[r], strict=True):
            _place(p, buffer, layout.size + offset)
        for graph in plan.graphs:
            for context in graph.contexts:
                loose = [t for t in graph.unallocated_leaves() if t.context is context]
                if loose:
                    context.alloc(kind, loose)
            self._kept += [b.owner for context in graph.contexts for b in context.buffers]
            for p in graph.node_pointers():
                if p.view_src and not p.buffer:
                    c.ggml_backend_view_init(p)
            check_ops(graph, [backend], {}, {})
            unable = for_the_cpu(graph, [backend])
            if graph.calls() or unable:
                p = next(iter(unable), graph.node_pointers()[-1])
                raise UnsupportedOpError(
                    f"{graph.wrap(p)!r} cannot be computed by {backend.name} in parallel with others: operations "
                    "written in Python, and views that start where GPUs cannot, are for the CPU (use cont)"
                )

    # ------------------------------------------------------------------ running

    def run(self, arrays: Sequence[npt.NDArray[Any]]) -> Any:
        """Set the inputs, compute, and read the results; errors as :class:`ParallelFunction`."""
        for i, (array, put) in enumerate(zip(arrays, self.puts, strict=True)):
            if put.dtype.kind == "i":
                raw = np.ascontiguousarray(array, put.dtype).reshape(-1).view(np.uint8)
                for own in self.inputs:
                    own[i].check_limit(raw)
            put[...] = array
        self.compute()
        views = [self.result(i) for i in range(len(self.takes))]
        found = [a if a.base is None else a.copy() for a in views]
        return found[0] if self._single else tuple(found)

    def result(self, i: int = 0) -> npt.NDArray[Any]:
        """The ``i``-th result of the last run, put together; as long as ``takes`` are."""
        parts, axis, whole = self.takes[i], self._axes[i], self._whole[i]
        if axis is None:
            return parts[0]
        return np.concatenate(parts, axis) if whole is None else whole

    def compute(self, meanwhile: Callable[[], object] | None = None) -> None:
        """Compute with what is in ``puts``, and wait; the results are in ``takes``.

        Parameters
        ----------
        meanwhile
            Called while a device that has no others to wait for computes, and its lock is held; else before.

        Raises
        ------
        AbortedError, GgmlError
            If a device reports failure.
        """
        if not self._is_new:
            _check(self.executor.run(self.steps, meanwhile, self.arrivals))
            return
        if meanwhile is not None:
            meanwhile()
        _check(self.executor.run_first(self.steps))
        self._is_new = False

    def record(self) -> None:
        """Have the only device record the beginning of the program, if it can, before the inputs are there; see
        ``Executor.record``.
        """
        if not self._is_new:
            self.executor.record(self.steps)

    def hand_over(
        self, meanwhile: Callable[[], object], finish: Callable[[], object] | None = None
    ) -> npt.NDArray[Any]:
        """The result of a program with a ``landing``, as soon as it has arrived. Errors as :meth:`compute`.

        Parameters
        ----------
        meanwhile
            Called while the device computes, the first time after that. It may not be done afterwards: call
            ``driver.finish``, also after an exception.
        finish
            Called where the result is not seen to arrive; default ``driver.finish``. To be given by who holds the lock
            of another device, which is to be released before this one's is waited for.
        """
        assert self.landing is not None
        if self._is_new:
            self.compute()
            meanwhile()
            return self.result()
        self.landing.clear(0)
        _check(self.executor.begin(self.steps))
        meanwhile()
        self.landing.wait(0, finish or self.executor.finish)
        return self.result()

    def close(self) -> None:
        """Give the program up."""
        super().close()
        self._kept.clear()

    def __repr__(self) -> str:
        nodes = [sum(len(g) for g in plan.graphs) for plan in self.plans]
        return f"<ParallelProgram of {len(self.plans[0].graphs)} steps on {len(self.plans)} devices, {nodes} nodes>"


def _check(status: int) -> None:
    if status:
        error = AbortedError if status == Status.ABORTED else GgmlError
        raise error(f"the computation failed: {Status(status).name.lower()}")


class _Layout:
    """Where the inputs lie, in host memory and on each device alike."""

    def __init__(self, inputs: Sequence[tuple[tuple[int, ...], Type]]) -> None:
        self.offsets: list[int] = []
        self.size = 0
        for shape, kind in inputs:
            self.offsets.append(self.size)
            self.size += _aligned(int(np.prod(shape, dtype=np.int64)) * dtypes.type_size(kind))


def _aligned(size: int, alignment: int = _ALIGN) -> int:
    return -(-size // alignment) * alignment


def _place(p: Any, buffer: Buffer, offset: int) -> None:
    if p.buffer:
        raise ValueError("a tensor that the program would place has memory already")
    c.ggml_backend_tensor_alloc(buffer.ptr, p, c.ffi.cast("void *", buffer.base + offset))


def _adjoining(parts: Sequence[npt.NDArray[Any]], axis: int) -> npt.NDArray[Any] | None:
    """Parts that lie in memory as the whole would, such as those of one row, as one array; None if they do not."""
    first, axis = parts[0], axis % parts[0].ndim
    ends = [part.ctypes.data + part.nbytes for part in parts]
    if any(part.ctypes.data != end for part, end in zip(parts[1:], ends, strict=False)) or any(
        n != 1 for n in first.shape[:axis]
    ):
        return None
    shape = (*first.shape[:axis], sum(part.shape[axis] for part in parts), *first.shape[axis + 1 :])
    assert first.base is not None
    start = first.ctypes.data - np.frombuffer(first.base, np.uint8).ctypes.data
    return np.ndarray(shape, first.dtype, first.base, start)


def _is_part(result: Any) -> bool:
    return isinstance(result, AllGather)
