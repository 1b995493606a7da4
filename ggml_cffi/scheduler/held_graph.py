"""The graph that a scheduler holds: the tensors' fields that ggml overwrites, and all that a run needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

from ggml_cffi import c
from ggml_cffi.core import interrupt
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.handle import Owner
from ggml_cffi.enums import Status
from ggml_cffi.errors import AbortedError, GgmlError, OutOfMemoryError
from ggml_cffi.scheduler.graph import Graph

# The fields that a scheduler overwrites: the buffer, and everything from the operands to the data pointer.
_TENSOR = "struct ggml_tensor"
_SRC, _DATA_END = c.ffi.offsetof(_TENSOR, "src"), c.ffi.offsetof(_TENSOR, "name")
_BUFFER = c.ffi.offsetof(_TENSOR, "buffer")

#: Longest delay of Ctrl-C in seconds: if the last run on the CPU took longer, Ctrl-C stops the next one.
_CTRL_C_DELAY = 0.05


class HeldGraph:
    """A graph while a scheduler works with it.

    The constructor saves the fields of the graph's tensors that ggml overwrites; :meth:`restore` writes them back.

    Parameters
    ----------
    graph
        The graph, all of whose inputs have memory.
    owners
        Owners of the C objects that the graph uses. They are kept, since other threads may close their handles.
    """

    __slots__ = ("_calls", "_cpu", "_owners", "_saved", "_seconds", "graph")

    def __init__(self, graph: Graph, owners: list[Owner]) -> None:
        self.graph = graph
        """The graph itself."""
        self._owners = owners
        self._saved: list[tuple[Any, bytes, bytes]] = []
        for p in graph.members:
            raw = c.ffi.buffer(p, c.ffi.sizeof(_TENSOR))
            self._saved.append((raw, raw[_BUFFER : _BUFFER + 8], raw[_SRC:_DATA_END]))
        self._calls: list[Any] = []
        self._cpu: Backend | None = None
        self._seconds = _CTRL_C_DELAY  # duration of the last run; the first counts as long

    def hold(self, cpu: Backend | None) -> None:
        """Mark the tensors as in use by a scheduler, so that no other takes them.

        Parameters
        ----------
        cpu
            The backend that computes some of the nodes on the CPU, None without such nodes.
        """
        self._calls = self.graph.calls()
        self._cpu = cpu
        nodes = frozenset(self.graph.node_pointers())
        for ctx in self.graph.contexts:
            ctx.held[self] = nodes

    def restore(self) -> None:
        """Undo what ggml wrote to the tensors, and the order of the nodes. The graph may be closed by now."""
        for raw, buffer, rest in self._saved:
            raw[_BUFFER : _BUFFER + 8] = buffer
            raw[_SRC:_DATA_END] = rest
        self.graph.reorder(self.graph.node_pointers())
        for ctx in self.graph.contexts:
            ctx.held.pop(self, None)

    def sources(self) -> Iterator[tuple[Any, list[Any]]]:
        """Yield every node with its own operands, not the copies that ggml put in their place; None if omitted."""
        pointers = c.ffi.typeof("struct ggml_tensor *[]")
        by_tensor = dict(zip(self.graph.members, self._saved, strict=True))
        for p in self.graph.node_pointers():
            _, _, rest = by_tensor[p]
            operands = c.ffi.from_buffer(pointers, rest[: c.GGML_MAX_SRC * 8])
            yield p, [src if src else None for src in c.ffi.unpack(operands, c.GGML_MAX_SRC)]

    def compute(self, scheduler: Any, start: Callable[[Any, Any], int]) -> None:
        """Compute the graph.

        Parameters
        ----------
        scheduler
            C pointer of the scheduler.
        start
            ``ggml_backend_sched_graph_compute`` or its asynchronous counterpart.

        Raises
        ------
        AbortedError
            If the run was stopped.
        GgmlError
            If a backend reports failure.
        Exception
            An exception of an operation written in Python.
        """
        graph, cpu = self.graph, self._cpu
        if cpu is None:
            status = start(scheduler, graph.ptr)
        else:
            calls = self._calls
            if cpu.aborting:
                cpu.clear_abort()
            for call in calls:
                call.error, call.stop = None, cpu.abort
            guarded = self._seconds >= _CTRL_C_DELAY and interrupt.begin(cpu.abort)
            began = perf_counter()
            try:
                status = start(scheduler, graph._cell[0] or graph.ptr)
            finally:
                if guarded:
                    interrupt.end()
            self._seconds = perf_counter() - began
            for call in calls:
                if call.error is not None:
                    # The call lives as long as its context, and the error's traceback would keep this graph alive.
                    error, call.error = call.error, None
                    raise error
        if status:
            _check_status(status)


def _check_status(status: int) -> None:
    if status == Status.SUCCESS:
        return
    if status == Status.ABORTED:
        raise AbortedError("the run was stopped")
    if status == Status.ALLOC_FAILED:
        raise OutOfMemoryError("a backend ran out of memory during the computation")
    raise GgmlError(f"the computation failed: {Status(status).name.lower()}")
