"""Chat templates of other people's models, rendered as ``transformers`` renders them."""

import json

import pytest

from ggml_cffi import FormatError
from ggml_cffi.models.generation import ChatTemplate
from tests.support import ROOT
from tests.support.chats import CHATS, NOW, SPECIAL_TOKENS, digest, templates

EXPECTED = json.loads((ROOT / "tests" / "data" / "chat_templates.json").read_text(encoding="utf-8"))
NAMES = [name for name in EXPECTED if name != "transformers"]


@pytest.fixture(scope="module")
def sources():
    found = templates()
    if not found:
        pytest.skip("the templates are not in vendor/ggml: run ./build_lib.sh --source-only")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_template_writes_what_transformers_writes(name, sources):
    template = ChatTemplate(sources[name], SPECIAL_TOKENS)
    wrong = []
    for chat, (messages, options) in CHATS.items():
        try:
            text = template.render(messages, **options, strftime_now=NOW.strftime)
        except FormatError:
            text = None
        if (text and digest(text)) != EXPECTED[name][chat]:
            wrong.append((chat, text))
    assert not wrong


@pytest.mark.parametrize("name", NAMES)
def test_arguments_as_json_text_are_those_of_a_dict(name, sources):
    template = ChatTemplate(sources[name], SPECIAL_TOKENS)
    messages, options = CHATS["call"]
    if EXPECTED[name]["call"] is not None:
        text = template.render(as_json(messages), **options, strftime_now=NOW.strftime)
        assert digest(text) == EXPECTED[name]["call"]


def as_json(messages):
    """Return messages with the arguments of tool calls as in OpenAI's API."""
    changed = json.loads(json.dumps(messages))
    for message in changed:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return changed


def test_all_templates_and_chats_have_an_expected_text(sources):
    assert sources.keys() == set(NAMES)
    assert all(EXPECTED[name].keys() == CHATS.keys() for name in NAMES)
    texts = [text for name in NAMES for text in EXPECTED[name].values()]
    assert sum(text is None for text in texts) < len(texts) / 10
