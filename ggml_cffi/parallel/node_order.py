"""Order of a graph's nodes in which a GPU computes independent nodes in parallel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from ggml_cffi.core.op_sets import VIEWS
from ggml_cffi.enums import Op
from ggml_cffi.scheduler.overlap import dependencies

#: Pairs of neighbours that GPU backends fuse.
_FUSED = frozenset(
    {(Op.RMS_NORM, Op.MUL), (Op.MUL, Op.ROPE), (Op.MUL_MAT, Op.ADD), (Op.ADD, Op.ADD), (Op.VIEW, Op.SET_ROWS)}
)


def by_levels(nodes: Sequence[Any]) -> list[Any]:
    """Return nodes (C pointers) in an order in which independent ones are neighbours.

    A GPU computes neighbouring nodes in parallel. Before a node that depends on one of them, it waits for all of them.
    Nodes that backends fuse stay together, and a view stays after its source.
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
