"""A barrier for the threads of devices, faster than ``threading.Barrier``."""

from __future__ import annotations

from threading import Lock


class Barrier:
    """A barrier of ``n`` threads: each continues once all have arrived."""

    def __init__(self, n: int) -> None:
        self.n = n
        # One lock for each ordered pair of threads: the first releases it on arrival, the second acquires it. Two sets
        # in turns, because a thread may arrive at the next barrier before another has left this one.
        made = [[[_locked() for _ in range(n)] for _ in range(n)] for _ in range(2)]
        self._releases = [[[made[s][i][j].release for j in range(n) if j != i] for i in range(n)] for s in range(2)]
        self._acquires = [[[made[s][j][i].acquire for j in range(n) if j != i] for i in range(n)] for s in range(2)]

    def wait(self, thread: int, k: int) -> None:
        """Wait at barrier ``k`` as thread number ``thread``.

        Each thread counts its barriers from 0, and again from 0 once all threads have left the last one.
        """
        for release in self._releases[k & 1][thread]:
            release()
        for acquire in self._acquires[k & 1][thread]:
            acquire()


def _locked() -> Lock:
    lock = Lock()
    lock.acquire()
    return lock
