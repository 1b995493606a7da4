"""Tool calls of DeepSeek V3, R1 and V3.1: name and JSON object between markers."""

from __future__ import annotations

from ggml_cffi.models.chat_parser.events import Answer
from ggml_cffi.models.chat_parser.json_calls import pass_value
from ggml_cffi.models.chat_parser.source import Source, Steps, ignore
from ggml_cffi.models.chat_parser.tags import NAME
from ggml_cffi.models.chat_parser.tools import Tools

_OPEN, _SEPARATOR, _CLOSE = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_LIST, _LIST_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"


def parse(source: Source, answer: Answer, _: Tools) -> Steps[None]:
    """Read an answer of DeepSeek. V3 and R1 write ``function`` before the name, and the arguments in a code block."""
    while marker := (yield from source.until((_OPEN, _LIST, _LIST_END), answer.content)):
        if marker != _OPEN:
            continue
        source.record(marker)
        name = yield from source.run(NAME)
        if not (yield from source.take_marker(_SEPARATOR)):
            answer.content(source.recorded())
            continue
        yield from source.skip_space()
        if not (yield from source.starts("{")):
            name = yield from source.run(NAME)
            yield from source.skip_space()
            yield from source.take_marker("```json")
        source.recorded()
        answer.start(name)
        yield from pass_value(source, answer.arguments, (_CLOSE,))
        answer.end()
        yield from source.until((_CLOSE,), ignore)
