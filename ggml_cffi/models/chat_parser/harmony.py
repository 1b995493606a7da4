"""The channels of gpt-oss (OpenAI's Harmony format): reasoning in ``analysis``, calls in messages to functions."""

from __future__ import annotations

import re

from ggml_cffi.models.chat_parser.events import Answer
from ggml_cffi.models.chat_parser.source import Source, Steps
from ggml_cffi.models.chat_parser.tools import Tools

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", _START)
_TO = re.compile(r"\bto=([\w.\-]+)")


def parse(source: Source, answer: Answer, _: Tools) -> Steps[None]:
    """Read the messages of an answer. Text without a header is content."""
    marker = yield from source.take_marker(" to=")  # the prompt has the words before it
    while marker or (marker := (yield from source.until((_START, _CHANNEL), answer.content))):
        header = [marker]
        if not (yield from source.until((_MESSAGE,), header.append)):
            return
        text = "".join(header)
        to = _TO.search(text)
        if to and to[1] != "assistant":
            answer.start(to[1].removeprefix("functions."))
            marker = yield from source.until(_ENDS, answer.arguments)
            answer.end()
        else:
            answer.border("\n\n")
            take = answer.reasoning if f"{_CHANNEL}analysis" in text else answer.content
            marker = yield from source.until(_ENDS, take)
        if marker != _START:
            marker = ""


def beginning(prompt: str) -> str:
    """Return the part of the answer that a prompt has already: the text after the last ``<|start|>assistant``."""
    _, start, rest = prompt.rpartition(f"{_START}assistant")
    return rest if start and _ENDS[0] not in rest else ""
