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


@dataclass(slots=True)
class LogitsFacts:
    """The facts of the logits of one token, each None if it was not computed."""

    best: int | None = None
    """Id of the highest logit, or of the first NaN."""
    log_sum: float | None = None
    """Logarithm of the sum of the exponentials."""


def logits_facts(logits: Logits, best: Sequence[int], log_sums: Sequence[int]) -> list[LogitsFacts]:
    """Return the facts of each row of ``logits``.

    Parameters
    ----------
    logits
        ``(n, n_vocab)``.
    best, log_sums
        Numbers of the rows whose highest logit, and whose sum of exponentials, is needed.
    """
    found = [LogitsFacts() for _ in range(len(logits))]
    if best:
        for row, token in zip(best, _rows(logits, best).argmax(axis=1).tolist(), strict=True):
            found[row].best = token
    if log_sums:
        for row, value in zip(log_sums, log_sum_exp(_rows(logits, log_sums)), strict=True):
            found[row].log_sum = value
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
