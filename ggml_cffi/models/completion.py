"""Whole answers in one call, and answers in ``asyncio``, by :meth:`Model.generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack, overload

from ggml_cffi.models.generation.async_stream import AsyncStream
from ggml_cffi.models.generation.chat import Chat
from ggml_cffi.models.generation.completion import Completion
from ggml_cffi.models.generation.sampling import SamplingOptions, SamplingParams
from ggml_cffi.models.generation.tool_schema import Tool


class GenerateOptions(SamplingOptions, total=False):
    """Keyword arguments of :meth:`Model.generate` after the number of tokens."""

    sampling: SamplingParams | None
    stop: str | Sequence[str] | None
    reuse: bool
    max_sequences: int
    tools: Sequence[Tool] | None
    documents: Sequence[Mapping[str, Any]] | None
    template_kwargs: Mapping[str, Any] | None
    keep_special: bool


class CompletionMethods:
    """The methods of :class:`~ggml_cffi.models.Model` that call its :meth:`generate`."""

    generate: Any

    def chat(
        self, messages: str | Chat, max_tokens: int | None = None, **options: Unpack[GenerateOptions]
    ) -> Completion:
        """Return the whole answer to a chat.

        Parameters
        ----------
        messages
            Messages for the model's chat template, or the text of one message of the user.
        max_tokens, **options
            As in :meth:`generate`.

        Raises
        ------
        FormatError
            If the model has no chat template, or the template refuses the messages.
        TypeError, ValueError, ClosedError
            See :meth:`generate`. TypeError also if ``messages`` is neither a text nor the messages of one chat.

        Examples
        --------
        >>> print(model.chat("Who are you?", max_tokens=32))  # doctest: +SKIP
        """
        chat = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        if not isinstance(chat, Sequence) or not chat or not isinstance(chat[0], Mapping):
            raise TypeError(
                f"messages must be a text, or a list of dicts with 'role' and 'content', not {messages!r:.80}: "
                "for several chats call generate(chats).completions()"
            )
        completion: Completion = self.generate(chat, max_tokens, **options).completion()
        return completion

    @overload
    def agenerate(  # type: ignore[overload-overlap]
        self, prompt: str | Chat, max_tokens: int | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncStream[str]: ...
    @overload
    def agenerate(
        self, prompt: Sequence[str] | Sequence[Chat], max_tokens: int | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncStream[tuple[int, str]]: ...
    def agenerate(
        self,
        prompt: str | Chat | Sequence[str] | Sequence[Chat],
        max_tokens: int | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncStream[str] | AsyncStream[tuple[int, str]]:
        """Generate in ``asyncio``: as :meth:`generate`, for ``async for`` and ``await``.

        A thread of a pool waits for the tokens of each call; the event loop continues. Calls of several tasks share
        runs and the KV cache. A task that is cancelled while it awaits an item ends its call.

        The call itself, before the first ``await``, tokenizes the prompts and compiles a grammar. If that takes long,
        call it in a thread: ``await asyncio.to_thread(model.agenerate, prompt)`` returns the stream.

        Parameters
        ----------
        prompt, max_tokens, **options
            As in :meth:`generate`.

        Raises
        ------
        TypeError, ValueError, ClosedError
            See :meth:`generate`. The call itself raises those of its arguments.

        Examples
        --------
        >>> async for text in model.agenerate("The capital of France is"):  # doctest: +SKIP
        ...     print(text, end="", flush=True)
        >>> answer = await model.agenerate([{"role": "user", "content": "Hello"}]).completion()  # doctest: +SKIP
        """
        return AsyncStream(self.generate(prompt, max_tokens, **options))
