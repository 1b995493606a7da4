"""Tool calls of Gemma 4 and FunctionGemma (their own notation), and of Gemma 3 (Python or JSON in a code block)."""

from __future__ import annotations

import json
import re

from ggml_cffi.models.chat_parser.events import Answer
from ggml_cffi.models.chat_parser.json_calls import pass_call
from ggml_cffi.models.chat_parser.python_calls import read_calls
from ggml_cffi.models.chat_parser.source import Source, Steps
from ggml_cffi.models.chat_parser.tools import Tools

_CALLS = {"<|tool_call>": "<tool_call|>", "<start_function_call>": "<end_function_call>"}
_THOUGHT, _THOUGHT_END = "<|channel>", "<channel|>"
_QUOTE = re.compile(r'<\|"\|>|<escape>')
_CALL = re.compile(r"\s*call:([\w.\-]+)\s*(\{.*\})\s*", re.DOTALL)
_KEY = re.compile(r"([{,]\s*)([\w.$\-]+)\s*:")
_PYTHON, _JSON, _FENCE = "```tool_code", "```json", "```"


def parse(source: Source, answer: Answer, _: Tools) -> Steps[None]:
    """Read an answer of Gemma 4 or FunctionGemma: ``call:name{key:value}`` between two markers."""
    while marker := (yield from source.until((*_CALLS, _THOUGHT), answer.content)):
        if marker == _THOUGHT:
            answer.border()
            yield from source.take_marker("thought")
            yield from source.until((_THOUGHT_END,), answer.reasoning)
            answer.border()
            continue
        body: list[str] = []
        end = yield from source.until((_CALLS[marker],), body.append)
        text = "".join(body)
        try:
            name, arguments = _read(text)
        except (ValueError, RecursionError):
            answer.content(marker + text + end)
        else:
            answer.start(name)
            answer.arguments(arguments)
            answer.end()


def _read(text: str) -> tuple[str, str]:
    """Return name and arguments (JSON) of a call; raise ValueError if it is malformed."""
    call = _CALL.fullmatch(text)
    if call is None:
        raise ValueError("no call")
    pieces = _QUOTE.split(call[2])  # structure and strings in turn
    parts = [
        json.dumps(piece, ensure_ascii=False) if i % 2 else re.sub(r"\bNone\b", "null", _KEY.sub(r'\1"\2":', piece))
        for i, piece in enumerate(pieces)
    ]
    return call[1], json.dumps(json.loads("".join(parts)), ensure_ascii=False, allow_nan=False)


def parse_gemma3(source: Source, answer: Answer, tools: Tools) -> Steps[None]:
    """Read an answer of Gemma 3, which has no markers: a code block with Python calls, or a JSON object."""
    source.record()
    yield from source.skip_space()
    if (yield from source.starts("{")):
        yield from pass_call(source, answer, tools, unmarked=True)
    else:
        answer.content(source.recorded())
    while marker := (yield from source.until((_PYTHON, _JSON), answer.content)):
        source.record(marker)
        yield from source.skip_space()
        if marker == _JSON:
            if not (yield from source.starts("{")):
                answer.content(source.recorded())
            elif (yield from pass_call(source, answer, tools, unmarked=True)):
                yield from source.skip_space()
                yield from source.take_marker(_FENCE)
            continue
        body: list[str] = []
        yield from source.until((_FENCE,), body.append)
        text = source.recorded()
        try:
            calls = read_calls("".join(body), tools)
        except ValueError:
            answer.content(text)
            continue
        for name, arguments in calls:
            answer.start(name)
            answer.arguments(arguments)
            answer.end()
