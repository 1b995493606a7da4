"""Snapshots: operands, backends, splits and copies of a graph as they are now, to be drawn or measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.core.text import clean
from ggml_cffi.enums import BackendBufferUsage as Usage
from ggml_cffi.enums import Op
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.scheduler import Scheduler
from ggml_cffi.scheduler.splits import find_copies, find_splits


class WithTensors:
    """Base of results that refer to tensors. A tensor is memory of this process: a pickled result has None instead."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: None if isinstance(value, Tensor) else value for name, value in self.__dict__.items()}


@dataclass(frozen=True)
class Copy(WithTensors):
    """A tensor that each run copies from one backend to another."""

    tensor: Tensor = field(compare=False)
    name: str
    source: str
    """The backend that the tensor is on."""
    target: str
    """The backend that needs it."""
    nbytes: int
    """Bytes of the tensor. Of a stack of experts in host memory, ggml copies only the experts in use."""
    split: int
    """The split before which the tensor is copied; later splits of the same backend use the same copy."""
    user: Tensor = field(compare=False)
    """The first node that needs it."""


@dataclass(frozen=True)
class SplitNodes:
    """Nodes that run one after another on one backend."""

    backend: str
    nodes: list[Tensor]


class Snapshot:
    """A graph as it is now. Tensors are identified by their C pointers.

    Parameters
    ----------
    graph
        The graph.
    scheduler
        The scheduler that holds the graph; it gives the backend of each node. Without it, devices are those of the
        nodes' memory, which nodes have while some scheduler holds the graph.
    """

    def __init__(self, graph: Graph, scheduler: Scheduler | None = None) -> None:
        self.graph = graph
        self.nodes = graph.nodes
        held = dict.fromkeys(held for ctx in graph.contexts for held in ctx.held.copy())
        # A scheduler puts copies in the place of operands, also for other graphs with the same nodes.
        own_operands = {p: operands for h in held for p, operands in h.sources()}
        self.sources: dict[Any, list[Any]] = {
            t.ptr: [s for s in own_operands.get(t.ptr, t.ptr.src) if s] for t in self.nodes
        }
        """The operands of each node."""
        computed = {t.ptr for t in self.nodes}
        operands = dict.fromkeys(s for sources in self.sources.values() for s in sources)
        self.leaves = [graph.wrap(p) for p in operands if p not in computed]
        """Inputs, weights and caches, in order of first use."""
        self.backends: list[str] = []
        """Labels of the backends."""
        self.where: dict[Any, str] = {}
        """The backend of each node, and of each leaf with memory."""
        is_held = any(h.graph is graph for h in held)
        if scheduler is not None:
            self._assign_by_scheduler(scheduler)
        elif is_held:
            self._assign_by_memory()
        self.splits = [SplitNodes(*found) for found in find_splits(self.nodes, self.where.get)]
        """The splits in order of computation; none where no backends are known."""
        self.copies: list[Copy] = []
        """The copies between backends in each run, in order."""
        if is_held:
            self._find_copies([(t.ptr, own_operands[t.ptr]) for t in self.nodes])

    @classmethod
    def of(cls, scheduler: Scheduler) -> Snapshot:
        """Return a snapshot of the graph that ``scheduler`` holds.

        Raises
        ------
        ValueError
            If no graph is held.
        """
        with scheduler.lock:
            return cls(scheduler.held.graph, scheduler)

    def _assign_by_scheduler(self, scheduler: Scheduler) -> None:
        self.backends = labels(scheduler.backends)
        names = {b.ptr: name for b, name in zip(scheduler.backends, self.backends, strict=True)}
        for t in (*self.nodes, *self.leaves):
            found = c.ggml_backend_sched_get_tensor_backend(scheduler.ptr, t.ptr)
            if found:
                self.where[t.ptr] = names[found]
            elif (memory := t.buffer_type) is not None:
                readers = [b for b in scheduler.backends if b.supports_buffer_type(memory)]
                self.where[t.ptr] = names[readers[0].ptr]

    def _assign_by_memory(self) -> None:
        last = ""
        for t in (*self.leaves, *self.nodes):
            memory = t.buffer_type
            if memory is not None:
                last = memory.device.name
            if last:
                self.where[t.ptr] = last
        self.backends = sorted(set(self.where.values()), key=lambda name: (name == "CPU", len(name), name))

    def _find_copies(self, sources: Sequence[tuple[Any, list[Any]]]) -> None:
        split_of = self.split_of()
        for source, target, user in find_copies(sources, self.where.get):
            t = self.graph.wrap(source)
            self.copies.append(
                Copy(t, clean(t.name), self.where[source], target, t.nbytes, split_of[user], self.graph.wrap(user))
            )

    def split_of(self) -> dict[Any, int]:
        """Return the number of the split of each node that computes something, by C pointer."""
        return {t.ptr: k for k, split in enumerate(self.splits) for t in split.nodes}

    def copies_to(self, split: int) -> list[Copy]:
        """Return the copies before a split."""
        return [copy for copy in self.copies if copy.split == split]


def labels(backends: Sequence[Backend]) -> list[str]:
    """Return the names of ``backends``, numbered where one device was opened more than once."""
    names = [b.name for b in backends]
    return [f"{name} #{names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def op_name(t: Tensor) -> str:
    """Return the operation's name as the Python function's, also where ggml has one op for many functions."""
    if t.op is Op.NONE:
        return "leaf"
    text: bytes = c.ffi.string(c.ggml_op_desc(t.ptr))
    return text.decode().lower()


def describe(t: Tensor) -> str:
    """Return one line about a tensor: operation, name, shape, type."""
    return f"{op_name(t)} {clean(t.name).strip()} {t.shape} {t.dtype.name}"


def is_weight(t: Tensor) -> bool:
    """Return whether a tensor is in memory for weights."""
    buffer = t.memory_root().buffer
    return bool(buffer) and c.ggml_backend_buffer_get_usage(buffer) == Usage.WEIGHTS
