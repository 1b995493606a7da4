"""Chat templates: messages to text in the form that a model was trained on, as ``transformers`` renders them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any

from ggml_cffi.errors import FormatError
from ggml_cffi.files.gguf.reader import GGUFFile
from ggml_cffi.models.generation.chat_messages import (
    Chat,
    Message,
    NotText,
    Plain,
    check_messages,
    forms,
    texts,
)
from ggml_cffi.models.generation.tool_schema import Tool, tool_schemas

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["Chat", "ChatTemplate", "Message", "chat_templates", "read_chat_template"]

_KEY = "tokenizer.chat_template"
_logger = logging.getLogger(__name__)


def chat_templates(file: GGUFFile) -> dict[str, str]:
    """Return a model file's templates by name; ``default`` is the one without a name."""
    found = {"default": file.metadata.get(_KEY)}
    found |= {key[len(_KEY) + 1 :]: value for key, value in file.metadata.items() if key.startswith(f"{_KEY}.")}
    return {name: template for name, template in found.items() if isinstance(template, str)}


def read_chat_template(file: GGUFFile, name: str, special_tokens: Callable[[], Mapping[str, str]]) -> ChatTemplate:
    """Return a model file's template of this name.

    Raises
    ------
    FormatError
        If the file has no templates, or the template is malformed.
    ValueError
        If the file has templates, but none of this name.
    """
    known = chat_templates(file)
    if not known:
        raise FormatError(f"{file.path} has no chat template: give the prompt as text")
    if name not in known:
        raise ValueError(f"the model has no chat template {name!r:.80}; it has {', '.join(known)}")
    return ChatTemplate(known[name], special_tokens())


class ChatTemplate:
    """A Jinja template that writes the messages of a chat as text.

    The template runs in Jinja's sandbox, since it comes from a model file. It has the tags, filters and functions that
    ``transformers`` gives to templates.

    Parameters
    ----------
    source
        The template.
    special_tokens
        Texts of special tokens by their names in templates, such as ``bos_token``.

    Raises
    ------
    FormatError
        If the template is malformed.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        self.source = source
        """The template's text."""
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = _environment().from_string(source)
        except Exception as error:  # also RecursionError and what Jinja's own parser lets through
            raise FormatError(f"the model's chat template is malformed: {error or type(error).__name__}") from None

    def render(
        self,
        messages: Chat,
        *,
        tools: Sequence[Tool] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Return the text of ``messages``.

        Content may be text, or a list of text parts as in OpenAI's API. The arguments of tool calls may be dicts or
        JSON text. The template gets them in the form that it expects. A missing content beside tool calls is empty text
        if the template would write ``None`` for it. The role ``developer`` becomes ``system`` for a template that does
        not know it.

        Parameters
        ----------
        messages
            The messages.
        tools
            Functions that the model may call: JSON schemas in the form of OpenAI's API, or Python functions, see
            :func:`tool_schema <ggml_cffi.models.tool_schema>`.
        documents
            Documents that the model may quote, such as ``{"title": "...", "text": "..."}``.
        add_generation_prompt
            True to end with the beginning of the model's answer.
        **variables
            Other variables of the template, such as ``enable_thinking=False``, and functions in place of those that
            templates know, such as ``strftime_now``.

        Raises
        ------
        TypeError, ValueError
            If a message has no role, or content that is not text, or a tool or a document is none.
        FormatError
            If the template refuses the messages, or fails.
        """
        plain = check_messages(messages)
        as_system = [m | {"role": "system"} if m["role"] == "developer" else m for m in plain]
        more = {
            **self._special_tokens,
            "tools": tool_schemas(tools),
            "documents": _check_documents(documents),
            "add_generation_prompt": add_generation_prompt,
            **variables,
        }
        if "developer" in self.source and plain != as_system:
            with suppress(FormatError):  # the template may name the role to refuse it
                return self._best(plain, more)
        return self._best(as_system, more)

    def _best(self, messages: list[Plain], variables: dict[str, Any]) -> str:
        """Return the rendering that holds most of the messages' texts, the first such among the forms of messages.

        Only the rendering shows which form a template expects: a wrong form makes it fail, or lose text without a word.
        """
        wanted = texts(messages)
        has_null = any(message.get("content") is None for message in messages)
        best, best_score = "", (-1, 0)
        failures: list[tuple[bool, FormatError]] = []
        for form in forms(messages):
            try:
                text = self._render(form, variables)
            except FormatError as error:
                failures.append((any(isinstance(message.get("content"), NotText) for message in form), error))
                continue
            n_nulls = text.count("None") + text.count("null") if has_null else 0
            score = sum(want in text for want in wanted), -n_nulls
            if score > best_score:
                best, best_score = text, score
            if score == (len(wanted), 0):
                return text
        if best_score[0] < 0:  # every form failed; the failures of text say more than those of parts
            raise min(failures, key=lambda failure: failure[0])[1]
        self._warn_of_lost(messages, best, variables)
        return best

    def _warn_of_lost(self, messages: list[Plain], text: str, variables: dict[str, Any]) -> None:
        """Log a warning for each message that leaves no trace in ``text``, the rendering of all messages.

        A message whose content a template changes, as most change earlier reasoning, is not lost: all of them get
        different marks in one rendering, since a rendering for each would take seconds for a long chat.
        """
        marks = {i: f"\ue000{i}\ue000" for i, message in enumerate(messages) if _is_missing(message, text)}
        if self._render_marked(messages, {}, variables) != text:  # it expects another form of the messages
            return
        marked = self._render_marked(messages, marks, variables)
        lost = {i: mark for i, mark in marks.items() if mark not in marked}
        if lost and self._render_marked(messages, lost, variables) != text:
            lost = {i: mark for i, mark in lost.items() if self._render_marked(messages, {i: mark}, variables) == text}
        for i in lost:
            name = f"message {i} ({messages[i]['role']})"
            _logger.warning("%s is left out: the model's chat template does not write it", name)

    def _render_marked(self, messages: list[Plain], marks: dict[int, str], variables: dict[str, Any]) -> str:
        """Return the text of messages some of which end with a mark, no text if the template refuses them."""
        marked = [m | {"content": m["content"] + marks[i]} if i in marks else m for i, m in enumerate(messages)]
        with suppress(FormatError):
            return self._render(marked, variables)
        return ""

    def _render(self, messages: list[Plain], variables: dict[str, Any]) -> str:
        watch = _Watch()
        watched = [_Watched(message, number, watch) for number, message in enumerate(messages)]
        try:
            return self._template.render(messages=watched, **variables)
        except Exception as error:  # a template can raise anything
            reason = str(error) or type(error).__name__
            raise FormatError(f"the model's chat template failed{watch.place}: {reason}") from None


def _is_missing(message: Plain, text: str) -> bool:
    """Return whether ``text`` is without the content of a message."""
    content = message.get("content")
    return isinstance(content, str) and content.strip() not in text


def _check_documents(documents: Sequence[Mapping[str, Any]] | None) -> list[Mapping[str, Any]] | None:
    if documents is None:
        return None
    if not isinstance(documents, Sequence) or not all(isinstance(document, Mapping) for document in documents):
        raise TypeError(f"documents must be a list of dicts with 'title' and 'text', not {documents!r:.80}")
    return list(documents)


@dataclass
class _Watch:
    """The field of a message that a template read last."""

    place: str = ""


class _Watched(Plain):
    """A message that notes each field that is read, for the text of an error."""

    def __init__(self, message: Plain, number: int, watch: _Watch) -> None:
        super().__init__(message)
        self._number, self._watch = number, watch

    def __getitem__(self, key: str) -> Any:
        self._watch.place = f" at the field {key!r} of message {self._number} ({super().get('role')})"
        return super().__getitem__(key)


# ---------------------------------------------------------------------- Jinja as transformers sets it up


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    """Return the environment of all templates."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The block ``generation`` around a model's answers: training uses it, rendering writes its body."""

        tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(reason: str) -> Any:
        raise TemplateError(reason)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON with the defaults of ``transformers``, without Jinja's escapes for HTML."""
    if isinstance(value, NotText):
        str(value)  # raises: as JSON it would be written too
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
