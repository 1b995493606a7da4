"""`AsyncItems`: a blocking iterator in an ``asyncio`` program, read by a thread of a shared pool."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from functools import cache
from threading import Event
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:  # slow to import
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

T = TypeVar("T")

#: Largest number of iterators that are read at the same time. Further ones wait for a thread.
MAX_THREADS = 256


class _End:
    """The end of the items in the queue, with the exception that ended them."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class AsyncItems(AsyncIterator[T], Generic[T]):
    """The items of a blocking iterator, for ``async for``. The first ``await`` starts a thread that reads them.

    The thread reads ahead of the caller. The iterator ends early by :meth:`cancel`, when a task that awaits an item is
    cancelled, and, after the item that is being computed, when the object is deleted.

    Parameters
    ----------
    items
        The iterator.
    cancel
        A function that ends the iterator soon, from any thread.
    """

    def __init__(self, items: Iterator[T], cancel: Callable[[], None]) -> None:
        self._items, self._end_items = items, cancel
        self._abandoned = Event()  # the reading thread must not keep this object alive
        self._cancelled = False
        self._queue: asyncio.Queue[T | _End] | None = None  # from the first ``await`` on, as the event loop
        self._loop: asyncio.AbstractEventLoop

    async def __anext__(self) -> T:
        import asyncio

        if self._cancelled:
            raise StopAsyncIteration
        if self._queue is None:
            self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue()
            _pool().submit(_read, self._items, self._end_items, self._loop, self._queue, self._abandoned)
        try:
            item = await self._queue.get()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if isinstance(item, _End):
            self._cancelled = True  # later calls do not wait
            self._queue.put_nowait(_End())  # nor do other tasks that await an item
            if item.error is not None:
                raise item.error
            raise StopAsyncIteration
        if self._cancelled:
            raise StopAsyncIteration
        return item

    def cancel(self) -> None:
        """End the iterator, from any thread. A task that awaits an item gets the end."""
        self._cancelled = True
        self._end_items()
        if self._queue is not None:
            with suppress(RuntimeError):  # the event loop is closed: no task awaits an item
                self._loop.call_soon_threadsafe(self._queue.put_nowait, _End())

    async def aclose(self) -> None:
        """End the iterator; the same as :meth:`cancel`."""
        self.cancel()

    def __del__(self) -> None:
        # The garbage collector may run this in any thread, which may hold locks that ``cancel`` needs.
        self._abandoned.set()


@cache
def _pool() -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="ggml_cffi asyncio")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of the threads


def _read(
    items: Iterator[T],
    cancel: Callable[[], None],
    loop: asyncio.AbstractEventLoop,
    queue: asyncio.Queue[T | _End],
    abandoned: Event,
) -> None:
    """Put the items into the queue of an event loop, until they end or no task can get them."""
    end = _End()
    try:
        for item in items:
            if abandoned.is_set():
                cancel()
                return
            loop.call_soon_threadsafe(queue.put_nowait, item)
    except BaseException as error:
        end = _End(error)
    try:
        loop.call_soon_threadsafe(queue.put_nowait, end)
    except RuntimeError:  # the event loop is closed
        cancel()
