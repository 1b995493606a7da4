"""Sessions and models in a process of their own: a crash there is an exception here.

>>> from ggml_cffi import isolate, models
>>> with isolate.Worker(models.load, "model.gguf") as worker:  # doctest: +SKIP
...     for piece in worker.generate("The capital of France is", max_tokens=16):
...         print(piece, end="", flush=True)
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ggml_cffi.core.handle import Closing
from ggml_cffi.errors import ClosedError
from ggml_cffi.isolate.process import Process

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

__all__ = ["Remote", "Stream", "Worker"]

_GRACE = 5.0  # seconds for a process to end by itself
_logger = logging.getLogger("ggml_cffi.isolate")
_numbers = itertools.count(1)


class Worker(Closing):
    """A process that calls ``make`` once, and then what that returned, whenever this process asks.

    ``make`` returns a session's functions, a model, or any other object; where it is a context manager, that is
    entered. What the object has by a name is called by that name: ``worker.f(x)``. For a dict of functions, names are
    its keys; for a function, call the worker itself.

    Arrays travel through shared memory with one copy each way. They are yours to keep and to write to, on both sides.
    Calls from several threads run one after the other.

    Parameters
    ----------
    make
        A function, local ones and lambdas included, or the name of one: ``"package.module:function"``. It is sent with
        the values that it uses; sessions and other objects of ggml cannot be.
    args
        Its arguments.
    name
        What messages and log records call the worker; default the name of ``make``, and a number.
    env
        Environment variables to set, such as ``{"GGML_VK_VISIBLE_DEVICES": "1"}``.
    restarts
        How often a new process may take the place of one that died, all in all. The call that was running fails; those
        after it, also those that wait, find a new process.
    timeout
        Most seconds of a call, or of a piece of a stream. A process that takes longer is killed.
    start_timeout
        Most seconds from the process's start to the end of ``make``.

    Raises
    ------
    Exception
        What ``make`` raises.
    TypeError
        If ``make`` or an argument cannot be sent.
    BackendCrashedError
        If the process dies in ``make``.

    Examples
    --------
    >>> def make(scale):
    ...     session = ggml.Session(["CPU"])
    ...     return session.compile(lambda x: ggml.scale(x, scale))
    >>> with Worker(make, 3.0) as worker:
    ...     worker(np.ones(4)).tolist()
    [3.0, 3.0, 3.0, 3.0]
    """

    def __init__(
        self,
        make: Callable[..., Any] | str,
        *args: Any,
        name: str | None = None,
        env: Mapping[str, str] | None = None,
        restarts: int = 0,
        timeout: float | None = None,
        start_timeout: float | None = None,
    ) -> None:
        if not callable(make) and not isinstance(make, str):
            raise TypeError(f"make is a function, or the name of one, not {type(make).__name__}")
        if restarts < 0:
            raise ValueError(f"restarts must be at least 0, not {restarts}")
        for what, seconds in (("timeout", timeout), ("start_timeout", start_timeout)):
            if seconds is not None and not seconds > 0:
                raise ValueError(f"{what} must be more than 0 seconds, not {seconds}")
        called = make if isinstance(make, str) else getattr(make, "__name__", type(make).__name__)
        self.name = name or f"{called} {next(_numbers)}"
        """What messages call it."""
        self._make, self._args, self._env = make, args, dict(env or {})
        self._restarts, self._timeout, self._start_timeout = restarts, timeout, start_timeout
        self._replaces = restarts > 0
        self._lock = threading.Lock()  # held during a call
        self._state = threading.Lock()  # held for moments
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False
        self._pid = os.getpid()
        self._processes: list[Process] = []  # the one that there is
        # For a worker that is forgotten, or left when the interpreter exits.
        self._finalizer = weakref.finalize(self, _abandon, self._processes, self._pid)
        try:
            self._start()
        except BaseException:
            self._closed = True
            raise

    def _start(self) -> None:
        process = Process(self.name, self._env)
        self._processes[:] = [process]  # before make is called: close() may end it meanwhile
        process.start(self._make, self._args, self._start_timeout)

    # ------------------------------------------------------------------ calls

    def call(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call what ``make`` returned by one of its names, and wait for the result.

        Parameters
        ----------
        name
            A name, also ``"part.name"``. What is no function is got, without arguments.

        Returns
        -------
        Any
            The result. For a generator, and any other iterator, a :class:`Stream` that computes piece by piece.

        Raises
        ------
        Exception
            What the function raises, with the traceback there as a note. An exception that cannot be sent is raised as
            its nearest base class that can.
        BackendCrashedError
            If the process died, with its last words.
        BackendTimeoutError
            If it took longer than ``timeout``; it is a ``TimeoutError``, too.
        ClosedError
            If the worker is closed, before or meanwhile.
        TypeError
            If an argument, or the result, cannot be sent.
        """
        return self._call(None, name, args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call what ``make`` returned; see :meth:`call`."""
        return self._call(None, "__call__", args, kwargs)

    def submit(self, name: str, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As :meth:`call`, in the background, after what was submitted before.

        The arguments must not change until the future is done. Where the process dies or is restarted before the call's
        turn, its future fails as well, unless the worker has ``restarts``.
        """
        from concurrent.futures import ThreadPoolExecutor

        with self._state:
            self._check_open()
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"ggml_cffi calls of {self.name}")
            before = None if self._replaces else self._processes[0]
            return self._pool.submit(self._call, before, name, args, kwargs)

    async def run_async(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`call`, without blocking the event loop. Cancelling the task drops a call that waits."""
        import asyncio

        return await asyncio.wrap_future(self.submit(name, *args, **kwargs))

    def __getattr__(self, name: str) -> Remote:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return Remote(self, name)

    def _call(self, process: Process | None, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        process, kind, value = self._ask(process, name, "call", name, args, kwargs)
        return Stream(self, process, name, value) if kind == "stream" else value

    def _ask(self, process: Process | None, during: str, what: str, *rest: Any) -> tuple[Process, str, Any]:
        """Ask the process that there is; where ``process`` is given, no other."""
        with self._lock:
            current = self._current(process)
            return current, *current.ask(what, *rest, during=during, timeout=self._timeout)

    def _current(self, process: Process | None) -> Process:
        self._check_open()
        (current,) = self._processes
        if process is not None and process is not current:
            raise process.error()
        if not current.dead:
            return current
        if process is not None or self._restarts == 0:
            raise current.error()
        self._restarts -= 1
        _logger.warning("%s, and is replaced", str(current.error()).partition(". ")[0])
        current.dispose()
        self._start()
        return self._processes[0]

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the worker {self.name!r} is closed")
        if self._pid != os.getpid():
            raise ClosedError(f"the worker {self.name!r} was opened before a fork; open another one here")

    # ------------------------------------------------------------------ its process

    @property
    def pid(self) -> int:
        """The id of its process."""
        return self._processes[0].pid

    @property
    def alive(self) -> bool:
        """Whether it can be called: its process runs, or another one may take its place."""
        return not self._closed and (self._restarts > 0 or not self._processes[0].dead)

    def restart(self) -> None:
        """Call ``make`` in a new process, with the same arguments, so that weights are there as in the beginning.

        A call that runs in another thread fails.

        Raises
        ------
        Exception
            As ``Worker`` itself.
        """
        self._check_open()
        before = self._processes[0]
        with self._ended("was ended by restart()", wait=0, grace=_GRACE):
            self._check_open()
            if self._processes[0] is before:
                self._start()

    def close(self, timeout: float = 5.0) -> None:
        """Drop what waits, finish what runs, and end the process.

        Parameters
        ----------
        timeout
            Seconds to wait for the call that runs, and as many for the process to close what ``make`` returned. It is
            killed after that.
        """
        with self._state:
            if self._closed:
                return
            self._closed = True
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
        self._processes[0].closed = True
        if self._pid == os.getpid():
            with self._ended("was closed", wait=timeout, grace=timeout):
                self._finalizer.detach()
        if pool is not None:
            pool.shutdown()

    @contextmanager
    def _ended(self, reason: str, *, wait: float, grace: float) -> Iterator[None]:
        """End the process; no call runs meanwhile."""
        process = self._processes[0]
        process.reason = process.reason or reason
        if not self._lock.acquire(timeout=wait):
            process.kill()  # so that the call that runs gives the lock back
            self._lock.acquire()
        try:
            process.end(grace)
            process.dispose()
            yield
        finally:
            self._lock.release()

    def __del__(self) -> None:
        if getattr(self, "_closed", True) is False and not sys.is_finalizing():
            warnings.warn(f"Worker {self.name!r} was never closed", ResourceWarning, source=self, stacklevel=2)
            self._finalizer()

    def __repr__(self) -> str:
        if self._closed:
            return f"<Worker {self.name!r} closed>"
        return f"<Worker {self.name!r}, process {self.pid}{'' if self.alive else ' died'}>"


def _abandon(processes: list[Process], pid: int) -> None:
    if pid == os.getpid():
        for process in processes:
            process.kill()
            process.dispose()


class Remote:
    """A function of a worker, ``worker.name``, with the calls that compiled functions have."""

    __slots__ = ("name", "worker")

    def __init__(self, worker: Worker, name: str) -> None:
        self.worker, self.name = worker, name

    @property
    def alive(self) -> bool:
        """Whether it can be called; see :attr:`Worker.alive`."""
        return self.worker.alive

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call, and wait for the result; see :meth:`Worker.call`."""
        return self.worker.call(self.name, *args, **kwargs)

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call in the background; see :meth:`Worker.submit`."""
        return self.worker.submit(self.name, *args, **kwargs)

    async def run_async(self, *args: Any, **kwargs: Any) -> Any:
        """Call without blocking the event loop; see :meth:`Worker.run_async`."""
        return await self.worker.run_async(self.name, *args, **kwargs)

    def __repr__(self) -> str:
        return f"<{self.name!r} of {self.worker!r}>"


class Stream(Iterator[Any]):
    """The pieces of an iterator in a worker, each computed when it is asked for.

    Other calls may come between two pieces. Iterating raises what :meth:`Worker.call` does.
    """

    def __init__(self, worker: Worker, process: Process, name: str, number: int) -> None:
        self._worker, self._process, self._name = worker, process, name
        self._number: int | None = number

    def __next__(self) -> Any:
        if self._number is None:
            raise StopIteration
        try:
            _, kind, value = self._worker._ask(self._process, self._name, "next", self._number)
        except BaseException:
            self._forget()
            raise
        if kind == "stop":
            self._number = None
            raise StopIteration
        return value

    def close(self) -> None:
        """Close the iterator in the worker. Closing twice is allowed."""
        number, self._number = self._number, None
        if number is not None and not self._process.dead:
            self._worker._ask(self._process, self._name, "drop", number)

    def _forget(self) -> None:
        number, self._number = self._number, None
        if number is not None:
            self._process.forgotten.append(number)  # told with the next call

    def __del__(self) -> None:
        self._forget()
