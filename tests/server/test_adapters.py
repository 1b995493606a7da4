"""Clients of other projects against the server: `pip install '.[adapters]'` installs all of them.

Each test needs its package only, and is skipped without it.
"""

from __future__ import annotations

import importlib
import re
import runpy
from collections.abc import Iterator
from typing import Literal

import numpy as np
import pytest

from ggml_cffi import models
from tests.support import ROOT
from tests.support.http_server import served

# The packages of others warn on import.
pytestmark = [pytest.mark.nightly, pytest.mark.filterwarnings("ignore")]

QUESTION = "What is the capital of France? Answer with one word."


@pytest.fixture(scope="module")
def url(smollm2) -> Iterator[str]:
    """The address of a server with SmolLM2 on the CPU."""
    with served(f"smollm2={smollm2}", "--devices", "CPU", "--ctx", "1024", "--preload") as found:
        yield found.url + "/v1"


@pytest.fixture(scope="module")
def model(smollm2):
    """The same model in this process."""
    with models.load(smollm2, ["CPU"], n_ctx=256) as model:
        model.forward([1])  # the model keeps one graph from now on
        yield model


@pytest.fixture(autouse=True)
def no_objects_left_behind():
    """Disable the check for leaked objects: the tests share a model, which keeps its last graphs."""


@pytest.fixture
def answer(model):
    """The first tokens of the model's answer."""
    return model.chat(QUESTION, 5).text


def need_package(name: str):
    return pytest.importorskip(name, reason=f"needs {name}: pip install '.[adapters]'")


#: The examples of the page by their headings, and the package that each needs.
PAGE = (ROOT / "docs" / "integrations.md").read_text()
EXAMPLES = re.findall(r"^## ([^\n]+)\n[^#]*?```\{code-block\} python\n(.*?)```", PAGE, re.M | re.S)


@pytest.mark.parametrize(("heading", "code"), EXAMPLES, ids=[heading for heading, _ in EXAMPLES])
def test_the_example_on_the_page_runs(url, tmp_path, capsys, heading, code):
    for name in re.findall(r"^(?:import|from) (\w+)", code, re.M):
        need_package(name)
    (tmp_path / "example.py").write_text(code.replace("http://127.0.0.1:8000/v1", url))
    runpy.run_path(str(tmp_path / "example.py"))
    assert capsys.readouterr().out.strip()


def test_the_page_has_an_example_of_each_client():
    assert [heading for heading, _ in EXAMPLES] == [
        "OpenAI",
        "LangChain",
        "LlamaIndex",
        "LiteLLM",
        "Instructor",
        "DSPy",
    ]


def test_langchain_chats_streams_and_embeds(url, model, answer):
    langchain_openai = need_package("langchain_openai")
    settings = {"base_url": url, "api_key": "none"}
    llm = langchain_openai.ChatOpenAI(model="smollm2", temperature=0, max_tokens=5, **settings)
    message = llm.invoke(QUESTION)
    assert message.content == answer
    assert message.usage_metadata["output_tokens"] == 5
    assert message.response_metadata["finish_reason"] == "length"
    assert "".join(chunk.content for chunk in llm.stream(QUESTION)) == answer
    embeddings = langchain_openai.OpenAIEmbeddings(model="smollm2", check_embedding_ctx_length=False, **settings)
    np.testing.assert_allclose(embeddings.embed_documents(["a text"]), model.embed(["a text"]), atol=1e-2)


def test_langchain_has_tools_and_structured_output(url):
    langchain_openai = need_package("langchain_openai")
    pydantic = importlib.import_module("pydantic")

    class Weather(pydantic.BaseModel, extra="forbid"):
        """The weather of a city."""

        city: Literal["Paris", "Rome"]

    llm = langchain_openai.ChatOpenAI(model="smollm2", temperature=0, max_tokens=64, base_url=url, api_key="none")
    (call,) = llm.bind_tools([Weather], tool_choice="Weather").invoke("What is the weather in Rome?").tool_calls
    assert call["name"] == "Weather"
    assert call["args"]["city"] in ("Paris", "Rome")
    found = llm.with_structured_output(Weather, method="json_schema").invoke("What is the weather in Rome?")
    assert isinstance(found, Weather)


def test_llama_index_completes_chats_and_streams(url, model, answer):
    need_package("llama_index.llms.openai_like")
    llms = importlib.import_module("llama_index.llms.openai_like")
    core = importlib.import_module("llama_index.core.llms")
    settings = {"model": "smollm2", "api_base": url, "api_key": "none", "temperature": 0, "max_tokens": 5}
    llm = llms.OpenAILike(is_chat_model=True, context_window=1024, **settings)
    message = core.ChatMessage(role="user", content=QUESTION)
    assert llm.chat([message]).message.content == answer
    assert "".join(part.delta or "" for part in llm.stream_chat([message])) == answer
    text = llms.OpenAILike(is_chat_model=False, context_window=1024, **settings)
    prompt = "The capital of France is"
    assert text.complete(prompt).text == "".join(model.generate(prompt, 5))


def test_litellm_chats_streams_and_embeds(url, model, answer):
    litellm = need_package("litellm")
    settings = {"model": "openai/smollm2", "api_base": url, "api_key": "none"}
    messages = [{"role": "user", "content": QUESTION}]
    found = litellm.completion(messages=messages, temperature=0, max_tokens=5, **settings)
    assert found.choices[0].message.content == answer
    assert found.usage.completion_tokens == 5
    stream = litellm.completion(messages=messages, temperature=0, max_tokens=5, stream=True, **settings)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answer
    vectors = litellm.embedding(input=["a text"], encoding_format="float", **settings)
    np.testing.assert_allclose(vectors.data[0]["embedding"], model.embed(["a text"])[0], atol=1e-2)


@pytest.mark.parametrize("mode", ["JSON_SCHEMA", "TOOLS"])
def test_instructor_returns_objects(url, mode):
    instructor, openai = need_package("instructor"), need_package("openai")
    pydantic = importlib.import_module("pydantic")

    class City(pydantic.BaseModel, extra="forbid"):
        name: Literal["Paris", "Rome"]

    with openai.OpenAI(base_url=url, api_key="none") as connection:
        client = instructor.from_openai(connection, mode=instructor.Mode[mode])
        messages = [{"role": "user", "content": QUESTION}]
        city = client.chat.completions.create(
            model="smollm2", temperature=0, max_tokens=64, messages=messages, response_model=City
        )
    assert city.name in ("Paris", "Rome")


def test_dspy_calls_the_model(url, answer):
    dspy = need_package("dspy")
    lm = dspy.LM("openai/smollm2", api_base=url, api_key="none", temperature=0, max_tokens=5, cache=False)
    assert lm(QUESTION) == [answer]
