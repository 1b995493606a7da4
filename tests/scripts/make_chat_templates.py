"""Write chats as ``transformers`` renders them, and the schemas of functions as it makes them.

``data/chat_templates.json`` has chats in the templates of other people's models, and ``data/tool_schemas.json`` the
JSON schemas of the functions of ``tests/support/tool_functions.py``.

``python -m tests.scripts.make_chat_templates``. It needs ``transformers``, and the templates that
``build_lib.sh --source-only`` unpacks. The first file has the first digits of the SHA-256 of each text, and null
where no form of the chat can be rendered.

Where ``transformers`` fails with a chat as it is, or writes a list of parts as Python text, or leaves the text out, the
text is that of the same chat in the form that the template expects: with the content as text, with empty content, with
the arguments of tool calls as JSON text, with ``system`` in place of ``developer``.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from tests.support.chats import CHATS, NOW, SPECIAL_TOKENS, digest, templates
from tests.support.tool_functions import FUNCTIONS

DATA = Path(__file__).resolve().parents[1] / "data"


class Now(type(NOW)):
    """The clock of the templates."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:  # noqa: ARG003 - as in datetime
        return NOW


def variants(template: str, messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the forms of a chat that templates may expect."""
    if "developer" in template or not any(m["role"] == "developer" for m in messages):
        yield messages
    messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in messages]
    for form in (messages, [m | {"content": text_of(m)} for m in messages]):
        yield form
        yield [m | {"tool_calls": with_text_arguments(m["tool_calls"])} if "tool_calls" in m else m for m in form]


def text_of(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def with_text_arguments(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
        for call in calls
    ]


def keeps_parts(messages: list[dict[str, Any]], text: str) -> bool:
    """Return whether the texts of parts are in ``text``, and not the parts themselves."""
    parts = [part["text"] for m in messages if isinstance(m.get("content"), list) for part in m["content"]]
    written = "'type': 'text'" in text or '"type": "text"' in text
    return not parts or (all(part.strip() in text for part in parts) and not written)


def render(tokenizer: Any, template: str, messages: list[dict[str, Any]], options: dict[str, Any]) -> str | None:
    from transformers.utils.chat_template_utils import render_jinja_template

    options = {"add_generation_prompt": True, "chat_template": template, **options}

    def apply(variant: list[dict[str, Any]]) -> str:
        return str(tokenizer.apply_chat_template(variant, tokenize=False, **options))

    def apply_with_none(variant: list[dict[str, Any]]) -> str:  # the function above leaves out fields that are None
        text = str(render_jinja_template([variant], **options, **SPECIAL_TOKENS)[0][0])
        if "None" in text or "null" in text:
            raise ValueError("the template writes the missing content")
        return text

    for variant, write in product(variants(template, messages), (apply, apply_with_none)):
        with suppress(Exception):  # a template can raise anything
            text = write(variant)
            if keeps_parts(variant, text):
                return text
    return None


def main() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import chat_template_utils, get_json_schema

    chat_template_utils.datetime = Now
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **SPECIAL_TOKENS)
    found: dict[str, Any] = {"transformers": version("transformers")}
    for name, template in templates().items():
        texts = {chat: render(tokenizer, template, *CHATS[chat]) for chat in CHATS}
        found[name] = {chat: text and digest(text) for chat, text in texts.items()}
    schemas = {name: get_json_schema(function) for name, function in FUNCTIONS.items()}
    (DATA / "tool_schemas.json").write_text(json.dumps(schemas, indent=1) + "\n", encoding="utf-8")
    text = json.dumps(found, indent=0).replace('",\n"', '", "').replace('null,\n"', 'null, "')
    (DATA / "chat_templates.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
