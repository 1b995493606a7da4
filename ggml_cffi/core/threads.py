"""Number of CPU threads: the default, the check of a number that a caller gives, and the number on a busy machine."""

from __future__ import annotations

import os
import time

from ggml_cffi import c

_LOOK_SECONDS = 0.1  # between two looks at the load: /proc/stat counts hundredths of seconds
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_BUSY_FIELDS = (1, 2, 3, 6, 7, 8)  # of a line of /proc/stat: user, nice, system, irq, softirq, steal


def default_threads() -> int:
    """Return the number of processors that this process may run on."""
    return len(allowed_processors())


def allowed_processors() -> frozenset[int]:
    """Return the numbers of the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def check_threads(n: int) -> int:
    """Return ``n`` if it is a number of threads that a CPU backend can have.

    Raises
    ------
    ValueError
        If ``n`` is out of range.
    """
    if not isinstance(n, int) or not 1 <= n <= c.GGML_MAX_N_THREADS:
        raise ValueError(f"n_threads must be 1 to {c.GGML_MAX_N_THREADS}, not {n}")
    return n


class LoadFollower:
    """The number of threads for the processors that other processes leave free.

    ggml's threads wait for each other after each node, in a loop that takes a processor. On a processor that another
    process uses too, a thread is stopped for milliseconds at a time, and all others spin until it goes on. If the
    system stops and continues the threads together, decode with two threads on two busy processors takes half to
    two thirds as long as with one. If it does so in turns, decode may take more than a hundred times as long. Both were
    seen on the same machine within seconds.

    Parameters
    ----------
    n_threads
        Largest number of threads.
    """

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        """Largest number of threads."""
        self.n_active = n_threads
        """Number of threads for the next run."""
        self._processors = allowed_processors()
        self._last = (time.perf_counter(), busy_seconds(self._processors), time.process_time())
        self.next_look = float("inf") if n_threads == 1 or self._last[1] is None else self._last[0] + _LOOK_SECONDS
        """The time of ``perf_counter`` from which :meth:`look` may change the number."""

    def look(self) -> int:
        """Return the number of threads for the next run, from the load since the last look.

        It is the largest number unless others keep half a processor busy.
        """
        now = (time.perf_counter(), busy_seconds(self._processors), time.process_time())
        before, self._last = self._last, now
        self.next_look = now[0] + _LOOK_SECONDS
        if before[1] is not None and now[1] is not None:
            others = (now[1] - before[1] - (now[2] - before[2])) / (now[0] - before[0])
            free = len(self._processors) - others
            if others < 0.5:
                self.n_active = self.n_threads
            elif abs(free - self.n_active) > 0.6:  # more than one half, so that the number does not waver
                self.n_active = max(1, min(self.n_threads, round(free)))
        return self.n_active


def busy_seconds(processors: frozenset[int]) -> float | None:
    """Return the seconds that these processors have worked since the system started, None if it does not tell."""
    try:
        with open("/proc/stat", "rb") as file:
            lines = file.read(200 * (os.cpu_count() or 1) + 400).splitlines()  # not the long lines after the processors
    except OSError:
        return None
    ticks = 0
    for line in lines[1:]:
        fields = line.split()
        if not fields or not fields[0].startswith(b"cpu"):
            break
        if int(fields[0][3:]) in processors:
            ticks += sum(int(fields[i]) for i in _BUSY_FIELDS if i < len(fields))
    return ticks / _TICKS
