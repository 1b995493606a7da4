"""Answers of a scripted model: tool calls, reasoning, stop strings and counts, whole and in streams."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
from fastapi.testclient import TestClient

from ggml_cffi.files import GGUFFile
from ggml_cffi.models import TokenLogprob
from ggml_cffi.models.text import TextMethods
from ggml_cffi.server import Catalog, create_app
from ggml_cffi.server.catalog import Loaded
from ggml_cffi.server.engine import Deliver, EmbedJob, Ended, Engine, Facts, Failed, Job, Token
from tests.support.byte_level_model import byte_level_model

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


class Scripted(Engine):
    """An engine whose answer is a text, one byte for each token."""

    facts = Facts(4096, True, 8, 0, 260, ("CPU",), 0)
    n_waiting = n_running = n_generated = 0
    text = ""
    error: Exception | None = None
    logprob: TokenLogprob | None = None

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.cancelled = 0

    def submit(self, job: Job | EmbedJob, deliver: Deliver) -> Callable[[], None]:
        assert isinstance(job, Job)
        self.jobs.append(job)
        data = self.text.encode()
        for token in data[: job.max_tokens]:
            deliver(Token(token, self.logprob))
        if self.error is not None:
            deliver(Failed(self.error))
        else:
            deliver(Ended("stop" if job.max_tokens is None or len(data) < job.max_tokens else "length"))
        return self.cancel

    def cancel(self) -> None:
        self.cancelled += 1

    def stop(self) -> None:
        pass


class ScriptedCatalog(Catalog):
    """A catalog with one scripted model."""

    def __init__(self, text: TextMethods, engine: Scripted) -> None:
        super().__init__({"m": "m.gguf"})
        self.model = Loaded("m", text, engine)

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[Loaded]:
        yield self.model


@pytest.fixture
def engine() -> Scripted:
    return Scripted()


@pytest.fixture
def client(tiny, engine) -> Iterator[TestClient]:
    with GGUFFile(tiny) as file, TestClient(create_app(ScriptedCatalog(TextMethods(file), engine))) as found:
        yield found


def post(client, path="/v1/chat/completions", **body):
    response = client.post(path, json={**CHAT, **body} if path.endswith("chat/completions") else body)
    assert response.status_code == 200, response.text
    return response.json()


def chunks(client, path="/v1/chat/completions", **body):
    """Return the data of the events of a stream."""
    given = {**CHAT, **body} if path.endswith("chat/completions") else body
    with client.stream("POST", path, json={**given, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        data = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    if not path.endswith("responses"):
        assert data.pop() == "[DONE]"
    return [json.loads(item) for item in data]


def test_a_tool_call_is_found_in_the_text(client, engine):
    engine.text = f"Let me see. {CALL}{CALL}"
    (choice,) = post(client, tools=[TOOL])["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    calls = [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in choice["message"]["tool_calls"]
    ]
    assert calls == [("add", {"a": 1})] * 2
    (choice,) = post(client, tools=[TOOL], parallel_tool_calls=False)["choices"]
    assert len(choice["message"]["tool_calls"]) == 1
    assert engine.cancelled == 2


def test_a_streamed_tool_call_adds_up(client, engine):
    engine.text = CALL
    *found, last = (chunk["choices"][0] for chunk in chunks(client, tools=[TOOL]))
    parts = [part for choice in found for part in choice["delta"].get("tool_calls", [])]
    assert parts[0]["id"]
    assert parts[0]["function"]["name"] == "add"
    assert json.loads("".join(part["function"]["arguments"] for part in parts)) == {"a": 1}
    assert {part["index"] for part in parts} == {0}
    assert last["finish_reason"] == "tool_calls"


def test_without_tools_a_text_like_a_call_is_content(client, engine):
    engine.text = CALL
    for body in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        (choice,) = post(client, **body)["choices"]
        assert choice["message"]["content"] == CALL
        assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_demanded_call_is_read_from_json(client, engine, choice):
    engine.text = '{"name": "add", "arguments": {"a": 1}}'
    (found,) = post(client, tools=[TOOL], tool_choice=choice)["choices"]
    (call,) = found["message"]["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("add", {"a": 1})
    assert engine.jobs[0].params.grammar is not None
    (found,) = post(client, tools=[TOOL], tool_choice=choice, max_tokens=10)["choices"]
    assert (found["message"]["content"], found["finish_reason"]) == (engine.text[:10], "length")
    (found,) = post(client, tools=[TOOL], tool_choice=choice, max_tokens=34)["choices"]
    (call,) = found["message"]["tool_calls"]
    assert (call["function"]["arguments"], found["finish_reason"]) == ('{"a":', "length")
    parts = [chunk["choices"][0]["delta"] for chunk in chunks(client, tools=[TOOL], tool_choice=choice)]
    calls = [part for delta in parts for part in delta.get("tool_calls", [])]
    assert [part["function"]["arguments"] for part in calls] == ["", *'{"a": 1}']  # as they are generated
    engine.text = f"[{engine.text}, {engine.text}]"
    (found,) = post(client, tools=[TOOL], tool_choice=choice, parallel_tool_calls=True)["choices"]
    assert len(found["message"]["tool_calls"]) == 2


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('{"name": "add", "arguments": {"a": 1}}', [("add", '{"a": 1}')]),
        ('{"name": "other", "arguments": {"a": 1}}', []),
        ('{"name": "add", "age": 3}', []),
        ('{"age": 3}', []),
        ('[{"age": 3}]', []),
    ],
)
def test_with_a_schema_and_tools_an_answer_is_a_value_or_a_call(client, engine, text, calls):
    engine.text = text
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    (found,) = post(client, tools=[TOOL], response_format=form)["choices"]
    assert engine.jobs[0].params.grammar is not None
    assert found["message"]["content"] == (None if calls else text)
    functions = [call["function"] for call in found["message"].get("tool_calls", [])]
    assert [(function["name"], function["arguments"]) for function in functions] == calls
    assert found["finish_reason"] == ("tool_calls" if calls else "stop")
    tool, form = {"type": "function", **TOOL["function"]}, {"format": {"type": "json_schema", "schema": schema}}
    (item,) = post(client, "/v1/responses", input="hi", tools=[tool], text=form)["output"]
    assert item["type"] == ("function_call" if calls else "message")
    assert engine.jobs[0].params.grammar == engine.jobs[1].params.grammar


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ("required", r'{"name": "add", "arguments": {"a": "\ud800"}}'),
        ("auto", r'<tool_call>{"name": "add\ud800", "arguments": {"a": "\ud800"}}</tool_call>'),
    ],
)
def test_half_of_a_surrogate_pair_in_a_call_reaches_the_client(client, engine, choice, text):
    engine.text = text
    (found,) = post(client, tools=[TOOL], tool_choice=choice)["choices"]
    (call,) = found["message"]["tool_calls"]
    assert call["function"]["name"] == ("add" if choice == "required" else "add\ud800")
    assert json.loads(call["function"]["arguments"]) == {"a": "\ud800"}


def test_reasoning_is_a_part_of_its_own(client, engine):
    engine.text = "<think>Hm.</think>Yes."
    found = post(client)
    (choice,) = found["choices"]
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("Hm.", "Yes.")
    assert found["usage"]["completion_tokens_details"] == {"reasoning_tokens": len("<think>Hm.")}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks(client)]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes."


def test_counts_are_those_of_tokens_also_when_text_is_held_back(client, engine):
    engine.text = "abc€END more"  # the sign has three bytes
    found = post(client, stop="END")
    assert found["choices"][0]["message"]["content"] == "abc€"
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens"] == 9
    assert found["usage"]["prompt_tokens"] == len(engine.jobs[0].ids)
    *_, last = chunks(client, stop="END", stream_options={"include_usage": True}, n=2)
    assert last["usage"]["completion_tokens"] == 18
    assert last["choices"] == []


def test_a_template_that_knows_the_role_developer_gets_it(tmp_path, engine):
    knows = "{% for message in messages %}{{ '[D]' if message.role == 'developer' else '[U]' }}{% endfor %}"
    path = byte_level_model(tmp_path / "m.gguf", knows)
    messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "hi"}]
    with GGUFFile(path) as file, TestClient(create_app(ScriptedCatalog(TextMethods(file), engine))) as client:
        post(client, messages=messages)
    assert bytes(engine.jobs[0].ids).decode() == "[D][U]"


def test_several_answers_have_seeds_of_their_own(client, engine):
    engine.text = "x"
    found = post(client, n=3, seed=7)
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    assert [job.params.seed for job in engine.jobs] == [7, 8, 9]


def test_parameters_have_openai_s_defaults(client, engine):
    post(client)
    post(client, temperature=0.5, top_p=0.5, top_k=0, min_p=0.1, repetition_penalty=1.5, logit_bias={"5": -3})
    post(client, top_p=0, ignore_eos=None)
    first, second, third = (job.params for job in engine.jobs)
    assert (first.temperature, first.top_p, first.top_k, first.min_p, first.repeat_penalty) == (1.0, 1.0, 40, 0.0, 1.0)
    assert (second.temperature, second.top_p, second.top_k, second.min_p) == (0.5, 0.5, 0, 0.1)
    assert (second.repeat_penalty, second.repeat_last_n, second.logit_bias) == (1.5, -1, {5: -3.0})
    assert (third.top_k, third.top_p, third.ignore_eos) == (1, 1.0, False)


def test_an_error_in_a_stream_is_its_last_event_and_before_it_a_status(client, engine):
    engine.error = RuntimeError("secret path")
    engine.text = ""
    response = client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert response.status_code == 500
    assert "secret" not in response.text
    engine.text = "abc"
    *_, last = chunks(client)
    assert last["error"]["type"] == "server_error"
    assert "secret" not in json.dumps(last)


def test_responses_have_items_of_each_kind(client, engine):
    engine.text = f"<think>Hm.</think>Look: {CALL}"
    tool = {"type": "function", **TOOL["function"]}
    found = post(client, "/v1/responses", input="hi", instructions="Be kind.", tools=[tool])
    assert [item["type"] for item in found["output"]] == ["reasoning", "message", "function_call"]
    reasoning, message, call = found["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert message["content"][0]["text"] == "Look:"
    assert (call["name"], json.loads(call["arguments"])) == ("add", {"a": 1})
    assert found["status"] == "completed"
    assert found["usage"]["output_tokens"] == len(engine.text)
    assert found["usage"]["output_tokens_details"] == {"reasoning_tokens": len("<think>Hm.")}


def test_the_events_of_a_response_repeat_its_items(client, engine):
    engine.text = f"Look: {CALL}"
    tool = {"type": "function", **TOOL["function"]}
    events = chunks(client, "/v1/responses", input="hi", tools=[tool])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"]["output"] == done
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == done[0]["content"][0]["text"]


def test_the_events_of_a_response_that_fails_end_with_the_error(client, engine):
    engine.text, engine.error = "abc", ValueError("no token is left")
    *_, before, last = chunks(client, "/v1/responses", input="hi")
    assert (last["type"], last["message"], last["code"], last["param"]) == ("error", "no token is left", None, None)
    assert last["error"]["type"] == "invalid_request_error"
    assert last["sequence_number"] == before["sequence_number"] + 1


def test_a_response_without_text_begins_and_ends(client, engine):
    kinds = [event["type"] for event in chunks(client, "/v1/responses", input="hi")]
    assert kinds == ["response.created", "response.in_progress", "response.completed"]


def test_the_calls_after_a_text_in_a_response_s_input_are_one_message_with_it(client, engine):
    call = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{}"}
    text = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I add."}]}
    output = {"type": "function_call_output", "call_id": "c1", "output": "1"}
    post(client, "/v1/responses", input=[{"role": "user", "content": "hi"}, text, call, call, output])
    prompt = bytes(token for token in engine.jobs[0].ids if token < 256).decode()
    assert prompt.count("assistant\n") == 2  # with the answer to come
    assert prompt.index("I add.") < prompt.index("tool\n1")


def test_the_chosen_token_is_one_of_the_most_likely_ones(client, engine):
    engine.text = "x"
    other = TokenLogprob(98, "b", b"b", -0.1)
    chosen = TokenLogprob(120, "x", b"x", -2.5, (other,))
    engine.logprob = chosen
    (choice,) = post(client, "/v1/completions", prompt="a", logprobs=1)["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{"b": -0.1, "x": -2.5}]


def test_items_of_a_response_s_input_become_messages(client, engine):
    call = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'}
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be kind."}]},
        {"role": "user", "content": "hi"},
        call,
        {**call, "call_id": "c2"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "reasoning", "summary": []},
    ]
    post(client, "/v1/responses", input=items)
    text = bytes(token for token in engine.jobs[0].ids if token < 256).decode()
    assert "system\nBe kind." in text
    assert text.index("user\nhi") < text.index("tool\n1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"previous_response_id": "r"}, "previous_response_id is not supported"),
        ({"input": [{"type": "item_reference"}]}, "input[0] has the type 'item_reference'"),
        ({"tools": [{"type": "web_search"}]}, "only functions are supported"),
        ({"tools": [{"type": "function"}]}, "tools[0] must have a 'name'"),
        ({"include": ["message.output_text.logprobs"]}, "log probabilities are not supported here"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice must be"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format must be"),
    ],
)
def test_a_wrong_response_is_refused(client, change, message):
    response = client.post("/v1/responses", json={"input": "hi", **change})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_completions_of_several_prompts_in_a_stream(client, engine):
    engine.text = "xy"
    found = chunks(client, "/v1/completions", prompt=[[97, 98], [99, 100]], echo=True, max_tokens=2)
    for i, prompt in enumerate(("ab", "cd")):
        parts = [chunk["choices"][0] for chunk in found if chunk["choices"][0]["index"] == i]
        assert "".join(part["text"] for part in parts) == f"{prompt}xy"
        assert parts[-1]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"api_keys": ["a", " "]}, "an API key is empty"),
        ({"max_prompt": 0}, "max_prompt must be at least 1"),
        ({"body_seconds": 0}, "body_seconds must be above 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create_app({"m": "m.gguf"}, **options)


def test_metrics_count_requests_and_prompts(client, engine):
    engine.text = "x"
    for _ in range(2):
        post(client, "/v1/completions", prompt="abc")
    client.post("/v1/completions", json={})
    text = client.get("/metrics").text
    assert 'ggml_cffi_requests_total{path="/v1/completions",status="200"} 2.0' in text
    assert 'ggml_cffi_requests_total{path="/v1/completions",status="400"} 1.0' in text
    assert 'ggml_cffi_prompt_tokens_total{model="m"} 6.0' in text
    assert 'ggml_cffi_first_token_seconds_count{model="m"} 2.0' in text
    assert engine.jobs[0].max_tokens == 16
