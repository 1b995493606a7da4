"""Answers in each format: content, reasoning and tool calls, whatever the pieces in which the text arrives."""

import json
import os
import random
import re

import pytest

from ggml_cffi import models
from ggml_cffi.models import (
    ChatMessage,
    ChatParser,
    ContentDelta,
    ReasoningDelta,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
)
from ggml_cffi.models.chat_parser.formats import FORMATS, find_format
from ggml_cffi.models.generation import ChatTemplate
from tests.support.byte_level_model import byte_level_model
from tests.support.chats import CHATS, NOW, SPECIAL_TOKENS, TOOLS, templates

WEATHER = ("weather", {"city": "Rome", "days": 2})
CLOCK = ("clock", {})
ESCAPED = ("weather", {"city": 'a"b\\c</tool_call>{[\n', "days": [1, {"x": None}]})

#: Format, answer, then the expected content, reasoning and calls.
ANSWERS = {
    "plain": ("plain", "Hello <there>, {you}: [1] ", "Hello <there>, {you}: [1] ", None, []),
    "plain thinks": ("plain", "<think>\nHm.\n</think>\n\nYes.", "Yes.", "Hm.", []),
    "plain does not think": ("plain", "<think>\n\n</think>\n\nYes.", "Yes.", None, []),
    "plain thinks to its end": ("plain", " <think> Hm, 1 < 2 </thi", None, "Hm, 1 < 2 </thi", []),
    "plain names the tag": ("plain", "Use <think>x</think> here", "Use <think>x</think> here", None, []),
    "json": ("json", '{"name": "weather", "arguments": {"city": "Rome", "days": 2}}', None, None, [WEATHER]),
    "json in a list": (
        "json",
        ' [ {"name": "weather", "arguments": {"city": "Rome", "days": 2}},\n{"name": "clock", "arguments": {}} ]\n',
        None,
        None,
        [WEATHER, CLOCK],
    ),
    "json without calls": ("json", " [Hello]", " [Hello]", None, []),
    "hermes": (
        "hermes",
        '<think>I look.</think>\n\nWait:\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 2}}\n'
        '</tool_call>\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>',
        "Wait:",
        "I look.",
        [WEATHER, CLOCK],
    ),
    "hermes escapes": (
        "hermes",
        f'<tool_call>{{"name": "weather", "arguments": {json.dumps(ESCAPED[1])}}}</tool_call>',
        None,
        None,
        [ESCAPED],
    ),
    "hermes in other orders": (
        "hermes",
        '<tool_call>{"arguments": {"city": "Rome", "days": 2}, "id": 3, "name": "weather"}\n'
        '{"name": "clock"}</tool_call>',
        None,
        None,
        [WEATHER, CLOCK],
    ),
    "hermes with text arguments": (
        "hermes",
        '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\", \\"days\\": 2}"}</tool_call>',
        None,
        None,
        [WEATHER],
    ),
    "hermes list": (
        "hermes",
        '<tool_calls>[{"name": "weather", "arguments": {"city": "Rome", "days": 2}}, '
        '{"name": "clock", "arguments": {}}]</tool_calls>',
        None,
        None,
        [WEATHER, CLOCK],
    ),
    "hermes between texts": ("hermes", 'a <tool_call>{"name": "clock"}</tool_call> b ', "a\nb ", None, [CLOCK]),
    "functionary": (
        "hermes",
        '<function=weather>{"city": "Rome", "days": 2}</function><function=clock>{}</function>',
        None,
        None,
        [WEATHER, CLOCK],
    ),
    "qwen3_coder": (
        "qwen3_coder",
        "I look.\n<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n2\n"
        "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=clock>\n</function>\n</tool_call>",
        "I look.",
        None,
        [WEATHER, CLOCK],
    ),
    "qwen3_coder without the first tag": (
        "qwen3_coder",
        "<function=weather>\n<parameter=city>\n  7\n\n</parameter>\n</function>\n</tool_call>",
        None,
        None,
        [("weather", {"city": "  7\n"})],
    ),
    "seed": (
        "qwen3_coder",
        "<seed:think>Hm.</seed:think><seed:tool_call>\n<function=weather>\n<parameter=city>Rome</parameter>\n"
        "<parameter=days>2</parameter>\n</function>\n</seed:tool_call>",
        None,
        "Hm.",
        [WEATHER],
    ),
    "glm4": (
        "glm4",
        "<think></think>\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>\n<tool_call>clock\n</tool_call>",
        None,
        None,
        [WEATHER, CLOCK],
    ),
    "llama3": ("llama3", '{"name": "weather", "parameters": {"city": "Rome", "days": 2}}', None, None, [WEATHER]),
    "llama3 twice": (
        "llama3",
        '\n{"type": "function", "name": "weather", "parameters": {"city": "Rome", "days": 2}}; '
        '{"name": "clock", "parameters": {}}',
        None,
        None,
        [WEATHER, CLOCK],
    ),
    "llama3 with a tag": (
        "llama3",
        'I look. <|python_tag|>{"name": "weather", "parameters": {"city": "Rome", "days": 2}}',
        "I look.",
        None,
        [WEATHER],
    ),
    "llama3 calls a built-in tool": (
        "llama3",
        '<|python_tag|>brave_search.call(query="Rome")',
        None,
        None,
        [("brave_search", {"query": "Rome"})],
    ),
    "llama3 writes a program": (
        "llama3",
        "<|python_tag|>x = 1\nprint(x)",
        None,
        None,
        [("code_interpreter", {"code": "x = 1\nprint(x)"})],
    ),
    "llama3 answers in JSON": ("llama3", '{"answer": {"name": 1}}', '{"answer": {"name": 1}}', None, []),
    "llama3 names another function": (
        "llama3",
        ' {"name": "Rome", "parameters": {}} is it.',
        ' {"name": "Rome", "parameters": {}} is it.',
        None,
        [],
    ),
    "mistral": (
        "mistral",
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome", "days": 2}, "id": "abcdefgh1"}, '
        '{"name": "clock", "arguments": {}}]',
        None,
        None,
        [WEATHER, CLOCK],
    ),
    "mistral with names": (
        "mistral",
        '[THINK]Hm.[/THINK]I look.[TOOL_CALLS]weather[CALL_ID]abcdefgh1[ARGS]{"city": "Rome", "days": 2}'
        "[TOOL_CALLS]clock[ARGS]{}",
        "I look.",
        "Hm.",
        [WEATHER, CLOCK],
    ),
    "gpt_oss": (
        "gpt_oss",
        "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant<|channel|>commentary<|message|>Wait.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
        '{"city": "Rome", "days": 2}<|call|>',
        "Wait.",
        "I look.",
        [WEATHER],
    ),
    "gpt_oss names the function first": (
        "gpt_oss",
        " to=functions.clock<|channel|>commentary json<|message|>{}",
        None,
        None,
        [CLOCK],
    ),
    "gpt_oss answers": (
        "gpt_oss",
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Yes, <b>.\n",
        "Yes, <b>.\n",
        "a\n\nb",
        [],
    ),
    "gpt_oss without channels": ("gpt_oss", "Yes.", "Yes.", None, []),
    "gemma4": (
        "gemma4",
        '<|channel>thought\nI look.\n<channel|>Wait.<|tool_call>call:weather{city:<|"|>Rome<|"|>,days:2}<tool_call|>'
        "<|tool_call>call:clock{}<tool_call|>",
        "Wait.",
        "I look.",
        [WEATHER, CLOCK],
    ),
    "gemma4 nests": (
        "gemma4",
        '<|tool_call>call:weather{city:<|"|>a, {b:[1]}"<|"|>,days:[1.5,{<|"|>x y<|"|>:true,z:None}]}<tool_call|>',
        None,
        None,
        [("weather", {"city": 'a, {b:[1]}"', "days": [1.5, {"x y": True, "z": None}]})],
    ),
    "functiongemma": (
        "gemma4",
        "<start_function_call>call:weather{city:<escape>Rome<escape>,days:2}<end_function_call>",
        None,
        None,
        [WEATHER],
    ),
    "gemma3": ("gemma3", '```tool_code\nprint(weather(city="Rome", days=2))\n```', None, None, [WEATHER]),
    "gemma3 by position": (
        "gemma3",
        "I look.\n```tool_code\nweather('Rome', days=2)\nclock()\n```",
        "I look.",
        None,
        [WEATHER, CLOCK],
    ),
    "gemma3 in JSON": (
        "gemma3",
        '```json\n{"name": "weather", "parameters": {"city": "Rome", "days": 2}}\n```',
        None,
        None,
        [WEATHER],
    ),
    "gemma3 in bare JSON": ("gemma3", '{"name": "clock", "parameters": {}}', None, None, [CLOCK]),
    "gemma3 shows code": (
        "gemma3",
        '```json\n{"a": 1}\n```\n```tool_code\nx = 1\n```',
        '```json\n{"a": 1}\n```\n```tool_code\nx = 1\n```',
        None,
        [],
    ),
    "deepseek": (
        "deepseek",
        "<think>I look.</think>Wait.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
        '{"city": "Rome", "days": 2}<｜tool▁call▁end｜><｜tool▁call▁begin｜>clock<｜tool▁sep｜>{}<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜>",
        "Wait.",
        "I look.",
        [WEATHER, CLOCK],
    ),
    "deepseek v3": (
        "deepseek",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Rome", "days": 2}\n```<｜tool▁call▁end｜>\n<｜tool▁calls▁end｜>',
        None,
        None,
        [WEATHER],
    ),
}

#: Malformed answers: format, answer, then the expected content and calls as (name, text of the arguments).
MALFORMED = {
    "json cut in the name": ("json", '[{"name": "clo', '[{"name": "clo', []),
    "json cut in the arguments": ("json", '{"name": "clock", "arguments": {"a": [', None, [("clock", '{"a": [')]),
    "json before a text": ("json", '{"name": "clock", "arguments": {}} b', "b", [("clock", "{}")]),
    "no JSON": ("hermes", "a <tool_call> {oops} b", "a <tool_call> {oops} b", []),
    "no call": ("hermes", '<tool_call>{"a": 1}</tool_call>', '<tool_call>{"a": 1}</tool_call>', []),
    "no name": ("hermes", '<tool_call>{"name": ""}', '<tool_call>{"name": ""}', []),
    "nothing": ("hermes", "<tool_call>", "<tool_call>", []),
    "cut before the arguments": ("hermes", '<tool_call>{"name": "clock", ', '<tool_call>{"name": "clock", ', []),
    "cut in the arguments": (
        "hermes",
        '<tool_call>{"name": "clock", "arguments": {"a": "x',
        None,
        [("clock", '{"a": "x')],
    ),
    "a bracket too few": (
        "hermes",
        '<tool_call>{"name": "clock", "arguments": {}</tool_call>b',
        "b",
        [("clock", "{}")],
    ),
    "brackets too few": (
        "hermes",
        '<tool_call>{"name": "clock", "arguments": {"a": [1</tool_call>b',
        "b",
        [("clock", '{"a": [1')],
    ),
    "brackets too many": (
        "hermes",
        '<tool_call>{"name": "clock", "arguments": {}}}}</tool_call>b',
        "b",
        [("clock", "{}")],
    ),
    "wrong values": (
        "hermes",
        '<tool_call>{"name": "clock", "arguments": {a: Rome}}</tool_call>',
        None,
        [("clock", "{a: Rome}")],
    ),
    "no function": ("qwen3_coder", "<tool_call>\n<function=>\n", "<tool_call>\n<function=>\n", []),
    "a parameter without an end": (
        "qwen3_coder",
        "<tool_call><function=weather><parameter=city>Rome</function></tool_call>",
        None,
        [("weather", '{"city": "Rome"}')],
    ),
    "an unknown name": ("glm4", "<tool_call>hello\n</tool_call>", "<tool_call>hello\n</tool_call>", []),
    "JSON is cut": ("llama3", '{"name": "weather", "param', '{"name": "weather", "param', []),
    "no list": ("mistral", "[TOOL_CALLS] yes", "[TOOL_CALLS] yes", []),
    "an empty list": ("mistral", "[TOOL_CALLS][]", "[TOOL_CALLS][]", []),
    "a list is cut": (
        "mistral",
        '[TOOL_CALLS][{"name": "clock", "arguments": {}}, {"na',
        ', {"na',
        [("clock", "{}")],
    ),
    "no message": ("gpt_oss", "Yes.<|channel|>commentary to=functions.clock", "Yes.", []),
    "no notation": (
        "gemma4",
        "<|tool_call>call:clock{a b}<tool_call|>",
        "<|tool_call>call:clock{a b}<tool_call|>",
        [],
    ),
    "no end": ("gemma4", "<|tool_call>call:clock", "<|tool_call>call:clock", []),
    "an expression": ("gemma3", "```tool_code\nclock(1 + x)\n```", "```tool_code\nclock(1 + x)\n```", []),
    "no separator": ("deepseek", "<｜tool▁call▁begin｜>clock {}", "<｜tool▁call▁begin｜>clock {}", []),
}


def run(form, pieces, **options):
    """Return the events of an answer that arrives in pieces, and the parser."""
    parser = ChatParser(form, **{"tools": TOOLS, "reasoning": True, **options})
    events = [event for piece in pieces for event in parser.feed(piece)]
    return events + parser.close(), parser


def joined(events):
    """Return the events with those that continue one another joined, and without the calls' random names."""
    found = []
    for event in events:
        match event:
            case ContentDelta(text):
                item = ["content", text]
            case ReasoningDelta(text):
                item = ["reasoning", text]
            case ToolCallStart(index, _, name):
                item = [f"start {index} {name}", ""]
            case ToolCallDelta(index, text):
                item = [f"arguments {index}", text]
            case ToolCallEnd(index):
                item = [f"end {index}", ""]
        if found and found[-1][0] == item[0]:
            found[-1][1] += item[1]
        else:
            found.append(item)
    return found


def add_up(events):
    """Return the message of the events."""
    texts = {}
    for kind, text in joined(events):
        texts[kind] = texts.get(kind, "") + text
    return texts


def calls_of(message):
    return [(call.name, json.loads(call.arguments)) for call in message.tool_calls]


@pytest.mark.parametrize("name", ANSWERS)
def test_the_parts_of_an_answer(name):
    form, text, content, reasoning, calls = ANSWERS[name]
    message = ChatParser(form, tools=TOOLS, reasoning=True).parse(text)
    assert (message.content, message.reasoning) == (content, reasoning)
    assert calls_of(message) == calls


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_call_is_content_or_has_malformed_arguments(name):
    form, text, content, calls = MALFORMED[name]
    message = ChatParser(form, tools=TOOLS).parse(text)
    assert message.content == content
    assert [(call.name, call.arguments) for call in message.tool_calls] == calls


@pytest.mark.parametrize("name", [*ANSWERS, *MALFORMED])
def test_the_events_do_not_depend_on_the_pieces(name):
    form, text = (ANSWERS.get(name) or MALFORMED[name])[:2]
    whole, parser = run(form, [text])
    want = joined(whole)
    for at in range(len(text) + 1):
        assert joined(run(form, [text[:at], text[at:]])[0]) == want
    assert joined(run(form, text)[0]) == want
    rng = random.Random(1)
    for _ in range(20):
        cuts = sorted(rng.choices(range(len(text) + 1), k=6))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert joined(run(form, pieces)[0]) == want
    texts = add_up(whole)
    assert (texts.get("content"), texts.get("reasoning")) == (parser.message.content, parser.message.reasoning)
    assert [texts[f"arguments {i}"] for i in range(len(parser.message.tool_calls))] == [
        call.arguments for call in parser.message.tool_calls
    ]


@pytest.mark.parametrize("form", FORMATS)
def test_random_texts_of_markers_are_parsed_whatever_the_pieces(form):
    rng = random.Random(form)
    words = sorted(
        {word for _, text, *_ in ANSWERS.values() for word in re.findall(r"<[^>]*>|\[[A-Z_]*\]|\w+|.", text)}
    )
    for _ in range(150):
        text = "".join(rng.choices(words, k=rng.randrange(1, 12)))
        if rng.random() < 0.5:  # an answer of this format with a wrong word
            answers = [answer for form_, answer, *_ in ANSWERS.values() if form_ == form]
            answer = rng.choice(answers)
            at = rng.randrange(len(answer))
            text = answer[:at] + rng.choice(words) + answer[at + rng.randrange(3) :]
        whole, parser = run(form, [text])
        assert joined(run(form, text)[0]) == joined(whole)
        assert [type(event) for event in whole].count(ToolCallStart) == [type(event) for event in whole].count(
            ToolCallEnd
        )
        assert all(call.name for call in parser.message.tool_calls)


def test_arguments_arrive_while_they_are_generated():
    parser = ChatParser("hermes")
    assert parser.feed('<tool_call>{"name": "weather", "argu') == []
    start, delta = parser.feed('ments": {"city": "Ro')
    assert (start.index, start.name, delta) == (0, "weather", ToolCallDelta(0, '{"city": "Ro'))
    assert parser.feed("me") == [ToolCallDelta(0, "me")]
    assert parser.feed('"}}') == [ToolCallDelta(0, '"}'), ToolCallEnd(0)]
    assert parser.feed("</tool_call>") == []
    assert parser.close() == []


def test_text_is_held_back_only_where_a_marker_may_begin():
    parser = ChatParser("hermes")
    assert parser.feed("1 < 2") == [ContentDelta("1 < 2")]
    assert parser.feed(" <tool") == []
    assert parser.feed(" x") == [ContentDelta(" <tool x")]


def test_a_call_has_an_id_of_nine_letters_and_digits():
    text = '<tool_call>{"name": "clock"}</tool_call>' * 2
    events, parser = run("hermes", [text])
    ids = [call.id for call in parser.message.tool_calls]
    assert ids == [event.id for event in events if isinstance(event, ToolCallStart)]
    assert len(set(ids)) == 2
    assert all(re.fullmatch("[A-Za-z0-9]{9}", name) for name in ids)
    message = ChatParser("mistral").parse("[TOOL_CALLS]clock[CALL_ID]abcdefgh1[ARGS]{}")
    assert message.tool_calls[0].id == "abcdefgh1"


@pytest.mark.parametrize(
    ("form", "text", "content"),
    [
        ("hermes", "<think>Hm.</think>\nYes.", "<think>Hm.</think>\nYes."),
        ("hermes", '<think><tool_call>{"name": "clock"}</think>', '<think><tool_call>{"name": "clock"}</think>'),
        (
            "gpt_oss",
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
            "Yes.",
        ),
        ("gemma4", "<|channel>thought\nHm.\n<channel|>Yes.", "Yes."),
    ],
)
def test_reasoning_is_split_off_on_request_only(form, text, content):
    message = ChatParser(form).parse(text)
    assert (message.content, message.reasoning, message.tool_calls) == (content, None, [])


def test_the_prompt_may_have_the_beginning_of_the_reasoning():
    prompt = "<|im_start|>assistant\n<think>\n"
    message = ChatParser("hermes", reasoning=True, prompt=prompt).parse("Hm.\n</think>\n\nYes.")
    assert (message.content, message.reasoning) == ("Yes.", "Hm.")
    message = ChatParser("hermes", prompt=prompt).parse("Hm.\n</think>\n\nYes.")
    assert (message.content, message.reasoning) == ("Hm.\n</think>\n\nYes.", None)
    closed = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    message = ChatParser("hermes", reasoning=True, prompt=closed).parse("Yes.")
    assert (message.content, message.reasoning) == ("Yes.", None)


def test_the_prompt_may_have_the_beginning_of_a_channel():
    prompt = "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>analysis<|message|>"
    text = "Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    message = ChatParser("gpt_oss", reasoning=True, prompt=prompt).parse(text)
    assert (message.content, message.reasoning) == ("Yes.", "Hm.")


def test_only_the_first_call_counts_without_parallel_calls():
    form, text, *_ = ANSWERS["hermes"]
    events, parser = run(form, [text], parallel_tool_calls=False)
    assert calls_of(parser.message) == [WEATHER]
    assert parser.complete
    assert isinstance(events[-1], ToolCallEnd)
    assert joined(run(form, text, parallel_tool_calls=False)[0]) == joined(events)
    assert not run(form, [text])[1].complete


@pytest.mark.parametrize(
    ("value", "kind", "want"),
    [
        ("5", "integer", 5),
        ("5", "string", "5"),
        ("5", ["string", "null"], "5"),
        ("null", ["string", "null"], None),
        ("True", "boolean", True),
        ('[1, "a"]', "array", [1, "a"]),
        ("[1, a", "array", "[1, a"),
        ("NaN", "number", "NaN"),
        ("5", None, 5),
        ("a", None, "a"),
        ("5", {"anyOf": [{"type": "string"}, {"type": "null"}]}, "5"),
        ("null", {"anyOf": [{"type": "string"}, {"type": "null"}]}, None),
        ("None", {"type": "string", "nullable": True}, None),
        ("5", {"type": "string", "nullable": True}, "5"),
        ("5", {"enum": ["5", "6"]}, "5"),
        ("5", {"const": "5"}, "5"),
        ("5", {"oneOf": [{"enum": [5, 6]}, True]}, 5),
        ("5", {"type": {}, "enum": 1, "anyOf": {}}, 5),
    ],
)
def test_bare_arguments_have_the_type_of_the_schema(value, kind, want):
    schema = kind if isinstance(kind, dict) else {} if kind is None else {"type": kind}
    tools = [{"name": "f", "parameters": {"type": "object", "properties": {"a": schema}}}]
    text = f"<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>"
    message = ChatParser("glm4", tools=tools).parse(text)
    assert calls_of(message) == [("f", {"a": want})]


@pytest.mark.parametrize("value", ["[" * 100_000, "1e999", "-1e999", "9" * 5000])
def test_values_that_json_cannot_have_become_text(value):
    call = ChatParser("glm4").parse(f"<tool_call>f\n<arg_key>a</arg_key><arg_value>{value}</arg_value></tool_call>")
    assert json.loads(call.tool_calls[0].arguments) == {"a": value}
    for form, text in (
        ("gemma4", f"<|tool_call>call:f{{a:{value}}}<tool_call|>"),
        ("gemma3", f"```tool_code\nf(a={value})\n```"),
    ):
        message = ChatParser(form).parse(text)
        assert (message.content, message.tool_calls) == (text, [])


def test_a_message_goes_into_the_next_prompt():
    text = 'Wait.<tool_call>{"name": "clock", "arguments": {"a": 1}}</tool_call>'
    message = ChatParser("hermes").parse(f"<think>Hm.</think>{text}")
    assert message.reasoning is None
    message = ChatParser("hermes", reasoning=True).parse(f"<think>Hm.</think>{text}")
    assert message.to_dict() == {
        "role": "assistant",
        "content": "Wait.",
        "reasoning_content": "Hm.",
        "tool_calls": [
            {
                "id": message.tool_calls[0].id,
                "type": "function",
                "function": {"name": "clock", "arguments": '{"a": 1}'},
            }
        ],
    }
    template = ChatTemplate("{% for c in messages[0].tool_calls %}{{ c.function.arguments.a }}{% endfor %}")
    assert template.render([message.to_dict()]) == "1"
    assert ChatMessage("Yes.").to_dict() == {"role": "assistant", "content": "Yes."}


def test_wrong_use_raises():
    for tool in ({}, {"type": "function"}, {"type": "function", "function": {"name": 1}}, {"function": "weather"}):
        with pytest.raises(ValueError, match=r"a tool must be .*'name'"):
            ChatParser("hermes", tools=[tool])
    with pytest.raises(ValueError, match="no format 'x': give one of plain, hermes, "):
        ChatParser("x")
    parser = ChatParser("plain")
    parser.parse("a")
    assert parser.close() == []
    with pytest.raises(ValueError, match="closed: make one for each answer"):
        parser.feed("b")


# ---------------------------------------------------------------------- models


def test_the_parser_of_a_model_has_the_format_of_its_template(tmp_path):
    path = byte_level_model(
        tmp_path / "m.gguf", "D", {"tokenizer.chat_template.tool_use": "<tool_call>{{ messages[0].content }}"}
    )
    with models.load(path, ["CPU"], n_ctx=64) as model:
        assert ChatParser.for_model(model).format == "plain"
        parser = ChatParser.for_model(model, tools=TOOLS, reasoning=True, parallel_tool_calls=False, prompt="<think>")
        assert parser.format == "hermes"
        message = parser.parse('Hm.</think><tool_call>{"name": "clock"}</tool_call>x')
        assert (message.content, message.reasoning, calls_of(message)) == (None, "Hm.", [CLOCK])
    with models.load(byte_level_model(tmp_path / "n.gguf"), ["CPU"], n_ctx=64) as model:
        assert ChatParser.for_model(model).format == "plain"


def test_control_tokens_are_text_on_request(tmp_path):
    specials = ("<|bos|>", "<|eos|>", *(f"<|c{i}|>" for i in range(4000)))  # most of the vocabulary
    with models.load(byte_level_model(tmp_path / "m.gguf", specials=specials), ["CPU"], n_ctx=64) as model:
        ids = list(model.generate_tokens(model.tokenize("hello"), 8))
        written = model.tokenizer.decode(ids, special=True)
        assert "<|c" in written
        assert "".join(model.generate("hello", 8, keep_special=True)) == written
        assert "".join(model.generate("hello", 8)) == model.tokenizer.decode(ids)
        assert "".join(text for _, text in model.generate(["hello"], 8, keep_special=True)) == written


#: Templates whose format of tool calls no parser reads, or that do not write the calls of an assistant at all.
UNREAD = (
    "Apertus GigaChat3 HuggingFaceTB-SmolLM3 Kimi LFM2 MiniMax-M2 MiniMax-M3 deepseek-ai-DeepSeek-V3.2 "
    "deepseek-ai-DeepSeek-V4 CohereForAI Cohere2 fireworks google-gemma-2 ibm-granite-granite-3 llama-cpp "
    "meetkai-functionary-medium-v3.2 microsoft moonshotai muse openbmb tencent upstage"
)


def test_the_calls_that_templates_write_are_read_back():
    sources = templates()
    if not sources:
        pytest.skip("the templates are not in vendor/ggml: run ./build_lib.sh --source-only")
    read, wrong = 0, []
    for name, source in sources.items():
        if name.startswith(tuple(UNREAD.split())):
            continue
        template = ChatTemplate(source, SPECIAL_TOKENS)
        (question, answer), options = CHATS["call_ended"]
        options = {"tools": TOOLS, "strftime_now": NOW.strftime}
        prompt = template.render([question], **options)
        chat = template.render([question, answer | {"content": None}], add_generation_prompt=False, **options)
        begun = os.path.commonprefix([prompt, chat])  # noqa: RUF071 - of characters
        begun = begun[: begun.rfind("<")] if begun.rfind("<") > begun.rfind(">") else begun  # not inside of a tag
        answer_text = chat[len(begun) :]
        message = ChatParser(find_format(source), tools=TOOLS, reasoning=True, prompt=begun).parse(answer_text)
        read += 1
        if [(call.name, call.arguments and json.loads(call.arguments)) for call in message.tool_calls] != [
            ("weather", {"city": "Rome's <centre>", "days": 2})
        ]:
            wrong.append((name, answer_text))
    assert not wrong
    assert read > 35
