"""Answers of chat models in their parts: content, reasoning and tool calls, while they are generated.

:class:`ChatParser` is for users. ``formats`` has a parser for each format of tool calls. Each is written as if the
whole answer were there; ``source`` lets it wait for more text. ``events`` has the parts.
"""

from ggml_cffi.models.chat_parser.events import (
    ChatMessage,
    ContentDelta,
    ReasoningDelta,
    ToolCall,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
)
from ggml_cffi.models.chat_parser.parser import ChatParser

__all__ = [
    "ChatMessage",
    "ChatParser",
    "ContentDelta",
    "ReasoningDelta",
    "ToolCall",
    "ToolCallDelta",
    "ToolCallEnd",
    "ToolCallStart",
]
