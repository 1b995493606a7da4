"""Number of CPU threads: the default, the check of a number that a caller gives, and the number on a busy machine."""

from __future__ import annotations

import os
import time
from collections import deque

from ggml_cffi import c

_LOOK_SECONDS = 0.1  # between two looks at the load: /proc/stat counts hundredths of seconds
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_PACE_RUNS = 3  # runs of a graph with few threads before one with all threads is compared with them
_TRIAL_RUNS = 4  # runs with all threads before the first verdict
_KEPT_RUNS = 8  # last runs with all threads that later verdicts are about
_LOST_AT_ONCE = 6.0  # times as long as with few threads
_LONGEST_SECONDS = 0.05  # of a run with few threads that is tried with all: a lost trial may take ten times as long
_WON_SECONDS, _LOST_SECONDS = (
    5.0,
    1.0,
)  # for which a verdict holds; a lost one also for a multiple of the trial's length
_LOST_TIMES = 30
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
    process uses too, a thread is stopped for milliseconds at a time, and all others spin until it goes on. Decode with
    two threads on two busy processors takes between half as long and ten times as long as with one, by how the system
    divides the time: :class:`ThreadContest` measures it.

    Parameters
    ----------
    n_threads
        Largest number of threads.
    """

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        """Largest number of threads."""
        self.n_active = n_threads
        """Number of threads for the processors that are free."""
        self._processors = allowed_processors()
        self._last = (time.perf_counter(), busy_seconds(self._processors), time.process_time())
        self.next_look = float("inf") if n_threads == 1 or self._last[1] is None else self._last[0] + _LOOK_SECONDS
        """The time of ``perf_counter`` from which :meth:`look` may change the number."""

    def look(self) -> int:
        """Return the number of threads for the free processors, from the load since the last look.

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


class Pace:
    """The seconds of a graph's runs with few threads, in one round of a :class:`ThreadContest`."""

    __slots__ = ("n_runs", "round", "seconds")

    def __init__(self) -> None:
        self.begin(None)

    def begin(self, which: object) -> None:
        """Forget the runs so far, which were of another round."""
        self.round = which
        self.n_runs = 0
        self.seconds = 0.0
        """Mean of the last runs."""

    def add(self, seconds: float) -> None:
        """Include a run."""
        self.n_runs += 1
        self.seconds += (seconds - self.seconds) / min(self.n_runs, _KEPT_RUNS)


class ThreadContest:
    """The choice between few threads and all threads while other processes use the processors, by measured runs.

    Threads that share their processors with others are quick if the system stops and continues them together, and slow
    if it continues one while it stops another. The same graph is computed in both ways, and the quicker one is kept for
    a while. Graphs that take long are computed with few threads.

    Parameters
    ----------
    n_few
        Threads for the processors that are free.
    n_all
        Largest number of threads, more than that.
    """

    def __init__(self, n_few: int, n_all: int) -> None:
        self.n_few, self.n_all = n_few, n_all
        self.all_is_quicker = False
        """The last verdict."""
        self._until = 0.0  # the time at which it ends
        self._round = object()  # in which runs are comparable
        self._trial = deque[float](maxlen=_KEPT_RUNS)  # seconds with all threads, relative to those with few
        self._trial_seconds = 0.0

    def choose(self, pace: Pace, now: float) -> int:
        """Return the number of threads for the next run of a graph. ``now`` is the time of ``perf_counter``."""
        if self.all_is_quicker and now >= self._until:  # the load may be another by now
            self._decide(False, now, 0.0)
            self._round = object()
        if pace.round is not self._round:
            pace.begin(self._round)
        if pace.n_runs < _PACE_RUNS or pace.seconds > _LONGEST_SECONDS:
            return self.n_few
        return self.n_all if self.all_is_quicker or now >= self._until else self.n_few

    def note(self, pace: Pace, n_threads: int, seconds: float, now: float) -> None:
        """Note a run that has ended now, with the number of threads that :meth:`choose` returned for it."""
        if n_threads == self.n_few:
            pace.add(seconds)
            return
        self._trial.append(seconds / pace.seconds)
        self._trial_seconds += seconds
        mean = sum(self._trial) / len(self._trial)
        if self._trial[-1] > _LOST_AT_ONCE:
            self._decide(False, now, max(_LOST_SECONDS, _LOST_TIMES * self._trial_seconds))
        elif self.all_is_quicker:
            if len(self._trial) == _KEPT_RUNS and mean > 1:
                self._decide(False, now, _LOST_SECONDS)
        elif len(self._trial) == _TRIAL_RUNS:
            won = mean < 0.9
            lost_seconds = max(_LOST_SECONDS, _LOST_TIMES * self._trial_seconds)
            self._decide(won, now, _WON_SECONDS if won else lost_seconds)

    def _decide(self, all_is_quicker: bool, now: float, seconds: float) -> None:
        self.all_is_quicker, self._until = all_is_quicker, now + seconds
        self._trial.clear()
        self._trial_seconds = 0.0


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
