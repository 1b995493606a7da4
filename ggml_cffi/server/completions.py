"""`/v1/completions`: texts continued without a chat template."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ggml_cffi.models import TokenLogprob
from ggml_cffi.server.catalog import Loaded
from ggml_cffi.server.engine import Job
from ggml_cffi.server.errors import ApiError
from ggml_cffi.server.generation import Generation, Piece
from ggml_cffi.server.schemas import MAX_CHOICES, CompletionBody, Prompts
from ggml_cffi.server.service import Json, Service, check_length, choices, new_id, sampling_params, stop_strings, usage
from ggml_cffi.server.sse import Data, merged, stream, unless_client_leaves


def router(service: Service) -> APIRouter:
    """Return the route of completions."""
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        if body.stream:
            return await stream(request, _chunks(service, body))
        return Json(await unless_client_leaves(request, _complete(service, body)))

    return routes


@dataclass(frozen=True)
class _Task:
    """The answers to all prompts, in order."""

    generations: list[Generation]
    echoes: list[str]
    """For each answer the text before it."""
    n_prompt: int


def prompt_ids(loaded: Loaded, prompts: Prompts) -> list[list[int]]:
    """Return the token ids of each prompt of a request: a text, texts, token ids, or lists of token ids."""
    if isinstance(prompts, str):
        return [_tokens(loaded, prompts)]
    if prompts and isinstance(prompts[0], int):
        return [check_ids(loaded, prompts)]
    return [_tokens(loaded, p) if isinstance(p, str) else check_ids(loaded, p) for p in prompts]  # type: ignore[arg-type]


def _tokens(loaded: Loaded, text: str) -> list[int]:
    return loaded.text.tokenize(check_length(loaded, text))


def check_ids(loaded: Loaded, ids: list[int]) -> list[int]:
    """Return token ids, or raise ApiError if one is outside the vocabulary."""
    n_vocab = loaded.engine.facts.n_vocab
    wrong = next((i for i in ids if not 0 <= i < n_vocab), None)
    if wrong is not None:
        raise ApiError(400, f"token ids must be 0 to {n_vocab - 1}, not {wrong}", param="prompt")
    return ids


def _prepare(service: Service, loaded: Loaded, body: CompletionBody) -> _Task:
    for name in ("suffix", "best_of"):
        if getattr(body, name) not in (None, "", body.n or 1):
            raise ApiError(400, f"{name} is not supported: leave it out", param=name)
    stop, params = stop_strings(body.stop), sampling_params(loaded, body, logprobs=body.logprobs)
    prompts = [service.check_prompt(loaded, ids) for ids in prompt_ids(loaded, body.prompt)]
    if not prompts or len(prompts) * (body.n or 1) > MAX_CHOICES:
        raise ApiError(400, f"a request may have 1 to {MAX_CHOICES} answers together", param="prompt")
    jobs = [job for ids in prompts for job in choices(Job(ids, params, body.max_tokens), body.n)]
    echoes = [loaded.text.detokenize(job.ids) if body.echo else "" for job in jobs]
    return _Task([Generation(loaded, job, stop) for job in jobs], echoes, sum(map(len, prompts)))


async def _complete(service: Service, body: CompletionBody) -> dict[str, Any]:
    """Return the whole answers."""
    async with service.catalog.use(body.model) as loaded:
        task = await service.in_thread(body, _prepare, service, loaded, body)
        found: list[list[Piece]] = [[Piece(text)] for text in task.echoes]
        async with aclosing(_pieces(service, loaded, task)) as pieces:
            async for i, piece in pieces:
                found[i].append(piece)
        answers = [
            _choice(i, "".join(piece.text for piece in parts), task.generations[i].reason)
            | {"logprobs": _logprobs([t for piece in parts for t in piece.logprobs], len(task.echoes[i]), body)}
            for i, parts in enumerate(found)
        ]
        return _head(loaded.name) | {"choices": answers, "usage": _usage(task)}


async def _chunks(service: Service, body: CompletionBody) -> AsyncGenerator[Data, None]:
    """Yield the chunks of a stream."""
    async with service.catalog.use(body.model) as loaded:
        task = await service.in_thread(body, _prepare, service, loaded, body)
        head = _head(loaded.name) | ({"usage": None} if body.include_usage else {})
        begun: set[int] = set()
        offsets = [len(echo) for echo in task.echoes]
        async with aclosing(_pieces(service, loaded, task)) as pieces:
            async for i, piece in pieces:
                text = piece.text if i in begun else task.echoes[i] + piece.text
                begun.add(i)
                logprobs = _logprobs(piece.logprobs, offsets[i], body)
                offsets[i] += sum(len(token.token) for token in piece.logprobs)
                yield head | {"choices": [_choice(i, text, None) | {"logprobs": logprobs}]}
        for i, generation in enumerate(task.generations):
            rest = "" if i in begun else task.echoes[i]
            yield head | {"choices": [_choice(i, rest, generation.reason) | {"logprobs": None}]}
        if body.include_usage:
            yield head | {"choices": [], "usage": _usage(task)}


def _pieces(service: Service, loaded: Loaded, task: _Task) -> AsyncGenerator[tuple[int, Piece], None]:
    return merged([service.pieces(loaded, generation) for generation in task.generations])


def _head(model: str) -> dict[str, Any]:
    return {"id": new_id("cmpl-"), "object": "text_completion", "created": int(time.time()), "model": model}


def _choice(i: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": i, "text": text, "finish_reason": reason}


def _usage(task: _Task) -> dict[str, int]:
    return usage(task.n_prompt, sum(generation.n_tokens for generation in task.generations))


def _logprobs(tokens: list[TokenLogprob], start: int, body: CompletionBody) -> dict[str, Any] | None:
    """Return the log probabilities of tokens whose text begins at ``start``, in the form of this API."""
    if body.logprobs is None:
        return None
    offsets = [start]
    for token in tokens:
        offsets.append(offsets[-1] + len(token.token))
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [max(token.logprob, -9999.0) for token in tokens],
        # With the chosen token, so that there may be one more than the request asks for.
        "top_logprobs": [{top.token: max(top.logprob, -9999.0) for top in (*token.top, token)} for token in tokens],
        "text_offset": offsets[:-1],
    }
