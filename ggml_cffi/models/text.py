"""The text side of a model: prompts to token ids, token ids to text, chats to prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ggml_cffi.files.gguf.reader import GGUFFile
from ggml_cffi.models.generation.chat import Chat, ChatTemplate, chat_templates, read_chat_template
from ggml_cffi.models.generation.tool_schema import Tool
from ggml_cffi.models.tokenizers.tokenizer import Tokenizer


class TextMethods:
    """The methods of :class:`~ggml_cffi.models.Model` that need its vocabulary only.

    Parameters
    ----------
    file
        The model's file, with the vocabulary and the chat templates.
    """

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self._tokenizer: Tokenizer | None = None
        self._chat_templates: dict[str, ChatTemplate] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, made from the file's vocabulary on first use. Another one may be assigned.

        Raises
        ------
        FormatError
            If the file has no vocabulary, or one of an unsupported kind.
        """
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self._file)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._chat_templates.clear()

    def tokenize(
        self,
        prompt: str | Chat,
        *,
        special: bool = True,
        tools: Sequence[Tool] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the token ids that :meth:`generate` computes for a prompt: a text, or messages.

        A text may begin with the beginning token itself, and end with the ending one, as rendered chats do: no second
        one is added, see :meth:`Tokenizer.encode_prompt`.

        Parameters
        ----------
        prompt
            Text, or messages for the model's chat template.
        special
            True if texts such as ``<|im_end|>`` mean the token of that name. Give False for text that is not trusted.
            The text of messages always has special tokens.
        tools, documents, template_kwargs
            Tools, documents and further arguments of :meth:`apply_chat_template`, for messages only.

        Raises
        ------
        ValueError
            If there are tools, documents or arguments of a template, and the prompt is a text.
        """
        if isinstance(prompt, str | bytes):  # the tokenizer refuses bytes
            if tools or documents or template_kwargs:
                raise ValueError("tools, documents and template_kwargs are for messages, and the prompt is a text")
            return self.tokenizer.encode_prompt(prompt, special=special)
        text = self.apply_chat_template(prompt, tools=tools, documents=documents, **(template_kwargs or {}))
        return self.tokenizer.encode_prompt(text)

    def detokenize(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; see :meth:`Tokenizer.decode`."""
        return self.tokenizer.decode(ids)

    @property
    def chat_template(self) -> str | None:
        """The model's Jinja template for chats, None if it has none."""
        return self.chat_templates.get("default")

    @property
    def chat_templates(self) -> dict[str, str]:
        """The model's Jinja templates by name; ``default`` is the one without a name in the file."""
        return chat_templates(self._file)

    def choose_chat_template(self, tools: Sequence[Tool] | None = None) -> str:
        """Return the name of the template for a chat: ``tool_use`` if there are tools and it exists, or ``default``."""
        return "tool_use" if tools and "tool_use" in self.chat_templates else "default"

    def apply_chat_template(
        self,
        messages: Chat,
        *,
        tools: Sequence[Tool] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Return the text of a chat, up to the beginning of the model's answer.

        Parameters
        ----------
        messages, tools, documents, add_generation_prompt
            As in :meth:`ChatTemplate.render <ggml_cffi.models.generation.chat.ChatTemplate.render>`.
        template
            Name of one of :attr:`chat_templates`; default ``tool_use`` if there are tools and the model has a template
            of that name, else ``default``.
        template_kwargs, **variables
            Other variables of the template, as a dict or one by one: ``enable_thinking=False``.

        Raises
        ------
        ValueError
            If a message has no role, or content that is not text, or there is no such template.
        FormatError
            If the model has no chat template, or the template refuses the messages.
        """
        name = template or self.choose_chat_template(tools)
        if name not in self._chat_templates:
            self._chat_templates[name] = read_chat_template(self._file, name, lambda: self.tokenizer.special_tokens)
        return self._chat_templates[name].render(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            **{**(template_kwargs or {}), **variables},
        )
