"""`TokenLogprob`: a chosen token with its log probability, and those of the most likely tokens."""

from __future__ import annotations

from dataclasses import dataclass

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
