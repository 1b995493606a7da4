"""`best_tokens`: the tokens with the highest logits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

#: Logits of one of the sets whose maxima bound the best ones.
_SET_SIZE = 64


def best_tokens(logits: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.intp]:
    """Return the ids of the ``k`` highest logits, the highest first. Logits of minus infinity are left out.

    NaN counts as the highest.

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
    """Return ids in ascending order that include the best ``k``: few ones if ``k`` is small.

    The ``k``-th largest of the maxima of disjoint sets is at most the ``k``-th largest logit. Only sets whose maximum
    is as large have such logits, so one pass over all logits is enough.
    """
    n_sets = logits.size // _SET_SIZE
    sets = logits[: n_sets * _SET_SIZE].reshape(_SET_SIZE, n_sets)
    maxima = sets.max(axis=0)
    known = maxima[maxima != -np.inf]  # a partition of many equal numbers is slow
    if known.size < 2 * k:
        return np.flatnonzero(logits != -np.inf)
    lowest = np.partition(known, -k)[-k]
    columns = np.flatnonzero(~(maxima < lowest))
    rows, at = np.nonzero(~(sets[:, columns] < lowest))
    rest = np.flatnonzero(~(logits[sets.size :] < lowest))
    return np.concatenate([rows * n_sets + columns[at], rest + sets.size])
