"""The locks of several backends."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from ggml_cffi import _remote
from ggml_cffi.backend import Backend


class Locks:
    """Several locks as one; made once, since runs are short. Those of remote devices raise if their server is lost."""

    def __init__(self, backends: Iterable[Backend]) -> None:
        unique = {id(b.lock): b.lock for b in backends}
        self._locks = [unique[key] for key in sorted(unique)]
        self.links = [lock for lock in self._locks if isinstance(lock, _remote.Link)]

    @property
    def plain(self) -> AbstractContextManager[Any]:
        """The one lock, where there is one and it is no server's: quicker than this object."""
        return self if self.links or len(self._locks) > 1 else self._locks[0]

    def __enter__(self) -> None:
        for lock in self._locks:
            lock.acquire()
        if self.links:
            try:
                self._check()
            except BaseException:
                self.release()
                raise

    def __exit__(self, *_error: object) -> None:
        if not self.links:
            for lock in self._locks:
                lock.release()
            return
        try:
            self._check()
        finally:
            self.release()

    def _check(self) -> None:
        for link in self.links:
            link.check()

    def acquire(self) -> None:
        """Lock, whatever became of the servers."""
        for lock in self._locks:
            lock.acquire()

    def release(self) -> None:
        """Unlock, all of them whatever comes in between."""
        raised = None
        for lock in reversed(self._locks):
            try:
                lock.release()
            except BaseException as error:  # of a signal that a link had kept away
                raised = error
        if raised is not None:
            raise raised

    def wait(self) -> None:
        """Until the servers have done what they were given: ggml does not wait for them."""
        for link in self.links:
            link.wait()
