"""Messages of a chat: checks, and the forms in which a template may expect their fields."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NoReturn

#: One message: ``{"role": "user", "content": "..."}``, and other fields of OpenAI's API where a template reads them.
Message = Mapping[str, Any]
#: The messages of one conversation.
Chat = Sequence[Message]
#: A message as plain dicts and lists.
Plain = dict[str, Any]

#: Types of parts that hold text, each with the name of its field.
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
#: Names of the field with a message's reasoning, the usual one first.
_REASONING = ("reasoning_content", "thinking", "reasoning")
#: Fields beside which an assistant's message may have no content.
_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", *_REASONING)


class NotText:
    """Base of the values that a template may read part by part, but not write."""

    def __str__(self) -> NoReturn:
        raise TypeError("'content' is a list of parts, and the template writes it as text")

    __repr__ = __str__


class Part(NotText, Plain):
    """A part of a content."""


class Parts(NotText, list[Part]):
    """A content as a list of parts. A template that knows only text fails on it, and gets text instead."""


def check_messages(messages: Chat) -> list[Plain]:
    """Return the messages as plain dicts: content is text, :class:`Parts` or None.

    Raises
    ------
    ValueError
        If a message has no role, or neither content nor a field instead of it, or content that is not text.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages must be a list of dicts with 'role' and 'content', not {messages!r:.80}")
    return [_check_message(number, message) for number, message in enumerate(messages)]


def _check_message(number: int, message: Message) -> Plain:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number}: a message must be a dict with 'role' and 'content', not {message!r:.80}")
    plain: Plain = _with_reasoning(_plain(message))
    role = plain.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"message {number}: 'role' must be a text such as 'user' or 'assistant', not {role!r:.80}")
    name = f"message {number} ({role})"
    content = plain.get("content")
    if content is None:
        if not any(plain.get(field) for field in _INSTEAD_OF_CONTENT):
            raise ValueError(f"{name}: 'content' is missing: give text, a list of text parts, or 'tool_calls'")
    elif isinstance(content, list):
        plain["content"] = Parts(_check_part(f"{name}: content[{i}]", part) for i, part in enumerate(content))
    elif not isinstance(content, str):
        raise ValueError(f"{name}: 'content' must be text or a list of text parts, not {content!r:.80}")
    for i, function in enumerate(_functions(plain)):
        if not isinstance(function.get("arguments", {}), str | dict):
            raise ValueError(f"{name}: the 'arguments' of tool_calls[{i}] must be a dict or JSON text")
    return plain


def _with_reasoning(message: Plain) -> Plain:
    """Return a message with its reasoning under both names that templates read, as ``transformers`` does."""
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """Return dicts for mappings and lists for tuples, at any depth."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _check_part(name: str, part: Any) -> Part:
    """Return a part of a content as ``{"type": "text", "text": ...}``."""
    if isinstance(part, str):
        return Part(type="text", text=part)
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get(_TEXT_PARTS[kind]) if isinstance(kind, str) and kind in _TEXT_PARTS else None
    if isinstance(text, str):
        return Part(type="text", text=text)
    if isinstance(kind, str) and kind not in _TEXT_PARTS:
        raise ValueError(f"{name} has the type {kind!r:.40}: the model reads text alone")
    raise ValueError(f"{name} must be {{'type': 'text', 'text': ...}}, not {part!r:.80}")


def _functions(message: Plain) -> Iterator[Plain]:
    """Yield name and arguments of each tool call of a message, as one dict."""
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(function, dict):
            yield function


# ---------------------------------------------------------------------- forms


def forms(messages: list[Plain]) -> Iterator[list[Plain]]:
    """Yield the messages in the forms that templates expect, the likeliest first, each once.

    The content may be as given, text, or a list of parts; the arguments of tool calls may be a dict or JSON text. The
    first form has no field whose value is None, as in ``transformers``.
    """
    seen: list[list[Plain]] = []
    contents = _without_none, _as_given, _as_text, _as_parts
    for change_arguments, change_content in product((_as_dict, _as_json), contents):
        form = [_with_arguments(change_content(message), change_arguments) for message in messages]
        if form not in seen:
            seen.append(form)
            yield form


def texts(messages: list[Plain]) -> list[str]:
    """Return the texts of all contents, without space around them, and the names of all functions called."""
    found = []
    for message in messages:
        content = message.get("content") or ""
        found += [content] if isinstance(content, str) else [part["text"] for part in content]
        found += [str(function.get("name", "")) for function in _functions(message)]
    return [text.strip() for text in found]


def _without_none(message: Plain) -> Plain:
    return {key: value for key, value in message.items() if value is not None}


def _as_given(message: Plain) -> Plain:
    return message


def _as_text(message: Plain) -> Plain:
    content = message.get("content") or ""
    return message | {"content": content if isinstance(content, str) else "".join(part["text"] for part in content)}


def _as_parts(message: Plain) -> Plain:
    content = message.get("content") or []
    return message | {"content": Parts([Part(type="text", text=content)]) if isinstance(content, str) else content}


def _as_dict(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments)
    except ValueError:  # a model's answer may be broken; the template still gets its text
        return arguments
    return found if isinstance(found, dict) else arguments


def _as_json(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _with_arguments(message: Plain, change: Callable[[Any], Any]) -> Plain:
    """Return a message whose tool calls have their arguments in another form."""
    if not any("arguments" in function for function in _functions(message)):
        return message
    changed = message | {"tool_calls": _plain(message["tool_calls"])}
    for function in _functions(changed):
        if "arguments" in function:
            function["arguments"] = change(function["arguments"])
    return changed
