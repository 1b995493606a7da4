"""Tool calls between ``<tool_call>`` tags: Hermes, Qwen and many others (JSON), Qwen 3 Coder and GLM 4 (tags)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from ggml_cffi.models.chat_parser.events import Answer
from ggml_cffi.models.chat_parser.json_calls import pass_call
from ggml_cffi.models.chat_parser.source import Source, Steps, ignore
from ggml_cffi.models.chat_parser.tools import Tools

NAME = re.compile(r"[\w.\-]*")
_OPEN, _CLOSE, _FUNCTION = "<tool_call>", "</tool_call>", "<function="
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
_GLM = _Notation("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", _CLOSE)


def parse(source: Source, answer: Answer, tools: Tools) -> Steps[None]:
    """Read an answer with ``<tool_call>`` tags. The first one of Qwen 3 Coder may be missing."""
    while marker := (yield from source.until((_OPEN, _FUNCTION), answer.content)):
        source.record(marker)
        if marker == _OPEN:
            yield from source.run(_BEFORE)
            if (yield from source.starts("{")):
                yield from _json_calls(source, answer, tools)
                continue
            marker = yield from source.take_marker(_FUNCTION)
        name = yield from source.run(NAME)
        if marker == _FUNCTION:
            is_call = bool(name) and bool((yield from source.take_marker(">")))
        else:
            yield from source.skip_space()
            is_call = tools.knows(name) and ((yield from source.starts(_GLM.key)) or (yield from source.starts(_CLOSE)))
        if name and is_call:
            source.recorded()
            yield from _tagged_call(source, answer, tools, name, _QWEN if marker else _GLM)
        else:
            answer.content(source.recorded())


def _json_calls(source: Source, answer: Answer, tools: Tools) -> Steps[None]:
    """Read the JSON objects between two tags."""
    while (yield from source.starts("{")):
        if not (yield from pass_call(source, answer, tools, stop=(_CLOSE,))):
            return
        source.record()
        yield from source.run(_AFTER)
    source.recorded()
    yield from source.take_marker(_CLOSE)


def _tagged_call(source: Source, answer: Answer, tools: Tools, name: str, tags: _Notation) -> Steps[None]:
    """Read the arguments of a call, each between tags, and pass them on one by one."""
    answer.start(name)
    ends = (tags.end, _CLOSE)
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
    if mark != _CLOSE:
        yield from source.skip_space()
        yield from source.take_marker(_CLOSE)
