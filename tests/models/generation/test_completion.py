"""Completions: the whole answer to a prompt, its tokens and the reason for its end."""

import pickle

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from tests.support.byte_level_model import byte_level_model

FRANCE = "The capital of France is"


@pytest.fixture(scope="module")
def model(smollm2):
    with models.load(smollm2, ["CPU"], n_ctx=128, n_threads=2) as model:
        model.forward([1])  # the model keeps one graph from now on
        yield model


@pytest.fixture(autouse=True)
def no_objects_left_behind():
    """Disable the check for leaked objects: the tests share a model, which keeps its last graphs."""


def test_a_completion_has_the_answer_of_the_stream(model):
    ids = list(model.generate_tokens(model.tokenize(FRANCE), 4))
    stream = model.generate(FRANCE, 4)
    assert (stream.token_ids, stream.finish_reason, stream.prompt_tokens) == ([], None, 5)
    first = next(stream)
    assert (stream.token_ids, stream.finish_reason) == (ids[:1], None)
    completion = stream.completion()
    assert completion.text == str(completion) == model.detokenize(ids) == first + completion.text[len(first) :]
    assert completion.token_ids == tuple(stream.token_ids) == tuple(ids)
    assert completion.prompt_tokens == 5
    assert completion.finish_reason == stream.finish_reason == "length"
    assert completion.timings is stream.timings
    assert completion.timings.decoded_tokens == 4
    assert stream.completion() == completion
    assert pickle.loads(pickle.dumps(completion)) == completion


def test_each_end_has_its_reason(model):
    chat = [{"role": "user", "content": "Say only the word yes."}]
    ended = model.generate(chat).completion()
    assert ended.finish_reason == "stop"
    assert not set(ended.token_ids) & model.tokenizer.end_tokens
    assert model.generate(chat, len(ended.token_ids)).completion().finish_reason == "length"
    assert model.generate(chat, len(ended.token_ids) + 1).completion().finish_reason == "stop"
    assert model.generate(FRANCE, 0).completion().finish_reason == "length"

    stopped = model.generate(FRANCE, 4, stop=".").completion()
    assert (stopped.text, stopped.finish_reason) == (" Paris", "stop")
    assert model.detokenize(stopped.token_ids) == " Paris."
    last = model.generate(FRANCE, 2, stop=".").completion()  # the stop string ends with the last token
    assert (last.text, last.finish_reason) == (" Paris", "stop")

    full = model.generate_tokens(range(100, 225), stop_at_end=False)
    assert (len(full.completion().token_ids), full.finish_reason) == (4, "length")  # the last one is not computed
    assert full.completion().text == ""


def test_a_cancelled_answer_has_the_text_so_far(model):
    stream = model.generate(FRANCE)
    first = next(stream)
    stream.cancel()
    assert stream.completion().text == first
    assert stream.finish_reason == "cancelled"
    with model.generate(FRANCE, 2) as finished:
        list(finished)
    assert finished.finish_reason == "length"  # the end of the block changes nothing
    before = model.generate(FRANCE)
    before.cancel()
    assert (before.completion().text, before.finish_reason) == ("", "cancelled")


@pytest.mark.parametrize("max_sequences", [1, 3])
def test_each_prompt_of_a_list_has_a_completion(model, max_sequences):
    prompts = [FRANCE, "One, two, three,", "Water boils at"]
    alone = [model.generate(prompt, 4, stop=".").completion() for prompt in prompts]
    stream = model.generate(prompts, 4, stop=".", max_sequences=max_sequences)
    assert stream.prompt_tokens == sum(c.prompt_tokens for c in alone)
    together = stream.completions()
    assert [c.text for c in together] == [c.text for c in alone]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert [c.finish_reason for c in together] == [c.finish_reason for c in alone] == ["stop", "length", "length"]
    for read in (stream.completion, lambda: stream.token_ids, lambda: stream.finish_reason):
        with pytest.raises(ValueError, match=r"3 prompts: completions\(\) has the answer to each"):
            read()
    assert model.generate([], 4).completions() == []
    (one,) = model.generate([FRANCE], 4, stop=".").completions()
    assert one.text == alone[0].text


def test_the_replicas_give_each_prompt_its_completion(two_gpus, path, rng):
    with models.load(path, two_gpus, "data", n_ctx=128) as model:
        requests = [models.generation.Request([i, i + 1], models.Sampler(), 3 + i, frozenset()) for i in range(3)]
        timings = models.Timings()
        tokens = models.generation.generate_on_replicas(model.batchers, requests, 4, timings)
        completions = models.Stream(tokens, requests, timings).completions()
        assert [len(c.token_ids) for c in completions] == [3, 4, 5]
        assert {c.finish_reason for c in completions} == {"length"}
        for request, c in zip(requests, completions, strict=True):
            alone = model.generate_tokens(request.ids, request.max_tokens, stop_at_end=False)
            assert list(alone) == list(c.token_ids)


def test_a_stop_string_ends_an_answer_of_which_a_replica_has_more_tokens(model):
    ids = model.generate(FRANCE, 4).completion().token_ids
    request = models.generation.Request([1], models.Sampler(), len(ids), frozenset())
    timings = models.Timings()

    def ahead():
        for token in ids:
            request.accept(token, timings)
        assert request.is_complete(64)
        yield from [(0, token) for token in ids]
        yield 0, None

    chunks = models.generation.numbered_text_chunks(ahead(), [request], model.tokenizer, (".",))
    stream = models.Stream(chunks, [request], timings)
    (completion,) = stream.completions()
    assert (completion.text, completion.finish_reason) == (" Paris", "stop")
    assert completion.token_ids == tuple(stream.token_ids) == ids[:2]
    assert stream.finish_reason == "stop"


@pytest.mark.parametrize("messages", [[], ["Hello"], [[{"role": "user", "content": "Hello"}]], None, b"Hello"])
def test_a_chat_that_is_not_one_conversation_is_refused(model, messages):
    with pytest.raises(TypeError, match=r"messages must be a text, or a list of dicts.*generate\(chats\)\.completions"):
        model.chat(messages, 1)


@pytest.mark.parametrize("prompt", [None, 5, {"role": "user", "content": "Hello"}, iter(["Hello"])])
def test_a_prompt_of_another_type_is_refused(model, prompt):
    with pytest.raises(TypeError, match="prompt must be a text, the messages of a chat, or a list of either, not"):
        model.generate(prompt, 1)


def test_a_chat_is_one_call(model):
    answer = model.chat("Who are you?", 3)
    messages = [{"role": "user", "content": "Who are you?"}]
    assert answer.text == model.chat(messages, 3).text == "".join(model.generate(messages, 3)) != ""
    assert answer.prompt_tokens == len(model.tokenize(messages))
    assert model.chat("Who are you?", 3, stop=answer.text[-1]).finish_reason == "stop"
    with pytest.raises(TypeError, match="temperature must be a number"):
        model.chat("Hello", temperature="hot")


def test_a_closed_model_ends_a_completion(path):
    with models.load(path, ["CPU"], n_ctx=64) as model:
        stream = model.generate_tokens([1], stop_at_end=False)
        next(stream)
    with pytest.raises(ggml.ClosedError):
        stream.completion()
    assert stream.finish_reason is None


def test_log_probabilities_are_those_of_the_tokens(tmp_path):
    with models.load(byte_level_model(tmp_path / "m.gguf"), ["CPU"], n_ctx=64) as model:
        assert model.generate_tokens([1, 2], 2).completion().logprobs is None
        stream = model.generate_tokens([1, 2], 3, stop_at_end=False, logprobs=0)
        assert stream.logprobs == []
        next(stream)
        assert len(stream.logprobs) == 1
        completion = stream.completion()
        assert tuple(entry.token_id for entry in completion.logprobs) == completion.token_ids
        logits = model.forward([1, 2, *completion.token_ids[:2]])[-3:].astype(np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = log_probabilities[range(3), list(completion.token_ids)]
    np.testing.assert_allclose([entry.logprob for entry in completion.logprobs], want, rtol=1e-3)
    assert pickle.loads(pickle.dumps(completion)) == completion


def test_a_complete_grammar_is_a_stop(model):
    completion = model.generate(FRANCE, 20, grammar=models.Grammar.choices(["Rome", "Paris"])).completion()
    assert completion.text in ("Rome", "Paris")
    assert completion.finish_reason == "stop"
