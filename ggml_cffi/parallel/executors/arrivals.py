"""Seeing in host memory that devices have written what others need."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np
import numpy.typing as npt

#: What fills places that a device has not written yet: a NaN that no computation makes.
_UNWRITTEN = np.uint32(0x7FC0DEAD)

#: Seconds after which devices are waited for after all: work takes long, or numbers are just those.
_PATIENCE = 0.02

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
