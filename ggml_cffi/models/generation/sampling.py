"""Sampling: from logits to the next token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, TypeAlias, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from ggml_cffi.core.numbers import as_integer, as_real
from ggml_cffi.models.generation.best_tokens import best_tokens
from ggml_cffi.models.generation.grammar import Grammar, as_grammar
from ggml_cffi.models.generation.grammar_state import GrammarState
from ggml_cffi.models.generation.logits_facts import KeptLogits, LogitsFacts
from ggml_cffi.models.generation.logprobs import Logprobs, TokenLogprob, token_logprob
from ggml_cffi.models.tokenizers.tokenizer import Tokenizer, check_tokens

#: Number of most likely tokens that nearly always has those that ``top_p`` and ``min_p`` leave.
_FEW = 256
#: The same, if the probabilities are nearly equal.
_MANY = 4096

_NO_TOKENS = np.empty(0, np.intp)
_NO_FACTS = LogitsFacts()

#: A function of the token ids so far (int32) and of the logits (float32), which it changes in place.
LogitsProcessor: TypeAlias = Callable[[npt.NDArray[np.int32], npt.NDArray[np.float32]], None]


class SamplingOptions(TypedDict, total=False):
    """The fields of :class:`SamplingParams` as keyword arguments."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    repeat_last_n: int
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    logits_processors: Sequence[LogitsProcessor]
    grammar: Grammar | Mapping[str, Any] | None
    logprobs: int | None
    ignore_eos: bool
    seed: int | None


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Parameters of :class:`Sampler`, checked on creation.

    Raises
    ------
    TypeError, ValueError
        If a parameter has a wrong type or is out of range, or a grammar is not valid.
    ImportError
        If there is a grammar, and llguidance is not installed.

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
    presence_penalty: float = 0.0
    """Number that is subtracted from the logits of the tokens that the answer has already, as in OpenAI's API."""
    frequency_penalty: float = 0.0
    """The same for each occurrence of the token in the answer, as in OpenAI's API."""
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    """Numbers that are added to the logits of tokens, by token id; minus infinity excludes a token."""
    logits_processors: Sequence[LogitsProcessor] = field(default=(), hash=False)
    """Functions ``f(token_ids, logits)`` that change the logits in place, and return nothing. They are called in order,
    before all other steps, for each token to choose. ``token_ids`` are those of the prompt and of the answer so far,
    an int32 array; ``logits`` is a float32 array ``(n_vocab,)`` that the function may change, but not keep. An
    exception ends the request, and is raised to its caller. Several requests may call a function at the same time. It
    cannot use the model that calls it."""
    grammar: Grammar | Mapping[str, Any] | None = None
    """The texts that an answer may have; a mapping is a JSON schema. The answer ends when it is complete. It is
    incomplete if ``max_tokens`` or a stop string ended it."""
    logprobs: int | None = None
    """Number of most likely tokens that :attr:`Stream.logprobs` has beside each chosen one; None for no list."""
    ignore_eos: bool = False
    """True to continue after an end token."""
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
        for name in ("presence_penalty", "frequency_penalty"):
            if not np.isfinite(as_real(name, getattr(self, name))):
                raise ValueError(f"{name} must be finite, not {getattr(self, name)}")
        object.__setattr__(self, "logit_bias", _check_bias(self.logit_bias))
        object.__setattr__(self, "logits_processors", _check_processors(self.logits_processors))
        object.__setattr__(self, "grammar", as_grammar(self.grammar))
        if self.logprobs is not None:
            as_integer("logprobs", self.logprobs, 0)
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos must be True or False, not {self.ignore_eos!r:.80}")
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

    @property
    def needs_tokenizer(self) -> bool:
        """True if a sampler with these parameters needs the tokenizer of the model."""
        return self.grammar is not None or self.logprobs is not None

    def for_sequence(self, number: int) -> SamplingParams:
        """Return the parameters for one of several sequences: ``number`` is added to the seed."""
        return self if self.seed is None else replace(self, seed=self.seed + number)


class Sampler:
    """The choice of the next tokens of one sequence.

    The steps, each on the result of the last one: ``logits_processors``, ``logit_bias``, the grammar, repetition
    penalty, presence and frequency penalty; then ``top_k``, ``top_p``, ``min_p`` and temperature in the order of
    llama.cpp. The grammar comes after everything that may raise a logit to any value, so no parameter overrides it.

    Parameters
    ----------
    params
        The parameters; default those of ``SamplingParams()``.
    tokenizer
        The tokenizer of the model, for a grammar and for ``logprobs``.
    **options
        Fields in place of those of ``params``.

    Raises
    ------
    TypeError, ValueError
        See :meth:`SamplingParams.from_options`; also if a tokenizer is needed and missing.
    """

    def __init__(
        self,
        params: SamplingParams | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        **options: Unpack[SamplingOptions],
    ) -> None:
        params = self.params = SamplingParams.from_options(params, **options)
        """The parameters."""
        self.logprobs = Logprobs()
        """The chosen tokens with their log probabilities, if the parameters ask for them."""
        self.facts = _NO_FACTS
        """Facts of the next logits, if the caller knows them."""
        if tokenizer is None and params.needs_tokenizer:
            raise ValueError("a grammar and logprobs need the tokenizer of the model: Sampler(tokenizer=...)")
        self._tokenizer = tokenizer
        self._random = np.random.default_rng(params.seed)
        grammar = as_grammar(params.grammar)
        self._grammar = None if grammar is None or tokenizer is None else GrammarState(grammar, tokenizer)
        self._bias = _as_arrays(params.logit_bias) if params.logit_bias else None
        self._repeats = params.repeat_penalty != 1 and params.repeat_last_n != 0
        self._counts = bool(params.presence_penalty or params.frequency_penalty)
        self._n_chosen: dict[int, int] = {}  # occurrences of each token in the answer, if ``_counts``
        changes = params.logits_processors or self._bias or self._grammar or self._repeats or self._counts
        self._only_chooses = not changes and params.logprobs is None
        self.needs_best = not changes and params.temperature == 0
        """True if it needs ``LogitsFacts.best``."""
        self.needs_kept = params.logprobs is not None
        """True if it can use ``LogitsFacts.kept``."""

    @property
    def complete(self) -> bool:
        """True if the grammar allows no further token."""
        return self._grammar is not None and self._grammar.complete

    @classmethod
    def for_model(
        cls, params: SamplingParams, n_vocab: int, tokenizer: Callable[[], Tokenizer], number: int = 0
    ) -> Sampler:
        """Return the sampler of one of several sequences of a model.

        Parameters
        ----------
        params
            The parameters of all sequences.
        n_vocab
            Number of the model's logits.
        tokenizer
            A function that returns the model's tokenizer, called if a parameter needs it.
        number
            Number of the sequence, which is added to the seed.

        Raises
        ------
        ValueError
            If ``logit_bias`` has an id beyond the vocabulary, or the grammar is not valid for the tokenizer.
        """
        check_tokens(params.logit_bias or (), n_vocab)
        return cls(params.for_sequence(number), tokenizer=tokenizer() if params.needs_tokenizer else None)

    def prepare(self) -> None:
        """Begin to compute the tokens that the grammar allows next, in another thread, while a device computes."""
        if self._grammar is not None:
            self._grammar.prepare()

    def __call__(self, logits: npt.NDArray[np.float32], previous: Sequence[int] = ()) -> int:
        """Return the chosen token.

        Parameters
        ----------
        logits
            ``(n_vocab,)``; they are not changed.
        previous
            The tokens so far, for the repetition penalty and the logits processors.

        Raises
        ------
        ValueError
            If the parameters exclude every token, or a logits processor writes NaN.
        Exception
            Any exception of a logits processor.
        """
        facts, self.facts = self.facts, _NO_FACTS
        if self._only_chooses:
            return self._choose(logits) if facts.best is None else facts.best
        adjusted = self._penalize(self._adjust(logits, previous), previous)
        token = self._choose(adjusted) if facts.best is None else facts.best
        if not adjusted[token] > -np.inf:  # the highest of all, or the first NaN
            raise ValueError(_no_token(adjusted[token], logits))
        if self.params.logprobs is not None:
            self._note_logprob(logits, token, facts)
        if self._grammar is not None:
            self._grammar.advance(token)
        if self._counts:
            self._n_chosen[token] = self._n_chosen.get(token, 0) + 1
        return token

    def _note_logprob(self, logits: npt.NDArray[np.float32], token: int, facts: LogitsFacts) -> None:
        """Append a chosen token to :attr:`logprobs`. If the logits stay, it is computed when it is read."""
        if self.logprobs:
            _ = self.logprobs[-1]  # computed by now in any case, so that at most one copy of logits stays
        if facts.kept is None:
            self.logprobs.append(self._logprob_of(logits, token))
        else:
            self.logprobs.append(partial(self._late_logprob, facts.kept, facts.row, token))

    def _late_logprob(self, kept: KeptLogits, row: int, token: int) -> TokenLogprob:
        return self._logprob_of(kept.logits[row], token, kept.log_sum(row))

    def _logprob_of(self, logits: npt.NDArray[np.float32], token: int, log_sum: float | None = None) -> TokenLogprob:
        assert self._tokenizer is not None
        return token_logprob(logits, token, self.params.logprobs or 0, self._tokenizer, log_sum)

    def _choose(self, logits: npt.NDArray[np.float32]) -> int:
        """Return a token: the most likely one, or one drawn at random."""
        params = self.params
        if params.temperature == 0:
            return int(logits.argmax())
        tokens = self._candidates(logits)
        if not tokens.size:  # a broken model: there are no probabilities to draw from
            return int(logits.argmax())
        values = logits[tokens].astype(np.float64)
        with np.errstate(over="ignore"):  # by a temperature near 0
            weights = np.exp((values - values.max()) / params.temperature)
        distribution = np.cumsum(weights)
        distribution /= distribution[-1]
        return int(tokens[np.searchsorted(distribution, self._random.random(), side="right")])

    def _candidates(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.intp]:
        """Return the tokens that ``top_k``, ``top_p`` and ``min_p`` leave; none if the highest logit is not finite.

        As few tokens as possible are sorted: a sort of a large vocabulary takes longer than a model on a GPU.
        """
        params = self.params
        n = logits.size
        if not params.top_k and params.top_p == 1 and params.min_p == 0:
            return np.flatnonzero(logits > -np.inf) if np.isfinite(logits.max()) else _NO_TOKENS
        for k in (min(params.top_k, n),) if params.top_k else (min(_FEW, n), min(_MANY, n), n):
            best = best_tokens(logits, k)
            if not (best.size and np.isfinite(logits[best[0]])):
                return _NO_TOKENS
            keep = best.size
            if params.top_p < 1 or params.min_p > 0:
                keep = self._count_kept(logits, best)
            if keep < best.size or best.size < k:
                break
        return best[:keep]

    def _count_kept(self, logits: npt.NDArray[np.float32], best: npt.NDArray[np.intp]) -> int:
        """Return how many of the best tokens ``top_p`` and ``min_p`` leave."""
        params = self.params
        ranked = logits[best].astype(np.float64)
        keep = best.size
        if params.top_p < 1:
            weights = np.exp(ranked - ranked[0])
            total = weights.sum() if params.top_k else np.exp(logits - logits[best[0]]).sum(dtype=np.float64)
            keep = int(np.searchsorted(np.cumsum(weights), params.top_p * total)) + 1
        if params.min_p > 0:
            keep = min(keep, int(np.count_nonzero(ranked >= ranked[0] + np.log(params.min_p))))
        return keep

    def _adjust(self, logits: npt.NDArray[np.float32], previous: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return ``logits``, or a copy that processors, biases and the grammar have changed."""
        params = self.params
        if params.logits_processors or self._bias:
            logits = np.array(logits, np.float32)
        if params.logits_processors:
            ids = np.asarray(previous, np.int32)
            for process in params.logits_processors:
                if process(ids, logits) is not None:
                    raise TypeError(f"{process!r:.80} must change the logits in place, and return nothing")
        if self._bias:
            tokens, values = self._bias
            logits[tokens] += values
        return logits if self._grammar is None else self._grammar.limit(logits)

    def _penalize(self, logits: npt.NDArray[np.float32], previous: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return ``logits``, or a copy in which the tokens so far are less likely."""
        if self._repeats and len(previous):
            logits = self._penalize_repeated(logits, previous)
        if self._n_chosen:
            tokens, counts = _as_arrays(self._n_chosen)
            params = self.params
            values = logits[tokens] - (params.presence_penalty + params.frequency_penalty * counts.astype(np.float64))
            logits = _replaced(logits, tokens, values)
        return logits

    def _penalize_repeated(self, logits: npt.NDArray[np.float32], previous: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return a copy of ``logits`` in which the last tokens are less likely."""
        penalty, n = self.params.repeat_penalty, self.params.repeat_last_n
        repeated = np.unique(np.asarray(previous if n == -1 else previous[-n:]))
        values = logits[repeated].astype(np.float64)
        with np.errstate(over="ignore"):
            changed = np.where(values > 0, values / penalty, values * penalty)
        return _replaced(logits, repeated, changed)


def _replaced(
    logits: npt.NDArray[np.float32], tokens: npt.NDArray[np.intp], values: npt.NDArray[np.float64]
) -> npt.NDArray[np.float32]:
    """Return a copy of ``logits`` with other values for some tokens, infinite ones beyond the range of float32."""
    replaced = logits.copy()
    with np.errstate(over="ignore"):
        replaced[tokens] = values
    return replaced


def _as_arrays(numbers: Mapping[int, float]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """Return the keys and the values of a mapping, infinite ones beyond the range of float32."""
    with np.errstate(over="ignore"):
        values = np.fromiter(numbers.values(), np.float64, len(numbers)).astype(np.float32)
    return np.fromiter(numbers, np.intp, len(numbers)), values


def _no_token(value: np.float32, logits: npt.NDArray[np.float32]) -> str:
    """Return the reason why no token can be chosen: ``value`` is the highest logit after all changes to ``logits``."""
    if value == -np.inf:
        return "no token is left: logits_processors, logit_bias and grammar together exclude every token"
    if np.isnan(logits).any():
        return "the model's logits are NaN: there is no most likely token"
    return "logits are NaN after logits_processors: exclude a token with -inf"


def _check_bias(bias: Any) -> dict[int, float] | None:
    """Return the biases by token id."""
    if bias is None:
        return None
    if not isinstance(bias, Mapping):
        raise TypeError(f"logit_bias must be a mapping of token ids to numbers, not {bias!r:.80}")
    checked = {as_integer("a token id of logit_bias", i, 0): as_real("logit_bias", v) for i, v in bias.items()}
    for token, value in checked.items():
        if not value < float("inf"):
            raise ValueError(f"logit_bias must be finite, or minus infinity, not {value} (token {token})")
    return checked


def _check_processors(processors: Any) -> tuple[LogitsProcessor, ...]:
    """Return the logits processors as a tuple."""
    if callable(processors) or not isinstance(processors, Iterable):
        raise TypeError(f"logits_processors must be a list of functions, not {processors!r:.80}")
    found = tuple(processors)
    for process in found:
        if not callable(process):
            raise TypeError(f"logits_processors must be functions, not {process!r:.80}")
    return found
