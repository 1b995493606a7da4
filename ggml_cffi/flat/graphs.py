"""Graphs, and the memory of a context's inputs, by C's names."""

from __future__ import annotations

from collections.abc import Sequence

from ggml_cffi import c
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.buffer import Buffer
from ggml_cffi.core.context import Context
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import BackendBufferUsage as Usage
from ggml_cffi.flat._checks import close, require, require_graph
from ggml_cffi.flat._objects import GraphBuilder, new_graph
from ggml_cffi.scheduler.graph import Graph

__all__ = [
    "ggml_backend_alloc_ctx_tensors",
    "ggml_backend_buffer_free",
    "ggml_backend_buffer_set_usage",
    "ggml_build_forward_expand",
    "ggml_graph_n_nodes",
    "ggml_new_graph",
]


def ggml_new_graph(ctx: Context) -> GraphBuilder:
    """Return an empty graph, to which :func:`ggml_build_forward_expand` adds outputs, as scripts for C do."""
    return GraphBuilder(require(ctx, Context))


def ggml_build_forward_expand(ctx: Context | GraphBuilder, tensor: Tensor) -> Graph | GraphBuilder:
    """Return the graph that computes ``tensor``, as R's binding does; or add an output to a graph, as C does."""
    if isinstance(ctx, GraphBuilder):
        ctx.expand(require(tensor, Tensor))
        return ctx
    return new_graph(require(ctx, Context), [require(tensor, Tensor)])


def ggml_graph_n_nodes(graph: Graph | GraphBuilder) -> int:
    """Return the number of nodes: tensors that are computed."""
    return len(require_graph(graph))


def ggml_backend_alloc_ctx_tensors(ctx: Context, backend: Backend) -> list[Buffer]:
    """Allocate all inputs of a context on a backend, where they stay: weights, caches, trained parameters.

    Without this call the scheduler allocates inputs. The result is a list of buffers, because a device may limit the
    size of one. :func:`ggml_backend_buffer_set_usage` and :func:`ggml_backend_buffer_free` take this list.
    """
    return require(ctx, Context).alloc(require(backend, Backend).buffer_type)


def ggml_backend_buffer_set_usage(buffer: Sequence[Buffer], usage: Usage) -> None:
    """Set the usage of buffers.

    With ``GGML_BACKEND_BUFFER_USAGE_WEIGHTS``, nodes run on the device of these weights. The other choice is ``_ANY``.
    """
    if usage not in (Usage.ANY, Usage.WEIGHTS):
        raise ValueError(f"usage must be ANY or WEIGHTS, not {usage!r}")
    for one in buffer:
        c.ggml_backend_buffer_set_usage(require(one, Buffer).ptr, usage)


def ggml_backend_buffer_free(buffer: Sequence[Buffer] | None) -> None:
    """Free buffers, whose tensors can no longer be used. Closing the context frees them too."""
    for one in buffer or ():
        close(one, Buffer)
