"""Checks of arguments that all modules of :mod:`ggml_cffi.flat` share."""

from __future__ import annotations

from typing import Any, TypeVar

from ggml_cffi.core.handle import Handle
from ggml_cffi.flat._objects import GraphBuilder
from ggml_cffi.scheduler.graph import Graph

_T = TypeVar("_T")


def require(value: Any, expected: type[_T]) -> _T:
    """Return ``value`` if it is of the expected type, else raise ``TypeError``."""
    if not isinstance(value, expected):
        raise TypeError(f"a {expected.__name__} is needed, not {type(value).__name__}")
    return value


def require_graph(graph: Graph | GraphBuilder) -> Graph:
    """Return a graph, built first if it is a :class:`GraphBuilder`; raise ``TypeError`` for other objects."""
    return graph.graph() if isinstance(graph, GraphBuilder) else require(graph, Graph)


def close(value: Handle | None, expected: type[Handle]) -> None:
    """Close a handle, or do nothing for None, as C's functions for freeing do."""
    if value is not None:
        require(value, expected).close()
