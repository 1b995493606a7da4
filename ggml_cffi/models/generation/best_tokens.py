"""`best_tokens`: the tokens with the highest logits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

#: Logits of one of the sets whose maxima bound the best ones.
_SET_SIZE = 32


def best_tokens(logits: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.intp]:
    """Return the ids of the ``k`` highest logits, the highest first. Logits of minus infinity are left out.

    Parameters
    ----------
    logits
        ``(n_vocab,)``.
    k
        Number of tokens, at least 1.
    """
    candidates = _candidates(logits, k)
    values = logits[candidates]
    if k < values.size:
        best = np.argpartition(values, -k)[-k:]
        candidates, values = candidates[best], values[best]
    return candidates[np.argsort(values)[::-1]]


def _candidates(logits: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.intp]:
    """Return ids that include the best ``k``: few ones if ``k`` is small.

    The ``k``-th largest of the maxima of disjoint sets is at most the ``k``-th largest logit. Two passes over the
    logits are many times as fast as a partition of all.
    """
    n_sets = logits.size // _SET_SIZE
    maxima = logits[: n_sets * _SET_SIZE].reshape(_SET_SIZE, n_sets).max(axis=0)
    maxima = maxima[maxima > -np.inf]  # a partition of many equal numbers is slow
    if maxima.size >= 2 * k:
        return np.flatnonzero(logits >= np.partition(maxima, -k)[-k])
    return np.flatnonzero(logits != -np.inf)
