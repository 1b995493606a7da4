"""A barrier for the threads that drive devices, quicker than ``threading.Barrier``.

A device's step is tens of microseconds, and to be woken up takes a thread as long. So where there are processors
enough, a thread that waits spins: in C, without Python's lock, on spin locks of the C library.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from ggml_cffi import c

_DECLARATIONS = """
    int pthread_spin_init(void *lock, int pshared);
    int pthread_spin_lock(void *lock);
    int pthread_spin_unlock(void *lock);
"""


@cache
def _library() -> Any:
    """The C library, None where it has no spin locks (macOS, Windows)."""
    try:
        from cffi import FFI  # type: ignore[import-untyped]

        ffi = FFI()
        ffi.cdef(_DECLARATIONS)
        library = ffi.dlopen(None)
        library.pthread_spin_init  # noqa: B018 - raises where it is missing
    except (OSError, AttributeError):
        return None
    return library


class Barrier:
    """Lets ``n`` threads go on once all have come.

    Parameters
    ----------
    n
        Threads.
    spin
        Whether those that wait keep a processor busy, where the C library can.
    """

    def __init__(self, n: int, *, spin: bool) -> None:
        self.n = n
        self._kept: list[Any] = []
        # One lock for each pair: the one who came releases it, the other acquires it. Two sets in turns, since a
        # thread may come to the next barrier before another has left this one.
        made = [[[self._lock(spin) for _ in range(n)] for _ in range(n)] for _ in range(2)]
        self._comes = [[[made[s][i][j][1] for j in range(n) if j != i] for i in range(n)] for s in range(2)]
        self._waits = [[[made[s][j][i][0] for j in range(n) if j != i] for i in range(n)] for s in range(2)]

    def _lock(self, spin: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """How to acquire and to release a lock that is held."""
        library = _library() if spin else None
        if library is None:
            lock = threading.Lock()
            lock.acquire()
            return lock.acquire, lock.release
        memory = c.ffi.new("int[16]")  # a cache line of its own
        self._kept.append(memory)
        library.pthread_spin_init(memory, 0)
        library.pthread_spin_lock(memory)
        return partial(library.pthread_spin_lock, memory), partial(library.pthread_spin_unlock, memory)

    def wait(self, who: int, k: int) -> None:
        """Thread ``who`` has come to barrier ``k``: 0, 1, 2 ... for each thread, from 0 again once all are through."""
        for come in self._comes[k & 1][who]:
            come()
        for wait in self._waits[k & 1][who]:
            wait()
