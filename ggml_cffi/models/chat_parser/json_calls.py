"""Tool calls as JSON objects, passed on as they arrive: ``{"name": "weather", "arguments": {"city": "Rome"}}``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from ggml_cffi.models.chat_parser.events import Answer
from ggml_cffi.models.chat_parser.source import Source, Steps, Take, ignore
from ggml_cffi.models.chat_parser.tools import Tools

_NAME_KEYS, _ARGUMENT_KEYS, _OTHER_KEYS = ("name",), ("arguments", "parameters"), ("type", "id")
_IN_STRING = re.compile(r'[^"\\]*')
_SCALAR = re.compile(r"[\w+.\-]*")
_PLAIN = re.compile(r'[^"{}\[\]<]*')
_BEFORE, _AFTER = re.compile(r"[\s\[]*"), re.compile(r"[\s\],]*")


def parse(source: Source, answer: Answer, tools: Tools) -> Steps[None]:
    """Read a call, a list of calls, or another text. A call has a known function, and no other keys."""
    source.record()
    yield from source.run(_BEFORE)
    if not (yield from source.starts("{")):
        answer.content(source.recorded())
    while (yield from source.starts("{")):
        if not (yield from pass_call(source, answer, tools, unmarked=True)):
            break
        yield from source.run(_AFTER)
        source.record()
    source.recorded()
    yield from source.until((), answer.content)


def pass_call(
    source: Source, answer: Answer, tools: Tools, *, unmarked: bool = False, stop: Sequence[str] = ()
) -> Steps[bool]:
    """Read a JSON object as a tool call. Return False if it is none: then the recorded text is content.

    The call starts as soon as name and arguments are reached. A call that becomes malformed later ends there.

    Parameters
    ----------
    source, answer, tools
        The text, the answer to add to, and the known functions. The record of ``source`` must have begun.
    unmarked
        True if nothing but the object itself shows that it is a call: its function must be known, its keys too.
    stop
        Texts that end the object even if brackets are open.
    """
    name, started = "", False
    arguments: list[str] = []  # those before the name
    mark = yield from source.take_marker("{")
    while mark in ("{", ","):
        mark = ""
        yield from source.skip_space()
        key = yield from _read_string(source)
        yield from source.skip_space()
        if key is None or not (yield from source.take_marker(":")):
            break
        yield from source.skip_space()
        if key in _NAME_KEYS:
            name = (yield from _read_string(source)) or ""
            if not name or (unmarked and not tools.knows(name)):
                break
        elif key in _ARGUMENT_KEYS:
            if name:
                started = True
                source.recorded()
                answer.start(name)
            if not (yield from _pass_arguments(source, answer.arguments if started else arguments.append, stop)):
                break
        elif (unmarked and key not in _OTHER_KEYS) or not (yield from pass_value(source, ignore, stop)):
            break
        yield from source.skip_space()
        mark = yield from source.take_marker(",", "}")
    if not started and (mark != "}" or not name):
        answer.content(source.recorded())
        return False
    if not started:
        source.recorded()
        answer.start(name)
        for text in arguments:
            answer.arguments(text)
    answer.end()
    return True


def pass_value(source: Source, take: Take, stop: Sequence[str] = ()) -> Steps[bool]:
    """Give a JSON value to ``take`` as it arrives; return whether it is complete.

    Only strings and brackets are looked at: a value that is no JSON for another reason is passed too.
    """
    yield from source.skip_space()
    first = yield from source.peek()
    if first == '"':
        return (yield from _pass_string(source, take))
    if first not in ("{", "["):
        text = yield from source.run(_SCALAR)
        take(text)
        return bool(text)
    depth = 0
    while True:
        for marker in stop:
            if (yield from source.starts(marker)):
                return False
        char = yield from source.peek()
        if char == '"':
            if not (yield from _pass_string(source, take)):
                return False
        elif char in ("{", "[", "}", "]"):
            take(source.take(1))
            depth += 1 if char in "{[" else -1
            if not depth:
                return True
        elif char:
            take(source.take(1))
            yield from source.pass_run(_PLAIN, take)
        else:
            return False


def _pass_string(source: Source, take: Take) -> Steps[bool]:
    """Give a JSON string to ``take``, quotes included; return whether it is complete."""
    take(source.take(1))
    while True:
        char = yield from source.peek()
        if char == "\\":
            take(source.take(len((yield from source.peek(2)))))
        elif char == '"':
            take(source.take(1))
            return True
        elif char:
            yield from source.pass_run(_IN_STRING, take)
        else:
            return False


def _read_string(source: Source) -> Steps[str | None]:
    """Return the value of a JSON string, None if there is none."""
    pieces: list[str] = []
    if (yield from source.peek()) != '"' or not (yield from _pass_string(source, pieces.append)):
        return None
    try:
        return str(json.loads("".join(pieces), strict=False))
    except ValueError:
        return None


def _pass_arguments(source: Source, take: Take, stop: Sequence[str]) -> Steps[bool]:
    """Give the arguments of a call to ``take``; those of some models are a JSON text in a string."""
    if (yield from source.peek()) != '"':
        return (yield from pass_value(source, take, stop))
    text = yield from _read_string(source)
    take(text or "")
    return text is not None
