"""Splits of a graph and the copies between them: the one place that derives both from the nodes' backends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic, NamedTuple, TypeVar

from ggml_cffi.core.backend import Backend
from ggml_cffi.core.op_sets import VIEWS
from ggml_cffi.core.tensor import Tensor

B = TypeVar("B")


class Split(NamedTuple):
    """Nodes that run one after another on one backend."""

    backend: Backend
    nodes: list[Tensor]


class CopyPlan(NamedTuple, Generic[B]):
    """A tensor that each run copies to another backend."""

    source: Any
    """C pointer of the tensor."""
    target: B
    """The backend that needs it."""
    user: Any
    """C pointer of the first node that needs it there; later nodes use the same copy."""


def find_splits(nodes: Iterable[Tensor], backend_of: Callable[[Any], B | None]) -> list[tuple[B, list[Tensor]]]:
    """Group consecutive nodes on one backend. Views, which compute nothing, are left out.

    ggml divides a group further if it would have too many inputs.

    Parameters
    ----------
    nodes
        Nodes in order of computation.
    backend_of
        The backend of the node at a C pointer, None where it is not known; such nodes are left out.
    """
    splits: list[tuple[B, list[Tensor]]] = []
    for t in nodes:
        if t.op in VIEWS or (backend := backend_of(t.ptr)) is None:
            continue
        if not splits or splits[-1][0] != backend:
            splits.append((backend, []))
        splits[-1][1].append(t)
    return splits


def find_copies(sources: Iterable[tuple[Any, list[Any]]], backend_of: Callable[[Any], B | None]) -> list[CopyPlan[B]]:
    """Return the tensors that each run copies between backends, in order of first use.

    Parameters
    ----------
    sources
        C pointers of the nodes in order of computation, each with its own operands. ggml has put a copy in the place
        of each operand that is on another backend.
    backend_of
        As for :func:`find_splits`.
    """
    found: dict[tuple[Any, B], CopyPlan[B]] = {}
    for p, operands in sources:
        if p.op in VIEWS or (backend := backend_of(p)) is None:
            continue
        for own, current in zip(operands, p.src, strict=False):
            if own and current != own and (own, backend) not in found:
                found[own, backend] = CopyPlan(own, backend, p)
    return list(found.values())
