"""Seeing in host memory that devices have written what others need, and choosing between that and waiting for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

#: What fills places that a device has not written yet: a NaN that no computation makes.
_UNWRITTEN = np.uint32(0x7FC0DEAD)

#: Seconds after which devices are waited for after all: work takes long, or numbers are just those.
_PATIENCE = 0.02

_TRIALS = 7  # of each way

Places = Sequence[npt.NDArray[np.uint32]]

_yield: Callable[[], object] = getattr(os, "sched_yield", lambda: None)


class Arrivals:
    """Places in host memory that devices write to, each number once: their parts of sums, or a result.

    The numbers themselves say when they are there. That is sooner than ggml does: it submits a fence behind the work,
    and then looks at it every so many thousand cycles, which for the short steps of a token is as long as they take.
    Nothing rests on it: where numbers do not show, the devices are waited for.

    Parameters
    ----------
    steps
        For each sum the places of all devices.
    """

    def __init__(self, steps: Sequence[Places]) -> None:
        self.steps = steps
        self.late = 0
        """How often devices had to be waited for."""
        self.patience = _PATIENCE
        """Seconds until they are; fewer each time that it was of no use."""

    def clear(self, k: int) -> None:
        """Get ready for sum ``k``, if there is one, before devices begin to compute it."""
        if k < len(self.steps):
            for place in self.steps[k]:
                place.fill(_UNWRITTEN)

    def wait(self, k: int, synchronize: Callable[[], object]) -> None:
        """Return when all parts of sum ``k``, if there is one, are there; ``synchronize`` waits for the devices."""
        if k == len(self.steps):
            return
        end = perf_counter() + self.patience
        for place in self.steps[k]:
            # The last one often comes last, and is quickly looked at.
            while place[-1] == _UNWRITTEN or (place == _UNWRITTEN).any():
                if perf_counter() > end:
                    self.late += 1
                    self.patience /= 4
                    synchronize()
                    return
                _yield()
        self.patience = min(2 * self.patience, _PATIENCE)


class Choice:
    """Which of several ways to do the same is quickest here: each is tried a few times."""

    def __init__(self, ways: Sequence[Callable[..., Any]]) -> None:
        self.ways = ways
        self.best: Callable[..., Any] | None = ways[0] if len(ways) == 1 else None
        """The way that is kept; None as long as they are tried."""
        self._seconds: list[list[float]] = [[] for _ in ways]

    def __call__(self, *args: Any) -> Any:
        """Do it one way."""
        if self.best is not None:
            return self.best(*args)
        i = min(range(len(self.ways)), key=lambda i: len(self._seconds[i]))
        start = perf_counter()
        result = self.ways[i](*args)
        self._seconds[i].append(perf_counter() - start)
        if len(self._seconds[-1]) > _TRIALS:
            medians = [median(seconds[1:]) for seconds in self._seconds]  # the first may have prepared something
            self.best = self.ways[medians.index(min(medians))]
        return result
