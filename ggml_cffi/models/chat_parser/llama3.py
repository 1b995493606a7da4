"""Tool calls of Llama 3: a bare JSON object, or Python text after ``<|python_tag|>``."""

from __future__ import annotations

import json
import re

from ggml_cffi.models.chat_parser.events import Answer
from ggml_cffi.models.chat_parser.json_calls import pass_call
from ggml_cffi.models.chat_parser.python_calls import read_calls
from ggml_cffi.models.chat_parser.source import Source, Steps
from ggml_cffi.models.chat_parser.tools import Tools

_PYTHON = "<|python_tag|>"
_BETWEEN = re.compile(r"[\s;,]*")


def parse(source: Source, answer: Answer, tools: Tools) -> Steps[None]:
    """Read an answer of Llama 3. An object without a tag is a call at the beginning, or after another call."""
    marker = ""
    while True:
        source.record(marker)
        yield from source.run(_BETWEEN)
        marker = marker or (yield from source.take_marker(_PYTHON))
        if (yield from source.starts("{")):
            if (yield from pass_call(source, answer, tools, unmarked=not marker)):
                marker = ""
                continue
        elif marker:
            source.recorded()
            yield from _python(source, answer, tools)
            return
        else:
            answer.content(source.recorded())
        marker = yield from source.until((_PYTHON,), answer.content)
        if not marker:
            return


def _python(source: Source, answer: Answer, tools: Tools) -> Steps[None]:
    """Read Python text: ``brave_search.call(query="...")``, or a program for the code interpreter."""
    pieces: list[str] = []
    yield from source.until((), pieces.append)
    text = "".join(pieces)
    try:
        calls = read_calls(text, tools)
    except ValueError:
        calls = []
    if not calls or not all(name.endswith(".call") or name in tools.names for name, _ in calls):
        calls = [("code_interpreter", json.dumps({"code": text}, ensure_ascii=False))]
    for name, arguments in calls:
        answer.start(name.removesuffix(".call"))
        answer.arguments(arguments)
        answer.end()
