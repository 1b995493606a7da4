"""An order of nodes in which several devices work at once.

ggml runs a graph in the order of its nodes, in splits of one device each. Before a split starts, ggml copies all that
the split needs from other devices. Suppose that two branches run on two devices and join on the second device. If the
join directly follows the second branch, both are one split, which waits for the first branch before it starts. The
order here therefore separates nodes that need a copy from nodes that do not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ggml_cffi.core.op_sets import VIEWS


def overlapping(nodes: Sequence[Any], backend_of: Mapping[Any, int], cpu: int) -> list[Any] | None:
    """Return ``nodes`` (C pointers, operands first) ordered by stages; None where no stage has several GPUs.

    A stage has the nodes that need no copy except of results of earlier stages, so within a stage no device waits for
    another. ``backend_of`` has the number of each node's backend, and ``cpu`` is the number of the CPU.
    """
    stage: dict[Any, int] = {}
    stages: dict[int, dict[int, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for p, before in zip(nodes, dependencies(nodes), strict=True):
        here = backend_of[p]
        stage[p] = max((stage[q] + (backend_of[q] != here) for q in before), default=0)
        stages[stage[p]][here].append(p)
    if not any(len(groups.keys() - {cpu}) > 1 for groups in stages.values()):
        return None
    ordered: list[Any] = []
    last = None
    for k in range(len(stages)):
        # The device of the last split does not come first, since both would become one split; for the same reason
        # the only device of the next stage does not come last. The CPU comes last: its work delays the start of others.
        next_devices = set(stages[k + 1]) if k + 1 in stages else set()
        alone = next(iter(next_devices)) if len(next_devices) == 1 else None
        for here in sorted(stages[k], key=lambda b: (b == last, b == cpu, b != alone, b)):
            ordered += stages[k][here]
            last = here
    return ordered


def dependencies(nodes: Sequence[Any]) -> list[list[Any]]:
    """Return the nodes that each node must follow: its operands, and earlier users of memory that either one writes."""
    known = set(nodes)
    touched: dict[Any, list[Any]] = defaultdict(list)  # by owner of the memory: users since the last write
    written: dict[Any, Any] = {}
    found = []
    for p in nodes:
        before = [q for q in (*p.src, p.view_src) if q and q in known]
        roots = {q.view_src or q for q in p.src if q}
        before += [written[root] for root in roots if root in written]
        if p.view_src and p.op not in VIEWS:
            before += touched[p.view_src]
            written[p.view_src], touched[p.view_src] = p, []
        for root in roots:
            touched[root].append(p)
        found.append([q for q in before if q != p])
    return found
