"""From logits to the next token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class Sampler:
    """Chooses the next token. The steps are llama.cpp's, in its order: each works on what the one before left.

    Parameters
    ----------
    temperature
        Logits are divided by it at the end; 0 takes the most likely token.
    top_k
        Only the ``k`` most likely tokens; 0 for all.
    top_p
        Only the most likely tokens that together have this probability.
    min_p
        Only tokens at least this likely, as a share of the most likely one's probability.
    repeat_penalty
        Logits of tokens that occur among the last ``repeat_last_n`` are divided by it where positive, multiplied where
        negative (Keskar et al., CTRL, 2019); 1 for no penalty. Holds with temperature 0 too.
    repeat_last_n
        How many tokens back a repetition counts; 0 for none, -1 for all.
    seed
        For repeatable choices; None for others every time.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_k: int = 40,
        top_p: float = 0.95,
        seed: int | None = None,
        *,
        min_p: float = 0.0,
        repeat_penalty: float = 1.0,
        repeat_last_n: int = 64,
    ) -> None:
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0, not {temperature}")
        if top_k < 0:
            raise ValueError(f"top_k must be at least 0, not {top_k}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
        if not 0 <= min_p <= 1:
            raise ValueError(f"min_p must be 0 to 1, not {min_p}")
        if not 0 < repeat_penalty < float("inf"):
            raise ValueError(f"repeat_penalty must be above 0, not {repeat_penalty}")
        if repeat_last_n < -1:
            raise ValueError(f"repeat_last_n must be at least -1, not {repeat_last_n}")
        if seed is not None and seed < 0:
            raise ValueError(f"seed must be at least 0, not {seed}")
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.repeat_penalty, self.repeat_last_n = repeat_penalty, repeat_last_n
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: npt.NDArray[np.float32], before: Sequence[int] = ()) -> int:
        """The chosen token.

        Parameters
        ----------
        logits
            ``(n_vocab,)``.
        before
            The tokens so far, for the repetition penalty.
        """
        if self.repeat_penalty != 1 and self.repeat_last_n and before:
            logits = self._penalized(logits, before)
        if self.temperature == 0:
            return int(logits.argmax())
        k = min(self.top_k or logits.size, logits.size)
        best = np.argpartition(logits, -k)[-k:]
        best = best[np.argsort(logits[best])[::-1]]
        ranked = logits[best].astype(np.float64)
        if not np.isfinite(ranked[0]):  # a broken model: there is nothing to weigh
            return int(best[0])
        keep = k
        if self.top_p < 1:
            keep = int(np.searchsorted(np.cumsum(softmax(ranked)), self.top_p)) + 1
        if self.min_p > 0:
            keep = min(keep, int(np.count_nonzero(ranked >= ranked[0] + np.log(self.min_p))))
        return int(self._random.choice(best[:keep], p=softmax(ranked[:keep] / self.temperature)))

    def _penalized(self, logits: npt.NDArray[np.float32], before: Sequence[int]) -> npt.NDArray[np.float32]:
        last = before if self.repeat_last_n == -1 else before[-self.repeat_last_n :]
        seen = np.unique(np.asarray(last))
        out = logits.copy()
        values = out[seen]
        out[seen] = np.where(values > 0, values / self.repeat_penalty, values * self.repeat_penalty)
        return out


def softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Probabilities of logits, the largest first."""
    p: npt.NDArray[np.float64] = np.exp(logits - logits[0])
    p /= p.sum()
    return p
