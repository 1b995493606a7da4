"""Executor that records the next step while devices compute this one. Only this file relies on internals of Vulkan.

ggml's Vulkan backend records commands while it traverses a graph. It submits them to the device at the last node, or
earlier if the graph is long. Recording the few operations of one token takes about as long as computing them. The
executor therefore records a step before its inputs are there, while the device is still busy. To prevent the
submission, the step's graph ends with a node without memory: ggml skips the node, and the submission with it. Recording
an event then submits all recorded commands.

Other constants and graph shapes in this file follow from the backend's rules for submitting and waiting. They do not
affect other backends: :func:`~ggml_cffi.parallel.executors.choose.choose_step_maker` uses them only for Vulkan devices.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import zip_longest
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.device import Device, DeviceType
from ggml_cffi.core.op_sets import VIEWS
from ggml_cffi.enums import Op, Type
from ggml_cffi.parallel.executors.base import EMPTY, Executor, Freeze, Step, StepMaker, Steps
from ggml_cffi.parallel.executors.polling import PolledResults
from ggml_cffi.parallel.executors.turns import Turns
from ggml_cffi.scheduler.graph import Graph

#: Largest number of columns of a product in a short graph.
_SHORT_COLUMNS = 16

#: Operations whose sizes the backend adds up to decide about a submission.
_COUNTED = frozenset({Op.MUL_MAT, Op.MUL_MAT_ID, Op.CONV_2D, Op.CONV_TRANSPOSE_2D, Op.CONV_3D, Op.FLASH_ATTN_EXT})

#: Largest number of operations that the backend records before it submits them by itself.
_NODES_PER_SUBMIT = 100

#: Settings with which the backend waits for each operation, submission or graph, so that no work stays recorded.
_WAITING_SETTINGS = ("GGML_VK_PERF_LOGGER", "GGML_VK_SERIALIZE_SUBMISSIONS", "GGML_VK_DISABLE_ASYNC")

#: Part of the name of devices for which the backend waits after each graph.
_WAITING_DEVICE = "(DG1)"

#: Operations after which a part must not end. They pass on sums of squares, which the backend clears with the next
#: graph without waiting for them.
_NORM = (Op.RMS_NORM, Op.MUL)

#: Number of operations in the first part of a long graph. Recording takes half as long as computing, so the device
#: begins early with a short first part.
FIRST_PART = 64


def is_vulkan(device: Device) -> bool:
    """Return whether ggml's Vulkan backend drives a device."""
    return device.backend_name == "Vulkan"


def can_record_ahead(device: Device) -> bool:
    """Return whether the backend of a device holds recorded work until it is submitted explicitly.

    It is False for a GPU that shares its memory with the processor, because the processor does part of the work.
    """
    if device.type is not DeviceType.GPU or not is_vulkan(device) or _WAITING_DEVICE in device.description:
        return False
    return not any(name in os.environ for name in _WAITING_SETTINGS)


class RecordAhead(Turns):
    """Executor that records step ``k + 1`` while the devices compute step ``k``, and submits it after the partial sums.

    With one device, the caller can :meth:`record` the beginning of a program before its inputs are known.

    Parameters
    ----------
    backends
        The backends of devices that can record ahead.
    fallback
        Executor for programs of several devices whose sums cannot be polled. Default this executor, in turns.
    """

    records_ahead = True

    def __init__(self, backends: Sequence[Backend], fallback: Executor | None = None) -> None:
        super().__init__(backends)
        self._fallback = fallback
        self._events: list[Any] = [None] * len(self.backends)
        self._recorded: Step | None = None  # for the only device, which this thread then holds

    def run(
        self, steps: Steps, meanwhile: Callable[[], object] | None = None, sums: PolledResults | None = None
    ) -> int:
        """Compute a program and wait for it, recording ahead if its sums can be polled. See :meth:`Executor.run`."""
        if sums is None:
            return super().run(steps, meanwhile)
        with self.locks:
            status = self._run_polling(steps, sums, meanwhile)
        self._count(steps)
        return status

    def run_steps(self, steps: Steps) -> int:
        """Compute a program whose sums cannot be polled, without locks and counters."""
        return super().run_steps(steps) if self._fallback is None else self._fallback.run_steps(steps)

    def _run_polling(self, steps: Steps, sums: PolledResults, meanwhile: Callable[[], object] | None) -> int:
        each = [*zip_longest(*steps, fillvalue=EMPTY)]
        status = 0
        sums.clear(0)
        try:
            for r, own in enumerate(each[0]):
                status = self._record(r, own) or status
            for k, step in enumerate(each):
                for r, own in enumerate(step):
                    status = self._submit(r, own) or status
                if k + 1 < len(each):
                    sums.clear(k + 1)
                    for r, own in enumerate(each[k + 1]):
                        status = self._record(r, own) or status
                    sums.wait(k, self._wait_for_events)
            if meanwhile is not None:  # between earlier steps, devices would wait for the host
                meanwhile()
        except BaseException:
            # The wait below also computes recorded steps, which would give NaN from sums that are marked as unwritten.
            self._wait_for_events()
            raise
        finally:
            self._wait()
        return status

    # ------------------------------------------------------------------ one device

    def record(self, steps: Steps) -> None:
        """Record the beginning of the next program to submit, if its step has a deferred part.

        This thread holds the device until :meth:`submit` or :meth:`finish`, one of which must follow. Nothing is
        recorded while another thread holds the device.
        """
        ((step,),) = steps
        if self._recorded is not None:  # left by a run that was interrupted twice
            self.finish()
        if step.deferred and self.backends[0].lock.acquire(blocking=False):
            self._recorded = step
            # The empty graph is submitted at once, because with each graph ggml makes the device clear some memory.
            empty, graph = (Step((deferred,)) for deferred in step.deferred)
            self._record(0, empty)
            self._submit(0, empty)
            self._record(0, graph)

    def submit(self, steps: Steps) -> int:
        """Begin to compute a program, including the part that :meth:`record` has recorded."""
        if len(self.backends) > 1:
            return super().submit(steps)
        status = 0
        with self.locks:
            try:
                for step in steps[0]:
                    if step is not self._recorded:
                        status = self._record(0, step) or status
                    status = self._submit(0, step) or status
            finally:
                self._release()
        self._count(steps)
        return status

    def finish(self, *, if_free: bool = False) -> None:
        """Wait for submitted and recorded work. With ``if_free``, return at once if another thread holds the device."""
        lock = self.backends[0].lock
        if lock.acquire(blocking=not if_free):
            try:
                self._wait()
            finally:
                self._release()
                lock.release()

    def _release(self) -> None:
        """Release the device held for recorded-ahead work."""
        if self._recorded is not None:
            self._recorded = None
            self.backends[0].lock.release()

    # ------------------------------------------------------------------ steps

    def _start(self, r: int, step: Step) -> int:
        status = self._record(r, step)
        return self._submit(r, step) or status

    def _record(self, r: int, step: Step) -> int:
        """Record the deferred graphs of a step for device ``r``."""
        status = 0
        for graph in step.deferred:
            status = c.ggml_backend_graph_compute_async(self.backends[r].ptr, graph) or status
        return status

    def _submit(self, r: int, step: Step) -> int:
        """Submit the recorded work of device ``r``, then the rest of the step. C: ``ggml_backend_event_record``."""
        pointer, status = self.backends[r].ptr, 0
        if step.deferred:
            if self._events[r] is None:
                self._events[r] = c.ggml_backend_event_new(self.backends[r].device.ptr)
            c.ggml_backend_event_record(self._events[r], pointer)
        for graph in step.immediate:
            status = c.ggml_backend_graph_compute_async(pointer, graph) or status
        return status

    def _wait_for_events(self) -> None:
        """Wait for all work before the devices' last events, but not for work that is only recorded."""
        for event in self._events:
            if event is not None:
                c.ggml_backend_event_synchronize(event)

    def _wait(self) -> None:
        """Wait for all work, recorded work included."""
        super()._wait()
        self._wait_for_events()  # ggml reuses an event only after a wait for it

    def close(self) -> None:
        """Free the events, and close the fallback."""
        if self._fallback is not None:
            self._fallback.close()
        events, self._events = self._events, [None] * len(self.backends)
        for event in events:
            if event is not None:
                c.ggml_backend_event_free(event)


class VulkanStepMaker(StepMaker):
    """Maker of steps whose graphs ggml's Vulkan backend submits at the right moments.

    Parameters
    ----------
    shared
        True if other devices wait for this one at the end of a step.
    ahead
        True to defer short steps: all of a step if ``shared``, else its beginning.
    """

    def __init__(self, *, shared: bool, ahead: bool) -> None:
        self._shared, self._ahead = shared, ahead
        self._contexts: list[Any] = []  # C contexts of graphs

    def make(self, graph: Graph, freeze: Freeze) -> Step:
        """Return the step that computes ``graph``; see :meth:`StepMaker.make`."""
        nodes = graph.node_pointers()
        if not _is_short(nodes):
            head = next((i for i, p in enumerate(nodes) if p.op in _COUNTED), 0) if self._shared else 0
            return self._in_two(nodes[:head], nodes[head:], freeze) if head else Step(immediate=(graph.ptr,))
        if self._ahead and not self._shared:
            return self._in_parts(nodes, freeze)
        if self._ahead and _n_operations(nodes) <= _most_nodes():
            return Step(self._deferred(nodes))
        _append_views(graph.ptr, nodes)
        return Step(immediate=(empty_graph(), graph.ptr) if self._shared else (graph.ptr,))

    def _in_two(self, first: Sequence[Any], rest: Sequence[Any], freeze: Freeze) -> Step:
        """Make one graph of the nodes before the first product, and one of the rest.

        The backend submits work whenever it has recorded a 40th of the operations of the previous graph. In a graph of
        few nodes this happens before and after each product. After a graph without products, the backend submits the
        next graph in one piece.
        """
        _mark_later_sources([first, rest])
        made = self._graph_of(first, 0)
        freeze(first)
        return Step(immediate=(made, self._graph_of(rest, 0)))

    def _in_parts(self, nodes: Sequence[Any], freeze: Freeze) -> Step:
        """Make a first part that is deferred, and one or more further parts that are each submitted in one piece.

        By itself, the backend would submit the rest in pieces of a few operations, so that the device begins early. The
        device has begun already, and each submission takes as long as two operations of a token.
        """
        most = _most_nodes()
        size = min(FIRST_PART, most)
        parts: list[Sequence[Any]] = []
        while nodes:
            end = _end_of_part(nodes, size)
            parts.append(nodes[:end])
            nodes, size = nodes[end:], min(2 * size, most)
        _mark_later_sources(parts)
        deferred: tuple[Any, ...] = ()
        immediate: list[Any] = []
        for i, part in enumerate(parts):
            if i == 0 and _n_operations(part) <= most:
                deferred = self._deferred(part)
            else:
                immediate += [empty_graph(), self._with_views(part)]
            freeze(part)
        return Step(deferred, tuple(immediate))

    def _deferred(self, nodes: Sequence[Any]) -> tuple[Any, ...]:
        more = 1 + _n_fillers(len(nodes))
        made = self._graph_of(nodes, more)
        for _ in range(more):
            c.ggml_graph_add_node(made, _node_without_memory())
        return empty_graph(), made

    def _with_views(self, nodes: Sequence[Any]) -> Any:
        made = self._graph_of(nodes, _n_fillers(len(nodes)))
        _append_views(made, nodes)
        return made

    def _graph_of(self, nodes: Sequence[Any], more: int) -> Any:
        """Return a C graph of these nodes in this order, with room for ``more`` nodes.

        ``ggml_build_forward_expand`` counts the uses of each node, which ``ggml_graph_add_node`` does not. Without the
        counts the backend fuses no nodes.
        """
        size = len({p for node in nodes for p in (node, *node.src) if p}) + more + 1
        made, context = _new_graph(size)
        self._contexts.append(context)
        for p in nodes:
            c.ggml_build_forward_expand(made, p)
        return made

    def close(self) -> None:
        """Free the C graphs."""
        contexts, self._contexts = self._contexts, []
        for context in contexts:
            c.ggml_free(context)


def _is_short(nodes: Iterable[Any]) -> bool:
    """Return whether a device computes these nodes in a short time."""
    return not any(p.op == Op.MUL_MAT and p.ne[1] > _SHORT_COLUMNS for p in nodes)


def _most_nodes() -> int:
    return min(int(os.environ.get("GGML_VK_MAX_NODES_PER_SUBMIT", _NODES_PER_SUBMIT)), _NODES_PER_SUBMIT)


def _n_operations(nodes: Iterable[Any]) -> int:
    return sum(p.op not in VIEWS for p in nodes)


def _end_of_part(nodes: Sequence[Any], most: int) -> int:
    """Return the number of nodes of a first part: up to ``most`` operations, or more if it cannot end earlier.

    A part ends before a product, because the backend fuses a product with no earlier node. It does not end between
    products that the backend computes in parallel, nor between a norm and the product that reads it.
    """
    end = count = 0
    before = None
    for i, p in enumerate(nodes):
        if p.op in VIEWS:
            continue
        if count > most and end:
            break
        if p.op == Op.MUL_MAT and before not in (Op.MUL_MAT, *_NORM):
            end = i
        before = p.op
        count += 1
    return end if count > most and end else len(nodes)


def _mark_later_sources(parts: Sequence[Sequence[Any]]) -> None:
    """Mark nodes that a later part reads as outputs. Otherwise fusion would omit their results."""
    needed: set[Any] = set()
    for part in reversed(parts):
        for p in part:
            if p in needed:
                c.ggml_set_output(p)
        needed.update(src for p in part for src in p.src if src)


def _new_graph(size: int) -> tuple[Any, Any]:
    """Return a C graph for ``size`` tensors, and its context."""
    need = c.ggml_graph_overhead_custom(size, False) + c.ggml_tensor_overhead() + 64
    context = c.ggml_init({"mem_size": need, "mem_buffer": c.NULL, "no_alloc": True})  # type: ignore[arg-type]
    return c.ggml_new_graph_custom(context, size, False), context


@cache
def _node_without_memory() -> Any:
    """Return a node that the backend counts as an operation but skips, because it has no memory."""
    _, context = _new_graph(1)  # never freed: all graphs share it
    made = c.ggml_new_tensor_1d(context, Type.F32, 1)
    made.op, made.flags = Op.SUM, c.GGML_TENSOR_FLAG_COMPUTE
    return made


@cache
def empty_graph() -> Any:
    """Return a C graph that computes nothing. After it the backend submits the next graph in one piece."""
    made, _ = _new_graph(2)  # never freed: all steps share it
    c.ggml_graph_add_node(made, _node_without_memory())
    return made


def _append_views(graph: Any, nodes: Sequence[Any]) -> None:
    """Append views, which compute nothing, to a short C graph.

    The device signals the backend before it begins the last fifth of a graph's nodes. The backend sleeps until that
    signal, and then polls. Waking up takes longer than the last fifth of a short graph, which therefore is views.
    """
    view = next((p for p in nodes if p.op in VIEWS), None)
    n, size = c.ggml_graph_n_nodes(graph), c.ggml_graph_size(graph)
    if view is not None:
        for _ in range(min(_n_fillers(n), size - n)):
            c.ggml_graph_add_node(graph, view)


def _n_fillers(n: int) -> int:
    """Return the number of nodes to append to ``n`` so that they are the last fifth of all."""
    return max((n - 10) // 4 + 1, 0)
