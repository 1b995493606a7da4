"""From what was traced for one device to the graphs of its steps.

A step is what is traced between one sum over devices and the next. Its graph starts from weights, inputs, what the
devices share, and what earlier steps computed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.op_sets import VIEWS
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Op
from ggml_cffi.parallel.rank import Rank
from ggml_cffi.parallel.step_graphs import Step, Steps
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.overlap import dependencies

_TENSOR = "struct ggml_tensor"
_SIZE = c.ffi.sizeof(_TENSOR)
_OP, _SRC = c.ffi.offsetof(_TENSOR, "op"), c.ffi.offsetof(_TENSOR, "src")
_SRC_END = _SRC + 8 * c.GGML_MAX_SRC

#: Nodes after the last use for which memory is not used again: ggml's Vulkan computes some nodes together with those
#: before, if what they write is not what those read.
_LINGER = 5

#: A node and the next that ggml's Vulkan computes as one.
_FUSED = frozenset(
    {(Op.RMS_NORM, Op.MUL), (Op.MUL, Op.ROPE), (Op.MUL_MAT, Op.ADD), (Op.ADD, Op.ADD), (Op.VIEW, Op.SET_ROWS)}
)


class StepGraphs:
    """The steps of one rank.

    Parameters
    ----------
    rank
        After its function was traced.
    first
        What comes before all else.
    results
        What to compute, each with where it is to be written, in memory that the devices share.
    in_levels
        Whether to compute what does not depend on one another side by side, as GPUs can.
    hold
        Whether to have steps recorded ahead.
    """

    def __init__(
        self,
        rank: Rank,
        first: Sequence[Tensor],
        results: Sequence[tuple[Tensor, Tensor]],
        *,
        in_levels: bool,
        hold: bool,
    ) -> None:
        self.rank = rank
        self.placed: dict[Any, Tensor] = {}
        """Results that are computed straight into shared memory, each with the tensor there whose place it takes."""
        self.graphs: list[Graph] = []
        """One for each step; none for the last where that gives nothing here."""
        self._step = self._steps()
        wanted = [s.partial for s in rank.all_reduces] + [t for t, _ in results]
        nodes = self._needed(wanted)
        self._uses = Counter(src for p in nodes for src in (*p.src, p.view_src) if src)
        self._uses.update(t.ptr for t in wanted)
        self.steps: list[Step] = []
        """Their C graphs."""
        self._made = Steps()
        ends: list[list[Tensor]] = [[*first]] + [[] for _ in rank.all_reduces]
        shared = [(s.partial, s.slots[rank.index], k) for k, s in enumerate(rank.all_reduces)]
        shared += [(t, target, len(rank.all_reduces)) for t, target in results]
        for t, target, k in shared:
            ends[k].append(self._share(t, target, k))
        nodes += [t.ptr for tensors in ends for t in tensors]
        for p in self._crossing(nodes):
            ends[self._step[p]].append(self._wrap(p))
        try:
            with _leaves() as freeze:
                for tensors in ends if ends[-1] else ends[:-1]:
                    graph = Graph(*dict.fromkeys(tensors))
                    self.graphs.append(graph)
                    if in_levels:
                        graph.reorder(levels(graph.node_pointers()))
                    nodes = graph.node_pointers()
                    if in_levels:
                        self.steps.append(self._made.make(graph, freeze, shared=rank.n > 1, hold=hold))
                    else:
                        self.steps.append(Step(rest=(graph.ptr,)))
                    freeze(nodes)
        except BaseException:
            self.close()
            raise

    def node_pointers(self) -> list[Any]:
        """C pointers of the nodes of all steps."""
        return [p for graph in self.graphs for p in graph.node_pointers()]

    def _wrap(self, pointer: Any) -> Tensor:
        return Tensor(self.rank.context, pointer, c.ggml_n_dims(pointer))

    def _steps(self) -> dict[Any, int]:
        """The step of each tensor: what was made after a sum is in the next."""
        starts = {s.slots[0].ptr for s in self.rank.all_reduces}
        step, found = 0, {}
        for t in self.rank.context.tensors():
            step += t.ptr in starts
            found[t.ptr] = step
        return found

    def _needed(self, wanted: Iterable[Tensor]) -> list[Any]:
        """Every node that has a part in ``wanted``, after what it is made from."""
        done: set[Any] = set()
        found: list[Any] = []
        for t in wanted:
            stack = [(t.ptr, False)]
            while stack:
                p, ready = stack.pop()
                if ready:
                    found.append(p)
                elif p not in done:
                    done.add(p)
                    if p.op != Op.NONE:
                        if self._step.setdefault(p, 0 if p.op in VIEWS else -1) < 0:
                            raise ValueError(
                                f"{self._wrap(p)!r} is computed from weights alone, which would leave it in their "
                                "context: say ctx=rank.context"
                            )
                        stack.append((p, True))
                        stack += [(src, False) for src in p.src if src]
        return found

    def _share(self, t: Tensor, target: Tensor, k: int) -> Tensor:
        """What writes ``t`` to ``target`` in step ``k``: itself, where nothing else needs it, else a copy."""
        p = t.ptr
        alone = self._uses[p] == 1 and self._step[p] == k and p.op not in VIEWS and not p.view_src
        if alone and t.dtype is target.dtype:
            self.placed[p] = target
            return t
        copy = self.rank.context.build(c.ggml_cpy, t.ndim, t.ptr, target.ptr)
        self._step[copy.ptr] = k
        return copy

    def _crossing(self, nodes: Sequence[Any]) -> list[Any]:
        """What a later step needs than the one that computes it."""
        step = self._step
        found: dict[Any, None] = {}
        for p in nodes:
            here = step[p]
            for src in p.src:
                if src and src.op != Op.NONE and step[src] < here:
                    found[src] = None
        return list(found)

    def spans(self) -> dict[Any, tuple[int, int]]:
        """When each result needs memory: numbers of the first and the last node that use it, sorted by the first."""
        found: dict[Any, tuple[int, int]] = {}
        i = 0
        for graph in self.graphs:
            for p in graph.node_pointers():
                if not p.view_src and p not in self.placed:
                    found[p] = (i, i)
                for src in p.src:
                    root = (src.view_src or src) if src else None
                    if root in found:
                        found[root] = (found[root][0], i + _LINGER)
                i += 1
        return found

    def close(self) -> None:
        """Give the graphs up."""
        for graph in self.graphs:
            graph.close()
        self._made.close()


@contextmanager
def _leaves() -> Iterator[Callable[[Iterable[Any]], None]]:
    """A function that makes nodes pass for leaves, until the end: a graph begins at them."""
    saved: list[tuple[Any, bytes, bytes]] = []

    def freeze(nodes: Iterable[Any]) -> None:
        for p in nodes:
            raw = c.ffi.buffer(p, _SIZE)
            saved.append((raw, raw[_OP : _OP + 4], raw[_SRC:_SRC_END]))
            raw[_OP : _OP + 4] = bytes(4)
            raw[_SRC:_SRC_END] = bytes(_SRC_END - _SRC)

    try:
        yield freeze
    finally:
        for raw, op, sources in reversed(saved):
            raw[_OP : _OP + 4] = op
            raw[_SRC:_SRC_END] = sources


def levels(nodes: Sequence[Any]) -> list[Any]:
    """``nodes`` in an order in which those that do not need one another are neighbours.

    A GPU computes neighbours side by side; before a node that needs one of those under way, it waits for all. Nodes
    that are computed as one stay together, views with what they are views of.
    """
    level: dict[Any, int] = {}
    chains: dict[int, list[list[Any]]] = defaultdict(list)
    previous: Any = None
    for p, before in zip(nodes, dependencies(nodes), strict=True):
        own = max((level[q] for q in before if q != previous), default=-1) + 1
        if previous in before:
            joined = p.op in VIEWS or (previous.op, p.op) in _FUSED
            if joined and own <= level[previous]:
                level[p] = level[previous]
                chains[level[p]][-1].append(p)
                previous = p
                continue
            own = max(own, level[previous] + 1)
        level[p] = own
        chains[own].append([p])
        previous = p
    return [p for k in sorted(chains) for chain in chains[k] for p in chain]
