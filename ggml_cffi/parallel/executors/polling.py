"""Polling: detection of finished results in host memory, without a call to ggml."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np
import numpy.typing as npt

from ggml_cffi.enums import Op

#: Operations whose kernels write each number of the result exactly once. Only such results can be polled.
WRITTEN_ONCE = frozenset({Op.MUL_MAT, Op.ADD, Op.SUB, Op.MUL, Op.DIV, Op.SCALE, Op.UNARY, Op.GLU})

#: Bit pattern of a number that no device has written yet: a NaN that computations do not produce.
UNWRITTEN = np.uint32(0x7FC0DEAD)

#: Seconds of polling before a wait for the devices: the work takes long, or the pattern is a real result.
TIMEOUT = 0.02

#: Arrays in host memory, as views of 32-bit integers.
Places = Sequence[npt.NDArray[np.uint32]]

_yield: Callable[[], object] = getattr(os, "sched_yield", lambda: None)


class PolledResults:
    """Places in host memory to which devices write each number once: partial sums, or the result of a program.

    A result is visible there before ggml reports it: ggml's Vulkan backend submits a fence after the work, and checks
    the fence at intervals of some thousand cycles, which is as long as a short step of a token. Correctness does not
    depend on polling: after a timeout, the host waits for the devices.

    Parameters
    ----------
    places
        For each result the places of all devices.
    """

    def __init__(self, places: Sequence[Places]) -> None:
        self.places = places
        self.n_timeouts = 0
        """Number of timeouts, each followed by a wait for the devices."""
        self.timeout = TIMEOUT
        """Seconds of polling before a timeout. Each timeout shortens it, and each success lengthens it again."""

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
            # Devices tend to write the last number last, and it is cheap to read one number.
            while place[-1] == UNWRITTEN or (place == UNWRITTEN).any():
                if perf_counter() > end:
                    self.n_timeouts += 1
                    self.timeout /= 4
                    synchronize()
                    return
                _yield()
        self.timeout = min(2 * self.timeout, TIMEOUT)
