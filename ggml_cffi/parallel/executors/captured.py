"""Steps that a backend captures in a graph of its own, and launches again without looking at their nodes.

ggml's CUDA backend captures a graph that it got twice. Before each launch it compares every node with those of the
capture, which takes as long as some kernels, unless the graph has an identity: a number that ggml's scheduler gives to
the graphs that it makes. There is no function to set it. The place of the number in the C structure is therefore looked
for once, by watching the scheduler number a small graph. If the place is not found, the nodes are compared.
"""

from __future__ import annotations

from functools import cache
from itertools import count
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.device import registry_lock
from ggml_cffi.enums import BackendDevType, Type
from ggml_cffi.parallel.executors.base import Freeze, Step, StepMaker
from ggml_cffi.scheduler.graph import Graph

_WORDS = 24  # words of 8 bytes at the beginning of a C graph in which the number is looked for
_NEAR = 1000  # ggml counts graphs one by one

#: Identities that ggml's own count does not reach.
_identities = count(1 << 62)


class CapturedStepMaker(StepMaker):
    """Maker of steps of one graph each, with an identity."""

    def __init__(self) -> None:
        self._graphs: list[Any] = []

    def make(self, graph: Graph, freeze: Freeze) -> Step:
        """Return the step that computes ``graph``; see :meth:`StepMaker.make`."""
        self._graphs.append(graph.ptr)
        _identify(graph.ptr)
        return Step(immediate=(graph.ptr,))

    def nodes_changed(self) -> None:
        """Give the graphs new identities: the backend compares and captures them again."""
        for graph in self._graphs:
            _identify(graph)

    def close(self) -> None:
        """Forget the graphs."""
        self._graphs.clear()


def _identify(graph: Any) -> None:
    """Give a C graph an identity that no other has."""
    place = identity_place()
    if place is not None:
        _words(graph)[place] = next(_identities)


@cache
def identity_place() -> int | None:
    """Return the number of the 8-byte word of a C graph that holds its identity; None if it is not found.

    C: ``ggml_backend_sched_split_graph``.
    """
    size = c.ggml_graph_overhead_custom(16, False) + 2 * c.ggml_tensor_overhead() + 64
    context = c.ggml_init({"mem_size": size, "mem_buffer": c.NULL, "no_alloc": True})  # type: ignore[arg-type]
    graph = c.ggml_new_graph_custom(context, 16, False)
    c.ggml_build_forward_expand(graph, c.ggml_neg(context, c.ggml_new_tensor_1d(context, Type.F32, 1)))
    with registry_lock:
        backend = c.ggml_backend_init_by_type(BackendDevType.CPU, c.NULL)
    backends = c.ffi.new("ggml_backend_t[]", [backend])
    scheduler = c.ggml_backend_sched_new(backends, c.NULL, 1, 16, False, False)
    seen = [list(_words(graph)[0:_WORDS])]
    for _ in range(2):
        c.ggml_backend_sched_reset(scheduler)
        c.ggml_backend_sched_split_graph(scheduler, graph)
        seen.append(list(_words(graph)[0:_WORDS]))
    c.ggml_backend_sched_free(scheduler)
    c.ggml_backend_free(backend)
    c.ggml_free(context)
    found = [
        i
        for i, (before, first, second) in enumerate(zip(*seen, strict=True))
        if before == 0 and 0 < first < second < first + _NEAR
    ]
    return found[0] if len(found) == 1 else None


def _words(graph: Any) -> Any:
    return c.ffi.cast("uint64_t *", graph)
