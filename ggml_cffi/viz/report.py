"""Reports: splits, copies and memory of a scheduled graph, as a table for the terminal."""

from __future__ import annotations

from dataclasses import dataclass

from ggml_cffi.core.text import count, table
from ggml_cffi.scheduler.scheduler import Scheduler
from ggml_cffi.viz.snapshot import Copy, Snapshot, describe, is_weight

__all__ = ["Memory", "Report", "SplitRow", "report", "summary"]


@dataclass(frozen=True)
class SplitRow:
    """One row of the table: a split of a graph."""

    backend: str
    n_nodes: int
    first: str
    """Its first node: operation, name, shape, type."""
    last: str
    copies: list[Copy]
    """Copies to its backend before it runs."""

    @property
    def copied(self) -> int:
        """Bytes copied to its backend."""
        return sum(copy.nbytes for copy in self.copies)


@dataclass(frozen=True)
class Memory:
    """Bytes on one backend."""

    compute: int
    """Compute buffer, for intermediate results and for copies from other backends."""
    inputs: int
    """Leaves of the graph that are not marked as weights: inputs, constants, caches."""
    weights: int
    n_nodes: int
    """Number of nodes that the backend computes."""

    @property
    def total(self) -> int:
        """Compute buffer, inputs and weights together."""
        return self.compute + self.inputs + self.weights


@dataclass(frozen=True)
class Report:
    """Splits, copies and memory of the graph that a scheduler holds. ``str()`` is a table."""

    n_nodes: int
    """Number of nodes, views included."""
    n_leaves: int
    splits: list[SplitRow]
    memory: dict[str, Memory]
    """By backend, in order of preference."""

    @property
    def copied(self) -> int:
        """Bytes copied between backends in each run."""
        return sum(split.copied for split in self.splits)

    @property
    def total(self) -> int:
        """Bytes on all backends."""
        return sum(m.total for m in self.memory.values())

    def __str__(self) -> str:
        copies = [copy for split in self.splits for copy in split.copies]
        head = summary(self.n_nodes, self.n_leaves, len(self.splits), copies)
        rows = [("split", "backend", "nodes", "first node", "last node", "bytes in", "copied in")]
        for k, split in enumerate(self.splits):
            names = [copy.name for copy in split.copies]
            names = names[:3] + [f"{len(names) - 3} more"] * (len(names) > 3)
            last = split.last if split.n_nodes > 1 else ""
            rows.append(
                (str(k), split.backend, str(split.n_nodes), split.first, last, f"{split.copied:,}", ", ".join(names))
            )
        numbers = {name: (m.n_nodes, m.compute, m.inputs, m.weights, m.total) for name, m in self.memory.items()}
        numbers["all"] = tuple(map(sum, zip(*numbers.values(), strict=True)))  # type: ignore[assignment]
        sizes = [["backend", "nodes", "compute", "inputs", "weights", "total"]]
        sizes += [[name, *(f"{n:,}" for n in row)] for name, row in numbers.items()]
        return "\n\n".join((head, table(rows, right=(0, 2, 5)), "bytes\n" + table(sizes, right=(1, 2, 3, 4, 5))))


def summary(n_nodes: int, n_leaves: int, n_splits: int, copies: list[Copy]) -> str:
    """Return one line about a graph: its nodes and leaves, and its splits and copied bytes if it is scheduled."""
    parts = [count(n_nodes, "node"), f"{n_leaves:,} {'leaf' if n_leaves == 1 else 'leaves'}"]
    if n_splits:
        parts.append(count(n_splits, "split"))
    if copies:
        parts.append(f"{sum(copy.nbytes for copy in copies):,} bytes copied per run")
    return ", ".join(parts)


def report(scheduler: Scheduler) -> Report:
    """Return splits, copies and memory by backend of the graph that ``scheduler`` holds.

    Raises
    ------
    ValueError
        If no graph is held.
    """
    with scheduler.lock:
        seen = Snapshot.of(scheduler)
        splits = [
            SplitRow(
                part.backend,
                len(part.nodes),
                describe(part.nodes[0]),
                describe(part.nodes[-1]),
                seen.copies_to(k),
            )
            for k, part in enumerate(seen.splits)
        ]
        sizes = dict(zip(seen.backends, scheduler.buffer_sizes().values(), strict=True))
        memory = {name: _memory(seen, name, compute) for name, compute in sizes.items()}
        return Report(len(seen.nodes), len(seen.leaves), splits, memory)


def _memory(seen: Snapshot, backend: str, compute: int) -> Memory:
    inputs = weights = 0
    for t in seen.leaves:
        if seen.where.get(t.ptr) == backend and not t.ptr.view_src:
            if is_weight(t):
                weights += t.nbytes
            else:
                inputs += t.nbytes
    n_nodes = sum(len(part.nodes) for part in seen.splits if part.backend == backend)
    return Memory(compute, inputs, weights, n_nodes)
