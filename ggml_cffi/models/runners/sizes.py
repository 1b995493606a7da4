"""Sizes of graphs: a graph serves all batches with as many tokens, or with somewhat fewer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

#: Largest number of tokens for which a graph has exactly that many: GPUs have kernels of their own for each.
EXACT = 8


@dataclass(frozen=True)
class Buckets:
    """Numbers of tokens of the graphs of a runner."""

    smallest_step: int
    """Smallest difference between two numbers above :data:`EXACT`."""
    per_octave: int
    """Numbers from one power of two to the next, where the difference is larger."""

    def of(self, n: int) -> int:
        """Return the number of tokens of the graph for ``n`` tokens."""
        if n <= EXACT:
            return n
        step = max((1 << n.bit_length()) // (2 * self.per_octave), self.smallest_step)
        return -(-n // step) * step

    def sizes(self, n: int, n_out: int, n_batch: int) -> tuple[int, int]:
        """Return tokens and outputs of the graph for a batch of ``n`` tokens and ``n_out`` outputs.

        ``n_batch`` is the largest number of tokens.
        """
        n_rows = min(self.of(n), n_batch)
        if n_out == n:
            n_out = n_rows
        elif n_out > 1 and n > EXACT:  # not all rows: an architecture would take them in the order of the tokens
            n_out = min(self.of(max(n_out, EXACT + 1)), n_rows - 1)
        return n_rows, n_out


def fill(target: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
    """Write the values of a batch into an input for at least as many tokens; repeat the last token in the others.

    A repeated token writes the same keys and values to the same KV slot again.
    """
    n = len(values)
    target[:n] = values
    if n < len(target):
        target[n:] = values[-1]
