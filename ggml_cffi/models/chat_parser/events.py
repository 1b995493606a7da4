"""The parts of an answer: events while it is generated, and the message that they add up to."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

_random = random.SystemRandom()  # a seed of the program must not make ids equal


@dataclass(frozen=True)
class ContentDelta:
    """More text of the answer's content."""

    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    """More text of the model's reasoning."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """The beginning of a tool call."""

    index: int
    """Number of the call in this answer, from 0."""
    id: str
    """Name of this call, for the message with its result: nine letters and digits, a form that every template takes."""
    name: str
    """Name of the function."""


@dataclass(frozen=True)
class ToolCallDelta:
    """More text of a tool call's arguments."""

    index: int
    arguments: str
    """A part of a JSON text."""


@dataclass(frozen=True)
class ToolCallEnd:
    """The end of a tool call: its arguments are complete."""

    index: int


#: A part of an answer.
Event = ContentDelta | ReasoningDelta | ToolCallStart | ToolCallDelta | ToolCallEnd


@dataclass(frozen=True)
class ToolCall:
    """A function that the model asks the caller to call."""

    id: str
    """Name of this call, for the message with its result."""
    name: str
    """Name of the function."""
    arguments: str
    """The arguments as JSON text, as the model wrote them: it may be malformed."""


@dataclass(frozen=True)
class ChatMessage:
    """An answer in its parts."""

    content: str | None = None
    """The text for the user, None if there is none."""
    reasoning: str | None = None
    """The text of the model's reasoning, None if there is none or it was not asked for."""
    tool_calls: list[ToolCall] = field(default_factory=list)
    """The tool calls in their order."""

    def to_dict(self) -> dict[str, Any]:
        """Return the message in the form of OpenAI's API, to append to the messages of the chat."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message


class Answer:
    """The events of one answer, and the message that they add up to.

    White space beside reasoning and tool calls is left out.

    Parameters
    ----------
    reasoning
        True to keep reasoning, False to leave it out.
    parallel_tool_calls
        False to leave out everything after the first tool call.
    """

    def __init__(self, *, reasoning: bool, parallel_tool_calls: bool) -> None:
        self.complete = False
        """True after the first tool call if there may be no other."""
        self._keep_reasoning, self._parallel = reasoning, parallel_tool_calls
        self._content, self._reasoning = _Trimmed(), _Trimmed(at_border=True)
        self._contents: list[str] = []
        self._reasonings: list[str] = []
        self._calls: list[_Call] = []
        # The events since the last drain: what makes each, and the pieces of its text.
        self._pending: list[tuple[Callable[[str], Event], list[str]]] = []

    @property
    def message(self) -> ChatMessage:
        """The answer so far."""
        calls = [ToolCall(call.id, call.name, "".join(call.arguments)) for call in self._calls]
        return ChatMessage("".join(self._contents) or None, "".join(self._reasonings) or None, calls)

    def drain(self) -> list[Event]:
        """Return the events since the last call."""
        events = [make("".join(pieces)) for make, pieces in self._pending]
        self._pending = []
        return events

    def content(self, text: str) -> None:
        """Add text to the content."""
        self._add_content(self._content.push(text))

    def reasoning(self, text: str) -> None:
        """Add text to the reasoning."""
        text = self._reasoning.push(text)
        if text and self._keep_reasoning and not self.complete:
            self._reasonings.append(text)
            self._emit(ReasoningDelta, text)

    def border(self, separator: str = "") -> None:
        """End a part of the answer: replace the white space before and after this point by ``separator``."""
        self._content.border(separator)
        self._reasoning.border(separator)

    def start(self, name: str, call_id: str = "") -> None:
        """Begin a tool call, with an id of its own if the model gave none."""
        self.border("\n")
        if not self.complete:
            call_id = call_id or "".join(_random.choices(string.ascii_letters + string.digits, k=9))
            index = len(self._calls)
            self._calls.append(_Call(call_id, name, partial(ToolCallDelta, index)))
            self._emit(lambda _: ToolCallStart(index, call_id, name))

    def arguments(self, text: str) -> None:
        """Add text to the arguments of the tool call that began last."""
        if text and not self.complete:
            call = self._calls[-1]
            call.arguments.append(text)
            self._emit(call.make_delta, text)

    def end(self) -> None:
        """End the tool call that began last. Without arguments, it gets an empty JSON object."""
        if not self.complete:
            if not any(text.strip() for text in self._calls[-1].arguments):
                self.arguments("{}")
            index = len(self._calls) - 1
            self._emit(lambda _: ToolCallEnd(index))
            self.complete = not self._parallel

    def finish(self) -> None:
        """End the answer: its last white space belongs to the content."""
        self._add_content(self._content.finish())

    def _add_content(self, text: str) -> None:
        if text and not self.complete:
            self._contents.append(text)
            self._emit(ContentDelta, text)

    def _emit(self, make: Callable[[str], Event], text: str = "") -> None:
        """Note an event. Its text is joined to that of the last event if both are made in the same way."""
        if self._pending and self._pending[-1][0] is make:
            self._pending[-1][1].append(text)
        else:
            self._pending.append((make, [text]))


@dataclass
class _Call:
    """A tool call in its pieces."""

    id: str
    name: str
    make_delta: Callable[[str], ToolCallDelta]
    arguments: list[str] = field(default_factory=list)


class _Trimmed:
    """Text in parts, each without the white space at its borders. White space is held back until text follows."""

    def __init__(self, at_border: bool = False) -> None:
        self._space, self._at_border = "", at_border
        self._separator, self._is_empty = "", True

    def push(self, text: str) -> str:
        """Return the text that may be released now."""
        text = self._space + text
        if self._at_border:
            text = text.lstrip()
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if kept:
            kept = ("" if self._is_empty else self._separator) + kept
            self._at_border, self._separator, self._is_empty = False, "", False
        return kept

    def border(self, separator: str) -> None:
        """Drop the white space before and after this point, and write ``separator`` between texts."""
        self._space, self._at_border = "", True
        self._separator = separator or self._separator

    def finish(self) -> str:
        """Return the white space at the end."""
        space, self._space = self._space, ""
        return space
