"""What a graph looks like now: operands, backends, splits and copies, for those who draw or measure it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.op_sets import VIEWS
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.core.text import clean
from ggml_cffi.enums import Op
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.scheduler import Scheduler


@dataclass(frozen=True)
class Copy:
    """What a run copies from one backend to another."""

    tensor: Tensor
    name: str
    source: str
    """The backend that has it."""
    target: str
    """The backend that needs it."""
    nbytes: int
    """Bytes; of a stack of experts in host memory, ggml copies only those that are used."""
    split: int
    """The split before which it is copied; later ones on the same backend find it there."""
    user: Tensor
    """The first node that needs it."""


@dataclass(frozen=True)
class Part:
    """A split: nodes that run one after another on one backend."""

    backend: str
    nodes: list[Tensor]


class Snapshot:
    """A graph as it is now. Its tensors are known by their C pointers.

    Parameters
    ----------
    graph
        What to look at.
    scheduler
        The one that holds it, which says where everything is. Without, the memory of a held graph says so.
    """

    def __init__(self, graph: Graph, scheduler: Scheduler | None = None) -> None:
        self.graph = graph
        self.nodes = graph.nodes
        held = {g: None for ctx in graph.contexts for g in ctx.held.copy()}
        # A scheduler puts copies in the place of operands, also for other graphs with the same nodes.
        before = {p: sources for g in held for p, sources in g.saved_sources()}
        self.sources: dict[Any, list[Any]] = {t.ptr: [s for s in before.get(t.ptr, t.ptr.src) if s] for t in self.nodes}
        """The operands of each node."""
        own = {t.ptr for t in self.nodes}
        operands = dict.fromkeys(s for sources in self.sources.values() for s in sources)
        self.leaves = [graph.wrap(p) for p in operands if p not in own]
        """What nothing computes, in order of first use."""
        self.backends: list[str] = []
        """Names of the backends."""
        self.where: dict[Any, str] = {}
        """The backend of each node, and of each leaf with memory."""
        if scheduler is not None:
            self._ask(scheduler)
        elif graph in held:
            self._guess()
        self.splits: list[Part] = []
        self._split()
        self.copies: list[Copy] = []
        if graph in held:
            self._find_copies(before)

    @classmethod
    def of(cls, scheduler: Scheduler) -> Snapshot:
        """The graph that ``scheduler`` holds.

        Raises
        ------
        ValueError
            If there is none.
        """
        with scheduler.lock:
            scheduler.n_splits  # noqa: B018 - raises when nothing is held
            graph = scheduler.graph
            assert graph is not None
            return cls(graph, scheduler)

    def _ask(self, scheduler: Scheduler) -> None:
        self.backends = labels(scheduler.backends)
        names = {b.ptr: name for b, name in zip(scheduler.backends, self.backends, strict=True)}
        for t in (*self.nodes, *self.leaves):
            found = c.ggml_backend_sched_get_tensor_backend(scheduler.ptr, t.ptr)
            if found:
                self.where[t.ptr] = names[found]
            elif (kind := t.buffer_type) is not None:
                able = [b for b in scheduler.backends if b.supports_buffer_type(kind)]
                self.where[t.ptr] = names[able[0].ptr]

    def _guess(self) -> None:
        last = ""
        for t in (*self.leaves, *self.nodes):
            kind = t.buffer_type
            if kind is not None:
                last = kind.device.name
            if last:
                self.where[t.ptr] = last
        self.backends = sorted(set(self.where.values()), key=lambda name: (name == "CPU", len(name), name))

    def _split(self) -> None:
        for t in self.nodes:
            if t.op in VIEWS or t.ptr not in self.where:
                continue
            if not self.splits or self.splits[-1].backend != self.where[t.ptr]:
                self.splits.append(Part(self.where[t.ptr], []))
            self.splits[-1].nodes.append(t)

    def _find_copies(self, before: dict[Any, list[Any]]) -> None:
        found: set[tuple[Any, str]] = set()
        for k, part in enumerate(self.splits):
            for t in part.nodes:
                for old, new in zip(before[t.ptr], t.ptr.src, strict=False):
                    if old and new != old and (old, part.backend) not in found:
                        found.add((old, part.backend))
                        tensor = self.graph.wrap(old)
                        self.copies.append(
                            Copy(tensor, clean(tensor.name), self.where[old], part.backend, tensor.nbytes, k, t)
                        )

    def split_of(self) -> dict[Any, int]:
        """The split of each node that computes something."""
        return {t.ptr: k for k, part in enumerate(self.splits) for t in part.nodes}


def labels(backends: Sequence[Backend]) -> list[str]:
    """The names of ``backends``, numbered where one device was opened more than once."""
    names = [b.name for b in backends]
    return [f"{name} #{names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def op_name(t: Tensor) -> str:
    """The operation as the Python function is called, also where ggml has one op for many."""
    if t.op is Op.NONE:
        return "leaf"
    text: bytes = c.ffi.string(c.ggml_op_desc(t.ptr))
    return text.decode().lower()


def describe(t: Tensor) -> str:
    """One line on a tensor: operation, name, shape, type."""
    return f"{op_name(t)} {clean(t.name).strip()} {t.shape} {t.dtype.name}"
