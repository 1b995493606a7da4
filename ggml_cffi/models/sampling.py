"""From logits to the next token."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


class Sampler:
    """Chooses the next token.

    Parameters
    ----------
    temperature
        Logits are divided by it; 0 takes the most likely token, and nothing else matters.
    top_k
        Only the ``k`` most likely tokens; 0 for all.
    top_p
        Only the most likely tokens that together have this probability.
    seed
        For repeatable choices; None for others every time.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """

    def __init__(self, temperature: float = 0.0, top_k: int = 40, top_p: float = 0.95, seed: int | None = None) -> None:
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0, not {temperature}")
        if top_k < 0:
            raise ValueError(f"top_k must be at least 0, not {top_k}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: npt.NDArray[np.float32]) -> int:
        """The chosen token for logits of shape ``(n_vocab,)``."""
        if self.temperature == 0:
            return int(logits.argmax())
        k = min(self.top_k or logits.size, logits.size)
        best = np.argpartition(logits, -k)[-k:]
        best = best[np.argsort(logits[best])[::-1]]
        p = self._probabilities(logits[best].astype(np.float64))
        if self.top_p < 1:
            n = int(np.searchsorted(np.cumsum(p), self.top_p)) + 1
            best, p = best[:n], p[:n] / p[:n].sum()
        return int(self._random.choice(best, p=p))

    def _probabilities(self, logits: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
        scaled = (logits - logits.max()) / self.temperature
        p: npt.NDArray[Any] = np.exp(scaled)
        p /= p.sum()
        return p
