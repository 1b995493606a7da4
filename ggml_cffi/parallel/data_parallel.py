"""Data parallelism: a replica of a function on each device. Each call runs on one of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Protocol

from ggml_cffi.core.device import DevicesLike, device_list, device_name
from ggml_cffi.core.handle import Closing
from ggml_cffi.errors import ClosedError
from ggml_cffi.parallel.replicas import Replica, Replicas, Task

_IN_FLIGHT = 32  # default number of calls of map() in flight on an executor


class TaskExecutor(Protocol):
    """Interface of an executor that runs calls, as in :mod:`concurrent.futures`."""

    def submit(self, function: Callable[..., Any], /, *args: Any) -> Any:
        """Schedule ``function(*args)`` and return its future."""


class DataParallel(Closing):
    """A replica of a function on each device. Each call goes to a free replica.

    Parameters
    ----------
    make
        A function that takes the name of a device and returns a function. If it returns a context manager, this class
        enters it now and leaves it at the end. If it returns a compiled function, this class closes the function's
        session. If it returns a :class:`~ggml_cffi.isolate.Worker`, a crash of one replica leaves the others intact.
    devices
        Devices or names, one for each replica. Default every GPU, or the CPU if there is no GPU.
    executor
        Object with ``submit(function, *args)`` that returns futures. It runs the calls in place of threads of this
        process, for example in other processes or on other machines. ``make`` and the names of devices are sent with
        the calls. Each process creates a replica when it gets a call and no replica is free, at most one for each of
        ``devices``, or of its own devices by default.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, or there are no devices.
    Exception
        The exception of ``make``, if it fails for every device. A replica that fails alone is dropped, with a warning
        to the logger ``ggml_cffi.parallel``.

    Examples
    --------
    >>> def make(device):
    ...     session = ggml.Session([device])
    ...     return session.compile(lambda x: ggml.scale(x, 2.0))
    >>> with DataParallel(make, ["CPU", "CPU"]) as double:
    ...     [y.tolist() for y in double.map([np.ones(2), np.zeros(2)])]
    [[2.0, 2.0], [0.0, 0.0]]
    """

    def __init__(
        self,
        make: Callable[[str], Any],
        devices: DevicesLike | None = None,
        *,
        executor: TaskExecutor | None = None,
    ) -> None:
        if not callable(make):
            raise TypeError(f"make must be a function of a device's name, not {type(make).__name__}")
        names = None if devices is None else [device_name(d) for d in device_list(devices)]
        if names is not None and not names:
            raise ValueError("devices is empty: name a device for each replica")
        self._lock = threading.Lock()
        self._closed = False
        self._running: set[Any] = set()
        self._task = Task(make, names)
        self._local: Replicas | None = None
        self._pool: ThreadPoolExecutor | None = None
        if executor is None:
            self._local = self._task.replicas
            executor = self._pool = ThreadPoolExecutor(len(self._local.all), thread_name_prefix="ggml_cffi replica")
            try:
                self._make_all(self._local, self._pool)
            except BaseException:
                self.close()
                raise
        self._executor = executor

    def _make_all(self, replicas: Replicas, pool: ThreadPoolExecutor) -> None:
        """Create all replicas at the same time."""
        list(pool.map(replicas.prepare, replicas.all))
        failed = [replica.error for replica in replicas.all if replica.error is not None]
        if len(failed) == len(replicas.all):
            raise failed[0]

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """Replicas in this process, with their devices, numbers of calls and errors; empty if there is an executor."""
        return self._local.all if self._local is not None else ()

    # ------------------------------------------------------------------ calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call a replica as soon as one is free, and wait for the result.

        Raises
        ------
        Exception
            The exception of the function.
        GgmlError
            If all replicas were dropped.
        ClosedError
            If this object is closed.
        """
        if self._local is not None:
            return self._local(args, kwargs)  # in this thread
        return self.submit(*args, **kwargs).result()

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call a replica in the background, and return a future. Do not change the arguments until the future is done.

        A call that has not started can be cancelled.
        """
        with self._lock:
            self._check_open()
            future: Future[Any] = self._executor.submit(self._task, args, kwargs)
            self._running.add(future)
        future.add_done_callback(self._running.discard)
        return future

    async def run_async(self, *args: Any, **kwargs: Any) -> Any:
        """Call a replica without blocking the event loop. Cancelling the task cancels a call that has not started."""
        import asyncio

        future = self.submit(*args, **kwargs)
        if isinstance(future, Future):
            return await asyncio.wrap_future(future)
        return await asyncio.to_thread(future.result)

    def map(self, *iterables: Iterable[Any], ordered: bool = True, in_flight: int | None = None) -> Iterator[Any]:
        """Yield the results for the elements of iterables, as the built-in ``map`` does, with several calls at once.

        Elements are taken and calls are made as the caller iterates. An exception of a call is raised in place of its
        result, and ends the iteration.

        Parameters
        ----------
        iterables
            One iterable for each argument of the function. The shortest one ends the iteration.
        ordered
            False for results in the order in which calls end.
        in_flight
            Largest number of calls that run or wait. Default two for each replica, 32 with an executor.
        """
        self._check_open()
        if not iterables:
            raise TypeError("map takes at least one iterable")
        if in_flight is None:
            in_flight = 2 * len(self.replicas) or _IN_FLIGHT
        if in_flight < 1:
            raise ValueError(f"in_flight must be at least 1, not {in_flight}")
        return self._map(zip(*iterables, strict=False), ordered, in_flight)

    def _map(self, arguments: Iterator[Any], ordered: bool, in_flight: int) -> Iterator[Any]:
        pending: dict[Future[Any], None] = {}  # in order
        finished: SimpleQueue[Future[Any]] = SimpleQueue()

        def result() -> Any:
            future = next(iter(pending)) if ordered else finished.get()
            del pending[future]
            return future.result()

        try:
            for args in arguments:
                future = self.submit(*args)
                pending[future] = None
                if not ordered:
                    future.add_done_callback(finished.put)
                if len(pending) == in_flight:
                    yield result()
            while pending:
                yield result()
        finally:
            for future in pending:
                future.cancel()

    # ------------------------------------------------------------------ the end

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this DataParallel is closed")

    def close(self) -> None:
        """Cancel calls that wait, finish calls that run, and close the replicas of this process.

        An executor stays open, and its processes keep their replicas until they end; see
        :func:`~ggml_cffi.parallel.release`.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        else:
            for future in list(self._running):
                future.cancel()
            for future in list(self._running):
                with suppress(Exception):
                    future.result()
        self._task.close()
        if self._pool is not None:
            self._pool.shutdown()

    def __repr__(self) -> str:
        if self._closed:
            return "<DataParallel closed>"
        where = ", ".join(map(repr, self.replicas)) or repr(self._executor)
        return f"<DataParallel: {where}>"
