"""Workers: a session or a model in a process of its own, where a crash becomes an exception here.

>>> from ggml_cffi import isolate, models
>>> with isolate.Worker(models.load, "model.gguf") as worker:  # doctest: +SKIP
...     for text in worker.generate("The capital of France is", max_tokens=16):
...         print(text, end="", flush=True)
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import threading
import warnings
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from ggml_cffi.core.async_items import AsyncItems
from ggml_cffi.core.handle import Closing
from ggml_cffi.errors import ClosedError
from ggml_cffi.isolate.process import WorkerProcess

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

__all__ = ["Stream", "Worker", "WorkerFunction"]

_GRACE = 5.0  # seconds that a process may take to end by itself
_logger = logging.getLogger("ggml_cffi.isolate")
_numbers = itertools.count(1)


class Worker(Closing):
    """A child process that holds the result of ``make``, whose functions can be called from here.

    ``make`` is called once, in the new process. It returns the functions of a session, a model, or any other object. If
    the object is a context manager, the worker enters it. The object's methods are called by their names:
    ``worker.f(x)``. If ``make`` returns a dict of functions, the names are its keys. If it returns a function, call the
    worker itself.

    Arrays travel through shared memory, with one copy in each direction. The receiver may keep them and write to them.
    Calls from several threads run one after the other.

    Parameters
    ----------
    make
        A function, or its name: ``"package.module:function"``. A local function or a lambda is sent together with the
        values that it uses; sessions and other objects of ggml cannot be sent.
    args
        The arguments of ``make``.
    name
        Name of the worker in messages and log records; default the name of ``make``, and a number.
    env
        Environment variables to set, such as ``{"GGML_VK_VISIBLE_DEVICES": "1"}``.
    restarts
        Number of times, in the worker's whole life, that a new process may replace one that died. The call that was
        running fails. Later calls, waiting ones included, use the new process.
    timeout
        Longest time of a call, or of one item of a stream, in seconds. A process that takes longer is killed.
    start_timeout
        Longest time from the process's start to the end of ``make``, in seconds.

    Raises
    ------
    Exception
        Any exception of ``make``.
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
            raise TypeError(f"make must be a function, or the name of one, not {type(make).__name__}")
        if restarts < 0:
            raise ValueError(f"restarts must be at least 0, not {restarts}")
        for parameter, seconds in (("timeout", timeout), ("start_timeout", start_timeout)):
            if seconds is not None and not seconds > 0:
                raise ValueError(f"{parameter} must be more than 0 seconds, not {seconds}")
        make_name = make if isinstance(make, str) else getattr(make, "__name__", type(make).__name__)
        self.name = name or f"{make_name} {next(_numbers)}"
        """Name of the worker in messages and log records."""
        self._make, self._args, self._env = make, args, dict(env or {})
        self._restarts, self._timeout, self._start_timeout = restarts, timeout, start_timeout
        self._replaces = restarts > 0
        self._lock = threading.Lock()  # held during a call
        self._state = threading.Lock()  # guards _closed and _pool; never held during a call
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False
        self._pid = os.getpid()
        self._processes: list[WorkerProcess] = []  # at most one; a list, since the finalizer must not refer to self
        # Ends the process of a worker that was never closed, also when the interpreter exits.
        self._finalizer = weakref.finalize(self, _abandon, self._processes, self._pid)
        try:
            self._start()
        except BaseException:
            self._closed = True
            raise

    def _start(self) -> None:
        process = WorkerProcess(self.name, self._env)
        self._processes[:] = [process]  # before the call of make, so that close() can end the process during that call
        process.start(self._make, self._args, self._start_timeout)

    # ------------------------------------------------------------------ calls

    def call(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function of the object that ``make`` returned, and wait for the result.

        Parameters
        ----------
        name
            The name of a function of the object, also ``"attribute.function"``. An attribute that is not callable is
            returned; it takes no arguments.

        Returns
        -------
        Any
            The result. For a generator, or any other iterator, a :class:`Stream` that computes each item on demand.

        Raises
        ------
        Exception
            Any exception of the function, with the process's traceback as a note. An exception that cannot be sent is
            raised as its nearest base class that can.
        BackendCrashedError
            If the process died; the message has the last lines that it wrote.
        BackendTimeoutError
            If the call took longer than ``timeout``. It is also a ``TimeoutError``.
        ClosedError
            If the worker is closed, before or during the call.
        TypeError
            If an argument, or the result, cannot be sent.
        """
        return self._call(None, name, args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function that ``make`` returned; see :meth:`call`."""
        return self._call(None, "__call__", args, kwargs)

    def submit(self, name: str, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call in the background, after the calls that were submitted before; see :meth:`call`.

        The arguments must not change until the future is done. If the process dies or is restarted before the call's
        turn, its future fails as well, unless the worker has ``restarts``.
        """
        from concurrent.futures import ThreadPoolExecutor

        with self._state:
            self._check_open()
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"ggml_cffi calls of {self.name}")
            process = None if self._replaces else self._processes[0]
            return self._pool.submit(self._call, process, name, args, kwargs)

    async def run_async(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call without blocking the event loop; see :meth:`call`. Cancelling the task cancels a call that waits."""
        import asyncio

        return await asyncio.wrap_future(self.submit(name, *args, **kwargs))

    def __getattr__(self, name: str) -> WorkerFunction:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return WorkerFunction(self, name)

    def _call(self, process: WorkerProcess | None, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        process, status, value = self._request(process, name, "call", name, args, kwargs)
        return Stream(self, process, name, value) if status == "stream" else value

    def _request(
        self, process: WorkerProcess | None, during: str, command: str, *rest: Any
    ) -> tuple[WorkerProcess, str, Any]:
        """Send a request to the current process. Raise if ``process`` is given and is not the current one."""
        with self._lock:
            current = self._current(process)
            return current, *current.request(command, *rest, during=during, timeout=self._timeout)

    def _current(self, process: WorkerProcess | None) -> WorkerProcess:
        """Return the current process, or its replacement if it died. Raise if ``process`` is given and another one."""
        self._check_open()
        (current,) = self._processes
        if process is not None and process is not current:
            raise process.error()
        if not current.ended:
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
            raise ClosedError(f"the worker {self.name!r} was opened before a fork; open another one in this process")

    # ------------------------------------------------------------------ the process

    @property
    def pid(self) -> int:
        """The process id."""
        return self._processes[0].pid

    @property
    def alive(self) -> bool:
        """True if the worker can be called: its process runs, or a new one may replace it."""
        return not self._closed and (self._restarts > 0 or not self._processes[0].ended)

    def restart(self) -> None:
        """End the process, and call ``make`` with the same arguments in a new one.

        A call that runs in another thread fails.

        Raises
        ------
        Exception
            The exceptions of creating a :class:`Worker`.
        """
        self._check_open()
        before = self._processes[0]
        with self._without_process("was ended by restart()", wait=0, grace=_GRACE):
            self._check_open()
            if self._processes[0] is before:
                self._start()

    def close(self, timeout: float = 5.0) -> None:
        """Cancel the calls that wait, finish the one that runs, and end the process.

        Parameters
        ----------
        timeout
            Seconds to wait for the running call, and as many for the process to close the object that ``make``
            returned. The process is killed after that.
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
            with self._without_process("was closed", wait=timeout, grace=timeout):
                self._finalizer.detach()
        if pool is not None:
            pool.shutdown()

    @contextmanager
    def _without_process(self, reason: str, *, wait: float, grace: float) -> Iterator[None]:
        """End the process, and hold the lock of calls for the ``with`` block."""
        process = self._processes[0]
        process.reason = process.reason or reason
        if not self._lock.acquire(timeout=wait):
            self._processes[0].kill()  # the running call, or make, fails and releases the lock
            self._lock.acquire()
        try:
            process = self._processes[0]  # another one if restart() was running
            process.reason = process.reason or reason
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


def _abandon(processes: list[WorkerProcess], pid: int) -> None:
    if pid == os.getpid():
        for process in processes:
            process.kill()
            process.dispose()


class WorkerFunction:
    """A function of a worker, ``worker.name``, with the methods of a compiled function."""

    __slots__ = ("name", "worker")

    def __init__(self, worker: Worker, name: str) -> None:
        self.worker, self.name = worker, name

    @property
    def alive(self) -> bool:
        """True if the worker can be called; see :attr:`Worker.alive`."""
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
    """An iterator in a worker: each item is computed when it is asked for. ``async for`` reads it in a thread.

    Other calls may run between two items. Iterating raises the exceptions of :meth:`Worker.call`. The attributes and
    methods of the iterator are here under their names: the stream of a model has ``finish_reason``, ``completion()``
    and the others of :class:`ggml_cffi.models.Stream`.
    """

    def __init__(self, worker: Worker, process: WorkerProcess, name: str, number: int) -> None:
        self.cancelled = False
        """True after :meth:`cancel`."""
        self._worker, self._process, self._name, self._number = worker, process, name, number
        self._ended = False

    def __next__(self) -> Any:
        if self._ended or self.cancelled:
            raise StopIteration
        try:
            status, value = self._request("next")
        except BaseException:
            self._ended = True
            raise
        if status == "stop" or self.cancelled:
            self._ended = True
            raise StopIteration
        return value

    def __aiter__(self) -> AsyncIterator[Any]:
        return AsyncItems(self, self.cancel)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        status, value = self._request("attribute", name)
        return partial(self._call, name) if status == "method" else value

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self._request("method", name, args, kwargs)[1]

    def _request(self, command: str, *rest: Any) -> tuple[str, Any]:
        stream = self._number, self.cancelled
        return self._worker._request(self._process, self._name, "of_stream", *stream, command, *rest)[1:]

    def cancel(self) -> None:
        """End the iteration, from any thread, also while the worker computes the next item or calls a method.

        An iterator that has a ``cancel`` itself, such as a model's stream, ends at once; others end after their
        current item.
        """
        self.cancelled = True
        self._process.cancel(self._number)

    def close(self) -> None:
        """Close the iterator in the worker. Closing twice is allowed."""
        ended, self._ended = self._ended, True
        if not ended and not self._process.ended:
            self._request("close")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._process.forgotten.append(self._number)  # sent with the next request
