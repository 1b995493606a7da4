"""Tool calls of Mistral's models: after ``[TOOL_CALLS]`` a JSON list, or a name, ``[ARGS]`` and a JSON object."""

from __future__ import annotations

from ggml_cffi.models.chat_parser.events import Answer
from ggml_cffi.models.chat_parser.json_calls import pass_call, pass_value
from ggml_cffi.models.chat_parser.source import Source, Steps
from ggml_cffi.models.chat_parser.tags import NAME
from ggml_cffi.models.chat_parser.tools import Tools

_CALLS = "[TOOL_CALLS]"


def parse(source: Source, answer: Answer, tools: Tools) -> Steps[None]:
    """Read an answer of one of Mistral's models."""
    while (yield from source.until((_CALLS,), answer.content)):
        source.record(_CALLS)
        yield from source.skip_space()
        if (yield from source.take_marker("[")):
            yield from _list(source, answer, tools)
        else:
            yield from _named(source, answer)


def _list(source: Source, answer: Answer, tools: Tools) -> Steps[None]:
    """Read ``{"name": ..., "arguments": ...}, ...]``."""
    mark = ","
    while mark == ",":
        yield from source.skip_space()
        if not (yield from pass_call(source, answer, tools, stop=(_CALLS,))):
            return
        source.record()
        yield from source.skip_space()
        mark = yield from source.take_marker(",", "]")
    source.recorded()


def _named(source: Source, answer: Answer) -> Steps[None]:
    """Read ``name[ARGS]{...}``, of some models with ``[CALL_ID]`` and an id after the name."""
    name = yield from source.run(NAME)
    call_id = ""
    if (yield from source.take_marker("[CALL_ID]")):
        call_id = yield from source.run(NAME)
    yield from source.take_marker("[ARGS]")
    yield from source.skip_space()
    if not name or not (yield from source.starts("{")):
        answer.content(source.recorded())
        return
    source.recorded()
    answer.start(name, call_id)
    yield from pass_value(source, answer.arguments, (_CALLS,))
    answer.end()
