"""The client of OpenAI against SmolLM2: chats, streams, tools, JSON, embeddings, errors, many at once."""

import asyncio
import json
import re

import pytest

from ggml_cffi import models
from tests.support import need
from tests.support.generation import CLEAR
from tests.support.http_server import served

openai = pytest.importorskip("openai", reason="needs pip install '.[dev]'")

CHAT = [{"role": "user", "content": "What is a GPU? Answer briefly."}]
PROMPTS = ["The capital of France is", "Water boils at", "Once upon a time", "Two and two are"]
GREEDY = {"model": "smollm2", "temperature": 0}
#: SmolLM2's chat template begins each chat with its own system message.
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "adult": {"type": "boolean"}},
    "required": ["name", "adult"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=["CPU", "Vulkan0,Vulkan1"])
def address(request, smollm2):
    """The address of a server with SmolLM2, on the CPU and on two Vulkan devices."""
    names = need(tuple(request.param.split(",")))
    options = ["--devices", ",".join(names), "--threads", "2", "--ctx", "256", "--kv-slots", "1024", "--preload"]
    with served(f"smollm2={smollm2}", *options) as found:
        yield found.url + "/v1"


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def text():
    """The vocabulary of the model, to count tokens."""
    with models.load(models.fetch("smollm2"), ["CPU"], n_ctx=64) as model:
        yield model


def test_a_chat_with_counts_and_log_probabilities(client, text):
    found = client.chat.completions.create(
        messages=CHAT, max_completion_tokens=3, logprobs=True, top_logprobs=2, **GREEDY
    )
    (choice,) = found.choices
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert choice.message.content == "A GPU ("
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(text.tokenize(CHAT)), 3)
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens) == choice.message.content
    for token in tokens:
        assert bytes(token.bytes).decode() == token.token
        assert token.top_logprobs[0].token == token.token  # greedy
        assert 0 >= token.top_logprobs[0].logprob > token.top_logprobs[1].logprob


def test_a_stream_has_the_same_text_and_the_counts_at_its_end(client):
    whole = client.chat.completions.create(messages=CHAT, max_tokens=4, **GREEDY)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.chat.completions.create(messages=CHAT, max_tokens=4, **GREEDY, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert not last.choices
    assert last.usage == whole.usage
    assert {chunk.id for chunk in chunks} == {last.id}


def test_answers_of_many_tasks_equal_those_alone(address):
    async def main():
        async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0) as client:

            async def ask(prompt):
                found = await client.completions.create(prompt=prompt, max_tokens=5, **GREEDY)
                return found.choices[0].text

            alone = [await ask(prompt) for prompt in CLEAR]
            together = await asyncio.gather(*(ask(prompt) for prompt in CLEAR * 4))
            return alone, together

    alone, together = asyncio.run(main())
    assert together == alone * 4
    assert len(set(alone)) == len(CLEAR)


def test_several_answers_with_seeds(client):
    def ask(seed):
        found = client.completions.create(
            model="smollm2", prompt=PROMPTS[2], max_tokens=4, n=2, seed=seed, temperature=1.5
        )
        assert [choice.index for choice in found.choices] == [0, 1]
        return [choice.text for choice in found.choices]

    first = ask(1)
    assert ask(1) == first
    assert first[0] != first[1]


def test_a_stop_string_ends_an_answer(client):
    found = client.completions.create(prompt=PROMPTS[0], max_tokens=9, stop=["Paris", "x"], **GREEDY)
    assert (found.choices[0].text, found.choices[0].finish_reason) == (" ", "stop")


def test_biases_penalties_and_other_parameters_reach_the_model(client, text):
    (paris,) = text.tokenize(" Paris")
    found = client.completions.create(prompt=PROMPTS[0], max_tokens=1, logit_bias={str(paris): -100}, **GREEDY)
    assert found.choices[0].text not in ("", " Paris")
    more = {"min_p": 0.99, "top_k": 5, "repetition_penalty": 1.0, "ignore_eos": True}
    found = client.completions.create(
        model="smollm2", prompt=PROMPTS[0], max_tokens=1, temperature=2, presence_penalty=0.1, extra_body=more
    )
    assert found.choices[0].text == " Paris"  # min_p leaves the likeliest token alone


def test_the_prompt_is_echoed_with_log_probabilities(client):
    found = client.completions.create(prompt=PROMPTS[0], max_tokens=2, echo=True, logprobs=1, **GREEDY)
    (choice,) = found.choices
    assert choice.text == PROMPTS[0] + " Paris."
    assert choice.logprobs.tokens == [" Paris", "."]
    assert choice.logprobs.text_offset == [len(PROMPTS[0]), len(PROMPTS[0] + " Paris")]
    assert [*choice.logprobs.top_logprobs[0]] == [" Paris"]


def test_an_answer_keeps_to_a_json_schema(client):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    found = client.chat.completions.create(messages=CHAT, max_tokens=60, response_format=form, **GREEDY)
    value = json.loads(found.choices[0].message.content)
    assert sorted(value) == ["adult", "name"]
    assert found.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_demanded_tool_is_called(client, stream):
    options = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 60, **GREEDY}
    if stream:
        calls, reason = [], None
        for chunk in client.chat.completions.create(messages=CHAT, stream=True, **options):
            for call in chunk.choices[0].delta.tool_calls or []:
                if call.id:
                    calls.append([call.function.name, ""])
                calls[-1][1] += call.function.arguments
            reason = chunk.choices[0].finish_reason or reason
    else:
        (choice,) = client.chat.completions.create(messages=CHAT, **options).choices
        calls = [[call.function.name, call.function.arguments] for call in choice.message.tool_calls]
        reason = choice.finish_reason
    ((name, arguments),) = calls
    assert name == "get_weather"
    assert json.loads(arguments)["city"] in ("Paris", "Rome")
    assert reason == "tool_calls"


def test_responses_with_text_and_with_a_tool(client):
    found = client.responses.create(model="smollm2", input=CHAT[0]["content"], max_output_tokens=3, temperature=0)
    assert found.output_text == "A GPU ("
    assert found.status == "incomplete"
    assert found.incomplete_details.reason == "max_output_tokens"
    assert found.usage.output_tokens == 3
    tool = {"type": "function", **WEATHER["function"]}
    with client.responses.stream(
        model="smollm2", input=CHAT, tools=[tool], tool_choice="required", temperature=0
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    (call,) = final.output
    assert (call.type, call.name) == ("function_call", "get_weather")
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")


def test_a_streamed_response_has_the_events_of_its_text(client):
    with client.responses.stream(model="smollm2", input="Hi", max_output_tokens=2, temperature=0) as stream:
        events = list(stream)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    (done,) = [event.text for event in events if event.type == "response.output_text.done"]
    assert text == done
    assert events[-1].type == "response.incomplete"
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_a_generating_model_embeds_beside_its_chats(client, text):
    found = client.embeddings.create(model="smollm2", input=["a cat", "a dog"])
    assert found.usage.prompt_tokens == sum(len(text.tokenize(t)) for t in ("a cat", "a dog"))
    (cat, dog) = (item.embedding for item in found.data)  # base64 on the way
    assert abs(sum(x * x for x in cat) - 1) < 1e-4
    plain = client.embeddings.create(model="smollm2", input="a dog", encoding_format="float").data[0].embedding
    assert sum(x * y for x, y in zip(dog, plain, strict=True)) > 0.99


def test_errors_have_the_client_s_own_types(client):
    with pytest.raises(openai.NotFoundError, match="the model 'nope' does not exist") as error:
        client.chat.completions.create(model="nope", messages=CHAT)
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature must be at least 0"):
        client.chat.completions.create(model="smollm2", messages=CHAT, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="at most 256") as error:
        client.completions.create(model="smollm2", prompt="word " * 300)
    assert error.value.code == "context_length_exceeded"
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError, match="the grammar"):
        client.chat.completions.create(model="smollm2", messages=CHAT, response_format=form)


def test_models_are_listed(client):
    (entry,) = client.models.list()
    assert entry.id == "smollm2"
    assert client.models.retrieve("smollm2").id == "smollm2"
    assert re.match("openai|ggml", entry.owned_by)
