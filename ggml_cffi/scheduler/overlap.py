"""An order of nodes in which devices work at once.

ggml runs a graph in the order of its nodes, cut into parts of one device each, and copies all that a part needs from
other devices before it starts the part. So where two branches run on two devices and join on the second, and the join
follows the second branch, both are one part: it waits for the first branch before it begins. The order here keeps what
needs a copy apart from what does not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ggml_cffi.core.op_sets import VIEWS


def overlapping(nodes: Sequence[Any], backend_of: Mapping[Any, int], cpu: int) -> list[Any] | None:
    """``nodes`` (C pointers in an order that works) in stages; None where no stage has several GPUs.

    A stage is what can be computed once the results of the stages before are copied to where they are needed: within
    it, no device waits for another. ``backend_of`` has the number of each node's backend, ``cpu`` that of the CPU.
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
        # Not first the device that the last part ran on, since that would make one part of both; not last the only
        # device of the next stage, likewise; the CPU last, since it holds up who starts the others.
        following = set(stages[k + 1]) if k + 1 in stages else set()
        alone = next(iter(following)) if len(following) == 1 else None
        for here in sorted(stages[k], key=lambda b: (b == last, b == cpu, b != alone, b)):
            ordered += stages[k][here]
            last = here
    return ordered


def dependencies(nodes: Sequence[Any]) -> list[list[Any]]:
    """What each node must come after: what it is made from, and what else touches memory that one of them writes."""
    known = set(nodes)
    touched: dict[Any, list[Any]] = defaultdict(list)  # by owner of the memory: whoever used it since it was written
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
