"""Profiles: the time that each node and each split of a graph takes."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from typing import Any, NamedTuple

from ggml_cffi import c
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.core.text import table, to_json
from ggml_cffi.enums import Op
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.scheduler import Scheduler
from ggml_cffi.viz.snapshot import Copy, Snapshot, WithTensors, describe, op_name

__all__ = ["NodeGroup", "NodeTime", "Profile", "SplitTime", "Times", "profile"]

_ONE_FLOP_PER_VALUE = frozenset(
    {
        *(Op.ADD, Op.ADD1, Op.ACC, Op.SUB, Op.MUL, Op.DIV, Op.SCALE, Op.CLAMP, Op.LEAKY_RELU, Op.UNARY, Op.GLU),
        *(Op.SQR, Op.SQRT, Op.LOG, Op.SIN, Op.COS),
    }
)
_SHOWN = 30


class Times(NamedTuple):
    """Seconds over several runs."""

    min: float
    median: float


@dataclass(frozen=True)
class NodeTime(WithTensors):
    """The measured time of one node."""

    node: Tensor = field(compare=False)
    op: str
    """The operation's name, as the Python function's."""
    text: str
    """Operation, name, shape and type."""
    backend: str
    split: int
    seconds: Times
    nbytes: int
    """Bytes of the operands and the result, each counted once; of a table, the rows that are looked up."""
    flop: int | None
    """Additions and multiplications of a matrix product or attention, one per value of an elementwise operation, None
    for other operations."""

    @property
    def gflops(self) -> float | None:
        """Rate in 1e9 floating-point operations per second."""
        return _rate(self.flop, self.seconds.median)

    @property
    def gbps(self) -> float | None:
        """Rate in 1e9 bytes per second."""
        return _rate(self.nbytes, self.seconds.median)


@dataclass(frozen=True)
class SplitTime:
    """The measured time of one split: copies to its backend, and its nodes."""

    backend: str
    n_nodes: int
    seconds: Times
    """Time of copies and computation."""
    copy_seconds: Times
    """Time of the copies as far as ggml waits for them; the rest is part of the computation."""
    copies: list[Copy]

    @property
    def copied(self) -> int:
        """Bytes copied to the backend."""
        return sum(copy.nbytes for copy in self.copies)


@dataclass
class NodeGroup:
    """Nodes taken together: the sums of their medians, bytes and operations."""

    n_nodes: int = 0
    seconds: float = 0.0
    nbytes: int = 0
    flop: int | None = 0
    """None if the number is unknown for one of the nodes."""

    def add(self, row: NodeTime) -> None:
        """Add a node."""
        self.n_nodes += 1
        self.seconds += row.seconds.median
        self.nbytes += row.nbytes
        self.flop = None if self.flop is None or row.flop is None else self.flop + row.flop


@dataclass(frozen=True)
class Profile:
    """Times measured by :func:`profile`. ``str()`` is a table."""

    nodes: list[NodeTime]
    """Nodes in order of computation, each measured by itself."""
    splits: list[SplitTime]
    """Splits in order of computation, each measured by itself."""
    total: Times
    """Time of whole runs without measurements in between."""
    runs: int
    """Number of measured runs: whole, split by split, and node by node."""
    events: list[dict[str, Any]] = field(repr=False)
    """Trace events of the fastest run node by node."""

    @property
    def node_seconds(self) -> float:
        """The sum of the nodes' medians: more than :attr:`total`, since each node is waited for."""
        return sum(row.seconds.median for row in self.nodes)

    @property
    def split_seconds(self) -> float:
        """The sum of the splits' medians. The excess over :attr:`total` is work that overlaps in a run."""
        return sum(row.seconds.median for row in self.splits)

    def by_op(self) -> dict[str, NodeGroup]:
        """Return groups of nodes by operation, the slowest first."""
        return _grouped(self.nodes, lambda row: row.op)

    def by_backend(self) -> dict[str, NodeGroup]:
        """Return groups of nodes by backend, the slowest first."""
        return _grouped(self.nodes, lambda row: row.backend)

    def trace(self, path: str | os.PathLike[str]) -> None:
        """Write the fastest run node by node for chrome://tracing or ui.perfetto.dev: a track for each backend.

        Source: Google, Trace Event Format, 2016.
        """
        times = {"seconds, nobody watching": self.total.median, "seconds, node by node": self.node_seconds}
        document = {"traceEvents": self.events, "displayTimeUnit": "ns", "otherData": times}
        Path(path).write_text(to_json(document, indent=1), encoding="utf-8")

    def __str__(self) -> str:
        whole = [
            ("µs", "median", "least"),
            ("whole run", _us(self.total.median), _us(self.total.min)),
            ("split by split", _us(self.split_seconds), _us(sum(r.seconds.min for r in self.splits))),
            ("node by node", _us(self.node_seconds), _us(sum(r.seconds.min for r in self.nodes))),
        ]
        parts = [table(whole, right=(1, 2)), self._split_table()]
        for head, groups in (("backend", self.by_backend()), ("operation", self.by_op())):
            parts.append(self._group_table(head, groups))
        parts.append(self._node_table())
        return "\n\n".join(parts)

    def _split_table(self) -> str:
        rows = [("split", "backend", "nodes", "µs", "%", "copying", "bytes in")]
        for k, row in enumerate(self.splits):
            time = row.seconds.median
            share, copying = _share(time, self.split_seconds), _us(row.copy_seconds.median)
            rows.append((str(k), row.backend, str(row.n_nodes), _us(time), share, copying, f"{row.copied:,}"))
        return table(rows, right=(0, 2, 3, 4, 5, 6))

    def _group_table(self, head: str, groups: dict[str, NodeGroup]) -> str:
        rows = [(head, "nodes", "µs", "%", "GFLOP/s", "GB/s")]
        for name, group in groups.items():
            rates = _number(_rate(group.flop, group.seconds)), _number(_rate(group.nbytes, group.seconds))
            share = _share(group.seconds, self.node_seconds)
            rows.append((name, str(group.n_nodes), _us(group.seconds), share, *rates))
        return table(rows, right=(1, 2, 3, 4, 5))

    def _node_table(self) -> str:
        rows = [("node", "backend", "µs", "least", "%", "GFLOP/s", "GB/s")]
        ordered = sorted(self.nodes, key=lambda row: -row.seconds.median)
        for row in ordered[:_SHOWN]:
            time = row.seconds.median
            numbers = _us(time), _us(row.seconds.min), _share(time, self.node_seconds)
            rows.append((row.text, row.backend, *numbers, _number(row.gflops), _number(row.gbps)))
        if rest := ordered[_SHOWN:]:
            time = sum(row.seconds.median for row in rest)
            least = sum(row.seconds.min for row in rest)
            share = _share(time, self.node_seconds)
            rows.append((f"{len(rest)} more", "", _us(time), _us(least), share, "", ""))
        return table(rows, right=(2, 3, 4, 5, 6))


def profile(scheduler: Scheduler, graph: Graph | None = None, *, runs: int = 3, warmup: int = 1) -> Profile:
    """Measure the nodes, the splits and the whole of a graph.

    The graph runs ``warmup + 3 * runs`` times: without waits, then with a wait after each split, then with a wait after
    each node. With a wait, a node takes longer than in a normal run, in which the device continues with the next node.
    Times are the host's, launch included. Caches and the memory of in-place nodes change with every run, as usual.

    Parameters
    ----------
    scheduler
        The scheduler that computes the graph.
    graph
        The graph; default the one that the scheduler holds. It is allocated if none is held.
    runs
        Number of runs of each of the three kinds, at least 1.
    warmup
        Number of runs before the measured ones. GPUs compile their kernels in these runs.

    Raises
    ------
    ValueError, TypeError
        If a number of runs is not possible, or there is no graph, or the scheduler holds another one.
    GgmlError
        As :meth:`Scheduler.compute`.

    C: ``ggml_backend_sched_set_eval_callback``.
    """
    _check_runs(runs, "runs", 1)
    _check_runs(warmup, "warmup", 0)
    with scheduler.lock:
        scheduler.ptr  # noqa: B018 - raises when closed
        if graph is not None and scheduler.graph is None:
            scheduler.alloc(graph)
        for _ in range(warmup):
            scheduler.compute(graph)
        whole = []
        for _ in range(runs):
            start = perf_counter_ns()
            scheduler.compute(graph)
            whole.append((perf_counter_ns() - start) / 1e9)
        seen = Snapshot.of(scheduler)
        by_split = [_watch(scheduler, {part.nodes[-1].ptr for part in seen.splits}) for _ in range(runs)]
        by_node = [_watch(scheduler, {t.ptr for part in seen.splits for t in part.nodes}) for _ in range(runs)]
        # ggml divides a split that needs too many copies: then its nodes are not launched together.
        together = scheduler.n_splits == len(seen.splits)
        splits = _splits(seen, by_split, together)
        nodes = _nodes(seen, by_node)
        fastest = min(by_node, key=lambda clock: clock.end - clock.start)
        return Profile(nodes, splits, _times(whole), runs, _events(seen, nodes, fastest))


def _check_runs(n: int, name: str, minimum: int) -> None:
    if isinstance(n, bool):
        raise TypeError(f"{name} must be an integer number of runs, not {n!r}")
    if not minimum <= operator.index(n) <= 1_000_000:
        raise ValueError(f"{name} must be {minimum} to 1,000,000, not {n}")


# ---------------------------------------------------------------------- measuring


class _Clock:
    """Times at which ggml announces each node, and at which the wanted nodes are done."""

    def __init__(self, wanted: Collection[Any], wait: Callable[[], None]) -> None:
        self.wanted, self.wait = wanted, wait
        self.asked: dict[Any, int] = {}
        self.done: dict[Any, int] = {}
        self.error: BaseException | None = None
        self.start = self.end = 0
        self.callback = c.ffi.callback("ggml_backend_sched_eval_callback", self._called)

    def _called(self, p: Any, ask: bool, _data: Any) -> bool:
        if self.error is not None:
            return ask  # stops at the first node of this split and of each later one
        try:
            if not ask:
                self.wait()
                self.done[p] = perf_counter_ns()
                return True
            found = p in self.wanted
            self.asked[p] = perf_counter_ns()
            return found
        except BaseException as error:  # KeyboardInterrupt
            self.error = error
            return ask


def _watch(scheduler: Scheduler, wanted: Collection[Any]) -> _Clock:
    clock = _Clock(wanted, scheduler.wait_for_servers)
    c.ggml_backend_sched_set_eval_callback(scheduler.ptr, clock.callback, c.NULL)
    try:
        clock.start = perf_counter_ns()
        scheduler.compute()
        clock.end = perf_counter_ns()
    finally:
        c.ggml_backend_sched_set_eval_callback(scheduler.ptr, c.NULL, c.NULL)
        if clock.error is not None:
            raise clock.error
    return clock


def _splits(seen: Snapshot, clocks: list[_Clock], together: bool) -> list[SplitTime]:
    found = []
    for k, part in enumerate(seen.splits):
        first, last = part.nodes[0].ptr, part.nodes[-1].ptr
        copying, computing = [], []
        for clock in clocks:
            before = clock.done[seen.splits[k - 1].nodes[-1].ptr] if k else clock.start
            copying.append((clock.asked[first] - before) / 1e9)
            # ggml announces all nodes of the split before it launches them.
            computing.append((clock.done[last] - clock.asked[last if together else first]) / 1e9)
        copies = seen.copies_to(k)
        if not copies:
            copying = [0.0] * len(clocks)
        both = [a + b for a, b in zip(copying, computing, strict=True)]
        found.append(SplitTime(part.backend, len(part.nodes), _times(both), _times(copying), copies))
    return found


def _nodes(seen: Snapshot, clocks: list[_Clock]) -> list[NodeTime]:
    found = []
    for k, part in enumerate(seen.splits):
        for t in part.nodes:
            seconds = _times([(clock.done[t.ptr] - clock.asked[t.ptr]) / 1e9 for clock in clocks])
            sources = seen.sources[t.ptr]
            row = NodeTime(
                t, op_name(t), describe(t), part.backend, k, seconds, _traffic(t, sources), _flop(t, sources)
            )
            found.append(row)
    return found


def _times(seconds: list[float]) -> Times:
    return Times(min(seconds), median(seconds))


# ---------------------------------------------------------------------- counting


def _size(p: Any, rows: int | None = None) -> int:
    """Return the bytes of ``rows`` rows of a tensor (default all), without gaps."""
    if rows is None:
        rows = int(p.ne[1] * p.ne[2] * p.ne[3])
    return c.ggml_row_size(p.type, p.ne[0]) * rows


def _traffic(t: Tensor, sources: list[Any]) -> int:
    p, op = t.ptr, t.op
    if op is Op.GET_ROWS:
        source, rows = sources
        return _size(source, c.ggml_nelements(rows)) + _size(rows) + _size(p)
    if op is Op.SET_ROWS:  # values, row numbers, and the rows to write
        values, rows = sources[:2]
        return _size(values) + _size(rows) + _size(p, int(values.ne[1] * values.ne[2] * values.ne[3]))
    if op is Op.CPY:  # its second operand is only written
        return _size(sources[0]) + _size(p)
    total = _size(p)
    for k, source in enumerate(dict.fromkeys(sources)):
        size = _size(source)
        if op is Op.MUL_MAT_ID and k == 0:  # each row uses one expert, so at most as many
            experts = int(source.ne[2])
            size = size // max(experts, 1) * min(experts, c.ggml_nelements(sources[2]))
        total += size
    return total


def _flop(t: Tensor, sources: list[Any]) -> int | None:
    op, size = t.op, t.size
    if op in (Op.MUL_MAT, Op.MUL_MAT_ID):
        return 2 * size * int(sources[0].ne[0])
    if op is Op.OUT_PROD:
        return 2 * size * int(sources[0].ne[1])
    if op is Op.FLASH_ATTN_EXT:
        q, k, v = sources[:3]
        return 2 * int(q.ne[1] * q.ne[2] * q.ne[3] * k.ne[1] * (k.ne[0] + v.ne[0]))
    return size if op in _ONE_FLOP_PER_VALUE else None


def _rate(count: int | None, seconds: float) -> float | None:
    return count / seconds / 1e9 if count is not None and seconds > 0 else None


def _grouped(rows: Iterable[NodeTime], key: Callable[[NodeTime], str]) -> dict[str, NodeGroup]:
    found: dict[str, NodeGroup] = {}
    for row in rows:
        found.setdefault(key(row), NodeGroup()).add(row)
    return dict(sorted(found.items(), key=lambda item: -item[1].seconds))


# ---------------------------------------------------------------------- writing


def _events(seen: Snapshot, nodes: list[NodeTime], clock: _Clock) -> list[dict[str, Any]]:
    """Return a run as complete events of Chrome's trace format, in microseconds."""
    track = {name: i for i, name in enumerate(seen.backends)}
    events: list[dict[str, Any]] = [_named("process_name", 0, "ggml_cffi, node by node")]
    for name, i in track.items():
        events += [_named("thread_name", i, name), {**_named("thread_sort_index", i, ""), "args": {"sort_index": i}}]

    def event(kind: str, name: str, tid: int, start: int, end: int, args: dict[str, Any]) -> dict[str, Any]:
        span = {"ts": (start - clock.start) / 1e3, "dur": (end - start) / 1e3}
        return {"ph": "X", "cat": kind, "name": name, "pid": 1, "tid": tid, **span, "args": args}

    before = clock.start
    for k, part in enumerate(seen.splits):
        tid, first, last = track[part.backend], part.nodes[0].ptr, part.nodes[-1].ptr
        copies = seen.copies_to(k)
        start = before if copies else clock.asked[first]
        events.append(event("split", f"split {k}", tid, start, clock.done[last], {"nodes": len(part.nodes)}))
        if copies:
            tensors = [f"{copy.name} from {copy.source}: {copy.nbytes:,} bytes" for copy in copies]
            args = {"bytes": sum(copy.nbytes for copy in copies), "tensors": tensors}
            events.append(event("copy", "copy in", tid, start, clock.asked[first], args))
        before = clock.done[last]
    for row, node in zip(nodes, (node for part in seen.splits for node in part.nodes), strict=True):
        p = node.ptr
        args = {"what": row.text, "split": row.split, "bytes": row.nbytes, "flop": row.flop}
        events.append(event("node", row.op, track[row.backend], clock.asked[p], clock.done[p], args))
    return events


def _named(event: str, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": event, "pid": 1, "tid": tid, "args": {"name": name}}


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f}"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}" if whole else "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
