"""`/v1/responses`: OpenAI's newer interface for texts and tool calls, without stored conversations."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import ValidationError

from ggml_cffi.models import ContentDelta, ReasoningDelta, ToolCallDelta, ToolCallEnd, ToolCallStart
from ggml_cffi.server.answers import ChatAnswer, ChatTask, Delta, ToolChoice, choose_tools, prepare
from ggml_cffi.server.catalog import Loaded
from ggml_cffi.server.chat import tool_dict
from ggml_cffi.server.errors import ApiError
from ggml_cffi.server.schemas import Function, ResponsesBody, SamplingBody, Tool
from ggml_cffi.server.service import Json, Service, new_id, sampling_params
from ggml_cffi.server.sse import Data, log_error, stream, unless_client_leaves


def router(service: Service) -> APIRouter:
    """Return the route of responses."""
    routes = APIRouter()

    @routes.post("/v1/responses")
    async def responses(body: ResponsesBody, request: Request) -> Response:
        if body.stream:
            return await stream(request, _events(service, body), named=True, done=None)
        return Json(await unless_client_leaves(request, _complete(service, body)))

    return routes


# ---------------------------------------------------------------------- the request


def messages_of(body: ResponsesBody) -> list[dict[str, Any]]:
    """Return the input of a request as the messages of a chat.

    Raises
    ------
    ApiError
        If an item has a type that is not supported.
    """
    messages: list[dict[str, Any]] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for i, item in enumerate(body.input):
        match item.get("type", "message"):
            case "message":
                messages.append({"role": item.get("role"), "content": item.get("content")})
            case "function_call":
                function = {"name": item.get("name"), "arguments": item.get("arguments", "")}
                call = {"id": item.get("call_id"), "type": "function", "function": function}
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": None})
                # A text and the calls after it are one message of a chat.
                messages[-1].setdefault("tool_calls", []).append(call)
            case "function_call_output":
                output = item.get("output")
                messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
            case "reasoning":
                pass  # templates take no reasoning of earlier answers
            case kind:
                raise ApiError(400, f"input[{i}] has the type {kind!r:.40}, which is not supported", param="input")
    return messages


def tool_choice_of(body: ResponsesBody) -> ToolChoice:
    """Return the tools of a request."""
    tools = []
    for i, tool in enumerate(body.tools or []):
        if tool.get("type") != "function":
            message = f"tools[{i}] has the type {tool.get('type')!r:.40}: only functions are supported"
            raise ApiError(400, message, param="tools")
        try:
            tools.append(tool_dict(Tool(type="function", function=Function(**tool))))
        except (ValidationError, TypeError):
            raise ApiError(400, f"tools[{i}] must have a 'name', and 'parameters' as a JSON schema") from None
    choice = body.tool_choice
    name = None
    if isinstance(choice, dict):
        name = choice.get("name")
        if choice.get("type") != "function" or not isinstance(name, str):
            raise ApiError(400, "tool_choice must be 'none', 'auto', 'required', or a function with its name")
    return choose_tools(tools, choice if isinstance(choice, str) else None, name, body.parallel_tool_calls)


def schema_of(body: ResponsesBody) -> dict[str, Any] | None:
    """Return the JSON schema of ``text.format``, None for free text."""
    form = (body.text.format if body.text else None) or {"type": "text"}
    match form.get("type"):
        case "text":
            return None
        case "json_object":
            return {"type": "object"}
        case "json_schema" if isinstance(form.get("schema"), dict):
            schema: dict[str, Any] = form["schema"]
            return schema
    raise ApiError(400, "text.format must be of type 'text', 'json_object', or 'json_schema' with a 'schema'")


def _prepare(service: Service, loaded: Loaded, body: ResponsesBody) -> ChatTask:
    for name in ("previous_response_id", "background"):
        if getattr(body, name):
            raise ApiError(400, f"{name} is not supported: this server stores no responses", param=name)
    if any("logprobs" in name for name in body.include or []):
        raise ApiError(400, "log probabilities are not supported here: use /v1/chat/completions", param="include")
    effort = body.reasoning.effort if body.reasoning else None
    sampling = SamplingBody(temperature=body.temperature, top_p=body.top_p)
    return prepare(
        service,
        loaded,
        messages_of(body),
        sampling_params(loaded, sampling),
        choice=tool_choice_of(body),
        schema=schema_of(body),
        max_tokens=body.max_output_tokens,
        template_kwargs={} if effort is None else {"reasoning_effort": effort},
    )


# ---------------------------------------------------------------------- the response


class _Output:
    """The items of a response while they are generated: each :meth:`feed` returns events of a stream."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None  # the last item, if it is incomplete

    def feed(self, event: Delta) -> Iterator[dict[str, Any]]:
        """Yield the events of a part of the answer."""
        match event:
            case ContentDelta(text):
                if self._open is None or self._open["type"] != "message":
                    yield from self._begin_message()
                yield from self._add(text, "text", "response.output_text.delta", {"content_index": 0, "logprobs": []})
            case ReasoningDelta(text):
                if self._open is None or self._open["type"] != "reasoning":
                    yield from self._begin({"id": new_id("rs_"), "type": "reasoning", "summary": [], "content": []})
                    self._item["content"].append({"type": "reasoning_text", "text": ""})
                yield from self._add(text, "text", "response.reasoning_text.delta", {"content_index": 0})
            case ToolCallStart(_, call_id, name):
                item = {"type": "function_call", "call_id": call_id, "name": name, "arguments": ""}
                yield from self._begin({"id": new_id("fc_"), **item})
            case ToolCallDelta(_, arguments):
                yield from self._add(arguments, "arguments", "response.function_call_arguments.delta", {})
            case ToolCallEnd():
                yield from self.end()

    @property
    def _item(self) -> dict[str, Any]:
        return self.items[-1]

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item["id"], "output_index": len(self.items) - 1}

    def _begin(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self.end()
        self._open = item | {"status": "in_progress"}
        self.items.append(self._open)
        index = len(self.items) - 1
        yield {"type": "response.output_item.added", "output_index": index, "item": dict(self._open)}

    def _begin_message(self) -> Iterator[dict[str, Any]]:
        yield from self._begin({"id": new_id("msg_"), "type": "message", "role": "assistant", "content": []})
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield {"type": "response.content_part.added", **self._place, "content_index": 0, "part": dict(part)}
        self._item["content"].append(part)

    def _add(self, text: str, field: str, kind: str, rest: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Add text to the open item, and yield the event of it."""
        owner = self._item if field == "arguments" else self._item["content"][0]
        owner[field] += text
        yield {"type": kind, **self._place, **rest, "delta": text}

    def end(self, status: str = "completed") -> Iterator[dict[str, Any]]:
        """Yield the events of the end of the open item, if there is one."""
        item, self._open = self._open, None
        if item is None:
            return
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            at = {**self._place, "content_index": 0}
            yield {"type": "response.output_text.done", **at, "text": part["text"], "logprobs": []}
            yield {"type": "response.content_part.done", **at, "part": part}
        elif item["type"] == "reasoning":
            at = {**self._place, "content_index": 0}
            yield {"type": "response.reasoning_text.done", **at, "text": item["content"][0]["text"]}
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield {"type": "response.function_call_arguments.done", **self._place, **done}
        yield {"type": "response.output_item.done", "output_index": self._place["output_index"], "item": item}


async def _complete(service: Service, body: ResponsesBody) -> dict[str, Any]:
    """Return the whole response."""
    last: Data = {}
    async with aclosing(_unnumbered(service, body)) as events:
        async for event in events:
            last = event
    found: dict[str, Any] = last["response"]
    return found


async def _events(service: Service, body: ResponsesBody) -> AsyncGenerator[Data, None]:
    """Yield the events of a stream; the last one has the whole response, or tells the error that ended it."""
    number = 0
    try:
        async with aclosing(_unnumbered(service, body)) as events:
            async for event in events:
                yield {**event, "sequence_number": number}
                number += 1
    except Exception as error:
        if not number:
            raise
        fields = log_error(error).body()["error"]
        # The fields are those of this interface; OpenAI's client raises an exception for the object that chats have.
        known = {name: fields[name] for name in ("code", "message", "param")}
        yield {"type": "error", **known, "error": fields, "sequence_number": number}


async def _unnumbered(service: Service, body: ResponsesBody) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the events; the last one has the whole response."""
    async with service.catalog.use(body.model) as loaded:
        task = await service.in_thread(body, _prepare, service, loaded, body)
        answer, output = ChatAnswer(service, loaded, task), _Output()
        head = _head(loaded.name, body)
        begin = [{"type": f"response.{kind}", "response": head} for kind in ("created", "in_progress")]
        async with aclosing(answer.deltas()) as deltas:
            async for events, _ in deltas:
                while begin:  # only now: an error before the first token has a status
                    yield begin.pop(0)
                for delta in events:
                    for event in output.feed(delta):
                        yield event
        complete = answer.finish_reason != "length"
        status = "completed" if complete else "incomplete"
        for event in (*begin, *output.end(status)):
            yield event
        reason = None if complete else {"reason": "max_output_tokens"}
        counts = {
            "input_tokens": task.n_prompt,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": answer.n_tokens,
            "output_tokens_details": {"reasoning_tokens": answer.n_reasoning},
            "total_tokens": task.n_prompt + answer.n_tokens,
        }
        end = {"status": status, "incomplete_details": reason, "output": output.items, "usage": counts}
        yield {"type": f"response.{status}", "response": head | end}


def _head(model: str, body: ResponsesBody) -> dict[str, Any]:
    """Return a response without output."""
    echoed = body.model_dump(
        include={"instructions", "max_output_tokens", "temperature", "top_p", "metadata", "text", "tools"},
        exclude_none=True,
    )
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "model": model,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "store": False,
        "tool_choice": body.tool_choice or "auto",
        "tools": [],
        "usage": None,
        **echoed,
    }
