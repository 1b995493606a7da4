"""The scheduler: one graph over several devices.

It decides which backend computes each node, copies tensors between devices where a node needs them, and gives the
intermediate results memory. On top of ggml's scheduler this one

* keeps inputs valid from run to run, by giving them memory of their own on the preferred device;
* lets a graph be reserved, allocated, released and allocated again;
* remembers placements until they are changed;
* turns failures that would end the process into exceptions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ggml_cffi import c
from ggml_cffi._handle import Handle, Owner
from ggml_cffi.backend import Backend, open_backend
from ggml_cffi.buffer import BufferType, read_only
from ggml_cffi.device import Device
from ggml_cffi.enums import Op, Status
from ggml_cffi.errors import ClosedError, GgmlError, OutOfMemoryError, UnsupportedOpError
from ggml_cffi.graph import Graph
from ggml_cffi.tensor import Tensor

MAX_BACKENDS = 16
_MAX_SIZE = 2**22  # ggml sets 20 KB of addresses aside for each
_VIEWS = frozenset({Op.VIEW, Op.RESHAPE, Op.PERMUTE, Op.TRANSPOSE, Op.NONE})


class Scheduler(Handle):
    """Computes graphs over several backends.

    Parameters
    ----------
    backends
        Backends, devices or names, the preferred first. The CPU, which takes what no other can compute, is added last
        when it is missing. What is given by name is opened here and closed with the scheduler.
    parallel
        Keep four copies of the inputs, so that several runs can be in flight (pipeline parallelism).
    op_offload
        Let GPUs compute large batches with weights that are in host memory.
    graph_size
        Nodes and leaves to make room for; it grows by itself.

    Raises
    ------
    ValueError
        With no backend, more than 16, one twice, or the CPU elsewhere than last.

    C: ``ggml_backend_sched_new``.
    """

    __slots__ = (
        "_capacity",
        "_graph",
        "_opened",
        "_pins",
        "_placed",
        "_reserved",
        "backends",
        "lock",
        "op_offload",
        "parallel",
    )

    def __init__(
        self,
        backends: Sequence[Backend | Device | str],
        *,
        parallel: bool = False,
        op_offload: bool = True,
        graph_size: int = 2048,
    ) -> None:
        if isinstance(backends, str | Backend | Device):
            raise TypeError("backends is a sequence: put the one backend in a list")
        if not isinstance(graph_size, int) or not 1 <= graph_size <= _MAX_SIZE:
            raise ValueError(f"graph_size must be 1 to {_MAX_SIZE}, not {graph_size}")
        self.parallel, self.op_offload = parallel, op_offload
        self._opened: list[Backend] = []
        try:
            self.backends = self._open(backends)
            """The backends in order of preference, the CPU last."""
            self._capacity = graph_size
            self._open_sched()
        except BaseException:
            self._close_opened()
            raise
        self.lock = threading.RLock()
        """Held by every call. Hold it yourself around a run and the reading of its outputs, where other threads may
        run the same scheduler: a run writes over the outputs of the one before."""
        self._graph: Graph | None = None
        self._reserved = False
        self._pins: list[Owner] = []
        self._placed: dict[Any, tuple[Tensor, Backend]] = {}

    def _open(self, given: Sequence[Backend | Device | str]) -> tuple[Backend, ...]:
        found: list[Backend] = []
        for which in given:
            backend, opened = open_backend(which)
            if opened:
                self._opened.append(backend)
            found.append(backend)
        if not found:
            raise ValueError("a scheduler needs at least one backend")
        if any(b.device.is_cpu for b in found[:-1]):
            raise ValueError("the CPU comes last: it takes what no backend before it can compute")
        if not found[-1].device.is_cpu:
            cpu = Backend("CPU")
            self._opened.append(cpu)
            found.append(cpu)
        if len({b.ptr for b in found}) < len(found):
            raise ValueError("a backend is listed twice; open the device twice for two streams on it")
        if len(found) > MAX_BACKENDS:
            raise ValueError(f"{len(found)} backends with the CPU; a scheduler has at most {MAX_BACKENDS}")
        return tuple(found)

    def _open_sched(self) -> None:
        pointers = c.ffi.new("ggml_backend_t[]", [b.ptr for b in self.backends])
        # The hash table holds nodes and leaves, and fills up with copies: twice the tensors leaves room.
        pointer = c.ggml_backend_sched_new(
            pointers, c.NULL, len(self.backends), 2 * self._capacity, self.parallel, self.op_offload
        )
        super().__init__(pointer, c.ggml_backend_sched_free, self.backends, fork_safe=False)

    # ------------------------------------------------------------------ placing

    def place(self, tensor: Tensor, backend: Backend | str) -> None:
        """Have ``tensor`` computed, or an input kept, on ``backend``. Takes effect at the next :meth:`alloc`.

        The placement stays until it is changed or :meth:`unplace` is called.

        Raises
        ------
        ValueError
            If the backend is not one of this scheduler's, or the tensor has memory elsewhere.

        C: ``ggml_backend_sched_set_tensor_backend``.
        """
        chosen = self._find(backend)
        root = tensor.ptr.view_src or tensor.ptr
        if root.buffer and self._graph is None:
            kind = BufferType(c.ggml_backend_buffer_get_type(root.buffer))
            if not chosen.supports_buffer_type(kind):
                raise ValueError(f"{tensor!r} has memory in {kind.name}, where {chosen.name} cannot compute")
        with self.lock:
            self._placed[tensor.ptr] = (tensor, chosen)

    def unplace(self, tensor: Tensor | None = None) -> None:
        """Forget the placement of ``tensor``, or all placements."""
        with self.lock:
            if tensor is None:
                self._placed.clear()
            else:
                self._placed.pop(tensor.ptr, None)

    def backend_of(self, tensor: Tensor) -> Backend:
        """The backend that computes ``tensor`` of the graph held, in the scheduler's own word.

        Raises
        ------
        ValueError
            If no graph is held, or the tensor is not part of it.

        C: ``ggml_backend_sched_get_tensor_backend``.
        """
        with self.lock:
            graph = self._held()
            if tensor not in graph:
                raise ValueError(f"{tensor!r} is not part of the graph that the scheduler holds")
            pointer = c.ggml_backend_sched_get_tensor_backend(self.ptr, tensor.ptr)
        return self._find(pointer)

    def assignment(self) -> list[tuple[Tensor, Backend]]:
        """Every computed node of the graph held with its backend, in order; views, which compute nothing, left out."""
        with self.lock:
            graph = self._held()
            return [(t, self.backend_of(t)) for t in graph.nodes if t.op not in _VIEWS]

    # ------------------------------------------------------------------ memory

    def reserve(self, graph: Graph) -> dict[Backend, int]:
        """Make room for ``graph``, usually the largest to come, so that later graphs fit without reallocation.

        The graph is left as it was. A graph held before is released.

        Returns
        -------
        dict
            Bytes of the compute buffer on each backend.

        Raises
        ------
        OutOfMemoryError
            If a device has not enough. The scheduler stays usable.
        UnsupportedOpError
            If no backend can compute a node.

        C: ``ggml_backend_sched_reserve``.
        """
        with self.lock:
            self.reset()
            self._prepare(graph)
            try:
                self._reserve(graph)
            finally:
                graph.restore()
            return self.buffer_sizes()

    def alloc(self, graph: Graph) -> None:
        """Assign every node to a backend and give every tensor of ``graph`` memory. A graph held before is released.

        Inputs (leaves without memory) get memory of their own where they were placed, else on the preferred backend,
        zeroed; set them after this call, once or before each run.

        Raises
        ------
        OutOfMemoryError
            If a device has not enough. The scheduler stays usable.
        UnsupportedOpError
            If no backend can compute a node.
        ClosedError
            If a context of the graph is closed.
        ValueError
            If another scheduler holds a graph with some of the same tensors.

        C: ``ggml_backend_sched_reserve``, ``ggml_backend_sched_alloc_graph``.
        """
        with self.lock:
            self.reset()
            self._prepare(graph)
            try:
                # alloc_graph does not notice when it runs out of memory, and crashes: reserve first, and look.
                self._reserve(graph)
                graph.restore()
                self._apply_placements(graph)
                with self._exclusive():
                    done = c.ggml_backend_sched_alloc_graph(self.ptr, graph.ptr)
                if not done:
                    raise OutOfMemoryError("the scheduler could not allocate the graph")
                self._check_in_place(graph)
            except BaseException:
                graph.restore()
                c.ggml_backend_sched_reset(self.ptr)
                raise
            graph.hold()
            self._graph = graph
            self._pins = [graph.owner, *(b.owner for ctx in graph.contexts for b in ctx.buffers)]

    def _prepare(self, graph: Graph) -> None:
        for ctx in graph.contexts:
            ctx.ptr  # noqa: B018 - raises when closed
            for p in ctx.released & graph.members:
                raise ClosedError(f"the buffer of {Tensor(ctx, p, c.ggml_n_dims(p))!r} was closed")
        graph.check_free()
        for p in [p for p, (t, _) in self._placed.items() if t.context.closed]:
            del self._placed[p]
        if graph.n_tensors > _MAX_SIZE:
            raise ValueError(f"{graph!r} is larger than a scheduler can hold ({_MAX_SIZE} tensors)")
        if graph.n_tensors > self._capacity:
            self._capacity = min(2 * graph.n_tensors, _MAX_SIZE)
            self._open_sched()
        self._alloc_inputs(graph)
        self._check_ops(graph)
        graph.save()

    def _alloc_inputs(self, graph: Graph) -> None:
        groups: dict[tuple[Any, Backend], list[Tensor]] = {}
        for t in graph.unallocated_leaves():
            _, backend = self._placed.get(t.ptr, (t, self.backends[0]))
            groups.setdefault((t.context, backend), []).append(t)
        for (ctx, backend), tensors in groups.items():
            ctx.alloc(backend.buffer_type, tensors)

    def _check_ops(self, graph: Graph) -> None:
        """ggml ends the process on a node that nothing can compute, or not where its memory is: look first."""
        devices = [(b, b.device.ptr) for b in self.backends]
        placed = {p: b for p, (_, b) in self._placed.items()}
        where: dict[Any, list[Any]] = {}
        for p in graph.members:  # every memory is within reach of some backend
            buffer = (p.view_src or p).buffer
            if buffer and buffer not in where:
                kind = BufferType(c.ggml_backend_buffer_get_type(buffer))
                where[buffer] = [d for b, d in devices if b.supports_buffer_type(kind)]
                if not where[buffer]:
                    names = ", ".join(b.name for b in self.backends)
                    raise ValueError(
                        f"{graph._wrap(p)!r} is in {kind.name}, which none of {names} can read: "
                        "add that device to the scheduler"
                    )
            if buffer and p in placed and placed[p].device.ptr not in where[buffer]:
                raise ValueError(f"{graph._wrap(p)!r} was placed on {placed[p].name}, but has memory elsewhere")
        supports = c.ggml_backend_dev_supports_op
        for p in graph.node_pointers():
            buffer = (p.view_src or p).buffer
            candidates = [d for b, d in devices if b is placed[p]] if p in placed else [d for _, d in devices]
            if buffer:
                if buffer in read_only and p.op not in _VIEWS:
                    raise ValueError(f"{graph._wrap(p)!r} writes to memory that is read-only")
                candidates = [d for d in candidates if d in where[buffer]]
            if not any(supports(d, p) for d in candidates):
                t = graph._wrap(p)
                names = ", ".join(b.name for b, d in devices if d in candidates) or "no backend of this scheduler"
                raise UnsupportedOpError(
                    f"{t!r} cannot be computed on {names}, where it was placed or has its memory"
                    if buffer or p in placed
                    else f"{t!r} cannot be computed on any of {names}"
                )

    def _check_in_place(self, graph: Graph) -> None:
        """An operation in place must run where the memory is that it writes to; ggml does not see to that."""
        for p in graph.node_pointers():
            if p.view_src and p.op not in _VIEWS:
                t = graph._wrap(p)
                kind, backend = t.buffer_type, self._find(c.ggml_backend_sched_get_tensor_backend(self.ptr, p))
                if kind is not None and not backend.supports_buffer_type(kind):
                    raise UnsupportedOpError(
                        f"{t!r} writes to {kind.name} but runs on {backend.name}: place both on one backend, or use "
                        "the form that is not in place"
                    )

    def _apply_placements(self, graph: Graph) -> None:
        c.ggml_backend_sched_reset(self.ptr)
        for t, backend in self._placed.values():
            if t in graph:
                c.ggml_backend_sched_set_tensor_backend(self.ptr, t.ptr, backend.ptr)

    def _reserve(self, graph: Graph) -> None:
        self._apply_placements(graph)
        with self._exclusive():
            enough = c.ggml_backend_sched_reserve(self.ptr, graph.ptr)
        if not enough:
            free = ", ".join(f"{b.name} {b.device.memory().free:,}" for b in self.backends)
            raise OutOfMemoryError(f"no room for the intermediate results of {graph!r}; bytes free: {free}")
        self._reserved = True

    def reset(self) -> None:
        """Release the graph held. Its inputs keep their memory and values; its other results can no longer be read.

        C: ``ggml_backend_sched_reset``.
        """
        with self.lock:
            graph, self._graph, pins, self._pins = self._graph, None, self._pins, []
            if graph is not None:
                self.synchronize()
                graph.restore()
                c.ggml_backend_sched_reset(self.ptr)
            del pins

    # ------------------------------------------------------------------ computing

    def compute(self, graph: Graph | None = None) -> None:
        """Compute the graph held, and wait. A graph is allocated first if none is held.

        Raises
        ------
        ValueError
            If another graph is held, or there is none.
        GgmlError
            If a backend reports failure.

        C: ``ggml_backend_sched_graph_compute``.
        """
        self._start_run(graph, c.ggml_backend_sched_graph_compute)

    def compute_async(self, graph: Graph | None = None) -> None:
        """Start computing the graph held and return; :meth:`synchronize` waits.

        C: ``ggml_backend_sched_graph_compute_async``.
        """
        self._start_run(graph, c.ggml_backend_sched_graph_compute_async)

    def _start_run(self, graph: Graph | None, function: Callable[[Any, Any], int]) -> None:
        with self.lock:
            held = self._ready(graph)
            with self._exclusive():
                status = function(self.ptr, held.ptr)
        _check(status)

    def synchronize(self) -> None:
        """Wait for everything that was started. C: ``ggml_backend_sched_synchronize``."""
        with self.lock, self._exclusive():
            c.ggml_backend_sched_synchronize(self.ptr)

    def _ready(self, graph: Graph | None) -> Graph:
        if self._graph is None:
            if graph is None:
                raise ValueError("the scheduler holds no graph: call alloc(graph) first, or pass the graph")
            self.alloc(graph)
        held = self._held()
        if graph is not None and graph is not held:
            raise ValueError(f"the scheduler holds {held!r}, not {graph!r}: call alloc() with the new one first")
        for ctx in held.contexts:
            ctx.ptr  # noqa: B018 - raises when closed
        return held

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Holds every backend, always in the same order: a backend takes work from one thread at a time."""
        locks = sorted((b.lock for b in self.backends), key=id)
        for lock in locks:
            lock.acquire()
        try:
            yield
        finally:
            for lock in reversed(locks):
                lock.release()

    # ------------------------------------------------------------------ looking

    @property
    def graph(self) -> Graph | None:
        """The graph held."""
        return self._graph

    @property
    def n_splits(self) -> int:
        """Parts of the graph held that run on one backend each. C: ``ggml_backend_sched_get_n_splits``."""
        with self.lock:
            self._held()
            return c.ggml_backend_sched_get_n_splits(self.ptr)

    @property
    def n_copies(self) -> int:
        """Copies of the inputs, 4 with ``parallel`` and 1 without. C: ``ggml_backend_sched_get_n_copies``."""
        return c.ggml_backend_sched_get_n_copies(self.ptr)

    def buffer_sizes(self) -> dict[Backend, int]:
        """Bytes of the compute buffer on each backend. C: ``ggml_backend_sched_get_buffer_size``."""
        with self.lock:
            if not self._reserved:
                return dict.fromkeys(self.backends, 0)
            return {b: c.ggml_backend_sched_get_buffer_size(self.ptr, b.ptr) for b in self.backends}

    def _find(self, backend: Any) -> Backend:
        """The backend of this scheduler that ``backend`` is: itself, its name or its C pointer."""
        for b in self.backends:
            if b is backend or b.ptr == backend or (isinstance(backend, str) and b.name.lower() == backend.lower()):
                return b
        raise ValueError(f"{backend!r} is not one of this scheduler's: {', '.join(b.name for b in self.backends)}")

    def _held(self) -> Graph:
        if self._graph is None:
            self.ptr  # noqa: B018 - raises when closed
            raise ValueError("the scheduler holds no graph: call alloc(graph) first")
        return self._graph

    def _close_opened(self) -> None:
        for backend in self._opened:
            backend.close()

    def close(self) -> None:
        """Close the scheduler, and the backends that it opened by name."""
        if not self.closed:
            self.reset()
            self._close_opened()
        super().close()

    def __repr__(self) -> str:
        return f"<Scheduler {'closed' if self.closed else ', '.join(b.name for b in self.backends)}>"


def _check(status: int) -> None:
    if status == Status.SUCCESS:
        return
    if status == Status.ALLOC_FAILED:
        raise OutOfMemoryError("a backend ran out of memory during the computation")
    raise GgmlError(f"the computation failed: {Status(status).name.lower()}")
