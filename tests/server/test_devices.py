"""Small random models on the CPU and on two Vulkan devices: answers, streams, vectors and scores against float64."""

import json

import httpx
import numpy as np
import pytest

from tests.server.conftest import TEMPLATE
from tests.support import bert_float64, bound_of_products, llama_float64, need
from tests.support.byte_level_model import BOS, byte_level_model
from tests.support.http_server import served

PROMPT = [BOS, *b"abc"]
ASK = {"model": "chat", "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True, "logprobs": 2}
#: The letters, after the tokens of BERT's own.
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"\u2581{letter}" for letter in "abcdefghij"), *map(str, range(36))]
VOCABULARY = {
    "tokenizer.ggml.model": "bert",
    "tokenizer.ggml.tokens": WORDS,
    "tokenizer.ggml.unknown_token_id": 1,
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.seperator_token_id": 3,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a llama with two layers, and of an encoder with three."""
    folder, rng = tmp_path_factory.mktemp("devices"), np.random.default_rng(2)
    layer = {f"blk.1.{name}_norm.weight": np.ones(64, np.float32) for name in ("attn", "ffn")}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        layer[f"blk.1.{name}.weight"] = (rng.standard_normal((64, 64)) * 0.1).astype(np.float32)
    chat = byte_level_model(folder / "chat.gguf", TEMPLATE, {"llama.block_count": 2}, layer)
    return chat, bert_float64.random_model(folder / "embed.gguf", rng, **VOCABULARY)


@pytest.fixture(scope="module", params=[("CPU",), ("Vulkan0", "Vulkan1")], ids=["CPU", "two devices"])
def devices(request):
    """Names of the devices."""
    return request.param if request.param == ("CPU",) else need(request.param)


@pytest.fixture(scope="module")
def both(files, devices):
    """A server of both models."""
    options = ["--devices", ",".join(devices), "--threads", "1", "--ctx", "512"]
    with served(f"chat={files[0]}", f"embed={files[1]}", *options) as found:
        yield found


def post(server, path, body):
    response = server.post(path, body)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_completion_has_the_log_probabilities_of_float64(both, files, devices):
    found = post(both, "/v1/completions", ASK)
    assert found["usage"] == {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}
    (entry,) = [entry for entry in both.get("/v1/models").json()["data"] if entry["id"] == "chat"]
    assert entry["devices"][: len(devices)] == list(devices)
    reference, ids, bound = llama_float64.Reference(files[0]), list(PROMPT), bound_of_products(devices, 2e-3)
    for logprob in found["choices"][0]["logprobs"]["token_logprobs"]:
        logits = reference.forward(ids)[-1]
        want = logits - logits.max()
        want -= np.log(np.exp(want).sum())
        assert abs(logprob - want.max()) < bound * np.abs(logits).max()
        ids.append(int(want.argmax()))
    assert found["choices"][0]["text"] == bytes(token for token in ids[4:] if token < 256).decode(errors="replace")


def test_a_stream_adds_up_to_the_whole_answer(both):
    body = {**ASK, "stream": True, "stream_options": {"include_usage": True}}
    whole = post(both, "/v1/completions", ASK)
    with httpx.stream("POST", both.url + "/v1/completions", json=body, timeout=600) as response:
        data = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert data.pop() == "[DONE]"
    *chunks, last = map(json.loads, data)
    assert last["usage"] == whole["usage"]
    parts = [chunk["choices"][0] for chunk in chunks]
    assert "".join(part["text"] for part in parts) == whole["choices"][0]["text"]
    assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
    chosen = [x for part in parts if part["logprobs"] for x in part["logprobs"]["token_logprobs"]]
    np.testing.assert_allclose(chosen, whole["choices"][0]["logprobs"]["token_logprobs"], atol=1e-3)


def test_the_client_of_openai(both):
    """SmolLM2 on two software devices takes minutes, so that test_openai.py asks it on the CPU only in each run."""
    openai = pytest.importorskip("openai", reason="needs pip install '.[dev]'")
    messages, greedy = [{"role": "user", "content": "a"}], {"model": "chat", "temperature": 0}
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    bias = {"logit_bias": {"9": -100, "10": -100, "13": -100, "32": -100}}  # no white space
    with openai.OpenAI(base_url=both.url + "/v1", api_key="none", max_retries=0) as client:
        create = client.chat.completions.create
        whole = create(messages=messages, response_format=form, **greedy, **bias).choices[0]
        assert json.loads(whole.message.content)["n"] in (1, 2)
        assert whole.finish_reason == "stop"
        stream = create(messages=messages, response_format=form, stream=True, **greedy, **bias)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.message.content
        call = create(messages=messages, tools=[tool], tool_choice="required", **greedy, **bias).choices[0]
        assert json.loads(call.message.tool_calls[0].function.arguments)["n"] in (1, 2)
        assert call.finish_reason == "tool_calls"
        assert len(client.embeddings.create(model="embed", input=["a b", "c"]).data) == 2
        with pytest.raises(openai.NotFoundError):
            create(model="other", messages=messages)


def test_vectors_and_scores_of_documents_equal_float64(both, files, devices):
    texts = ["a b c", "c b", "a b c d", "j"]
    ids = [post(both, "/tokenize", {"model": "embed", "prompt": text})["tokens"] for text in texts]
    assert ids[0] == [2, 4, 5, 6, 3]
    want, bound = bert_float64.Reference(files[1]).embed(ids, "mean"), bound_of_products(devices, 5e-3)
    found = post(both, "/v1/embeddings", {"model": "embed", "input": texts})
    assert found["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert np.abs([item["embedding"] for item in found["data"]] - want).max() < bound
    scores = want[1:] @ want[0]
    documents = [texts[1], {"text": texts[2]}, texts[3]]
    found = post(both, "/v1/rerank", {"model": "embed", "query": texts[0], "documents": documents})
    results = found["results"]
    assert [result["index"] for result in results] == np.argsort(-scores).tolist()
    for result in results:
        assert abs(result["relevance_score"] - scores[result["index"]]) < 2 * bound
        assert result["document"] == {"text": texts[1 + result["index"]]}
    nulls = {"return_documents": None, "top_n": None}
    again = post(both, "/v1/rerank", {"model": "embed", "query": texts[0], "documents": documents, **nulls})
    assert again["results"] == results
    options = {"query": texts[0], "documents": documents, "top_n": 1, "return_documents": False}
    assert post(both, "/v1/rerank", {"model": "embed", **options})["results"] == [
        {name: value for name, value in results[0].items() if name != "document"}
    ]
    beside = post(both, "/v1/embeddings", {"model": "chat", "input": [PROMPT]})["data"][0]["embedding"]
    assert abs(np.linalg.norm(beside) - 1) < 1e-3
