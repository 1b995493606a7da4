"""Chat templates: what transformers gives them, and the form of messages that each expects."""

import json
import logging

import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.models.generation import ChatTemplate
from tests.support.byte_level_model import BOS, END, EOS, START, byte_level_model

WRITES = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
ADDS = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
LOOPS = "{% for m in messages %}{% for part in m['content'] %}[{{ part['text'] }}]{% endfor %}{% endfor %}"
EITHER = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endif %}{% endfor %}"
)
JSON = "{% for m in messages %}{{ m.content if m.content is string else m.content | tojson }}{% endfor %}"
CALLS = (
    "{% for m in messages %}{% for call in m.tool_calls or [] %}{{ call.function.name }}:ARGUMENTS{% endfor %}"
    "{{ m.content }}{% endfor %}"
)


def user(content):
    return {"role": "user", "content": content}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def call(arguments, content=None):
    function = {"name": "weather", "arguments": arguments}
    return {"role": "assistant", "content": content, "tool_calls": [{"type": "function", "function": function}]}


# ---------------------------------------------------------------------- Jinja as in transformers


def test_special_tokens_and_variables_are_in_reach_of_a_template():
    template = ChatTemplate("{{ bos_token }}{{ messages[0].content }}{{ unk_token }}{{ more }}", {"bos_token": "<s>"})
    assert template.render([user("hi")], more=1) == "<s>hi1"
    assert ChatTemplate("{{ add_generation_prompt }}").render([]) == "True"
    assert ChatTemplate("{{ add_generation_prompt }}").render([], add_generation_prompt=False) == "False"
    template = ChatTemplate("{{ tools is none }} {{ documents is none }}")
    assert template.render([]) == "True True"
    assert template.render([], tools=[{}], documents=[{}]) == "False False"


@pytest.mark.parametrize(
    "wrong", ["{% if %}", "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"]
)
def test_a_template_runs_in_a_sandbox_and_its_failure_is_a_format_error(wrong):
    with pytest.raises(ggml.FormatError, match=r"chat template (failed|is malformed)"):
        ChatTemplate(wrong).render([])


def test_a_failure_names_the_message_and_the_field():
    template = (
        "{% for m in messages %}{% if m.role == 'critic' %}{{ raise_exception('no critics') }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ggml.FormatError, match=r"at the field 'role' of message 1 \(critic\): no critics"):
        ChatTemplate(template).render([user("a"), {"role": "critic", "content": "b"}])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ensure_ascii": True},
        {"indent": 2},
        {"separators": (",", ":")},
        {"sort_keys": True},
        {"indent": 1, "sort_keys": True},
    ],
)
def test_tojson_is_json_dumps_without_escapes(options):
    value = {"b": "a < b && c > 'd': café 漢", "a": [1, None, True]}
    arguments = ", ".join(f"{key}={option!r}" for key, option in options.items())
    text = ChatTemplate(f"{{{{ value | tojson({arguments}) }}}}").render([], value=value)
    assert text == json.dumps(value, **{"ensure_ascii": False, **options})


def test_loop_controls_generation_blocks_and_time_are_known():
    template = (
        "{% for m in messages %}{% if m.content == 'b' %}{% continue %}{% endif %}{% if m.content == 'd' %}{% break %}"
        "{% endif %}{% generation %}{% set x = 1 %}{{ m.content }}{% endgeneration %}{{ x }}{% endfor %}"
        "{{ strftime_now('%Y') | length }}"
    )
    assert ChatTemplate(template).render([user(c) for c in "abcde"]) == "ac4"


# ---------------------------------------------------------------------- forms of content


@pytest.mark.parametrize("template", [WRITES, ADDS, JSON])
@pytest.mark.parametrize("content", [parts("Hi", " there"), ["Hi", " there"], tuple(parts("Hi there"))])
def test_a_template_for_text_gets_the_text_of_the_parts(template, content):
    assert ChatTemplate(template).render([user(content)]) == ChatTemplate(template).render([user("Hi there")])


def test_a_template_for_parts_gets_the_parts():
    for template in (LOOPS, EITHER):
        assert ChatTemplate(template).render([user(parts("Hi", " there"))]) == "[Hi][ there]"
    assert ChatTemplate(LOOPS).render([user("Hi there")]) == "[Hi there]"
    assert ChatTemplate(EITHER).render([user("Hi there")]) == "Hi there"


def test_parts_of_the_responses_api_are_text():
    content = [
        {"type": "input_text", "text": "a"},
        {"type": "output_text", "text": "b"},
        {"type": "refusal", "refusal": "c"},
    ]
    assert ChatTemplate(WRITES).render([user(content)]) == "<user>abc"


@pytest.mark.parametrize("template", [WRITES, ADDS, JSON, EITHER])
def test_missing_content_beside_tool_calls_is_empty(template):
    for message in (call({"city": "Rome"}), {k: v for k, v in call({"city": "Rome"}).items() if k != "content"}):
        text = ChatTemplate(template).render([message, user("x")])
        assert text == ChatTemplate(template).render([message | {"content": ""}, user("x")])
        assert "None" not in text
        assert "null" not in text


@pytest.mark.parametrize("content", [None, ""])
def test_a_template_that_asks_for_no_content_beside_tool_calls_sees_none(content):
    template = (
        "{% for m in messages %}{% if m.content is none %}{{ m.tool_calls[0].function.name }}{% endif %}{% endfor %}"
    )
    assert ChatTemplate(template).render([call({}, content)]) == ("weather" if content is None else "")


@pytest.mark.parametrize("arguments", [{"city": "Köln"}, '{"city": "Köln"}'])
@pytest.mark.parametrize(
    ("write", "text"),
    [
        ("{{ call.function.arguments | tojson }}", '{"city": "Köln"}'),
        ("{{ '' + call.function.arguments }}", '{"city": "Köln"}'),
        ("{% for k, v in call.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}", "city=Köln"),
    ],
)
def test_arguments_of_tool_calls_have_the_form_that_the_template_expects(arguments, write, text):
    template = ChatTemplate(CALLS.replace("ARGUMENTS", write))
    assert template.render([call(arguments, "")]) == f"weather:{text}"


def test_broken_arguments_stay_text():
    template = ChatTemplate(CALLS.replace("ARGUMENTS", "{{ call.function.arguments }}"))
    assert template.render([call('{"city": ', "")]) == 'weather:{"city": '


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ("Hi", "messages must be a list of dicts"),
        (user("Hi"), "messages must be a list of dicts"),
        ([("user", "Hi")], "message 0: a message must be a dict with 'role' and 'content'"),
        ([user("a"), {"content": "Hi"}], "message 1: 'role' must be a text"),
        ([user("a"), {"role": 3, "content": "Hi"}], "message 1: 'role' must be a text"),
        ([user("a"), {"role": "user"}], r"message 1 \(user\): 'content' is missing"),
        ([user(None)], r"message 0 \(user\): 'content' is missing"),
        ([user(b"Hi")], r"message 0 \(user\): 'content' must be text or a list"),
        ([user(3)], r"message 0 \(user\): 'content' must be text or a list"),
        ([user([3])], r"message 0 \(user\): content\[0\] must be"),
        ([user([{"type": "text"}])], r"message 0 \(user\): content\[0\] must be"),
        ([user([*parts("a"), {"type": "image_url", "image_url": {}}])], r"content\[1\] has the type 'image_url'"),
        ([call(3)], r"message 0 \(assistant\): the 'arguments' of tool_calls\[0\] must be"),
    ],
)
def test_errors_name_the_message_and_the_field(messages, match):
    with pytest.raises(ValueError, match=match):
        ChatTemplate(WRITES).render(messages)


def test_the_role_developer_is_system_where_the_template_does_not_know_it():
    assert ChatTemplate(WRITES).render([{"role": "developer", "content": "x"}]) == "<system>x"
    template = "{% for m in messages %}{{ 'D' if m.role == 'developer' else 'S' }}{% endfor %}"
    assert ChatTemplate(template).render([{"role": "developer", "content": "x"}]) == "D"


@pytest.mark.parametrize("parts", [False, True])
def test_a_long_chat_is_not_rendered_more_often_than_a_short_one(caplog, parts):
    content = "message.content[0].text" if parts else "message.content"
    template = ChatTemplate(
        "{{ count() }}{% for message in messages %}{{ message.role }}: {{ " + content + ".split('</think>')[-1] }}\n"
        "{% endfor %}"
    )

    def renderings(n):
        times = []
        answer = {"role": "assistant", "content": "<think>Hm.</think>Yes."}
        text = template.render([answer] * n, count=lambda: times.append(0) or "")
        assert text == "assistant: Yes.\n" * n
        return len(times)

    assert renderings(40) == renderings(3)
    assert not caplog.records


def test_a_message_that_leaves_no_trace_is_told_in_the_log(caplog):
    template = ChatTemplate(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content | upper }}{% endif %}{% endfor %}"
    )
    with caplog.at_level(logging.WARNING, "ggml_cffi"):
        assert template.render([user("hi"), {"role": "critic", "content": "bad"}]) == "HI"
    assert [record.getMessage()[:20] for record in caplog.records] == ["message 1 (critic) i"]


# ---------------------------------------------------------------------- models


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
)


@pytest.mark.parametrize("adds", [True, False])
def test_a_chat_has_one_beginning_and_one_ending_token(tmp_path, adds):
    flags = {"tokenizer.ggml.add_bos_token": adds, "tokenizer.ggml.add_eos_token": adds}
    with models.load(byte_level_model(tmp_path / "m.gguf", TEMPLATE, flags), ["CPU"], n_ctx=64) as model:
        ids = [BOS, START, *b"hi", END]
        ended = [*ids, EOS] if adds else ids
        assert model.tokenize([user("hi")]) == ended
        text = model.apply_chat_template([user("hi")], add_generation_prompt=False)
        assert model.tokenize(text) == [*ids, EOS]
        assert model.tokenize("hi") == ([BOS, *b"hi", EOS] if adds else [*b"hi"])
        for prompt in ([user("hi")], model.apply_chat_template([user("hi")])):
            model.clear_cache()
            list(model.generate(prompt, 1))
            assert model.timings.prompt_tokens == len(ended)
            assert model.cached[-1][: len(ended)] == ended


def test_templates_are_chosen_by_name(tmp_path):
    key = "tokenizer.chat_template"
    more = {f"{key}.tool_use": "T{{ messages[0].content }}", f"{key}.rag": "R{{ documents[0].text }}"}
    path = byte_level_model(tmp_path / "m.gguf", "D{{ messages[0].content }}{{ x }}", more)
    with models.load(path, ["CPU"], n_ctx=64) as model:
        assert set(model.chat_templates) == {"default", "tool_use", "rag"}
        assert model.apply_chat_template([user("a")], x=1) == "Da1"
        assert model.apply_chat_template([user("a")], tools=[{"name": "f"}]) == "Ta"
        assert model.tokenize([user("a")], tools=[{"name": "f"}]) == model.tokenize("Ta")
        assert model.tokenize([user("a")], template_kwargs={"template": "default"}) == model.tokenize("Da")
        with pytest.raises(ValueError, match="are for messages, and the prompt is a text"):
            model.tokenize("Ta", tools=[{"name": "f"}])
        assert model.apply_chat_template([user("a")], tools=[{"name": "f"}], template="default") == "Da"
        assert model.apply_chat_template([user("a")], documents=[{"text": "d"}], template="rag") == "Rd"
        with pytest.raises(ValueError, match="no chat template 'x'; it has default, "):
            model.apply_chat_template([user("a")], template="x")


def test_documents_and_variables_reach_the_template(tmp_path):
    template = "{{ documents[0].text if documents else '' }}{{ x }}{{ y }}{{ add_generation_prompt }}"
    with models.load(byte_level_model(tmp_path / "m.gguf", template), ["CPU"], n_ctx=64) as model:
        documents, chat = [{"text": "d"}], [user("a")]
        assert model.apply_chat_template(chat, documents=documents, template_kwargs={"x": 1, "y": 2}, y=3) == "d13True"
        assert model.apply_chat_template(chat, add_generation_prompt=False) == "False"
        ids = model.tokenize("d1True")
        assert model.tokenize(chat, documents=documents, template_kwargs={"x": 1}) == ids
        list(model.generate(chat, 1, documents=documents, template_kwargs={"x": 1}))
        assert model.cached[-1][: len(ids)] == ids
        with pytest.raises(ValueError, match="are for messages, and the prompt is a text"):
            model.generate("a", 1, documents=documents)
    for wrong in ("d", [3], {"text": "d"}):
        with pytest.raises(TypeError, match="documents must be a list of dicts"):
            ChatTemplate(template).render(chat, documents=wrong)


def test_fields_without_a_value_are_no_fields():
    template = "{% for m in messages %}{{ 'tool_calls' in m }}{{ 'content' in m }}{% endfor %}"
    chat = [user("a") | {"tool_calls": None}, call({}) | {"content": None}]
    assert ChatTemplate(template).render(chat) == "FalseTrueTrueFalse"


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_each_name_that_templates_read(field):
    template = ChatTemplate("{{ messages[0].reasoning_content }} {{ messages[0].thinking }} {{ messages[0].content }}")
    assert template.render([{"role": "assistant", "content": "c", field: "r"}]) == "r r c"


def test_a_template_that_names_the_role_developer_may_refuse_it():
    template = (
        "{% for m in messages %}{% if m.role == 'developer' %}{{ raise_exception('no') }}{% endif %}<{{ m.role }}>"
        "{% endfor %}"
    )
    assert ChatTemplate(template).render([{"role": "developer", "content": "x"}]) == "<system>"


def test_the_clock_of_templates_can_be_set():
    template = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}")
    assert template.render([], strftime_now=lambda form: f"<{form}>") == "<%Y-%m-%d>"


def test_the_channels_of_one_answer_do_not_end_it(tmp_path):
    for specials, ends in (
        (("<|bos|>", "<|eos|>", "<|end|>"), {EOS, 258}),
        (("<|bos|>", "<|eos|>", "<|end|>", "<|return|>", "<|call|>"), {EOS, 259, 260}),
    ):
        path = byte_level_model(tmp_path / "m.gguf", specials=specials)
        with models.load(path, ["CPU"], n_ctx=64) as model:
            assert model.tokenizer.end_tokens == ends
