"""`ChatParser`: a model's text to content, reasoning and tool calls, while it is generated."""

from __future__ import annotations

from collections.abc import Sequence

from ggml_cffi.models.chat_parser.events import Answer, ChatMessage, Event
from ggml_cffi.models.chat_parser.formats import FORMATS, THINK, find_format
from ggml_cffi.models.chat_parser.harmony import beginning
from ggml_cffi.models.chat_parser.source import Source, Steps
from ggml_cffi.models.chat_parser.tools import Tools
from ggml_cffi.models.generation.tool_schema import Tool
from ggml_cffi.models.text import TextMethods


class ChatParser:
    """The division of one answer into content, reasoning and tool calls, while it is generated.

    The text may arrive in any pieces: the events say the same. Generate it with ``keep_special=True``, since the
    markers of most formats are control tokens.

    A text that only begins like a call is content. A call that becomes malformed after its name ends there: its
    arguments are then no valid JSON, so check them before you call a function. White space beside reasoning and calls
    is left out.

    Parameters
    ----------
    format
        Name of the format: ``hermes`` (also Qwen 2.5 and 3), ``qwen3_coder``, ``glm4``, ``llama3``, ``mistral``,
        ``gpt_oss``, ``gemma3``, ``gemma4`` (also FunctionGemma), ``deepseek``, ``json`` for calls that a grammar
        demands, or ``plain`` without tool calls.
    tools
        The functions that the model may call, as for :meth:`Model.apply_chat_template`. The parser takes the types of
        arguments from them where the format has none, and does not take other JSON for a call of Llama 3 or Gemma 3.
        None if they are not known.
    reasoning
        True for reasoning in parts of its own. With False it stays in the content, with its tags; that of ``gpt_oss``
        and ``gemma4``, which has a channel of its own, is left out.
    parallel_tool_calls
        False to leave out all that follows the first tool call.
    prompt
        The text that the model continues. Its end may hold the beginning of the reasoning, as ``<think>``.

    Raises
    ------
    ValueError
        If there is no such format.

    Examples
    --------
    >>> parser = ChatParser("hermes", reasoning=True)
    >>> parser.feed("<think>Hm.</think>It is")
    [ReasoningDelta(text='Hm.'), ContentDelta(text='It is')]
    >>> parser.feed(" late.")
    [ContentDelta(text=' late.')]
    >>> parser.close()
    []
    >>> parser.message.content
    'It is late.'
    """

    def __init__(
        self,
        format: str = "hermes",  # noqa: A002 - the name says it best
        *,
        tools: Sequence[Tool] | None = None,
        reasoning: bool = False,
        parallel_tool_calls: bool = True,
        prompt: str = "",
    ) -> None:
        if format not in FORMATS:
            raise ValueError(f"there is no format {format!r:.80}: give one of {', '.join(FORMATS)}")
        self.format = format
        """Name of the format."""
        self._source = Source()
        self._answer = Answer(reasoning=reasoning, parallel_tool_calls=parallel_tool_calls)
        if FORMATS[format].channels:
            self._source.push(beginning(prompt))
        self._steps = self._parse(Tools(tools), prompt, reasoning)

    @classmethod
    def for_model(
        cls,
        model: TextMethods,
        *,
        tools: Sequence[Tool] | None = None,
        reasoning: bool = False,
        parallel_tool_calls: bool = True,
        prompt: str = "",
    ) -> ChatParser:
        """Return a parser for the format that a model's chat template shows; the parameters are the class's."""
        return cls(
            find_format(model.chat_templates.get(model.choose_chat_template(tools))),
            tools=tools,
            reasoning=reasoning,
            parallel_tool_calls=parallel_tool_calls,
            prompt=prompt,
        )

    @property
    def message(self) -> ChatMessage:
        """The answer so far; all of it after :meth:`close`."""
        return self._answer.message

    @property
    def complete(self) -> bool:
        """True if the rest of the text is left out: after the first call, without ``parallel_tool_calls``."""
        return self._answer.complete

    def feed(self, text: str) -> list[Event]:
        """Return the events of more text. Text that later text may turn into a marker is held back.

        Raises
        ------
        ValueError
            If the parser was closed.
        """
        if self._source.ended:
            raise ValueError("the parser is closed: make one for each answer")
        self._source.push(text)
        return self._advance()

    def close(self) -> list[Event]:
        """Return the events of the text held back, at the end of the answer. Closing twice is allowed."""
        self._source.ended = True
        return self._advance()

    def parse(self, text: str) -> ChatMessage:
        """Return a whole answer in its parts. The parser is closed afterwards.

        Raises
        ------
        ValueError
            If the parser was closed before.
        """
        self.feed(text)
        self.close()
        return self.message

    def _advance(self) -> list[Event]:
        next(self._steps, None)
        return self._answer.drain()

    def _parse(self, tools: Tools, prompt: str, reasoning: bool) -> Steps[None]:
        """Read the answer with all its parts."""
        source, answer, form = self._source, self._answer, FORMATS[self.format]
        if not form.channels:
            yield from _reasoning(source, answer, prompt, reasoning)
        yield from form.parse(source, answer, tools)
        answer.finish()


def _reasoning(source: Source, answer: Answer, prompt: str, split: bool) -> Steps[None]:
    """Read the reasoning at the beginning of an answer. Inside of it nothing is a tool call."""
    marker = next((marker for marker in THINK if prompt.rstrip().endswith(marker)), "")
    if not marker:
        source.record()
        yield from source.skip_space()
        marker = yield from source.take_marker(*THINK)
        text = source.recorded()
        if not marker or not split:
            answer.content(text)
    if marker:
        end = yield from source.until((THINK[marker],), answer.reasoning if split else answer.content)
        if split:
            answer.border()
        else:
            answer.content(end)
