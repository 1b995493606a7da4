"""The formats of tool calls and reasoning, by name, and the one that a chat template shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ggml_cffi.models.chat_parser import deepseek, gemma, harmony, json_calls, llama3, mistral, tags
from ggml_cffi.models.chat_parser.events import Answer
from ggml_cffi.models.chat_parser.source import Source, Steps
from ggml_cffi.models.chat_parser.tools import Tools

#: Tags around the reasoning at the beginning of an answer.
THINK = {"<think>": "</think>", "[THINK]": "[/THINK]", "<seed:think>": "</seed:think>"}


@dataclass(frozen=True)
class Format:
    """One format of answers."""

    parse: Callable[[Source, Answer, Tools], Steps[None]]
    """The parser of an answer, after its reasoning in tags of :data:`THINK`."""
    channels: bool = False
    """True if the format has its own form of reasoning."""


def _plain(source: Source, answer: Answer, _: Tools) -> Steps[None]:
    """Read an answer without tool calls."""
    yield from source.until((), answer.content)


#: The formats by their names.
FORMATS = {
    "plain": Format(_plain),
    "hermes": Format(tags.parse),
    "qwen3_coder": Format(tags.parse),
    "glm4": Format(tags.parse),
    "llama3": Format(llama3.parse),
    "mistral": Format(mistral.parse),
    "gpt_oss": Format(harmony.parse, channels=True),
    "gemma3": Format(gemma.parse_gemma3),
    "gemma4": Format(gemma.parse, channels=True),
    "deepseek": Format(deepseek.parse),
    "json": Format(json_calls.parse),
}

#: Texts in a chat template, each set with the format that it shows; the first set that is there counts.
_SIGNS = (
    (("<|channel|>", "<|message|>"), "gpt_oss"),
    (("<|tool_call>call:",), "gemma4"),
    (("<start_function_call>",), "gemma4"),
    (("[TOOL_CALLS]",), "mistral"),
    (("tool▁call▁begin",), "deepseek"),
    (("]<]minimax[>[",), "plain"),
    (("<tool_call>", "<arg_key>"), "glm4"),
    (("<tool_call>", "<function="), "qwen3_coder"),
    (("<seed:tool_call>",), "qwen3_coder"),
    (("<tool_call>",), "hermes"),
    (("<tool_calls>",), "hermes"),
    (("<TOOLCALL>",), "hermes"),
    (("<|python_tag|>", "<function="), "hermes"),
    (("<|python_tag|>",), "llama3"),
    (("ipython", '"parameters": '), "llama3"),
)


def find_format(template: str | None) -> str:
    """Return the name of the format that a chat template's text shows: ``plain`` if it shows no tool calls."""
    for signs, name in _SIGNS:
        if template and all(sign in template for sign in signs):
            return name
    return "plain"
