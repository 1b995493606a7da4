"""The graph that a scheduler holds: the tensors' fields that ggml overwrites, and all that a run needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

from ggml_cffi import c
from ggml_cffi.core import interrupt
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.device import Device
from ggml_cffi.core.handle import Owner
from ggml_cffi.core.shaders import first_run
from ggml_cffi.enums import Status, Type
from ggml_cffi.errors import AbortedError, GgmlError, OutOfMemoryError
from ggml_cffi.scheduler.graph import Graph

# The fields that a scheduler overwrites: the buffer, and everything from the operands to the data pointer.
_TENSOR = "struct ggml_tensor"
_SRC, _DATA_END = c.ffi.offsetof(_TENSOR, "src"), c.ffi.offsetof(_TENSOR, "name")
_BUFFER = c.ffi.offsetof(_TENSOR, "buffer")

_LAST = c.GGML_MAX_SRC - 1  # the last operand of a node, which only functions written in Python may have

#: Tensors of one number in host memory that :func:`unread_tensors` returns, with that memory; never freed.
_unread: list[tuple[Any, Any]] = []

#: Longest delay of Ctrl-C in seconds: if the last run on the CPU took longer, Ctrl-C stops the next one.
_CTRL_C_DELAY = 0.05


#: For each tensor its memory, and the contents of its fields ``buffer`` and ``src`` to ``data``.
SavedFields = list[tuple[Any, bytes, bytes]]


class HeldGraph:
    """A graph while a scheduler works with it.

    The constructor saves the fields of the graph's tensors that ggml overwrites; :meth:`restore` writes them back.

    Parameters
    ----------
    graph
        The graph, all of whose inputs have memory.
    owners
        Owners of the C objects that the graph uses. They are kept, since other threads may close their handles.
    saved
        The fields that an earlier object saved, if the tensors have the same memory as then.
    """

    __slots__ = ("_calls", "_cpu", "_is_new", "_owners", "_seconds", "added", "graph", "saved")

    def __init__(self, graph: Graph, owners: list[Owner], saved: SavedFields | None = None) -> None:
        self.graph = graph
        """The graph itself."""
        self.added: dict[Any, Any] = {}
        """Operands that were added to nodes (C pointers), and that no node reads."""
        self._owners = owners
        self.saved = _save(graph) if saved is None else saved
        """The fields before ggml overwrote them."""
        self._calls: list[Any] = []
        self._cpu: Backend | None = None
        self._is_new = True
        self._seconds = _CTRL_C_DELAY  # duration of the last run; the first counts as long

    def add_operands(self, added: dict[Any, Any]) -> None:
        """Add an operand (value) to each node (key), until the fields are restored."""
        self.added = added
        for node, operand in added.items():
            if not node.src[_LAST]:
                node.src[_LAST] = operand

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

    def restore(self, *, keep_added: bool = False) -> None:
        """Undo what ggml wrote to the tensors, and the order of the nodes. The graph may be closed by now.

        Parameters
        ----------
        keep_added
            Keep the operands of :attr:`added`.
        """
        for raw, buffer, rest in self.saved:
            raw[_BUFFER : _BUFFER + 8] = buffer
            raw[_SRC:_DATA_END] = rest
        self.graph.reorder(self.graph.node_pointers())
        for ctx in self.graph.contexts:
            ctx.held.pop(self, None)
        if keep_added:
            self.add_operands(self.added)

    def sources(self) -> Iterator[tuple[Any, list[Any]]]:
        """Yield every node with its own operands, not the copies that ggml put in their place; None if omitted."""
        pointers = c.ffi.typeof("struct ggml_tensor *[]")
        by_tensor = dict(zip(self.graph.members, self.saved, strict=True))
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
        if self._is_new:
            self._is_new = False
            with first_run(_devices_of(scheduler), self.graph.node_pointers):
                self.compute(scheduler, start)
            return
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
            if began >= cpu.load.next_look:
                cpu.follow_load(began)
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


def _save(graph: Graph) -> SavedFields:
    size, found = c.ffi.sizeof(_TENSOR), []
    for p in graph.members:
        raw = c.ffi.buffer(p, size)
        found.append((raw, raw[_BUFFER : _BUFFER + 8], raw[_SRC:_DATA_END]))
    return found


def _devices_of(scheduler: Any) -> list[Device]:
    """Return the devices of a scheduler (a C pointer)."""
    n = c.ggml_backend_sched_get_n_backends(scheduler)
    return [Device(c.ggml_backend_get_device(c.ggml_backend_sched_get_backend(scheduler, i))) for i in range(n)]


def _check_status(status: int) -> None:
    if status == Status.SUCCESS:
        return
    if status == Status.ABORTED:
        raise AbortedError("the run was stopped")
    if status == Status.ALLOC_FAILED:
        raise OutOfMemoryError("a backend ran out of memory during the computation")
    raise GgmlError(f"the computation failed: {Status(status).name.lower()}")


def unread_tensors(n: int) -> list[Any]:
    """Return ``n`` tensors (C pointers) of one number in host memory. All schedulers share them; nothing is written."""
    while len(_unread) < n:
        memory = c.ffi.new("char[]", 256)  # with room for the alignment that ggml demands
        start = c.ffi.cast("char *", -(-int(c.ffi.cast("uintptr_t", memory)) // 64) * 64)
        tensor = c.ffi.new("struct ggml_tensor *")
        tensor.type, tensor.data = Type.F32, start
        tensor.buffer = c.ggml_backend_cpu_buffer_from_ptr(start, 64)
        for i in range(c.GGML_MAX_DIMS):
            tensor.ne[i], tensor.nb[i] = 1, 4
        _unread.append((tensor, memory))
    return [tensor for tensor, _ in _unread[:n]]
