"""Schedulers, by C's names."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

from ggml_cffi.core.backend import Backend
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Status
from ggml_cffi.flat._checks import close, require, require_graph
from ggml_cffi.flat._objects import FlatContext, FlatScheduler, GraphBuilder
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.scheduler import Scheduler

__all__ = [
    "ggml_backend_sched_alloc_graph",
    "ggml_backend_sched_free",
    "ggml_backend_sched_get_backend",
    "ggml_backend_sched_get_buffer_size",
    "ggml_backend_sched_get_n_backends",
    "ggml_backend_sched_get_n_copies",
    "ggml_backend_sched_get_n_splits",
    "ggml_backend_sched_get_tensor_backend",
    "ggml_backend_sched_graph_compute",
    "ggml_backend_sched_graph_compute_async",
    "ggml_backend_sched_new",
    "ggml_backend_sched_reserve",
    "ggml_backend_sched_reset",
    "ggml_backend_sched_set_tensor_backend",
    "ggml_backend_sched_synchronize",
]


def ggml_backend_sched_new(backends: Sequence[Backend], parallel: bool = True, graph_size: int = 2048) -> Scheduler:
    """Return a scheduler over backends, the preferred first. The CPU is added last if it is missing.

    The arguments are those of R's binding. With ``parallel``, the scheduler keeps four copies of each
    input that it transfers between backends, if the backends support that.
    """
    return FlatScheduler(list(backends), parallel=bool(parallel), graph_size=graph_size)


def ggml_backend_sched_free(sched: Scheduler | None) -> None:
    """Close a scheduler. Its backends stay open."""
    close(sched, Scheduler)


def ggml_backend_sched_get_n_backends(sched: Scheduler) -> int:
    """Return the number of backends, the CPU included."""
    return len(require(sched, Scheduler).backends)


def ggml_backend_sched_get_backend(sched: Scheduler, i: int = 0) -> Backend:
    """Return a backend by its position, counted from 0."""
    backends = require(sched, Scheduler).backends
    if not 0 <= index(i) < len(backends):
        raise IndexError(f"the scheduler has {len(backends)} backends, counted from 0: there is no {i}")
    return backends[index(i)]


def ggml_backend_sched_get_n_splits(sched: Scheduler) -> int:
    """Return the number of splits of the held graph, 0 if none is held."""
    return require(sched, Scheduler).n_splits if sched.graph is not None else 0


def ggml_backend_sched_get_n_copies(sched: Scheduler) -> int:
    """Return the number of copies of inputs: 4, or 1 without ``parallel`` or on backends that do not support it."""
    return require(sched, Scheduler).n_copies


def ggml_backend_sched_get_buffer_size(sched: Scheduler, backend: Backend) -> int:
    """Return the bytes of intermediate tensors on a backend."""
    sizes = require(sched, Scheduler).buffer_sizes()
    if backend not in sizes:
        raise ValueError(f"{backend!r} is not one of {sched!r}")
    return sizes[backend]


def ggml_backend_sched_reserve(sched: Scheduler, measure_graph: Graph | GraphBuilder) -> bool:
    """Reserve memory for a graph that is allocated and computed later. Return True, or raise ``OutOfMemoryError``."""
    require(sched, Scheduler).reserve(require_graph(measure_graph))
    return True


def ggml_backend_sched_alloc_graph(sched: Scheduler, graph: Graph | GraphBuilder) -> bool:
    """Allocate a graph. Return True, or raise the errors of :meth:`ggml_cffi.Scheduler.alloc`."""
    require(sched, Scheduler).alloc(require_graph(graph))
    return True


def ggml_backend_sched_set_tensor_backend(sched: Scheduler, node: Tensor, backend: Backend) -> None:
    """Place a tensor on a backend, which computes a node or stores an input from the next reservation or allocation on.

    A reset of the scheduler keeps the placement. In C a reset removes it.
    """
    require(sched, Scheduler).place(require(node, Tensor), require(backend, Backend))


def ggml_backend_sched_get_tensor_backend(sched: Scheduler, node: Tensor) -> Backend | None:
    """Return the backend that computes a tensor or on which it was placed, None if there is neither."""
    if not isinstance(sched, FlatScheduler):
        held = require(sched, Scheduler).graph
        return sched.backend_of(node) if held is not None and node in held else None
    return sched.placed_on(require(node, Tensor))


def ggml_backend_sched_graph_compute(sched: Scheduler, graph: Graph | GraphBuilder) -> Status:
    """Compute a graph and wait. The graph is allocated first if the scheduler holds none.

    Returns
    -------
    Status
        ``GGML_STATUS_SUCCESS``; every failure raises.

    Raises
    ------
    ValueError
        If the scheduler holds another graph: C would compute that one.
    """
    require(sched, Scheduler).compute(require_graph(graph))
    return Status.SUCCESS


def ggml_backend_sched_graph_compute_async(sched: Scheduler, graph: Graph | GraphBuilder) -> Status:
    """Start computing a graph.

    Setting or reading values waits for the run, and so does :func:`ggml_backend_sched_synchronize`.
    """
    started = require_graph(graph)
    require(sched, Scheduler).compute_async(started)
    for ctx in started.contexts:
        if isinstance(ctx, FlatContext):
            ctx.running.add(sched)
    return Status.SUCCESS


def ggml_backend_sched_synchronize(sched: Scheduler) -> None:
    """Wait for runs that were started."""
    require(sched, Scheduler).synchronize()


def ggml_backend_sched_reset(sched: Scheduler) -> None:
    """Release the held graph. Inputs keep their values, and placements stay."""
    require(sched, Scheduler).reset()
