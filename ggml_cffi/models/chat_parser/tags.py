"""Tool calls between ``<tool_call>`` tags: Hermes, Qwen and many others (JSON), Qwen 3 Coder and GLM 4 (tags).

The parser takes each of the forms, whatever the model's own is: it is seen from the first characters.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from ggml_cffi.models.chat_parser.events import Answer
from ggml_cffi.models.chat_parser.json_calls import pass_call, pass_value
from ggml_cffi.models.chat_parser.source import Source, Steps, ignore
from ggml_cffi.models.chat_parser.tools import Tools

NAME = re.compile(r"[\w.\-]*")
_OPEN, _FUNCTION = "<tool_call>", "<function="
#: The tags around calls, of Hermes and Qwen, Apriel, Nemotron and Seed.
_CLOSE = {
    _OPEN: "</tool_call>",
    "<tool_calls>": "</tool_calls>",
    "<TOOLCALL>": "</TOOLCALL>",
    "<seed:tool_call>": "</seed:tool_call>",
    _FUNCTION: "</tool_call>",  # Qwen 3 Coder may leave out the first tag
}
_BEFORE, _AFTER = re.compile(r"[\s\[]*"), re.compile(r"[\s\]},]*")


@dataclass(frozen=True)
class _Notation:
    """The tags around the arguments of a call."""

    key: str
    key_end: str
    value: str
    value_end: str
    end: str


_QWEN = _Notation("<parameter=", ">", "", "</parameter>", "</function>")
_GLM = _Notation("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", _CLOSE[_OPEN])


def parse(source: Source, answer: Answer, tools: Tools) -> Steps[None]:
    """Read an answer with tags."""
    while tag := (yield from source.until(tuple(_CLOSE), answer.content)):
        close = _CLOSE[tag]
        source.record(tag)
        yield from source.run(_BEFORE)
        if tag != _FUNCTION and (yield from source.starts("{")):
            yield from _json_calls(source, answer, tools, close)
            continue
        by_function = tag == _FUNCTION or bool((yield from source.take_marker(_FUNCTION)))
        name = yield from source.run(NAME)
        if by_function:
            is_call = bool((yield from source.take_marker(">")))
        else:
            yield from source.skip_space()
            is_call = tools.knows(name) and ((yield from source.starts(_GLM.key)) or (yield from source.starts(close)))
        if not name or not is_call:
            answer.content(source.recorded())
            continue
        source.recorded()
        answer.start(name)
        yield from source.skip_space()
        if (yield from source.starts("{")):  # Functionary
            yield from pass_value(source, answer.arguments, (_QWEN.end,))
            answer.end()
            yield from source.take_marker(_QWEN.end)
        else:
            yield from _tagged_arguments(source, answer, tools, name, _QWEN if by_function else _GLM, close)


def _json_calls(source: Source, answer: Answer, tools: Tools, close: str) -> Steps[None]:
    """Read the JSON objects between two tags."""
    while (yield from source.starts("{")):
        if not (yield from pass_call(source, answer, tools, stop=(close,))):
            return
        source.record()
        yield from source.run(_AFTER)
    source.recorded()
    yield from source.take_marker(close)


def _tagged_arguments(
    source: Source, answer: Answer, tools: Tools, name: str, tags: _Notation, close: str
) -> Steps[None]:
    """Read the arguments of a call, each between tags, and pass them on one by one."""
    ends = (tags.end, close)
    separator = "{"
    mark = yield from source.until((tags.key, *ends), ignore)
    while mark == tags.key:
        key: list[str] = []
        value: list[str] = []
        yield from source.until((tags.key_end,), key.append)
        if tags.value:
            yield from source.until((tags.value,), ignore)
        mark = yield from source.until((tags.value_end, tags.key, *ends), value.append)
        parameter, text = "".join(key).strip(), "".join(value).removeprefix("\n").removesuffix("\n")
        key_text = json.dumps(parameter, ensure_ascii=False)
        answer.arguments(f"{separator}{key_text}: {tools.to_json(name, parameter, text)}")
        separator = ", "
        if mark == tags.value_end:
            mark = yield from source.until((tags.key, *ends), ignore)
    answer.arguments("}" if separator != "{" else "")
    answer.end()
    if mark != close:
        yield from source.skip_space()
        yield from source.take_marker(close)
