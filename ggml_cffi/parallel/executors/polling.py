"""Polling: host memory shows that devices have written their results, without a call to ggml."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np
import numpy.typing as npt

from ggml_cffi.enums import Op

#: Operations whose kernels write each number of the result once, complete. Only such results can be polled.
WRITTEN_ONCE = frozenset({Op.MUL_MAT, Op.ADD, Op.SUB, Op.MUL, Op.DIV, Op.SCALE, Op.UNARY, Op.GLU})

#: Bit pattern of a number that no device has written yet: a NaN that no computation gives.
UNWRITTEN = np.uint32(0x7FC0DEAD)

#: Seconds of polling, after which the devices are waited for: the work takes long, or the pattern is a real result.
TIMEOUT = 0.02

#: Arrays in host memory, each seen as 32-bit integers.
Places = Sequence[npt.NDArray[np.uint32]]

_yield: Callable[[], object] = getattr(os, "sched_yield", lambda: None)


class PolledResults:
    """Places in host memory to which devices write, each number once: partial sums, or the result of a program.

    The host sees a result there sooner than ggml reports it. ggml's Vulkan submits a fence behind the work and reads
    it at intervals of some thousand cycles, as long as a short step of a token takes. Correctness does not depend on
    polling: after a timeout the devices are waited for.

    Parameters
    ----------
    places
        For each result the places of all devices.
    """

    def __init__(self, places: Sequence[Places]) -> None:
        self.places = places
        self.n_timeouts = 0
        """Number of times that the devices had to be waited for."""
        self.timeout = TIMEOUT
        """Seconds of polling. Each timeout makes it shorter, each success longer again."""

    def clear(self, k: int) -> None:
        """Mark the places of result ``k``, if there is one, as unwritten. Call it before devices compute them."""
        if k < len(self.places):
            for place in self.places[k]:
                place.fill(UNWRITTEN)

    def wait(self, k: int, synchronize: Callable[[], object]) -> None:
        """Return when result ``k``, if there is one, is complete.

        Parameters
        ----------
        synchronize
            Waits for the devices. It is called after a timeout.
        """
        if k == len(self.places):
            return
        end = perf_counter() + self.timeout
        for place in self.places[k]:
            # The last number tends to come last, and reading one number is quick.
            while place[-1] == UNWRITTEN or (place == UNWRITTEN).any():
                if perf_counter() > end:
                    self.n_timeouts += 1
                    self.timeout /= 4
                    synchronize()
                    return
                _yield()
        self.timeout = min(2 * self.timeout, TIMEOUT)
