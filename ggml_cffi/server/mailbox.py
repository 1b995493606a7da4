"""Events that the threads of engines send to tasks. One wake-up of the loop delivers all events of a step."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from ggml_cffi.server.engine import Event

T = TypeVar("T")


class Lane(Generic[T]):
    """A queue of one task, for items of the same thread. It is quicker than ``asyncio.Queue``."""

    def __init__(self) -> None:
        self._items: list[T] = []
        self._waiting: asyncio.Future[None] | None = None

    def put(self, item: T) -> None:
        """Append an item."""
        self._items.append(item)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def take(self) -> list[T]:
        """Return all items, once there is one."""
        if not self._items:
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        items, self._items = self._items, []
        return items


class Mailbox:
    """Events that other threads send to one task."""

    def __init__(self) -> None:
        self._loop, self._lane = asyncio.get_running_loop(), Lane[Event]()
        self._post = _posts.setdefault(self._loop, _Post())

    def put(self, event: Event) -> None:
        """Append an event, from any thread."""
        self._post.events.append((self._lane, event))
        call_once(self._wake)

    def _wake(self) -> None:
        with suppress(RuntimeError):  # the loop is closed: no task waits
            self._post.wake(self._loop)

    async def take(self) -> list[Event]:
        """Return all events, once there is one."""
        return await self._lane.take()


class _Post:
    """The events on their way to the tasks of one loop."""

    def __init__(self) -> None:
        self.events: deque[tuple[Lane[Event], Event]] = deque()
        self._is_called = False  # by a loop that has not begun to deliver

    def wake(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let the loop deliver the events."""
        if self.events and not self._is_called:
            self._is_called = True
            loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_called = False  # before the events are read: a thread that adds one now calls again
        with suppress(IndexError):
            while True:
                lane, event = self.events.popleft()
                lane.put(event)


_posts: WeakKeyDictionary[asyncio.AbstractEventLoop, _Post] = WeakKeyDictionary()
_held = threading.local()


def call_once(wake: Callable[[], object]) -> None:
    """Call a function that wakes another thread: at the end of :func:`together` in this thread, or now."""
    held: set[Callable[[], object]] | None = getattr(_held, "wakes", None)
    if held is None:
        wake()
    else:
        held.add(wake)


@contextmanager
def together() -> Iterator[None]:
    """Wake each thread once, at the end, for all events that this thread puts into mailboxes meanwhile.

    A wake-up is a system call, and the other thread would begin with the first event before the others are there.
    """
    _held.wakes = held = set[Callable[[], object]]()
    try:
        yield
    finally:
        _held.wakes = None
        for wake in held:
            wake()
