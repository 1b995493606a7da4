"""Graphs: the nodes to compute for some outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.context import Context
from ggml_cffi.core.handle import Handle
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Op

# ggml_build_forward_expand recurses along the operands: 100,000 levels overrun the stack of the main thread, and other
# threads may have much smaller stacks.
_RECURSION_SAFE = 2_000


class Graph(Handle):
    """All nodes that must be computed for some outputs, each after its operands.

    Parameters
    ----------
    outputs
        Tensors that will be read. A run does not reuse their memory.

    Raises
    ------
    ValueError
        Without outputs, or if no output has to be computed, or a scheduler holds some of the tensors.
    ClosedError
        If the context of an output, or of a tensor that an output needs, is closed.

    C: ``ggml_new_graph_custom``, ``ggml_build_forward_expand``.
    """

    __slots__ = ("_nodes", "_order", "_pointers", "contexts", "gradients", "members", "outputs")

    def __init__(self, *outputs: Tensor) -> None:
        if not outputs:
            raise ValueError("a graph needs at least one output")
        for t in outputs:
            if not isinstance(t, Tensor):
                raise TypeError(f"outputs are tensors, not {type(t).__name__}")
        self.outputs = outputs
        """The outputs."""
        self.gradients: dict[Tensor, Tensor] = {}
        """The gradient of each parameter, for a graph from :meth:`backward`."""
        self.contexts: list[Context] = []
        """All contexts with tensors of the graph."""
        for t in outputs:
            self.contexts += [ctx for ctx in t.context.reachable() if ctx not in self.contexts]
        keep = [ctx.owner for ctx in self.contexts]  # another thread may close the contexts meanwhile
        bound = sum(ctx.n_tensors for ctx in self.contexts) + 1
        capacity = bound + bound // 3  # room for views that step graphs append
        size = c.ggml_graph_overhead_custom(capacity, False) + 64
        pool = c.ggml_init({"mem_size": size, "mem_buffer": c.NULL, "no_alloc": True})  # type: ignore[arg-type]
        pointer = c.ggml_new_graph_custom(pool, capacity, False)
        super().__init__(pointer, lambda _, pool=pool: c.ggml_free(pool), self.contexts)  # type: ignore[misc]
        for t in outputs:
            for step in steps(t) if bound > _RECURSION_SAFE else (t.ptr,):
                c.ggml_build_forward_expand(pointer, step)
        self._order = c.ggml_graph_nodes(pointer)
        self._nodes: list[Any] = c.ffi.unpack(self._order, c.ggml_graph_n_nodes(pointer))
        self._pointers = c.ffi.new("struct ggml_tensor *[]", self._nodes)
        self.members: set[Any] = {*self._nodes, *_operands(self._nodes)}
        """C pointers of all nodes and leaves."""
        try:
            self.check_free()
            if not self._nodes:
                raise ValueError("there is nothing to compute: all outputs are inputs, weights or caches")
        except ValueError:
            self.close()
            raise
        for t in outputs:
            c.ggml_set_output(t.ptr)
        del keep

    @classmethod
    def backward(cls, loss: Tensor, params: Sequence[Tensor], outputs: Sequence[Tensor] = ()) -> Graph:
        """Return a graph of ``loss``, ``outputs`` and the gradients of ``loss``; see :attr:`gradients`.

        Errors as :func:`ggml_cffi.gradients`.
        """
        from ggml_cffi.train.gradients import gradients

        found = gradients(loss, params)
        graph = cls(loss, *outputs, *found)
        graph.gradients = dict(zip(params, found, strict=True))
        return graph

    def check_free(self) -> None:
        """Raise ``ValueError`` if a scheduler holds this graph, or another with some of these nodes.

        That scheduler has replaced operands by copies, which are valid in its own runs only.
        """
        for ctx in self.contexts:
            for other, nodes in ctx.held.copy().items():  # copied, since schedulers of other threads change it
                if not nodes.isdisjoint(self._nodes):
                    raise ValueError(
                        f"a scheduler holds {other.graph!r} with some of these tensors: call its reset() first"
                    )

    @property
    def nodes(self) -> list[Tensor]:
        """The nodes in order of computation."""
        self.ptr  # noqa: B018 - raises when closed
        return [self.wrap(p) for p in self._nodes]

    @property
    def leaves(self) -> list[Tensor]:
        """The leaves: inputs, weights and caches."""
        self.ptr  # noqa: B018 - raises when closed
        return [self.wrap(p) for p in self.members if p.op == Op.NONE]

    def wrap(self, pointer: Any) -> Tensor:
        """Return the node or leaf at a C pointer."""
        return Tensor(self.outputs[0].context, pointer, c.ggml_n_dims(pointer))

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, t: object) -> bool:
        return isinstance(t, Tensor) and t.ptr in self.members

    @property
    def n_tensors(self) -> int:
        """Number of nodes and leaves together."""
        return len(self.members)

    def reorder(self, nodes: Sequence[Any]) -> None:
        """Change the order of computation to ``nodes``, the same C pointers, each after its operands."""
        if nodes is not self._nodes:
            self._nodes = list(nodes)
            self._pointers = c.ffi.new("struct ggml_tensor *[]", self._nodes)
        c.ffi.memmove(self._order, self._pointers, c.ffi.sizeof(self._pointers))

    def calls(self) -> list[Any]:
        """Return the nodes written in Python, as :class:`ggml_cffi.ops.custom.Call`."""
        members = self.members
        return [call for ctx in self.contexts for p, call in ctx.calls.items() if p in members]

    def node_pointers(self) -> list[Any]:
        """Return the C pointers of the nodes."""
        return self._nodes

    def unallocated_leaves(self) -> Iterator[Tensor]:
        """Yield leaves without memory, each as a tensor of the context that holds it."""
        wanted = {p for p in self.members if p.op == Op.NONE and not p.view_src and not p.buffer}
        for ctx in self.contexts if wanted else ():
            for t in ctx.tensors():
                if t.ptr in wanted:
                    yield t

    def draw(self, path: str | PathLike[str] | None = None) -> str:
        """Return the graph as an SVG document, and write it to ``path``. See :func:`ggml_cffi.viz.svg`."""
        from ggml_cffi import viz

        return viz.svg(self, path)

    def __repr__(self) -> str:
        return "<Graph closed>" if self.closed else f"<Graph {len(self)} nodes>"


def _operands(nodes: list[Any]) -> Iterator[Any]:
    for p in nodes:
        for src in p.src:
            if src:  # an optional operand may be missing before others
                yield src
                if src.view_src:
                    yield src.view_src


def steps(output: Tensor) -> Iterator[Any]:
    """Yield the C pointers of ``output`` and all its operands, operands first, without recursion."""
    done: set[Any] = set()
    stack = [(output.ptr, False)]
    while stack:
        pointer, ready = stack.pop()
        if ready:
            yield pointer
        elif pointer not in done:
            done.add(pointer)
            stack.append((pointer, True))
            stack += [(src, False) for src in pointer.src if src]
