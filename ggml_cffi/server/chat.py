"""`/v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ggml_cffi.models import (
    ContentDelta,
    ReasoningDelta,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
)
from ggml_cffi.server.answers import ChatAnswer, ChatTask, Delta, ToolChoice, choose_tools, prepare
from ggml_cffi.server.catalog import Loaded
from ggml_cffi.server.errors import ApiError
from ggml_cffi.server.schemas import ChatBody, NamedTool, ResponseFormat, Tool
from ggml_cffi.server.service import Json, Service, new_id, sampling_params, stop_strings, token_entry, usage
from ggml_cffi.server.sse import Data, merged, stream, unless_client_leaves


def router(service: Service) -> APIRouter:
    """Return the route of chats."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        if body.stream:
            return await stream(request, _chunks(service, body))
        return Json(await unless_client_leaves(request, _complete(service, body)))

    return routes


def tool_choice_of(body: ChatBody) -> ToolChoice:
    """Return the tools of a request."""
    choice = body.tool_choice
    tools = [tool_dict(tool) for tool in body.tools or []]
    name = choice.function.name if isinstance(choice, NamedTool) else None
    return choose_tools(tools, choice if isinstance(choice, str) else None, name, body.parallel_tool_calls)


def tool_dict(tool: Tool) -> dict[str, Any]:
    """Return a tool for a chat template."""
    return {"type": "function", "function": tool.function.model_dump(exclude_none=True, exclude={"strict"})}


def schema_of(form: ResponseFormat | None) -> dict[str, Any] | None:
    """Return the JSON schema of a ``response_format``, None for free text."""
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "object"}
    if form.json_schema is None or form.json_schema.schema_ is None:
        raise ApiError(400, "response_format of type 'json_schema' needs 'json_schema' with a 'schema'")
    return form.json_schema.schema_


def _prepare(service: Service, loaded: Loaded, body: ChatBody) -> ChatTask:
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    return prepare(
        service,
        loaded,
        body.messages,
        sampling_params(loaded, body, logprobs=logprobs),
        choice=tool_choice_of(body),
        schema=schema_of(body.response_format),
        max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        n=body.n,
        stop=stop_strings(body.stop),
        template_kwargs=effort | (body.chat_template_kwargs or {}),
    )


async def _complete(service: Service, body: ChatBody) -> dict[str, Any]:
    """Return the whole answer."""
    async with service.catalog.use(body.model) as loaded:
        task = await service.in_thread(body, _prepare, service, loaded, body)
        answers = [ChatAnswer(service, loaded, task, i) for i in range(len(task.jobs))]
        logprobs: list[list[TokenLogprob]] = [[] for _ in answers]
        async with aclosing(merged([answer.deltas() for answer in answers])) as deltas:
            async for i, (_, tokens) in deltas:
                logprobs[i] += tokens
        found = [
            {
                "index": i,
                "message": _message(answer),
                "logprobs": _logprobs(logprobs[i]) if body.logprobs else None,
                "finish_reason": answer.finish_reason,
            }
            for i, answer in enumerate(answers)
        ]
        head = _head(loaded.name, "chat.completion")
        return head | {"choices": found, "usage": _usage(task, answers)}


async def _chunks(service: Service, body: ChatBody) -> AsyncGenerator[Data, None]:
    """Yield the chunks of a stream."""
    async with service.catalog.use(body.model) as loaded:
        task = await service.in_thread(body, _prepare, service, loaded, body)
        answers = [ChatAnswer(service, loaded, task, i) for i in range(len(task.jobs))]
        head = _head(loaded.name, "chat.completion.chunk") | ({"usage": None} if body.include_usage else {})
        begun: set[int] = set()

        def chunk(i: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
            choice = {"index": i, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return head | {"choices": [choice]}

        async with aclosing(merged([answer.deltas() for answer in answers])) as deltas:
            async for i, (events, tokens) in deltas:
                if i not in begun:
                    begun.add(i)
                    yield chunk(i, {"role": "assistant", "content": ""})
                logprobs = _logprobs(tokens) if body.logprobs and tokens else None
                for delta in [found for event in events if (found := _delta(event))] or ([{}] if logprobs else []):
                    yield chunk(i, delta, logprobs=logprobs)
                    logprobs = None
        for i, answer in enumerate(answers):
            if i not in begun:  # an answer without text
                yield chunk(i, {"role": "assistant", "content": ""})
            yield chunk(i, {}, answer.finish_reason)
        if body.include_usage:
            yield head | {"choices": [], "usage": _usage(task, answers)}


def _usage(task: ChatTask, answers: list[ChatAnswer]) -> dict[str, Any]:
    counts = usage(task.n_prompt, sum(answer.n_tokens for answer in answers))
    return counts | {"completion_tokens_details": {"reasoning_tokens": sum(answer.n_reasoning for answer in answers)}}


def _message(answer: ChatAnswer) -> dict[str, Any]:
    """Return the message of an answer: one without tool calls has text, which may be empty."""
    message = answer.message
    return message.to_dict() | {"content": message.content if message.tool_calls else message.content or ""}


def _head(model: str, kind: str) -> dict[str, Any]:
    return {"id": new_id("chatcmpl-"), "object": kind, "created": int(time.time()), "model": model}


def _delta(event: Delta) -> dict[str, Any] | None:
    """Return the part of an answer as OpenAI's API writes it, None for one that has no form there."""
    match event:
        case ContentDelta(text):
            return {"content": text}
        case ReasoningDelta(text):
            return {"reasoning_content": text}
        case ToolCallStart(index, call_id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
        case ToolCallDelta(index, arguments):
            return {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}
    return None


def _logprobs(tokens: list[TokenLogprob]) -> dict[str, Any]:
    return {"content": [token_entry(token) for token in tokens], "refusal": None}
