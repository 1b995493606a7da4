"""Step graphs: the division of one device's trace into the graphs of its steps.

A step is the part of a trace between two all-reduces. Its graph begins at weights, inputs, shared memory, and the
results of earlier steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.handle import Closing
from ggml_cffi.core.op_sets import VIEWS
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Op
from ggml_cffi.parallel.executors import Freeze, Step, StepMaker
from ggml_cffi.parallel.node_order import by_levels
from ggml_cffi.parallel.rank import Rank
from ggml_cffi.scheduler.graph import Graph

_TENSOR = "struct ggml_tensor"
_SIZE = c.ffi.sizeof(_TENSOR)
_OP, _SRC = c.ffi.offsetof(_TENSOR, "op"), c.ffi.offsetof(_TENSOR, "src")
_SRC_END = _SRC + 8 * c.GGML_MAX_SRC

#: Number of nodes after a tensor's last use before its memory is reused. A backend may fuse a node with some earlier
#: nodes, provided that it does not write to memory that these nodes read.
_LINGER = 5


class StepGraphs(Closing):
    """The steps of one rank.

    Parameters
    ----------
    rank
        The rank, after its function was traced.
    first
        Tensors to compute first.
    results
        Tensors to compute, each with the tensor in shared memory that receives its values.
    side_by_side
        True to order nodes so that independent ones are neighbours, for GPUs.
    maker
        The maker of steps. It is closed with this object.
    """

    def __init__(
        self,
        rank: Rank,
        first: Sequence[Tensor],
        results: Sequence[tuple[Tensor, Tensor]],
        maker: StepMaker,
        *,
        side_by_side: bool,
    ) -> None:
        self.rank = rank
        self.in_shared_memory: dict[Any, Tensor] = {}
        """Nodes that are computed directly in shared memory, each with the tensor there that it replaces."""
        self.graphs: list[Graph] = []
        """The graph of each step. The last step may be missing."""
        self._step = self._number_steps()
        outputs = [s.partial for s in rank.all_reduces] + [t for t, _ in results]
        nodes = self._sources_of(outputs)
        self._uses = Counter(src for p in nodes for src in (*p.src, p.view_src) if src)
        self._uses.update(t.ptr for t in outputs)
        self.steps: list[Step] = []
        """The C graphs of each step."""
        self._maker = maker
        ends = self._ends(nodes, first, results)
        try:
            with _frozen_nodes() as freeze:
                for tensors in ends if ends[-1] else ends[:-1]:
                    graph = Graph(*dict.fromkeys(tensors))
                    self.graphs.append(graph)
                    if side_by_side:
                        graph.reorder(by_levels(graph.node_pointers()))
                    nodes = graph.node_pointers()
                    self.steps.append(maker.make(graph, freeze))
                    freeze(nodes)
        except BaseException:
            self.close()
            raise

    def _ends(
        self, nodes: list[Any], first: Sequence[Tensor], results: Sequence[tuple[Tensor, Tensor]]
    ) -> list[list[Tensor]]:
        """Return the tensors at which the graph of each step ends."""
        rank = self.rank
        ends: list[list[Tensor]] = [[*first]] + [[] for _ in rank.all_reduces]
        shared = [(s.partial, s.slots[rank.index], k) for k, s in enumerate(rank.all_reduces)]
        shared += [(t, target, len(rank.all_reduces)) for t, target in results]
        for t, target, k in shared:
            ends[k].append(self._share(t, target, k))
        nodes += [t.ptr for tensors in ends for t in tensors]
        for p in self._read_by_later_steps(nodes):
            ends[self._step[p]].append(self._wrap(p))
        return ends

    def node_pointers(self) -> list[Any]:
        """Return C pointers of the nodes of all steps."""
        return [p for graph in self.graphs for p in graph.node_pointers()]

    def nodes_changed(self) -> None:
        """Note that nodes have other sizes now. No run may be in progress."""
        self._maker.nodes_changed()

    def _wrap(self, pointer: Any) -> Tensor:
        return Tensor(self.rank.context, pointer, c.ggml_n_dims(pointer))

    def _number_steps(self) -> dict[Any, int]:
        """Return the step of each tensor: a tensor created after an all-reduce belongs to the next step."""
        starts = {s.slots[0].ptr for s in self.rank.all_reduces}
        step, found = 0, {}
        for t in self.rank.context.tensors():
            step += t.ptr in starts
            found[t.ptr] = step
        return found

    def _sources_of(self, outputs: Iterable[Tensor]) -> list[Any]:
        """Return the nodes that compute ``outputs``, each after its sources."""
        done: set[Any] = set()
        found: list[Any] = []
        for t in outputs:
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
                                f"{self._wrap(p)!r} is computed from weights alone, so it is in their context: "
                                "pass ctx=rank.context to the operation"
                            )
                        stack.append((p, True))
                        stack += [(src, False) for src in p.src if src]
        return found

    def _share(self, t: Tensor, target: Tensor, k: int) -> Tensor:
        """Return the node that writes ``t`` to ``target`` in step ``k``: ``t``, or a copy if others read it."""
        p = t.ptr
        alone = self._uses[p] == 1 and self._step[p] == k and p.op not in VIEWS and not p.view_src
        if alone and t.dtype is target.dtype:
            self.in_shared_memory[p] = target
            return t
        copy = self.rank.context.build(c.ggml_cpy, t.ndim, t.ptr, target.ptr)
        self._step[copy.ptr] = k
        return copy

    def _read_by_later_steps(self, nodes: Sequence[Any]) -> list[Any]:
        """Return the nodes that are read in a later step."""
        step = self._step
        found: dict[Any, None] = {}
        for p in nodes:
            here = step[p]
            for src in p.src:
                if src and src.op != Op.NONE and step[src] < here:
                    found[src] = None
        return list(found)

    def lifetimes(self) -> dict[Any, tuple[int, int]]:
        """Return the numbers of the first and the last node that use each tensor's memory, sorted by the first."""
        found: dict[Any, tuple[int, int]] = {}
        i = 0
        for graph in self.graphs:
            for p in graph.node_pointers():
                if not p.view_src and p not in self.in_shared_memory:
                    found[p] = (i, i)
                for src in p.src:
                    root = (src.view_src or src) if src else None
                    if root in found:
                        found[root] = (found[root][0], i + _LINGER)
                i += 1
        return found

    def close(self) -> None:
        """Free the graphs."""
        for graph in self.graphs:
            graph.close()
        self._maker.close()


@contextmanager
def _frozen_nodes() -> Iterator[Freeze]:
    """Yield a function that turns nodes into leaves, at which graphs begin. They become nodes again at the end."""
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
