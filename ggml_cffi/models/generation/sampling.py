"""Sampling: from logits to the next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from ggml_cffi.core.numbers import as_integer, as_real


class SamplingOptions(TypedDict, total=False):
    """The fields of :class:`SamplingParams` as keyword arguments."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    repeat_last_n: int
    seed: int | None


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Parameters of :class:`Sampler`, checked on creation.

    Raises
    ------
    TypeError, ValueError
        If a parameter is no number, or out of range.

    Examples
    --------
    >>> SamplingParams(temperature=0.8, seed=1).top_k
    40
    """

    temperature: float = 0.0
    """Divisor of the logits in the last step; 0 takes the most likely token (greedy)."""
    top_k: int = 40
    """Number of most likely tokens to choose from; 0 for all."""
    top_p: float = 0.95
    """Total probability of the most likely tokens to choose from."""
    min_p: float = 0.0
    """Lowest probability of a token to choose, as a fraction of the most likely token's."""
    repeat_penalty: float = 1.0
    """Divisor of positive logits, and factor of negative ones, of tokens among the last ``repeat_last_n`` (Keskar et
    al., CTRL, 2019); 1 for no penalty. It holds with temperature 0 too."""
    repeat_last_n: int = 64
    """Number of last tokens that the penalty covers; 0 for none, -1 for all."""
    seed: int | None = None
    """Seed of the random choices; None for different choices each time."""

    def __post_init__(self) -> None:
        if not 0 <= as_real("temperature", self.temperature) < float("inf"):
            raise ValueError(f"temperature must be at least 0 and finite, not {self.temperature}")
        if not 0 < as_real("top_p", self.top_p) <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= as_real("min_p", self.min_p) <= 1:
            raise ValueError(f"min_p must be 0 to 1, not {self.min_p}")
        if not 0 < as_real("repeat_penalty", self.repeat_penalty) < float("inf"):
            raise ValueError(f"repeat_penalty must be above 0 and finite, not {self.repeat_penalty}")
        as_integer("top_k", self.top_k, 0)
        as_integer("repeat_last_n", self.repeat_last_n, -1)
        if self.seed is not None:
            as_integer("seed", self.seed, 0)

    @classmethod
    def from_options(cls, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]) -> SamplingParams:
        """Return ``params``, or the defaults, with ``options`` in place of its fields.

        Raises
        ------
        TypeError
            If an option is unknown, or no number.
        ValueError
            If an option is out of range.
        """
        params = cls() if params is None else params
        if not isinstance(params, cls):
            raise TypeError(
                f"sampling must be SamplingParams, not {params!r:.80}: give its fields as keyword arguments"
            )
        if not options:
            return params
        known = [field.name for field in fields(cls)]
        unknown = ", ".join(map(repr, options.keys() - set(known)))
        if unknown:
            raise TypeError(f"unknown sampling option {unknown}: the options are {', '.join(known)}")
        return replace(params, **options)

    def for_sequence(self, number: int) -> SamplingParams:
        """Return the parameters for one of several sequences: ``number`` is added to the seed."""
        return self if self.seed is None else replace(self, seed=self.seed + number)


class Sampler:
    """The choice of the next token, in the steps and the order of llama.cpp.

    Each step works on the tokens that the last step left: repetition penalty, ``top_k``, ``top_p``, ``min_p``,
    temperature.

    Parameters
    ----------
    params
        The parameters; default those of ``SamplingParams()``.
    **options
        Fields in place of those of ``params``.

    Raises
    ------
    TypeError, ValueError
        See :meth:`SamplingParams.from_options`.
    """

    def __init__(self, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]) -> None:
        self.params = SamplingParams.from_options(params, **options)
        """The parameters."""
        self._random = np.random.default_rng(self.params.seed)

    def __call__(self, logits: npt.NDArray[np.float32], previous: Sequence[int] = ()) -> int:
        """Return the chosen token.

        Parameters
        ----------
        logits
            ``(n_vocab,)``.
        previous
            The tokens so far, for the repetition penalty.
        """
        params = self.params
        if params.repeat_penalty != 1 and params.repeat_last_n and previous:
            logits = self._penalize(logits, previous)
        if params.temperature == 0:
            return int(logits.argmax())
        k = min(params.top_k or logits.size, logits.size)
        best = np.argpartition(logits, -k)[-k:]
        best = best[np.argsort(logits[best])[::-1]]
        ranked = logits[best].astype(np.float64)
        if not np.isfinite(ranked[0]):  # a broken model: there are no probabilities to draw from
            return int(best[0])
        keep = k
        if params.top_p < 1:
            keep = int(np.searchsorted(np.cumsum(softmax(ranked)), params.top_p)) + 1
        if params.min_p > 0:
            keep = min(keep, int(np.count_nonzero(ranked >= ranked[0] + np.log(params.min_p))))
        return int(self._random.choice(best[:keep], p=softmax(ranked[:keep] / params.temperature)))

    def _penalize(self, logits: npt.NDArray[np.float32], previous: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return a copy of ``logits`` in which the last tokens are less likely."""
        penalty, n = self.params.repeat_penalty, self.params.repeat_last_n
        repeated = np.unique(np.asarray(previous if n == -1 else previous[-n:]))
        penalized = logits.copy()
        values = penalized[repeated]
        penalized[repeated] = np.where(values > 0, values / penalty, values * penalty)
        return penalized


def softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the probabilities of logits, of which the first is the largest."""
    p: npt.NDArray[np.float64] = np.exp(logits - logits[0])
    p /= p.sum()
    return p
