"""`GrammarState`: the position of one sequence in a grammar, and the tokens that may follow.

The tokens that may follow are computed in a thread of a pool while the device computes the logits: they are known from
the tokens so far. llguidance and numpy release the GIL for that.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, ref

import numpy as np
import numpy.typing as npt

from ggml_cffi.models.generation.grammar import Grammar, import_llguidance
from ggml_cffi.models.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

_N_GRAMMARS = 64
_MAX_THREADS = 8

#: Upper limits of the logits of eight tokens by the bits of a byte: no limit if the bit is set, else minus infinity.
_LIMITS = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), np.inf, -np.inf)
_LIMITS = _LIMITS.astype(np.float32)


class GrammarState:
    """The position of one sequence in a grammar.

    Parameters
    ----------
    grammar
        The grammar.
    tokenizer
        The tokenizer of the model. Its tokens are prepared for llguidance once.

    Raises
    ------
    ValueError
        If the grammar is not valid for this tokenizer.
    """

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer) -> None:
        self._matcher = _compiler(tokenizer).matcher(grammar)
        self._limits: Future[npt.NDArray[np.float32]] | None = None

    @property
    def complete(self) -> bool:
        """True if the text is complete, and no token may follow but an end token."""
        return self._matcher.is_stopped()

    def prepare(self) -> None:
        """Begin to compute the tokens that may follow, in another thread."""
        if self._limits is None:
            self._limits = _executor().submit(_compute_limits, self._matcher)

    def limit(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return a copy of ``logits``, ``(n_vocab,)``, with minus infinity for the tokens that may not follow.

        Raises
        ------
        ValueError
            If the grammar is too complex for llguidance at this position.
        """
        if self._limits is None:
            limits = _compute_limits(self._matcher)
        else:
            limits, self._limits = self._limits.result(), None
        limited = np.full(logits.shape, -np.inf, np.float32) if logits.size > limits.size else np.empty_like(logits)
        n = min(limits.size, logits.size)  # ids beyond the vocabulary are no tokens: embeddings are often padded
        np.minimum(logits[:n], limits[:n], out=limited[:n])
        return limited

    def advance(self, token: int) -> None:
        """Move on by ``token``.

        Raises
        ------
        ValueError
            If the token may not follow, or the grammar is too complex for llguidance at this position.
        """
        if not self._matcher.consume_token(token):
            raise ValueError(f"the grammar stopped at token {token}: {self._matcher.get_error()}")


class _Compiler:
    """The tokens of one tokenizer in llguidance's form, and the grammars compiled for them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokens = import_llguidance().LLTokenizer(_TokenTable(tokenizer), eos_token=_end_tokens(tokenizer))
        self._beginning = lru_cache(_N_GRAMMARS)(self._compile)
        self._lock = Lock()

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """Return a new matcher at the beginning of a grammar."""
        with self._lock:
            matcher: LLMatcher = self._beginning(grammar).deep_copy()
            return matcher

    def _compile(self, grammar: Grammar) -> LLMatcher:
        llguidance = import_llguidance()
        limits = llguidance.LLParserLimits(verbose_errors=False)
        matcher: LLMatcher = llguidance.LLMatcher(self._tokens, grammar.source, log_level=0, limits=limits)
        if matcher.is_error():
            raise ValueError(f"the grammar ({grammar.kind}) is not valid: {matcher.get_error()}")
        return matcher


class _TokenTable:
    """The attributes of a tokenizer that llguidance reads."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        # Weak, because the garbage collector does not see the reference of llguidance to this object.
        self._tokenizer = ref(tokenizer)
        ids = range(len(tokenizer))
        self.tokens = [tokenizer.token_bytes(i, special=True) for i in ids]
        self.special_token_ids = [i for i in ids if self.tokens[i] and not tokenizer.token_bytes(i)]
        if not tokenizer.end_tokens:
            self.special_token_ids.append(len(tokenizer))
            self.tokens.append(b"<end of the text>")
        self.eos_token_id, self.bos_token_id = _end_tokens(tokenizer)[0], tokenizer.bos

    def __call__(self, text: bytes | str) -> list[int]:
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        tokenizer = self._tokenizer()
        return [] if tokenizer is None else tokenizer.encode(text, special=False, bos=False)


def _end_tokens(tokenizer: Tokenizer) -> list[int]:
    """Return the end tokens, or an id beyond the vocabulary: llguidance needs one."""
    return sorted(tokenizer.end_tokens) or [len(tokenizer)]


def _compute_limits(matcher: LLMatcher) -> npt.NDArray[np.float32]:
    """Return the upper limit of each token's logit: infinity for the tokens that may follow, else minus infinity."""
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    if matcher.is_error():
        raise ValueError(f"the grammar stopped: {matcher.get_error()}")
    return np.take(_LIMITS, bits, axis=0, mode="clip").reshape(-1)  # with this mode faster than an index


_compilers: WeakKeyDictionary[Tokenizer, _Compiler] = WeakKeyDictionary()
_compilers_lock = Lock()


def _compiler(tokenizer: Tokenizer) -> _Compiler:
    """Return the compiler of a tokenizer."""
    with _compilers_lock:
        if tokenizer not in _compilers:
            _compilers[tokenizer] = _Compiler(tokenizer)
        return _compilers[tokenizer]


@lru_cache(1)
def _executor() -> ThreadPoolExecutor:
    """Return the threads that compute the tokens that may follow."""
    return ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS), thread_name_prefix="ggml_cffi grammar")


os.register_at_fork(after_in_child=_executor.cache_clear)  # the threads are not there after a fork
