"""Perplexity of a text, a measure of a model's predictions."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, sqrt

import numpy as np
import numpy.typing as npt

from ggml_cffi.core.progress import Progress
from ggml_cffi.models.generation.batcher import Batcher


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a text."""

    value: float
    """``exp`` of the mean negative log-likelihood of the scored tokens."""
    error: float
    """Standard error of ``value``."""
    n_tokens: int
    """Number of scored tokens."""

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} ± {self.error:{spec}}" if spec else str(self)

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f}"


def measure_perplexity(
    batcher: Batcher, ids: list[int], n_ctx: int, bos: int | None, progress: Progress | None = None
) -> Perplexity:
    """Return the perplexity of ``ids``, measured as llama.cpp's ``perplexity`` does.

    Parameters
    ----------
    batcher
        The model.
    ids
        Token ids of the text.
    n_ctx
        Tokens of a window. Tokens that fill no window are left out; the second half of each window is scored.
    bos
        The model's beginning token, which takes the place of each window's first token; None if it has none.
    progress
        Called with the tokens done and the tokens in all.

    Raises
    ------
    ValueError
        If ``n_ctx`` is below 2, or the text is shorter than one window.
    """
    if n_ctx < 2:
        raise ValueError(f"n_ctx must be at least 2, not {n_ctx}")
    windows = len(ids) // n_ctx
    if not windows:
        raise ValueError(f"{len(ids)} tokens do not fill a window of {n_ctx}: give a longer text, or a smaller n_ctx")
    first = n_ctx // 2
    scores = []
    for i in range(windows):
        window = ids[i * n_ctx : (i + 1) * n_ctx]
        targets = window[first + 1 :]
        if bos is not None:
            window[0] = bos
        logits = batcher.logits(window, n_ctx - first)[:-1]
        scores.append(negative_log_likelihoods(logits, targets))
        if progress is not None:
            progress((i + 1) * n_ctx, windows * n_ctx)
    losses = np.concatenate(scores)
    mean, error = float(losses.mean()), float(losses.std()) / sqrt(max(len(losses) - 1, 1))
    value = exp(mean) if mean < 700 else float("inf")  # exp overflows above 709
    return Perplexity(value, value * error, len(losses))


def negative_log_likelihoods(logits: npt.NDArray[np.float32], targets: list[int]) -> npt.NDArray[np.float64]:
    """Return ``-log p`` of each target by its row of logits: ``(n,)``."""
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    chosen = rows[np.arange(len(targets)), targets]
    return np.asarray(np.log(np.exp(rows).sum(axis=1)) - chosen)
