"""Locks of devices: one for each local device, one for each server of remote devices, and several of them as one."""

from __future__ import annotations

from _thread import RLock
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any


class DeviceLock(RLock):  # type: ignore[misc]  # the stubs call it final; it is not
    """A reentrant lock of a local device. Such a device cannot be lost, and ggml itself waits for its work."""

    __slots__ = ()

    def check(self) -> None:
        """Do nothing: a local device cannot be lost."""

    def wait(self) -> None:
        """Do nothing: ``ggml_backend_synchronize`` has waited already."""


class RemoteLock(ABC):
    """A reentrant lock of all devices of one server. ``with`` raises if the server is lost."""

    @property
    @abstractmethod
    def usable(self) -> bool:
        """True if the server is there, as far as is known without asking it."""

    @property
    @abstractmethod
    def broken(self) -> bool:
        """True if a call into ggml about this server would end the process."""

    @abstractmethod
    def acquire(self, blocking: bool = True) -> bool:
        """Acquire the lock, even if the server is lost; return False if another thread holds it."""

    @abstractmethod
    def release(self) -> None:
        """Unlock."""

    @abstractmethod
    def __enter__(self) -> object: ...

    @abstractmethod
    def __exit__(self, *_error: object) -> None: ...

    @abstractmethod
    def check(self) -> None:
        """Raise :class:`BackendCrashedError` if the server is lost, :class:`ClosedError` if it was disconnected."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until the server has done all its work."""

    @abstractmethod
    def free_later(self, call: Callable[[], None]) -> None:
        """Call ``call`` once the lock is free: now, or when its holder releases it."""


Lock = DeviceLock | RemoteLock


class Locks:
    """Several locks as one, made once for many runs. Locks of servers raise if the server is lost."""

    def __init__(self, locks: Iterable[Lock]) -> None:
        unique = {id(lock): lock for lock in locks}
        self._locks = [unique[key] for key in sorted(unique)]
        self.remote = [lock for lock in self._locks if isinstance(lock, RemoteLock)]
        """The locks of servers."""

    @property
    def plain(self) -> AbstractContextManager[Any]:
        """The lock itself if it is the only one and local, which is quicker than this object; else this object."""
        return self if self.remote or len(self._locks) > 1 else self._locks[0]

    def __enter__(self) -> None:
        for lock in self._locks:
            lock.acquire()
        if self.remote:
            try:
                self._check()
            except BaseException:
                self.release()
                raise

    def __exit__(self, *_error: object) -> None:
        if not self.remote:
            for lock in self._locks:
                lock.release()
            return
        try:
            self._check()
        finally:
            self.release()

    def _check(self) -> None:
        for lock in self.remote:
            lock.check()

    def acquire(self) -> None:
        """Acquire all locks, even if a server is lost."""
        for lock in self._locks:
            lock.acquire()

    def release(self) -> None:
        """Release all locks, even if one raises."""
        raised = None
        for lock in reversed(self._locks):
            try:
                lock.release()
            except BaseException as error:  # a server's lock delays a signal, whose handler then raises
                raised = error
        if raised is not None:
            raise raised

    def wait(self) -> None:
        """Wait until the servers have done their work, since ggml does not wait for them."""
        for lock in self.remote:
            lock.wait()


def free_when_unlocked(
    locks: Sequence[RemoteLock], function: Callable[[Any], None], keep: Sequence[Any], pointer: Any
) -> None:
    """Call ``function(pointer)``, which frees memory of servers, once no thread holds ``locks``.

    The call never waits, because the garbage collector may make it in any thread, with any locks held.

    Parameters
    ----------
    keep
        Objects that must live until then.
    """
    held: list[RemoteLock] = []
    try:
        for lock in locks:
            if not lock.acquire(blocking=False):
                break
            held.append(lock)
        else:
            if not any(lock.broken for lock in locks):  # if broken, C would end the process: the memory is not freed
                function(pointer)
    finally:
        for taken in reversed(held):
            taken.release()
    if len(held) < len(locks):
        locks[len(held)].free_later(partial(free_when_unlocked, locks, function, keep, pointer))
