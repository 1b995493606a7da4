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
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from os import PathLike
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from ggml_cffi import c
from ggml_cffi.core import interrupt
from ggml_cffi.core.backend import Backend, open_backend
from ggml_cffi.core.buffer import BufferType
from ggml_cffi.core.context import Context
from ggml_cffi.core.device import Device
from ggml_cffi.core.handle import Handle, Owner
from ggml_cffi.core.locks import Locks, free_when_unlocked
from ggml_cffi.core.op_sets import VIEWS
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Op, Status, TensorFlag, Type
from ggml_cffi.errors import AbortedError, ClosedError, GgmlError, OutOfMemoryError
from ggml_cffi.scheduler.checks import check_in_place, check_ops, for_the_cpu
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.observe import Observer
from ggml_cffi.scheduler.overlap import overlapping

if TYPE_CHECKING:
    from ggml_cffi.viz.draw import Report
    from ggml_cffi.viz.profile import Profile

MAX_BACKENDS = 16
_PATIENCE = 0.05  # seconds that Ctrl-C may have to wait for a run on the CPU
_MAX_SIZE = 2**22  # ggml sets 20 KB of addresses aside for each
_READ_AGAIN = frozenset({Op.ADD_ID, Op.SOFT_MAX_BACK})


class Split(NamedTuple):
    """Nodes that run one after another on one backend."""

    backend: Backend
    nodes: list[Tensor]


#: Owners of schedulers that were forgotten while they computed.
_abandoned: list[Owner] = []

#: A tensor, a piece of memory, bytes from the start of the tensor's data, and how many.
Transfer = tuple[Any, Any, int, int]


def _keep_second_operands(graph: Graph) -> None:
    """Keep ggml from computing a node over an operand that it reads again after it has written."""
    for p in graph.node_pointers():
        if p.op in _READ_AGAIN:
            second = p.src[1]
            for t in (second, second.view_src) if second.view_src else (second,):
                t.flags |= TensorFlag.OUTPUT


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
    overlap
        Compute the nodes in an order in which several GPUs work at once, where the graph allows it and none of its
        nodes was placed by hand. False keeps the order in which the graph was built.
    graph_size
        Nodes and leaves to make room for; it grows by itself.

    Raises
    ------
    ValueError
        With no backend, more than 16, one twice, or the CPU elsewhere than last.

    C: ``ggml_backend_sched_new``.
    """

    __slots__ = (
        "_calls",
        "_capacity",
        "_graph",
        "_locks",
        "_moved",
        "_opened",
        "_pending",
        "_pinned",
        "_pins",
        "_placed",
        "_primed",
        "_reserved",
        "_seconds",
        "_uses_cpu",
        "backends",
        "lock",
        "op_offload",
        "overlap",
        "parallel",
    )

    def __init__(
        self,
        backends: Sequence[Backend | Device | str],
        *,
        parallel: bool = False,
        op_offload: bool = True,
        overlap: bool = True,
        graph_size: int = 2048,
    ) -> None:
        if isinstance(backends, str | Backend | Device):
            raise TypeError("backends is a sequence: put the one backend in a list")
        if not isinstance(graph_size, int) or not 1 <= graph_size <= _MAX_SIZE:
            raise ValueError(f"graph_size must be 1 to {_MAX_SIZE}, not {graph_size}")
        self.parallel, self.op_offload, self.overlap = parallel, op_offload, overlap
        self._pinned: dict[Any, Backend] = {}
        self._moved: dict[Any, str] = {}
        self._opened: list[Backend] = []
        try:
            self.backends = self._open(backends)
            """The backends in order of preference, the CPU last."""
            self._capacity = graph_size
            self._locks = Locks(b.lock for b in self.backends)
            self._open_sched()
        except BaseException:
            self._close_opened()
            raise
        self.lock = threading.RLock()
        """Held by every call. Hold it yourself around a run and the reading of its outputs, where other threads may
        run the same scheduler: a run writes over the outputs of the one before."""
        self._graph: Graph | None = None
        self._calls: list[Any] = []
        self._pending = False
        self._uses_cpu = True
        self._seconds = _PATIENCE  # that the last run of the graph held took: as if long before it is known
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
        self._primed = False
        keep = [b.owner for b in self.backends]  # another thread may close them meanwhile
        pointers = c.ffi.new("ggml_backend_t[]", [b.ptr for b in self.backends])
        # The hash table holds nodes and leaves, and fills up with copies: twice the tensors leaves room.
        pointer = c.ggml_backend_sched_new(
            pointers, c.NULL, len(self.backends), 2 * self._capacity, self.parallel, self.op_offload
        )
        free: Callable[[Any], None] = c.ggml_backend_sched_free
        if self._locks.remote:
            free = partial(free_when_unlocked, self._locks.remote, free, keep)
        super().__init__(pointer, free, self.backends, fork_safe=False)

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
            return [(t, self.backend_of(t)) for t in graph.nodes if t.op not in VIEWS]

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
            _keep = self._prepare(graph)
            try:
                self._reserve(graph)
            finally:
                graph.restore()
            return self.buffer_sizes()

    def reserve_size(self, graph: Graph) -> dict[Backend, int]:
        """Bytes that :meth:`reserve` would take on each backend, without taking them. A graph held is released.

        Inputs without memory get it all the same, as they do in :meth:`alloc`.

        C: ``ggml_backend_sched_reserve_size``.
        """
        with self.lock:
            self.reset()
            _keep = self._prepare(graph)
            sizes = c.ffi.new("size_t[]", len(self.backends))
            try:
                self._apply_placements(graph)
                with self.exclusive():
                    c.ggml_backend_sched_reserve_size(self.ptr, graph.ptr, sizes)
            finally:
                graph.restore()
                c.ggml_backend_sched_reset(self.ptr)
            # It frees buffers that it finds too small: until the next reserve there is nothing to ask for.
            self._reserved = self._primed = False
            return dict(zip(self.backends, sizes, strict=True))

    def split_graph(self, graph: Graph) -> list[Split]:
        """How ``graph`` would be split, without memory for its results. A graph held is released.

        C: ``ggml_backend_sched_split_graph``.
        """
        with self.lock:
            self.reset()
            _keep = self._prepare(graph)
            try:
                self._apply_placements(graph)
                c.ggml_backend_sched_split_graph(self.ptr, graph.ptr)
                return self._splits(graph)
            finally:
                graph.restore()
                c.ggml_backend_sched_reset(self.ptr)

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
            _keep = self._prepare(graph)
            try:
                self._order(graph)
                # alloc_graph does not notice when it runs out of memory, and crashes: reserve first, and look.
                self._reserve(graph)
                graph.restore()
                self._apply_placements(graph)
                with self.exclusive():
                    done = c.ggml_backend_sched_alloc_graph(self.ptr, graph.ptr)
                if not done:
                    raise OutOfMemoryError("the scheduler could not allocate the graph")
                for p in graph.node_pointers():
                    if p.view_src and p.op not in VIEWS:
                        check_in_place(p, graph, self._find(c.ggml_backend_sched_get_tensor_backend(self.ptr, p)))
            except BaseException:
                graph.restore()
                c.ggml_backend_sched_reset(self.ptr)
                raise
            finally:
                self._pinned = {}
            graph.hold()
            self._graph, self._calls = graph, graph.calls()
            self._seconds = _PATIENCE
            self._uses_cpu = self._is_on_cpu(graph)
            self._pins = _keep

    def _is_on_cpu(self, graph: Graph) -> bool:
        cpu, find = self.backends[-1].ptr, c.ggml_backend_sched_get_tensor_backend
        pointer = self.ptr
        return len(self.backends) == 1 or any(find(pointer, p) == cpu for p in graph.node_pointers())

    def _prepare(self, graph: Graph) -> list[Owner]:
        """Check, make room, give inputs memory. The caller keeps what is returned: others may close it."""
        keep = [graph.owner, *_buffers(graph)]
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
        keep += _buffers(graph)
        _keep_second_operands(graph)
        self._moved = for_the_cpu(graph, self.backends) if len(self.backends) > 1 else {}
        check_ops(graph, self.backends, {p: b for p, (_, b) in self._placed.items()}, self._moved)
        graph.save()
        return keep

    def _alloc_inputs(self, graph: Graph) -> None:
        groups: dict[tuple[Any, Backend], list[Tensor]] = {}
        for t in graph.unallocated_leaves():
            _, backend = self._placed.get(t.ptr, (t, self.backends[0]))
            groups.setdefault((t.context, backend), []).append(t)
        for (ctx, backend), tensors in groups.items():
            ctx.alloc(backend.buffer_type, tensors)

    def _order(self, graph: Graph) -> None:
        """Have the GPUs work at once; see :mod:`ggml_cffi.scheduler.overlap`."""
        if not self.overlap or len(self.backends) < 3 or any(t in graph for t, _ in self._placed.values()):
            return
        self._apply_placements(graph)
        c.ggml_backend_sched_split_graph(self.ptr, graph.ptr)
        numbers = {b.ptr: i for i, b in enumerate(self.backends)}
        find = c.ggml_backend_sched_get_tensor_backend
        where = {p: numbers[find(self.ptr, p)] for p in graph.node_pointers()}
        graph.restore()
        ordered = overlapping(graph.node_pointers(), where, len(self.backends) - 1)
        if ordered is not None:
            graph.reorder(ordered)
            # In another order ggml could choose other devices.
            self._pinned = {p: self.backends[i] for p, i in where.items() if p.op not in VIEWS}

    def _apply_placements(self, graph: Graph) -> None:
        c.ggml_backend_sched_reset(self.ptr)
        for t, backend in self._placed.values():
            if t in graph:
                c.ggml_backend_sched_set_tensor_backend(self.ptr, t.ptr, backend.ptr)
        for p in self._moved:
            c.ggml_backend_sched_set_tensor_backend(self.ptr, p, self.backends[-1].ptr)
        for p, backend in self._pinned.items():
            c.ggml_backend_sched_set_tensor_backend(self.ptr, p, backend.ptr)

    def _reserve(self, graph: Graph) -> None:
        if not self._primed and any(not p.view_src and c.ggml_is_empty(p) for p in graph.node_pointers()):
            self._prime()
        self._apply_placements(graph)
        with self.exclusive():
            enough = c.ggml_backend_sched_reserve(self.ptr, graph.ptr)
        if not enough:
            free = ", ".join(f"{b.name} {b.device.memory().free:,}" for b in self.backends)
            raise OutOfMemoryError(f"no room for the intermediate results of {graph!r}; bytes free: {free}")
        self._reserved = True

    def _prime(self) -> None:
        """Have ggml make a buffer on each backend.

        Without, it would put what is empty into a buffer that is not there, if the graphs before needed none, or into
        one without an address, and then take it for not placed.
        """
        with Context() as ctx:
            nodes = [ctx.build(c.ggml_dup, 1, ctx.new_tensor(Type.F32, (1,)).ptr) for _ in self.backends]
            with Graph(*nodes) as graph, self.exclusive():
                c.ggml_backend_sched_reset(self.ptr)
                for node, backend in zip(nodes, self.backends, strict=True):
                    c.ggml_backend_sched_set_tensor_backend(self.ptr, node.ptr, backend.ptr)
                enough = c.ggml_backend_sched_reserve(self.ptr, graph.ptr)
                c.ggml_backend_sched_reset(self.ptr)
        if not enough:
            raise OutOfMemoryError("no room for a single number on each device")
        self._primed = True

    def reset(self) -> None:
        """Release the graph held. Its inputs keep their memory and values; its other results can no longer be read.

        C: ``ggml_backend_sched_reset``.
        """
        with self.lock:
            graph, self._graph, pins, self._pins = self._graph, None, self._pins, []
            if graph is not None:
                self._locks.acquire()  # a lost server is no reason not to
                try:
                    c.ggml_backend_sched_synchronize(self.ptr)
                    self._pending = False
                finally:
                    self._locks.release()
                graph.restore()
                c.ggml_backend_sched_reset(self.ptr)
            del pins

    # ------------------------------------------------------------------ computing

    def compute(
        self,
        graph: Graph | None = None,
        *,
        observe: Callable[[Tensor], object] | None = None,
        only: Collection[Tensor] | None = None,
    ) -> None:
        """Compute the graph held, and wait. A graph is allocated first if none is held.

        Parameters
        ----------
        observe
            Called with each node once it is computed; its values can be read during the call. Returning False stops
            the run. Nodes then run one by one, which is slower.
        only
            The nodes to observe; the others run as they would. Default all.

        Raises
        ------
        ValueError
            If another graph is held, or there is none.
        AbortedError
            If ``observe`` or :meth:`Backend.abort` stopped the run.
        GgmlError
            If a backend reports failure.
        Exception
            Whatever ``observe``, or an operation written in Python, raised.

        C: ``ggml_backend_sched_graph_compute``, ``ggml_backend_sched_set_eval_callback``.
        """
        if observe is None:
            self._run(graph, c.ggml_backend_sched_graph_compute, wait=True)
            return
        with self.lock:
            observer = Observer(self._ready(graph), observe, only)
            c.ggml_backend_sched_set_eval_callback(self.ptr, observer.callback, c.NULL)
            try:
                self._run(graph, c.ggml_backend_sched_graph_compute, wait=True)
            finally:
                c.ggml_backend_sched_set_eval_callback(self.ptr, c.NULL, c.NULL)
                if observer.error is not None:
                    raise observer.error

    def compute_async(self, graph: Graph | None = None) -> None:
        """Start computing the graph held and return; :meth:`synchronize` waits. Errors as :meth:`compute`.

        C: ``ggml_backend_sched_graph_compute_async``.
        """
        self._pending = True
        self._run(graph, c.ggml_backend_sched_graph_compute_async, wait=False)

    def _run(self, graph: Graph | None, function: Callable[[Any, Any], int], *, wait: bool) -> None:
        with self.lock:
            self._ready(graph)
            with self._locks:
                self.compute_held(function)
                if wait:
                    self._locks.wait()

    def replay(self, inputs: Iterable[Transfer], outputs: Iterable[Transfer]) -> None:
        """Set inputs, compute the graph held, and get outputs, all in one go: for callers that have checked them.

        C: ``ggml_backend_tensor_set``, ``ggml_backend_sched_graph_compute``, ``ggml_backend_tensor_get``.
        """
        with self.lock, self._locks:
            for what in inputs:
                c.ggml_backend_tensor_set(*what)
            self.compute_held()
            for what in outputs:
                c.ggml_backend_tensor_get(*what)

    def compute_held(self, function: Callable[[Any, Any], int] | None = None) -> None:
        """Compute the graph held, and wait: for callers that hold :attr:`lock` and :meth:`exclusive`.

        ``function`` starts it: ``ggml_backend_sched_graph_compute`` (default), or its asynchronous sister.
        """
        held = self._graph or self._held()
        start = function or c.ggml_backend_sched_graph_compute
        if not self._uses_cpu:
            status = start(self.ptr, held.ptr)
        else:
            cpu, calls = self.backends[-1], self._calls
            if cpu.aborting:
                cpu.clear_abort()
            for call in calls:
                call.error, call.stop = None, cpu.abort
            guarded = self._seconds >= _PATIENCE and interrupt.begin(cpu.abort)
            began = perf_counter()
            try:
                status = start(self._cell[0] or self.ptr, held._cell[0] or held.ptr)
            finally:
                if guarded:
                    interrupt.end()
            self._seconds = perf_counter() - began
            for call in calls:
                if call.error is not None:
                    raise call.error
        if status:
            _check(status)

    def synchronize(self) -> None:
        """Wait for everything that was started. C: ``ggml_backend_sched_synchronize``."""
        with self.lock, self.exclusive():
            c.ggml_backend_sched_synchronize(self.ptr)
            self._locks.wait()
            self._pending = False

    def wait_for_servers(self) -> None:
        """Within a run, wait for remote devices: ggml takes no notice of what they still compute."""
        self._locks.wait()

    def _ready(self, graph: Graph | None) -> Graph:
        if self._graph is None:
            self.ptr  # noqa: B018 - raises when closed
            if graph is None:
                raise ValueError("the scheduler holds no graph: call alloc(graph) first, or pass the graph")
            self.alloc(graph)
        held = self._held()
        if graph is not None and graph is not held:
            raise ValueError(f"the scheduler holds {held!r}, not {graph!r}: call alloc() with the new one first")
        for ctx in held.contexts:
            ctx.ptr  # noqa: B018 - raises when closed
        return held

    def exclusive(self) -> AbstractContextManager[Any]:
        """Holds every backend, always in the same order: a backend takes work from one thread at a time."""
        return self._locks.plain

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

    @property
    def splits(self) -> list[Split]:
        """The parts of the graph held, in order of computation, each on one backend."""
        with self.lock:
            return self._splits(self._held())

    def _splits(self, graph: Graph) -> list[Split]:
        """Runs of nodes on one backend. ggml begins a part of its own also where one would have too many inputs."""
        found: list[Split] = []
        for t in graph.nodes:
            if t.op in VIEWS:
                continue
            backend = self._find(c.ggml_backend_sched_get_tensor_backend(self.ptr, t.ptr))
            if not found or found[-1].backend is not backend:
                found.append(Split(backend, []))
            found[-1].nodes.append(t)
        return found

    @property
    def copies(self) -> list[tuple[Tensor, Backend]]:
        """What is copied between backends in each run of the graph held: each tensor, and where to."""
        with self.lock:
            graph = self._held()
            found: dict[tuple[Any, Any], tuple[Tensor, Backend]] = {}
            for p, sources in graph.saved_sources():
                if p.op in VIEWS:
                    continue
                backend = self._find(c.ggml_backend_sched_get_tensor_backend(self.ptr, p))
                for before, now in zip(sources, p.src, strict=False):
                    if before and now != before:
                        found.setdefault((before, backend.ptr), (graph.wrap(before), backend))
            return list(found.values())

    def report(self) -> Report:
        """Splits, copies and memory of the graph held; printed, a table. See :func:`ggml_cffi.viz.draw.report`."""
        from ggml_cffi.viz import draw

        return draw.report(self)

    def draw(self, path: str | PathLike[str] | None = None) -> str:
        """The graph held as an SVG document, written to ``path`` too. See :func:`ggml_cffi.viz.draw.svg`."""
        from ggml_cffi.viz import draw

        return draw.svg(self, path)

    def profile(self, graph: Graph | None = None, *, runs: int = 3, warmup: int = 1) -> Profile:
        """Measure each node and each split of the graph. See :func:`ggml_cffi.viz.profile.profile`."""
        from ggml_cffi.viz.profile import profile

        return profile(self, graph, runs=runs, warmup=warmup)

    def buffer_type(self, backend: Backend | str) -> BufferType:
        """The kind of memory that results on ``backend`` are in. C: ``ggml_backend_sched_get_buffer_type``."""
        return BufferType(c.ggml_backend_sched_get_buffer_type(self.ptr, self._find(backend).ptr))

    def _find(self, backend: Any) -> Backend:
        """The backend of this scheduler that ``backend`` is: itself, its name or its C pointer."""
        for b in self.backends:
            if b is backend or b.ptr == backend or (isinstance(backend, str) and b.device.is_called(backend)):
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
        with getattr(self, "lock", nullcontext()):
            if not self.closed:
                self.reset()
                self._close_opened()
            super().close()

    def forgotten(self) -> None:
        """Close without waiting for locks; with work under way, leave everything as it is rather than free it."""
        if self._pending:
            _abandoned.append(self.owner)
        elif self._graph is not None:
            self._graph.restore()
            self._graph = None
        for backend in self._opened:
            super(Backend, backend).close()
        super().close()

    def __repr__(self) -> str:
        return f"<Scheduler {'closed' if self.closed else ', '.join(b.name for b in self.backends)}>"


def _buffers(graph: Graph) -> list[Owner]:
    return [b.owner for ctx in graph.contexts for b in ctx.buffers]


def _check(status: int) -> None:
    if status == Status.SUCCESS:
        return
    if status == Status.ABORTED:
        raise AbortedError("the run was stopped")
    if status == Status.ALLOC_FAILED:
        raise OutOfMemoryError("a backend ran out of memory during the computation")
    raise GgmlError(f"the computation failed: {Status(status).name.lower()}")
