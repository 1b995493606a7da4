"""`best_tokens`: the tokens with the highest logits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_BLOCK = 64


def best_tokens(logits: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.intp]:
    """Return the ids of the ``k`` highest logits, the highest first.

    Parameters
    ----------
    logits
        ``(n_vocab,)``.
    k
        Number of tokens, 1 to ``n_vocab``.
    """
    candidates = _candidates(logits, k)
    values = logits if candidates is None else logits[candidates]
    best = np.argpartition(values, -k)[-k:]
    best = best[np.argsort(values[best])[::-1]]
    return best if candidates is None else candidates[best]


def _candidates(logits: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.intp] | None:
    """Return few ids that include the best ``k``; None if that needs all of them.

    The ``k``-th largest of the maxima of disjoint sets is at most the ``k``-th largest logit. Two passes over the
    logits are many times as fast as a partition of all.
    """
    n_blocks = logits.size // _BLOCK
    if n_blocks < 2 * k:
        return None
    maxima = logits[: n_blocks * _BLOCK].reshape(_BLOCK, n_blocks).max(axis=0)
    found = np.flatnonzero(logits >= np.partition(maxima, -k)[-k])
    return found if found.size >= k else None  # fewer where logits are not numbers
