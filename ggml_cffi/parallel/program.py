"""A function that was traced for several devices, with memory, ready to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt

from ggml_cffi import c
from ggml_cffi.core import dtypes
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.buffer import Buffer
from ggml_cffi.core.handle import Owner
from ggml_cffi.core.shaders import first_run
from ggml_cffi.enums import Status
from ggml_cffi.errors import AbortedError, ClosedError, GgmlError, UnsupportedOpError
from ggml_cffi.parallel.executors import WRITTEN_ONCE, PolledResults, can_poll
from ggml_cffi.parallel.group import Group
from ggml_cffi.parallel.mirror import Mirror
from ggml_cffi.parallel.rank import Rank
from ggml_cffi.parallel.step_graphs import StepGraphs
from ggml_cffi.parallel.trace import ParallelTrace, Signature, aligned
from ggml_cffi.scheduler.checks import check_ops, find_cpu_only


class ParallelProgram(ParallelTrace):
    """A traced function with memory, ready to run.

    The programs of one group run one after another, because they use the same memory. Programs with different slots use
    different host memory.

    Parameters
    ----------
    group
        The devices and their memory.
    ranks, function, inputs
        As for ``ParallelTrace``.
    slot
        As for ``Group.host_block``.
    ahead
        True to record the beginning of the program ahead on the only device of a group. Several devices record each
        step ahead if their executor supports it.
    source
        Memory of the only device with the first input, which another program writes there.
    target
        Memory that the only result goes to, on this device or a peer.
    """

    def __init__(
        self,
        group: Group,
        ranks: Sequence[Rank],
        function: Callable[..., Any],
        inputs: Signature,
        slot: int = 0,
        *,
        ahead: bool = False,
        source: Buffer | None = None,
        target: Buffer | None = None,
    ) -> None:
        self.executor = group.executor
        self._owners: list[Owner] = []
        self._is_new = True
        ahead = self.executor.records_ahead and (ahead or len(ranks) > 1)
        receives, sends = source is not None, target is not None
        super().__init__(group.backends, ranks, function, inputs, ahead=ahead, receives=receives, sends=sends)
        try:
            self._alloc(group, slot, source, target)
        except BaseException:
            self.close()
            raise

    def _alloc(self, group: Group, slot: int, source: Buffer | None, target: Buffer | None) -> None:
        """Allocate all tensors."""
        layout = self._layout
        shared = group.host_block(self.host_bytes, slot)
        for graphs, backend in zip(self.step_graphs, self.backends, strict=True):
            _check_graphs(graphs, backend)  # now: a backend refuses operands in the memory of a peer
        for memory, t in ((source, self.inputs[0][0]), (target, self._outputs[0][0][1])):
            if memory is not None:
                _put(t.ptr, memory, 0)
                self._owners.append(memory.owner)
        arenas = [group.arena(r, size) for r, size in enumerate(self.arena_bytes)]
        for r, (rank, graphs, backend) in enumerate(zip(self.ranks, self.step_graphs, self.backends, strict=True)):
            host = shared.buffers[backend.device]
            self._owners += [host.owner, arenas[r].owner]
            for k, s in enumerate(rank.all_reduces):
                for j, t in enumerate(s.slots):
                    place = self._slot_place(k, j)
                    _put(t.ptr, arenas[j] if self.sums_on_devices else host, place)
            at = self._result_offsets[r]
            for _, result in () if self._sends else self._outputs[r]:
                _put(result.ptr, host, at)
                at += aligned(result.nbytes)
            self._alloc_rank(graphs, backend, host, arenas[r], r)
        memory = shared.memory
        self.input_arrays = [
            np.ndarray(t.shape, dtypes.numpy_dtype(t.dtype), memory, offset)
            for t, offset in zip(self.inputs[0][self._n_received :], layout.offsets, strict=True)
        ]
        """For each input from the host the array that a run reads. Callers must check values that they write there."""
        self.output_arrays = self._views(memory)
        """For each result its parts, valid until the group runs a program with the same slot again. A result that goes
        to other memory has no elements here."""
        self._joined = [
            None if axis is None else _adjoining(parts, axis)
            for parts, axis in zip(self.output_arrays, self._axes, strict=True)
        ]
        self._mirror = None
        if group.mirrors:
            results = slice(layout.size + self._sets * self._slot, self.host_bytes)
            self._mirror = Mirror(self.backends[0], shared, layout.size, results)
        self.steps = self.executor.arrange([graphs.steps for graphs in self.step_graphs])
        """The steps of each device."""
        self.renew()
        self._compiles = True  # until the first run, in which the drivers compile shaders
        self.polled_sums = self._polled_sums(memory)
        """Places of the partial sums, None if they cannot be polled."""
        self.polled_output = self._polled_output()
        """Place of the only result of the only device, None if it cannot be polled."""

    def _alloc_rank(self, graphs: StepGraphs, backend: Backend, host: Buffer, arena: Buffer, r: int) -> None:
        """Allocate every other tensor of one rank."""
        layout, buffer_type = self._layout, backend.buffer_type
        for p, target in graphs.in_shared_memory.items():
            _check_new(p)
            c.ggml_backend_tensor_alloc(target.ptr.buffer, p, target.ptr.data)
        if self._copies:
            source, target, _ = self._copies[r]
            _put(source.ptr, host, 0)
            _put(target.ptr, arena, 0)
        for t, offset in zip(self.inputs[r][self._n_received :], layout.offsets, strict=True):
            if t.size:
                _put(t.ptr, arena, offset)
        for p, offset in zip(graphs.lifetimes(), self._offsets[r], strict=True):
            _put(p, arena, layout.size + offset)
        for graph in graphs.graphs:
            for context in graph.contexts:
                loose = [t for t in graph.unallocated_leaves() if t.context is context]
                if loose:
                    context.alloc(buffer_type, loose)
            self._owners += [b.owner for context in graph.contexts for b in context.buffers]
            for p in graph.node_pointers():
                if p.view_src and not p.buffer:
                    c.ggml_backend_view_init(p)

    def _views(self, memory: Any) -> list[list[npt.NDArray[Any]]]:
        """Return for each result its parts in host memory."""
        if self._sends:
            return [[np.empty(0, np.float32)]]
        found: list[list[npt.NDArray[Any]]] = [[] for _ in self._axes]
        for r, (outputs, at) in enumerate(zip(self._outputs, self._result_offsets, strict=True)):
            numbers = [i for i, axis in enumerate(self._axes) if r == 0 or axis is not None]
            for i, (_, target) in zip(numbers, outputs, strict=True):
                found[i].append(np.ndarray(target.shape, dtypes.numpy_dtype(target.dtype), memory, at))
                at += aligned(target.nbytes)
        return found

    def _polled_sums(self, memory: Any) -> PolledResults | None:
        """Return the places of all partial sums, if each is written once and every step can be recorded ahead."""
        all_reduces, n = self.ranks[0].all_reduces, len(self.ranks)
        if not all_reduces or self.sums_on_devices or any(s.keeps_partial for s in all_reduces):
            return None
        if any(step.immediate for own in self.steps for step in own):
            return None
        for rank, graphs in zip(self.ranks, self.step_graphs, strict=True):
            direct = [s.partial for s in rank.all_reduces if s.partial.ptr in graphs.in_shared_memory]
            if any(t.op not in WRITTEN_ONCE for t in direct):
                return None
        return PolledResults(
            [
                [np.ndarray(s.partial.nbytes // 4, np.uint32, memory, self._slot_place(k, r)) for r in range(n)]
                for k, s in enumerate(all_reduces)
            ]
        )

    def _polled_output(self) -> PolledResults | None:
        if len(self.ranks) > 1 or len(self.output_arrays) > 1 or self._mirror is not None or self._sends:
            return None
        if not can_poll(self.backends[0].device):
            return None
        (t, _), part = self._outputs[0][0], self.output_arrays[0][0]
        if part.dtype != np.float32 or (t.ptr in self.step_graphs[0].in_shared_memory and t.op not in WRITTEN_ONCE):
            return None
        return PolledResults([[part.reshape(-1).view(np.uint32)]])

    # ------------------------------------------------------------------ running

    def shorten_last_input(self, nbytes: int) -> None:
        """Copy only the first ``nbytes`` bytes of the last input to the devices. No run may be in progress.

        Call it after other nodes were changed.
        """
        n = -(-(self._layout.offsets[-1] + nbytes) // 4)
        if self._mirror is not None:
            self._mirror.n_input_bytes = 4 * n
        for copy in self._copies:
            for t in copy:
                t.ptr.ne[0] = n
                t.ptr.nb[1] = t.ptr.nb[2] = t.ptr.nb[3] = 4 * n
        for graphs in self.step_graphs:
            graphs.nodes_changed()

    def run(self, arrays: Sequence[npt.NDArray[Any]]) -> Any:
        """Write the inputs, compute, and return copies of the results. See ``ParallelFunction`` for the errors."""
        self._check_open()
        for i, (array, target) in enumerate(zip(arrays, self.input_arrays, strict=True)):
            if target.dtype.kind == "i":
                raw = np.ascontiguousarray(array, target.dtype).reshape(-1).view(np.uint8)
                for own in self.inputs:
                    own[i].check_row_numbers(raw)
            target[...] = array
        self.compute()
        views = [self.result(i) for i in range(len(self.output_arrays))]
        found = [a if a.base is None else a.copy() for a in views]
        return found[0] if self._single else tuple(found)

    def result(self, i: int = 0) -> npt.NDArray[Any]:
        """Return the ``i``-th result of the last run, its parts joined. It is valid as long as ``output_arrays``."""
        parts, axis, whole = self.output_arrays[i], self._axes[i], self._joined[i]
        if axis is None:
            return parts[0]
        return np.concatenate(parts, axis) if whole is None else whole

    def compute(self, meanwhile: Callable[[], object] | None = None) -> None:
        """Compute from ``input_arrays`` to ``output_arrays``, and wait.

        Parameters
        ----------
        meanwhile
            Called once: see :meth:`Executor.run <ggml_cffi.parallel.executors.Executor.run>`.

        Raises
        ------
        AbortedError, GgmlError
            If a device reports failure.
        ClosedError
            If the program is closed: the group was closed, or has since run many programs for other signatures.
        """
        self._check_open()
        if self._compiles:
            with self._compiling():
                self.compute(meanwhile)
            return
        if self._mirror is None:
            self._run(meanwhile)
            return
        with self.executor.locks:
            self._mirror.send()
            self._run(meanwhile)
            self._mirror.receive()

    def _run(self, meanwhile: Callable[[], object] | None) -> None:
        """Run the steps, and wait."""
        if not self._is_new:
            _check(self.executor.run(self.steps, meanwhile, self.polled_sums))
            return
        if meanwhile is not None:
            meanwhile()
        _check(self.executor.run_first(self.steps))
        self._is_new = False

    def renew(self) -> None:
        """Run the program like a new one next time: its nodes have other sizes, for which a device may allocate."""
        self._is_new = any(step.deferred for own in self.steps for step in own)

    def _compiling(self) -> AbstractContextManager[None]:
        """Return the context manager of the run that compiles shaders, if they are new to a device."""
        self._compiles = False
        return first_run([b.device for b in self.backends], self.step_graphs[0].node_pointers)

    def record(self) -> None:
        """Record the beginning of the program on the only device, if the executor can; see ``RecordAhead.record``.

        Nothing is recorded if a run first copies the inputs to the device: recorded work would come before the copy.
        """
        self._check_open()
        if not (self._is_new or self._compiles or self._mirror):
            self.executor.record(self.steps)

    def submit(self) -> None:
        """Begin to compute on the only device. Call ``executor.finish`` before the results are used.

        The first run, and one that copies inputs to the device, are complete on return. See :meth:`compute` for the
        errors.
        """
        self._check_open()
        if self._is_new or self._compiles or self._mirror:
            self.compute()
        else:
            _check(self.executor.submit(self.steps))

    def submit_and_poll(
        self, meanwhile: Callable[[], object], finish: Callable[[], object] | None = None
    ) -> npt.NDArray[Any]:
        """Compute a program with a ``polled_output``, and return the result once it is in host memory.

        The device may not be done by then: call ``executor.finish`` afterwards, also after an exception. See
        :meth:`compute` for the errors.

        Parameters
        ----------
        meanwhile
            Called while the device computes, in the first run after it.
        finish
            Called after a timeout; default ``executor.finish``. A caller that holds the lock of another device passes
            a function that releases it before it waits for this device.
        """
        self._check_open()
        assert self.polled_output is not None
        if self._is_new or self._compiles:
            self.compute()
            meanwhile()
            return self.result()
        self.polled_output.clear(0)
        _check(self.executor.submit(self.steps))
        meanwhile()
        self.polled_output.wait(0, finish or self.executor.finish)
        return self.result()

    def _check_open(self) -> None:
        if not self._owners:
            raise ClosedError("this program is closed: trace the function again in an open group")

    def close(self) -> None:
        """Free the graphs, and release the memory."""
        super().close()
        self._owners.clear()

    def __repr__(self) -> str:
        nodes = [sum(len(g) for g in graphs.graphs) for graphs in self.step_graphs]
        steps, n = len(self.step_graphs[0].graphs), len(self.step_graphs)
        return f"<ParallelProgram of {steps} steps on {n} devices, {nodes} nodes>"


def _check(status: int) -> None:
    if status:
        error = AbortedError if status == Status.ABORTED else GgmlError
        raise error(f"the computation failed: {Status(status).name.lower()}")


def _check_graphs(graphs: StepGraphs, backend: Backend) -> None:
    """Raise UnsupportedOpError unless the device of one rank can compute all nodes."""
    for graph in graphs.graphs:
        check_ops(graph, [backend], {}, {})
        unable = find_cpu_only(graph, [backend])
        if graph.calls() or unable:
            p = next(iter(unable), graph.node_pointers()[-1])
            reason = f"it {unable[p]}" if unable else "operations written in Python are for the CPU"
            raise UnsupportedOpError(
                f"{graph.wrap(p)!r} cannot be computed by {backend.name} in parallel with others: {reason}"
            )


def _check_new(p: Any) -> None:
    if p.buffer:
        raise ValueError("a tensor of the traced function has memory already: compute results from rank.context only")


def _put(p: Any, buffer: Buffer, offset: int) -> None:
    _check_new(p)
    c.ggml_backend_tensor_alloc(buffer.ptr, p, c.ffi.cast("void *", buffer.base + offset))


def _adjoining(parts: Sequence[npt.NDArray[Any]], axis: int) -> npt.NDArray[Any] | None:
    """Return the joined array of parts that are adjacent in memory, such as parts of one row; None for other parts."""
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
