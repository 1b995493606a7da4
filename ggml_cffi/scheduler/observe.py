"""Observation of a run node by node."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.op_sets import VIEWS
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.errors import AbortedError
from ggml_cffi.scheduler.graph import Graph


class Observed(Tensor):
    """A node that was just computed. Until the run continues, its values can be read, even those of an intermediate."""

    __slots__ = ("live",)
    live: bool

    def _check_output(self) -> None:
        if not self.live:
            super()._check_output()


class Observer:
    """A function that is called after nodes. Its exception stops the run, and is kept in ``error``."""

    def __init__(self, graph: Graph, function: Callable[[Tensor], object], only: Collection[Tensor] | None) -> None:
        if not callable(function):
            raise TypeError(f"observe must be a function of a tensor, not {type(function).__name__}")
        self.graph = graph
        self.function = function
        self.only = None if only is None else {t.ptr for t in only}
        self.error: BaseException | None = None
        self.callback = c.ffi.callback("ggml_backend_sched_eval_callback", self._called, False, self._failed)

    def _failed(self, _kind: Any, error: BaseException, _trace: Any) -> None:
        """Keep an exception of :meth:`_called`, also one that a signal raises before its first line."""
        self.error = error

    def _called(self, p: Any, ask: bool, _data: Any) -> bool:
        if self.error is not None:
            # Returning False ends the current split only: observe the first node of each later split, to end it too.
            return ask
        if ask:
            return p.op not in VIEWS if self.only is None else p in self.only
        known = self.graph.wrap(p)
        t = Observed(known.context, p, known.ndim)
        t.live = True
        try:
            if self.function(t) is False:
                raise AbortedError(f"the run was stopped by its observer after {t!r}")
        finally:
            t.live = False
        return True
