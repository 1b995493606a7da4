"""The parts that the routes of one server share."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from ggml_cffi.core.text import to_json
from ggml_cffi.models import SamplingParams, TokenLogprob
from ggml_cffi.models.generation import check_stop
from ggml_cffi.server.catalog import Catalog, Loaded
from ggml_cffi.server.engine import Job
from ggml_cffi.server.errors import ApiError
from ggml_cffi.server.generation import Generation, Piece
from ggml_cffi.server.metrics import Metrics
from ggml_cffi.server.schemas import Body, SamplingBody

T = TypeVar("T")

#: Largest number of stop strings: each is looked for after every token.
_MAX_STOPS = 64
#: Characters of a request, or token ids, from which on its texts are long: to find their tokens takes a tenth of a
#: second or more.
_LONG_TEXT = 50_000


class Json(JSONResponse):
    """A JSON reply. Half of a surrogate pair, which a model may write in JSON too, is written as an escape."""

    def render(self, content: Any) -> bytes:
        try:
            return super().render(content)
        except UnicodeEncodeError:
            return to_json(content).encode()


@dataclass(frozen=True)
class Service:
    """The models, the metrics and the limits of a server."""

    catalog: Catalog
    metrics: Metrics
    max_prompt: int | None = None
    """Largest number of tokens of a prompt; None for the context of the model."""
    _long_texts: asyncio.Lock = field(default_factory=asyncio.Lock, init=False, repr=False)

    async def in_thread(self, body: Body, function: Callable[..., T], *args: Any) -> T:
        """Call a function that finds the tokens of a request, or their text, in a thread.

        Requests with long texts do so one after the other, also if their clients leave meanwhile: there are only a few
        threads, and the other requests need one too.
        """
        if text_length(body) < _LONG_TEXT:
            return await asyncio.to_thread(function, *args)
        await self._long_texts.acquire()
        working = asyncio.ensure_future(asyncio.to_thread(function, *args))

        def end(done: asyncio.Future[T]) -> None:
            self._long_texts.release()
            _ = done.cancelled() or done.exception()  # no warning about one that nobody awaits

        working.add_done_callback(end)
        return await asyncio.shield(working)

    def check_prompt(self, loaded: Loaded, ids: list[int]) -> list[int]:
        """Return the token ids of a prompt.

        Raises
        ------
        ApiError
            If there are none, or too many, or the model generates no text.
        """
        facts = loaded.engine.facts
        if not facts.generates:
            raise ApiError(400, f"the model {loaded.name!r} generates no text: it is for embeddings", param="model")
        limit = facts.n_ctx if self.max_prompt is None else min(self.max_prompt, facts.n_ctx)
        if len(ids) > limit:
            message = f"the prompt has {len(ids)} tokens, and this server takes at most {limit}"
            raise ApiError(400, message, code="context_length_exceeded")
        if not ids:
            raise ApiError(400, "the prompt is empty: it has no tokens")
        return ids

    async def pieces(self, loaded: Loaded, generation: Generation) -> AsyncGenerator[Piece, None]:
        """Yield the parts of an answer, and count its tokens."""
        start, metrics, name = time.monotonic(), self.metrics, loaded.name
        metrics.prompt_tokens.labels(name).inc(len(generation.job.ids))
        first = True
        stream = generation.pieces()
        try:
            async for piece in stream:
                if first:
                    metrics.first_token_seconds.labels(name).observe(time.monotonic() - start)
                    first = False
                yield piece
        finally:
            await stream.aclose()


def text_length(value: Any) -> int:
    """Return the number of characters of the texts, and of token ids, in a body or a JSON value."""
    n, rest = 0, [value]
    while rest:  # no recursion: a body may be nested as deep as the interpreter allows
        found = rest.pop()
        if isinstance(found, str):
            n += len(found)
        elif isinstance(found, BaseModel):
            rest += vars(found).values()
        elif isinstance(found, Mapping):
            rest += found.values()
        elif isinstance(found, list):
            others = [item for item in found if not isinstance(item, int)]
            n += len(found) - len(others)
            rest += others
    return n


def check_length(loaded: Loaded, text: str) -> str:
    """Return a text whose tokens may fit into the context. It takes seconds to find the tokens of millions of letters.

    Raises
    ------
    ApiError
        If the text has too many characters even for the longest tokens of the vocabulary.
    """
    facts = loaded.engine.facts
    if facts.generates and len(text) > loaded.longest_prompt:
        message = f"the prompt has {len(text)} characters, and this server takes at most {facts.n_ctx} tokens"
        raise ApiError(400, message, code="context_length_exceeded")
    return text


def new_id(prefix: str) -> str:
    """Return an id for a response or a part of it."""
    return f"{prefix}{secrets.token_hex(12)}"


def sampling_params(loaded: Loaded, body: SamplingBody, *, logprobs: int | None = None) -> SamplingParams:
    """Return the parameters of a request, with OpenAI's defaults.

    Raises
    ------
    ApiError
        If one is out of range, or ``logit_bias`` has an id beyond the vocabulary, or there are options of a stream
        without a stream.
    """
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is for streams: set stream to true", param="stream_options")
    n_vocab = loaded.engine.facts.n_vocab
    wrong = next((token for token in body.logit_bias or () if not 0 <= token < n_vocab), None)
    if wrong is not None:
        raise ApiError(400, f"token ids of logit_bias must be 0 to {n_vocab - 1}, not {wrong}", param="logit_bias")
    try:
        return SamplingParams(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_k=1 if body.top_p == 0 else 40 if body.top_k is None else body.top_k,
            top_p=1.0 if body.top_p is None else body.top_p or 1.0,
            min_p=body.min_p or 0.0,
            repeat_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            repeat_last_n=-1,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=body.logit_bias,
            logprobs=logprobs,
            ignore_eos=bool(body.ignore_eos),
            seed=None if body.seed is None else body.seed % 2**63,
        )
    except (TypeError, ValueError) as error:
        message = str(error).replace("repeat_penalty", "repetition_penalty")  # its name in requests
        name = message.partition(" ")[0]
        raise ApiError(400, message, param=name if name in type(body).model_fields else None) from None


def choices(job: Job, n: int | None) -> list[Job]:
    """Return the jobs for ``n`` answers to one prompt. Each has a seed of its own."""
    return [Job(job.ids, job.params.for_sequence(i), job.max_tokens) for i in range(n or 1)]


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    """Return the stop strings of a request; an empty list means none.

    Raises
    ------
    ApiError, ValueError
        If there are too many, or one is empty.
    """
    if isinstance(stop, list) and len(stop) > _MAX_STOPS:
        raise ApiError(400, f"a request may have {_MAX_STOPS} stop strings, not {len(stop)}", param="stop")
    return check_stop(stop or None)


def usage(n_prompt: int, n_generated: int) -> dict[str, int]:
    """Return the counts of tokens of an answer."""
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_generated,
        "total_tokens": n_prompt + n_generated,
    }


def token_entry(token: TokenLogprob) -> dict[str, object]:
    """Return a token with its log probability, as chats and responses describe it."""
    entry = {"token": token.token, "logprob": max(token.logprob, -9999.0), "bytes": list(token.bytes)}
    return entry | {"top_logprobs": [token_entry_of_top(top) for top in token.top]}


def token_entry_of_top(token: TokenLogprob) -> dict[str, object]:
    """Return one of the most likely tokens."""
    return {"token": token.token, "logprob": max(token.logprob, -9999.0), "bytes": list(token.bytes)}
