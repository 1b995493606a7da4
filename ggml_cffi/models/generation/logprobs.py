"""`TokenLogprob`: a chosen token with its log probability, and those of the most likely tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

from ggml_cffi.models.generation.best_tokens import best_tokens
from ggml_cffi.models.generation.logits_facts import log_sum_exp
from ggml_cffi.models.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenLogprob:
    """A token with the natural logarithm of its probability."""

    token_id: int
    token: str
    """Text of the token. Bytes that are no complete character become U+FFFD."""
    bytes: bytes
    """Bytes of the token."""
    logprob: float
    """Logarithm of its probability: the log softmax of the model's logits, before any change by parameters. Those of
    OpenAI's and llama.cpp's servers mean the same."""
    top: tuple[TokenLogprob, ...] = ()
    """The most likely tokens at this position, the most likely one first, without ``top`` of their own. The chosen
    token need not be among them."""


class Logprobs(Sequence[TokenLogprob]):
    """Tokens with their log probabilities, in order. An entry may be computed when it is first read, in any thread."""

    def __init__(self) -> None:
        self._entries: list[TokenLogprob | Callable[[], TokenLogprob]] = []

    def append(self, entry: TokenLogprob | Callable[[], TokenLogprob]) -> None:
        """Append an entry, or a function that computes it."""
        self._entries.append(entry)

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, i: int) -> TokenLogprob: ...
    @overload
    def __getitem__(self, i: slice) -> list[TokenLogprob]: ...
    def __getitem__(self, i: int | slice) -> TokenLogprob | list[TokenLogprob]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i = range(len(self))[i]  # another thread may append
        entry = self._entries[i]
        if not isinstance(entry, TokenLogprob):
            entry = self._entries[i] = entry()
        return entry


def token_logprob(
    logits: npt.NDArray[np.float32], token: int, n_top: int, tokenizer: Tokenizer, log_sum: float | None = None
) -> TokenLogprob:
    """Return the log probability of a token, and those of the ``n_top`` most likely ones.

    Parameters
    ----------
    logits
        ``(n_vocab,)``, unmodified.
    token
        Id of the chosen token.
    n_top
        Number of most likely tokens.
    tokenizer
        The tokenizer, for texts and bytes.
    log_sum
        Logarithm of the sum of the exponentials of the logits, if it is known.
    """
    known = log_sum_exp(logits[None])[0] if log_sum is None else log_sum

    def describe(token_id: int, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        data = tokenizer.token_bytes(token_id, special=True)
        return TokenLogprob(token_id, data.decode("utf-8", "replace"), data, float(logits[token_id]) - known, top)

    best = best_tokens(logits, n_top) if n_top else ()
    return describe(token, tuple(describe(int(i)) for i in best))
