"""The outcome of a graph's checks, kept for the next allocation of the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ggml_cffi.core.backend import Backend
from ggml_cffi.enums import Op
from ggml_cffi.scheduler.held_graph import HeldGraph, SavedFields
from ggml_cffi.scheduler.placements import Placements, Required


@dataclass(frozen=True)
class Preparation:
    """The outcome of the checks of one graph, with which a scheduler allocates the graph again.

    The checks take longer than ggml's own allocation. Their outcome depends on the graph, on the memory of its leaves,
    on the placements by hand, and on the compute buffers of the scheduler. Nothing here keeps the graph alive.
    """

    saved: SavedFields
    """The fields of the tensors that ggml overwrites."""
    added: dict[Any, Any]
    """Operands that were added to nodes."""
    required: Required
    """Placements that the graph requires."""
    cpu: Backend | None
    """The CPU, if it computes some of the nodes."""
    leaves: list[tuple[Any, Any]]
    """C pointers of the leaves and of their buffers."""
    n_changes: int
    """Number of changes of the placements by hand until then."""
    sizes: dict[Backend, int]
    """Bytes of the compute buffers, with which the graph fits."""

    @classmethod
    def of(cls, held: HeldGraph, placements: Placements, cpu: Backend | None, sizes: dict[Backend, int]) -> Preparation:
        """Return the outcome for a graph that was just allocated."""
        leaves = [(p, p.buffer) for p in held.graph.members if p.op == Op.NONE]
        return cls(held.saved, held.added, placements.required, cpu, leaves, placements.n_changes, sizes)

    def is_valid(self, placements: Placements, sizes: dict[Backend, int]) -> bool:
        """Return whether the outcome would be the same now."""
        return (
            self.n_changes == placements.n_changes
            and self.sizes == sizes
            and all(p.buffer == buffer for p, buffer in self.leaves)
        )
