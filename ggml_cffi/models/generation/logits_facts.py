"""`LogitsFacts`: the facts of logits that samplers need, for all rows of a batch at once.

Numpy releases Python's lock in each call on many numbers, and a thread waits until it has the lock again. One call for
all rows keeps that short where other threads are busy, as those of a server are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]


class KeptLogits:
    """A copy of logits, for work that the next run need not wait for.

    Parameters
    ----------
    logits
        ``(n, n_vocab)``, which this object owns from now on.
    """

    def __init__(self, logits: Logits) -> None:
        self.logits = logits
        """The logits, ``(n, n_vocab)``."""
        self._log_sums: list[float] | None = None

    def log_sum(self, row: int) -> float:
        """Return the logarithm of the sum of the exponentials of a row. The first call computes those of all rows."""
        if self._log_sums is None:
            self._log_sums = log_sum_exp(self.logits)
        return self._log_sums[row]


@dataclass(slots=True)
class LogitsFacts:
    """The facts of the logits of one token, each None if it is not known."""

    best: int | None = None
    """Id of the highest logit, or of the first NaN."""
    kept: KeptLogits | None = None
    """A copy of the logits, which stays valid."""
    row: int = 0
    """The row of the copy."""


def logits_facts(logits: Logits, best: Sequence[int], kept: Sequence[int]) -> list[LogitsFacts]:
    """Return the facts of each row of ``logits``.

    Parameters
    ----------
    logits
        ``(n, n_vocab)``.
    best, kept
        Numbers of the rows whose highest logit is needed, and of those that are needed later.
    """
    found = [LogitsFacts() for _ in range(len(logits))]
    if best:
        for row, token in zip(best, _rows(logits, best).argmax(axis=1).tolist(), strict=True):
            found[row].best = token
    if kept:
        copy = KeptLogits(logits.copy() if len(kept) == len(logits) else logits[list(kept)])
        for i, row in enumerate(kept):
            found[row].kept, found[row].row = copy, i
    return found


def log_sum_exp(logits: Logits) -> list[float]:
    """Return the logarithm of the sum of the exponentials of each row."""
    largest = logits.max(axis=1, keepdims=True)
    terms = logits - largest
    sums = np.exp(terms, out=terms).sum(axis=1, dtype=np.float64)
    found: list[float] = (largest[:, 0].astype(np.float64) + np.log(sums)).tolist()
    return found


def _rows(logits: Logits, rows: Sequence[int]) -> Logits:
    return logits if len(rows) == len(logits) else logits[list(rows)]
