"""Compiled functions: a user's function, traced once for each signature and replayed after that."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy.typing as npt

from ggml_cffi.core.backend import Backend
from ggml_cffi.core.context import Context
from ggml_cffi.core.device import Device
from ggml_cffi.core.dry_run import DryRunContext
from ggml_cffi.core.lru import LRU
from ggml_cffi.errors import ClosedError
from ggml_cffi.scheduler.scheduler import Scheduler
from ggml_cffi.session.trace import Signature, Trace, TracedProgram, flatten

if TYPE_CHECKING:
    # Importing futures takes longer than importing this package.
    from concurrent.futures import Future


_R = TypeVar("_R", covariant=True)
"""The result of a compiled function: the user's result with an array in place of each tensor."""


class SessionInterface(Protocol):
    """The part of a :class:`~ggml_cffi.Session` that a compiled function uses."""

    max_programs: int
    precision: str

    @property
    def backends(self) -> tuple[Backend, ...]:
        """The open backends; raises :class:`ClosedError` when the session is closed."""

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Run a call in the session's own thread."""

    def close(self) -> None:
        """Close the session."""


class CompiledFunction(Generic[_R]):
    """A function of arrays, made by :meth:`Session.compile`.

    Type checkers know the result if the user's function is annotated: ``CompiledFunction[NDArray[Any]]`` for one that
    returns a tensor.

    Arguments may be arrays, or objects that numpy or DLPack can read, alone or in tuples, lists and dicts. Other values
    (numbers, strings, None) are constants of the trace. The result has the structure that the function returned, with
    an array in place of each tensor: of the tensor's type if numpy has it (``float16``, ``int32``), else ``float32``.

    ``float64`` and ``bfloat16`` arrays are computed in F32, integers in I32. PyTorch tensors that require gradients are
    constants: no gradient flows back to them.
    """

    def __init__(self, session: SessionInterface, function: Callable[..., Any]) -> None:
        self.session = session
        self.function = function
        self._programs: LRU[Signature, TracedProgram] = LRU(session.max_programs)
        self._last: TracedProgram | None = None
        self._lock = threading.RLock()
        # The programs are closed with the last reference to this function.
        weakref.finalize(self, self._programs.clear).atexit = False

    @property
    def programs(self) -> tuple[TracedProgram, ...]:
        """The traced programs, from the least to the most recently used."""
        with self._lock:
            return self._programs.values

    def __call__(self, *args: Any, **kwargs: Any) -> _R:
        """Run, and wait for the result.

        Raises
        ------
        ClosedError
            If the session is closed.
        Exception
            Any exception that the function raises during tracing, or that :meth:`Scheduler.compute` raises.
        """
        last = self._last
        try:
            if last is not None and not kwargs:  # the fast path: the signature of the last call
                out: _R | None = last.replay(args)
                if out is not None:
                    return out
            return self._run(args, kwargs)
        except ClosedError:
            # Another thread may have closed the program: each new signature closes the least recently used one.
            self.session.backends  # noqa: B018 - raises when closed
            return self._run(args, kwargs)

    def submit(self, *args: Any, **kwargs: Any) -> Future[_R]:
        """Run in the session's thread, after all calls that were submitted earlier.

        The arrays must not change until the future is done.
        """
        return self.session.submit(lambda: self(*args, **kwargs))

    async def run_async(self, *args: Any, **kwargs: Any) -> _R:
        """Run without blocking the event loop.

        Cancelling the task cancels a run that has not started, and stops one that runs on the CPU.
        """
        import asyncio

        program: TracedProgram | None = None

        def call() -> _R:
            nonlocal program
            program, arrays = self._find(args, kwargs)
            out: _R = program.run(arrays)
            return out

        future: Future[_R] = self.session.submit(call)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if future.running() and program is not None:
                with suppress(ClosedError):
                    self.session.backends[-1].abort()
            raise

    def trace(self, *args: Any, **kwargs: Any) -> TracedProgram:
        """Return the program for these arguments without running it: its graph, scheduler and report."""
        program, _ = self._find(args, kwargs)
        return program

    def reserve_size(self, *args: Any, **kwargs: Any) -> dict[Device, int]:
        """Return the bytes that inputs and intermediate tensors would take on each device for these arguments.

        The function is traced in a dry run: nothing is allocated. The errors are the same as those of a call.

        C: ``ggml_backend_sched_reserve_size``.
        """
        backends = self.session.backends
        context = DryRunContext(precision=self.session.precision, devices=[b.device for b in backends])
        with Trace(self.function, _signature(args, kwargs, []), context) as trace:
            sizes = dict.fromkeys(backends, 0)
            if trace.graph is not None:
                with Scheduler(backends) as scheduler:
                    sizes = scheduler.reserve_size(trace.graph)
            return {b.device: size + context.taken[b.buffer_type] for b, size in sizes.items()}

    def clear(self) -> None:
        """Close all traced programs."""
        with self._lock:
            self._programs.clear()
            self._last = None

    def discard(self, context: Context) -> None:
        """Close the traced programs that use tensors of ``context``."""
        with self._lock:
            self._last = None
            self._programs.discard(lambda program: context in program.context.reachable())

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _R:
        program, arrays = self._find(args, kwargs)
        out: _R = program.run(arrays)
        return out

    def _find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[TracedProgram, list[npt.NDArray[Any]]]:
        """Return the program for these arguments, traced if it is new, and the arrays of the arguments."""
        arrays: list[npt.NDArray[Any]] = []
        signature = _signature(args, kwargs, arrays)
        program = self._programs.peek(signature)
        if program is not None and program is self._last:
            return program, arrays
        with self._lock:
            program = self._programs.get(signature, lambda: self._traced(signature))
            self._last = program
        return program, arrays

    def _traced(self, signature: Signature) -> TracedProgram:
        return TracedProgram(self.session.backends, self.function, signature, self.session.precision)


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any], arrays: list[npt.NDArray[Any]]) -> Signature:
    return flatten(args, arrays), flatten(kwargs, arrays) if kwargs else None
