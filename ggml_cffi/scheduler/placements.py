"""Placements: backends that the caller chose for tensors, or that checks and the node order require."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.buffer import BufferType
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.scheduler.checks import find_cpu_only
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.spread import find_spread

#: Placements that a graph itself requires: nodes for the CPU, operands on several devices, pinned nodes.
Required = tuple[dict[Any, str], dict[Any, Backend], dict[Any, Backend]]


class Placements:
    """The backends of the tensors for which ggml must not choose one."""

    __slots__ = ("_by_hand", "_spread", "cpu_only", "n_changes", "pinned")

    def __init__(self) -> None:
        self._by_hand: dict[Any, tuple[Tensor, Backend]] = {}
        self.n_changes = 0
        """Number of times that the caller changed placements."""
        self.cpu_only: dict[Any, str] = {}
        """Nodes of the graph in preparation that only the CPU can compute, by C pointer, each with the reason."""
        self._spread: dict[Any, Backend] = {}
        self.pinned: dict[Any, Backend] = {}
        """Backends that ggml chose for the nodes in their first order, to be kept in another order, by C pointer."""

    def set(self, tensor: Tensor, backend: Backend) -> None:
        """Place ``tensor`` on ``backend`` until it is placed elsewhere or removed."""
        self._by_hand[tensor.ptr] = (tensor, backend)
        self.n_changes += 1

    def remove(self, tensor: Tensor | None = None) -> None:
        """Remove the placement of ``tensor``, or all placements."""
        self.n_changes += 1
        if tensor is None:
            self._by_hand.clear()
        else:
            self._by_hand.pop(tensor.ptr, None)

    def get(self, pointer: Any) -> Backend | None:
        """Return the backend that the caller placed the tensor at ``pointer`` on, None where it was not placed."""
        found = self._by_hand.get(pointer)
        return None if found is None else found[1]

    def by_pointer(self) -> dict[Any, Backend]:
        """Return the backends that the caller chose, by C pointer."""
        return {p: backend for p, (_, backend) in self._by_hand.items()}

    def concern(self, graph: Graph) -> bool:
        """Return whether the caller placed any tensor of ``graph``."""
        return any(t in graph for t, _ in self._by_hand.values())

    def remove_closed(self) -> None:
        """Remove the placements of tensors whose context is closed, since their pointers may be reused."""
        for p in [p for p, (t, _) in self._by_hand.items() if t.context.closed]:
            del self._by_hand[p]

    def require(self, graph: Graph, backends: Sequence[Backend]) -> None:
        """Find the nodes of ``graph`` that must be on one backend, whatever ggml would choose."""
        self.cpu_only = find_cpu_only(graph, backends) if len(backends) > 1 else {}
        self._spread = find_spread(graph, backends)

    @property
    def required(self) -> Required:
        """Placements that :meth:`require` and the order of the nodes gave the graph in preparation."""
        return self.cpu_only, self._spread, self.pinned

    @required.setter
    def required(self, found: Required) -> None:
        self.cpu_only, self._spread, self.pinned = found

    def apply(self, scheduler: Any, graph: Graph, cpu: Backend) -> None:
        """Reset the C scheduler, and set the placements of the tensors of ``graph`` in it.

        C: ``ggml_backend_sched_reset``, ``ggml_backend_sched_set_tensor_backend``.
        """
        c.ggml_backend_sched_reset(scheduler)
        place = c.ggml_backend_sched_set_tensor_backend
        for p, backend in self._spread.items():
            place(scheduler, p, backend.ptr)
        for t, backend in self._by_hand.values():
            if t in graph:
                place(scheduler, t.ptr, backend.ptr)
        for p in self.cpu_only:
            place(scheduler, p, cpu.ptr)
        for p, backend in self.pinned.items():
            place(scheduler, p, backend.ptr)


def check_placement(tensor: Tensor, backend: Backend) -> None:
    """Raise ``ValueError`` if ``tensor`` has memory that ``backend`` cannot use."""
    root = tensor.memory_root()
    if root.buffer:
        memory = BufferType(c.ggml_backend_buffer_get_type(root.buffer))
        if not backend.supports_buffer_type(memory):
            raise ValueError(f"{tensor!r} has memory in {memory.name}, where {backend.name} cannot compute")
