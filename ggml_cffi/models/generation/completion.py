"""`Completion`: the whole answer to one prompt; and the attributes of an answer that streams have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ggml_cffi.models.generation.logprobs import TokenLogprob
from ggml_cffi.models.generation.requests import FinishReason, Request
from ggml_cffi.models.generation.timings import Timings


@dataclass(frozen=True)
class Completion:
    """The whole answer to one prompt, made by :meth:`Stream.completion`. ``str(completion)`` is its text.

    It is pickled, and compared by its fields.
    """

    text: str
    """Text of the answer, without the stop string that ended it; empty for :meth:`Model.generate_tokens`."""
    token_ids: tuple[int, ...]
    """The generated tokens, those of a stop string included, without the end token."""
    prompt_tokens: int
    """Number of tokens of the prompt."""
    finish_reason: FinishReason | None
    """``"stop"`` after an end token, a stop string or a complete grammar, ``"length"`` if ``max_tokens`` was reached or
    the context is full, ``"cancelled"`` after :meth:`Stream.cancel`. None if an error ended the answer."""
    logprobs: tuple[TokenLogprob, ...] | None
    """The generated tokens with their log probabilities; None if ``logprobs=`` did not ask for them."""
    timings: Timings
    """Counts and times of the call. The prompts of a list share it."""

    def __str__(self) -> str:
        return self.text


class Answers:
    """The answers to the prompts of one call, up to the last item that the caller got.

    The attributes of a single answer raise ValueError if the call has several prompts.
    """

    def __init__(self, requests: Sequence[Request], timings: Timings) -> None:
        self._requests = requests
        self.timings = timings
        """Counts and times of this call."""

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of the prompt, or of all prompts."""
        return sum(len(request.ids) for request in self._requests)

    @property
    def token_ids(self) -> list[int]:
        """The generated tokens, those of a stop string included, without the end token."""
        request = self._request
        return request.token_ids[: request.stopped_at]

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """The generated tokens with their log probabilities; empty if ``logprobs=`` did not ask for them.

        It has every generated token, also those whose text is held back or behind a stop string.
        """
        request = self._request
        return request.logprobs[: request.stopped_at]

    @property
    def finish_reason(self) -> FinishReason | None:
        """The reason for the end: see :attr:`Completion.finish_reason`. None before the end."""
        return _finish_reason(self._request)

    @property
    def _request(self) -> Request:
        """The request of a call with one prompt."""
        if len(self._requests) != 1:
            raise ValueError(f"this call has {len(self._requests)} prompts: completions() has the answer to each")
        return self._requests[0]

    def _complete(self, request: Request) -> Completion:
        asked = request.sampler.params.logprobs is not None
        return Completion(
            "".join(request.chunks),
            tuple(request.token_ids[: request.stopped_at]),
            len(request.ids),
            _finish_reason(request),
            tuple(request.logprobs[: request.stopped_at]) if asked else None,
            self.timings,
        )


def _finish_reason(request: Request) -> FinishReason | None:
    """Return the reason for the end, also if a replica's thread found another one after the stop string."""
    return request.finish_reason if request.stopped_at is None else "stop"
