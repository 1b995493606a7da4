"""Conversations that chat templates are rendered with, and the templates of other people's models."""

from __future__ import annotations

from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from tests.support import ROOT

#: The templates of llama.cpp, which ``build_lib.sh --source-only`` unpacks.
TEMPLATES = ROOT / "vendor" / "ggml" / "0.25.3" / "chat-templates"
#: Special tokens of all templates.
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
#: The time of all renderings.
NOW = datetime(2026, 2, 3, 4, 5, 6)

_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'Return the weather <now> & "then" in a city\'s centre, e.g. Köln.',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name of the city"},
                "days": {"type": "integer", "description": "Number of days"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "description": "Unit"},
            },
            "required": ["city"],
        },
    },
}
_CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "Return the time.",
        "parameters": {"type": "object", "properties": {}},
    },
}
TOOLS = [_WEATHER, _CLOCK]
DOCUMENTS = [{"title": "Rome", "text": "Rome has 7 hills."}, {"title": "Oslo", "text": "Oslo has none & more."}]


def _user(content: Any = "Is it <warm> in 'Köln' & Rome?") -> dict[str, Any]:
    return {"role": "user", "content": content}


def _system(role: str = "system") -> dict[str, Any]:
    return {"role": role, "content": "Be brief & kind."}


def _assistant(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def _call(number: int, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"id": f"abcdefgh{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def _result(number: int, name: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"abcdefgh{number}", "name": name, "content": content}


_ROME = _call(1, "weather", {"city": "Rome's <centre>", "days": 2})
_TIME = _call(2, "clock", {})
_CALLING = _assistant("", tool_calls=[_ROME])
_WARM = _result(1, "weather", '{"degrees": 31}')
_TURNS = [_system(), _user(), _assistant("Yes, it is."), _user("And now?")]

#: Messages and options of each conversation, by name.
CHATS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "plain": ([_user()], {}),
    "system": ([_system(), _user()], {}),
    "developer": ([_system("developer"), _user()], {}),
    "turns": (_TURNS, {}),
    "ended": (_TURNS[:3], {"add_generation_prompt": False}),
    "parts": ([_user([{"type": "text", "text": "Is it warm in"}, {"type": "text", "text": " Rome?"}])], {}),
    "tools": ([_user()], {"tools": TOOLS}),
    "system_tools": ([_system(), _user()], {"tools": TOOLS}),
    "call": ([_user(), _CALLING, _WARM], {"tools": TOOLS}),
    "call_ended": ([_user(), _CALLING], {"tools": TOOLS, "add_generation_prompt": False}),
    "call_without_content": (
        [_user(), {key: value for key, value in _CALLING.items() if key != "content"}, _WARM],
        {"tools": TOOLS},
    ),
    "call_null": ([_user(), _CALLING | {"content": None}, _WARM], {"tools": TOOLS}),
    "call_with_text": ([_user(), _assistant("I look.", tool_calls=[_ROME]), _WARM], {"tools": TOOLS}),
    "two_calls": (
        [_user(), _assistant("", tool_calls=[_ROME, _TIME]), _WARM, _result(2, "clock", "12:00")],
        {"tools": TOOLS},
    ),
    "after_call": (
        [_system(), _user(), _CALLING, _WARM, _assistant("It is 31 degrees."), _user("Thanks!")],
        {"tools": TOOLS},
    ),
    "thinking": ([_user()], {"enable_thinking": True}),
    "no_thinking": ([_user()], {"enable_thinking": False}),
    "reasoning": (
        [_user(), _CALLING | {"reasoning_content": "I need the weather."}, _WARM],
        {"tools": TOOLS, "enable_thinking": True},
    ),
    "old_reasoning": ([_user(), _assistant("Yes.", reasoning_content="It is summer."), _user("Sure?")], {}),
    "documents": ([_user()], {"documents": DOCUMENTS}),
}


def templates() -> dict[str, str]:
    """Return the templates by their names; none if they were not unpacked."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(Path(TEMPLATES).glob("*.jinja"))}


def digest(text: str) -> str:
    """Return the first digits of a text's SHA-256."""
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
