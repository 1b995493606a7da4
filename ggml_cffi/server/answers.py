"""Answers to chats: the prompt from messages and tools, and content, reasoning and tool calls from the text."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ggml_cffi.models import (
    ChatMessage,
    ChatParser,
    ContentDelta,
    Grammar,
    ReasoningDelta,
    SamplingParams,
    TokenLogprob,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
)
from ggml_cffi.server.call_schema import call_schema
from ggml_cffi.server.catalog import Loaded
from ggml_cffi.server.engine import Job
from ggml_cffi.server.errors import ApiError
from ggml_cffi.server.generation import Generation
from ggml_cffi.server.service import Service, check_length, choices

Delta = ContentDelta | ReasoningDelta | ToolCallStart | ToolCallDelta | ToolCallEnd


@dataclass(frozen=True)
class ToolChoice:
    """The tools of a request, and the freedom that the model has to call them."""

    tools: list[dict[str, Any]] = field(default_factory=list)
    """Tools in the form of OpenAI's chats."""
    forced: tuple[str, ...] = ()
    """Names of the functions of which the model must call one."""
    parallel: bool | None = None
    """True for several calls, False for one at most, None if the request does not say."""

    def __post_init__(self) -> None:
        names = [tool["function"]["name"] for tool in self.tools]
        unknown = [name for name in self.forced if name not in names]
        if unknown:
            raise ApiError(400, f"tool_choice names {unknown[0]!r:.80}, which is not among the tools")


def choose_tools(
    tools: list[dict[str, Any]] | None, choice: str | None, name: str | None, parallel: bool | None
) -> ToolChoice:
    """Return the tools that a request allows.

    Parameters
    ----------
    tools
        Tools in the form of OpenAI's chats.
    choice
        ``"none"``, ``"auto"`` or ``"required"``; None for the default.
    name
        Name of the function that the model must call, in place of ``choice``.
    parallel
        The field ``parallel_tool_calls``.

    Raises
    ------
    ApiError
        If a call is demanded, and there is no tool for it.
    """
    found = tools or []
    if name is not None:
        return ToolChoice(found, (name,), parallel)
    if choice == "required":
        if not found:
            raise ApiError(400, "tool_choice is 'required', and there are no tools", param="tool_choice")
        return ToolChoice(found, tuple(tool["function"]["name"] for tool in found), parallel)
    return ToolChoice([] if choice == "none" else found, (), parallel)


@dataclass(frozen=True)
class ChatTask:
    """A chat to answer."""

    jobs: list[Job]
    """A job for each answer."""
    prompt: str
    """Text of the prompt."""
    choice: ToolChoice
    stop: tuple[str, ...]
    constrained: bool
    """True if a grammar determines the form of the content."""

    @property
    def n_prompt(self) -> int:
        """Number of tokens of the prompt."""
        return len(self.jobs[0].ids)


def prepare(
    service: Service,
    loaded: Loaded,
    messages: Sequence[Mapping[str, Any]],
    params: SamplingParams,
    *,
    choice: ToolChoice,
    schema: dict[str, Any] | None,
    max_tokens: int | None,
    n: int | None = None,
    stop: tuple[str, ...] = (),
    template_kwargs: Mapping[str, Any] | None = None,
) -> ChatTask:
    """Return the task of a chat.

    Parameters
    ----------
    service, loaded, messages, params, choice, max_tokens, n, stop, template_kwargs
        The server, the model, and the fields of a request.
    schema
        JSON schema of the answer, None for free text. With tools, the answer may be a call in its place.

    Raises
    ------
    ApiError, ValueError, TypeError
        If the messages do not suit the model's template, or the prompt does not fit.
    """
    constrained = schema is not None
    functions = [tool["function"] for tool in choice.tools]
    if choice.forced:
        demanded = [function for function in functions if function["name"] in choice.forced]
        schema = call_schema(demanded, several=bool(choice.parallel))
    elif schema is not None and functions:
        schema = call_schema(functions, several=bool(choice.parallel), answer=schema)
    if schema is not None:
        params = SamplingParams.from_options(params, grammar=Grammar.json_schema(schema))
    text = loaded.text.apply_chat_template(messages, tools=choice.tools or None, **(template_kwargs or {}))
    ids = service.check_prompt(loaded, loaded.text.tokenizer.encode_prompt(check_length(loaded, text)))
    return ChatTask(choices(Job(ids, params, max_tokens), n), text, choice, stop, constrained)


def make_parser(loaded: Loaded, task: ChatTask) -> tuple[ChatParser, bool]:
    """Return the parser of an answer, and whether it needs the text of control tokens."""
    choice = task.choice
    if choice.forced:
        return ChatParser("json"), False
    if task.constrained:
        return ChatParser("json", tools=choice.tools) if choice.tools else ChatParser("plain"), False
    tools = choice.tools or None
    parallel = choice.parallel is not False
    parser = ChatParser.for_model(
        loaded.text, tools=tools, reasoning=True, parallel_tool_calls=parallel, prompt=task.prompt
    )
    known = parser.format != "plain"
    if not tools and parser.format not in _CHANNELS:  # a text like a call is content then
        parser = ChatParser("plain", reasoning=True, prompt=task.prompt)
    return parser, known


#: Formats whose content has markers of its own, without tools too.
_CHANNELS = ("gpt_oss", "gemma4")


class ChatAnswer:
    """One answer to a chat in generation."""

    def __init__(self, service: Service, loaded: Loaded, task: ChatTask, number: int = 0) -> None:
        self._service, self._loaded = service, loaded
        self._parser, keep_special = make_parser(loaded, task)
        self._generation = Generation(loaded, task.jobs[number], task.stop, keep_special=keep_special)
        self.n_reasoning = 0
        """Number of tokens up to the last one of the reasoning, its first tag included."""

    async def deltas(self) -> AsyncGenerator[tuple[list[Delta], list[TokenLogprob]], None]:
        """Yield the parts of the answer, with the tokens since the last part if they were asked for."""
        async with aclosing(self._service.pieces(self._loaded, self._generation)) as pieces:
            async for piece in pieces:
                events: list[Delta] = list(self._parser.feed(piece.text))
                if any(isinstance(event, ReasoningDelta) for event in events):
                    self.n_reasoning = self.n_tokens
                if events or piece.logprobs:
                    yield events, piece.logprobs
                if self._parser.complete:
                    break
        if rest := list(self._parser.close()):
            yield rest, []

    @property
    def message(self) -> ChatMessage:
        """The answer so far."""
        return self._parser.message

    @property
    def n_tokens(self) -> int:
        """Number of generated tokens."""
        return self._generation.n_tokens

    @property
    def finish_reason(self) -> str:
        """The reason for the end."""
        reason = self._generation.reason or "stop"
        return "tool_calls" if self.message.tool_calls and reason == "stop" else reason
