"""Grammars, logits processors and log probabilities in the answers of models."""

import gc
import json
import re
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import jsonschema
import numpy as np
import pytest
from pydantic import BaseModel

from ggml_cffi import models
from ggml_cffi.isolate import Worker
from ggml_cffi.models import Grammar, Sampler, SamplingParams
from tests.support.byte_level_model import BOS, END, EOS, byte_level_model
from tests.support.generation import batcher_of, tokenizer_of
from tests.support.json_schemas import SCHEMAS, invalid_answers

ANY = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


class Person(BaseModel, extra="forbid"):
    kind: Literal["cat", "dog"]
    friend: bool


@pytest.fixture
def model(bytes_path):
    """Open a random model of bytes: at temperature 1 it chooses among all that a grammar allows."""
    with models.load(bytes_path, ["CPU"], n_ctx=512) as model:
        yield model


def answers(model, n, **options):
    """Return ``n`` answers at temperature 1."""
    return [answer.text for answer in model.generate(["x"] * n, **(ANY | {"seed": 0} | options)).completions()]


# ---------------------------------------------------------------------- kinds of grammars


def test_answers_match_a_regular_expression_as_a_whole(model):
    pattern = r"(Jan|Feb)-[0-9]{2}(\.[a-c]{1,3})?é?"
    found = answers(model, 40, grammar=Grammar.regex(pattern))
    assert all(re.fullmatch(pattern, text) for text in found)
    assert len(set(found)) > 20


def test_answers_are_one_of_the_choices(model):
    choices = ["yes", "no", 'mayb\u00e9 "x"\n', "\\d", "noon"]
    assert set(answers(model, 60, grammar=Grammar.choices(choices))) == set(choices)


def test_answers_follow_lark_and_gbnf_grammars(model):
    lark = 'start: number (" + " number)*\nnumber: /[1-9]/'
    gbnf = 'root ::= number (" + " number)*\nnumber ::= [1-9]'
    for grammar in (Grammar.lark(lark), Grammar.gbnf(gbnf)):
        found = answers(model, 40, grammar=grammar, max_tokens=200)
        assert all(re.fullmatch(r"[1-9]( \+ [1-9])*", text) for text in found)
        assert {len(text) for text in found} > {1, 5}


def test_answers_of_json_object_are_objects(model):
    # Sixty characters of random bytes are seldom a whole object: the braces close because the bias makes it likely.
    bias = {ord("}"): 12.0, ord('"'): 8.0}
    found = answers(model, 20, grammar=Grammar.json_object(), logit_bias=bias, max_tokens=400)
    assert all(isinstance(json.loads(text), dict) for text in found)


def test_a_schema_may_be_a_mapping_a_text_or_a_pydantic_model(model):
    for grammar in (PERSON, Grammar.json_schema(PERSON), Grammar.json_schema(json.dumps(PERSON))):
        for text in answers(model, 10, grammar=grammar):
            jsonschema.validate(json.loads(text), PERSON)
    for text in answers(model, 10, grammar=Grammar.json_schema(Person)):
        Person.model_validate_json(text)


def test_json_has_bounded_whitespace_or_none(model):
    grammar = Grammar.json_schema({"const": {"a": [1, 2]}})
    spaced = {ord(" "): 50.0, ord("\n"): 50.0, ord("\t"): 50.0}
    for text in answers(model, 5, grammar=grammar, logit_bias=spaced):
        assert json.loads(text) == {"a": [1, 2]}
        assert " " in text
        assert re.fullmatch(r"\S+((\n{1,2}[ \t]{0,20}| )\S+)*", text)
    compact = Grammar.json_schema({"const": {"a": [1, 2]}}, whitespace=False)
    assert set(answers(model, 5, grammar=compact, logit_bias=spaced)) == {'{"a":[1,2]}'}


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_random_answers_are_valid_for_their_schema(model, number):
    for text in answers(model, 10, grammar=SCHEMAS[number], max_tokens=500):
        jsonschema.validate(json.loads(text), SCHEMAS[number], format_checker=jsonschema.FormatChecker())


def test_schema_bound_answers_of_a_language_model_are_valid(smollm2):
    with models.load(smollm2, ["CPU"], n_ctx=4096) as model:
        assert invalid_answers(model, len(SCHEMAS), max_tokens=240) == []


@pytest.mark.nightly  # the random answers above are bound by the same schemas
def test_a_thousand_schema_bound_answers_are_valid(smollm2):
    with models.load(smollm2, ["CPU"], n_ctx=4096) as model:
        assert invalid_answers(model, 1000, max_tokens=240) == []


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grammar.regex("a("), "regex.*unclosed group"),
        (lambda: Grammar.json_schema({"type": "strin"}), "json_schema.*Invalid type: strin"),
        (lambda: Grammar.json_schema({"not": {"type": "string"}}), 'Unimplemented keys: \\["not"\\]'),
        (lambda: Grammar.json_schema("{"), "not JSON"),
        (lambda: Grammar.json_schema({"const": float("nan")}), "the JSON schema has a value that is not JSON"),
        (lambda: Grammar.lark("foo:"), "no start rule found"),
        (lambda: Grammar.gbnf('start ::= "a"'), "No 'root' rule found"),
        (lambda: Grammar.gbnf("root ::= ("), "Expected '\\)'"),
        (lambda: Grammar.choices([]), "choices"),
        (lambda: Grammar.choices(["a", ""]), "choices"),
        (lambda: SamplingParams(grammar={"type": "strin"}), "Invalid type: strin"),
    ],
)
def test_a_grammar_that_is_not_valid_is_refused_with_the_reason(make, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make()


def test_values_that_are_no_grammar_are_refused():
    for make, value in ((Grammar.regex, 1), (Grammar.lark, b"start"), (Grammar.gbnf, None), (Grammar.choices, "yes")):
        with pytest.raises(TypeError, match=f"not {value!r}"):
            make(value)
    for value in ([1], int, "[1]"):
        with pytest.raises(TypeError, match="must be a mapping, a text or a Pydantic model"):
            Grammar.json_schema(value)
    with pytest.raises(TypeError, match=r"the JSON schema has a value that is not JSON: .*set"):
        Grammar.json_schema({"enum": {1, 2}})
    with pytest.raises(ValueError, match=r"Sampler\(tokenizer=\.\.\.\)"):
        Sampler(grammar=PERSON)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(
        ImportError, match=r"a grammar needs llguidance, of the extra grammar: pip install '.\[grammar\]'"
    ):
        Grammar.regex("a")


def test_a_grammar_too_complex_for_llguidance_ends_its_request(model):
    rules = [f'a{i}: "a" b{i}\nb{i}: "b" | "a" a{i}' for i in range(1000)]
    grammar = Grammar.lark("\n".join(["start: " + " | ".join(f"a{i}" for i in range(1000)), *rules]))
    with ThreadPoolExecutor() as pool:
        other = pool.submit(lambda: [*model.generate_tokens([1, 2], 30, stop_at_end=False)])
        with pytest.raises(ValueError, match=r"the grammar stopped at token 97: .*row has 3000 items; max is 2000"):
            answers(model, 1, grammar=grammar)
        assert len(other.result()) == 30


# ---------------------------------------------------------------------- the end of an answer


def test_an_end_token_is_allowed_only_where_the_grammar_is_complete(tokenizer):
    logits = np.full(260, -5.0, np.float32)
    logits[[EOS, END, BOS]] = 9.0, 8.0, 10.0
    logits[ord("a")] = 1.0
    sampler = Sampler(tokenizer=tokenizer, grammar=Grammar.regex("a{2,4}"))
    assert [sampler(logits) for _ in range(3)] == [ord("a"), ord("a"), EOS]
    assert sampler.complete


def test_an_answer_ends_with_its_grammar_and_without_an_end_token(model):
    five = Grammar.regex("[ab]{5}")
    for limit, n, reason in ((50, 5, "stop"), (5, 5, "stop"), (3, 3, "length")):
        answer = model.generate_tokens([1], limit, grammar=five, **ANY).completion()
        assert (len(answer.token_ids), answer.finish_reason) == (n, reason)
    empty = model.generate("x", 50, grammar=Grammar.regex("a*"), logit_bias={ord("a"): -100.0}).completion()
    assert (empty.text, empty.finish_reason) == ("", "stop")


def test_ids_that_are_no_tokens_and_control_tokens_are_never_chosen(tokenizer):
    logits = np.zeros(300, np.float32)
    logits[256:] = 10
    sampler = Sampler(tokenizer=tokenizer, grammar=Grammar.regex("(?s).{50}"), **ANY, seed=1)
    assert all(sampler(logits) < 256 for _ in range(20))


def test_a_vocabulary_without_end_token_is_bound_too(tmp_path):
    path = byte_level_model(tmp_path / "m.gguf", specials=(), without=("tokenizer.ggml.eos_token_id",))
    with models.load(path, ["CPU"], n_ctx=128) as model:
        assert not model.tokenizer.end_tokens
        assert set(answers(model, 20, grammar=Grammar.choices(["ab", "c"]))) == {"ab", "c"}


def test_parameters_that_leave_no_token_end_the_request(model):
    with pytest.raises(ValueError, match="together exclude every token"):
        list(model.generate("x", grammar=Grammar.regex("a"), logit_bias={ord("a"): -np.inf}))
    assert len(list(model.generate_tokens([1], 3, stop_at_end=False))) == 3


def test_ignore_eos_continues_after_an_end_token(model):
    always_eos = {"logit_bias": {EOS: 100.0}}
    assert list(model.generate("x", 5, **always_eos)) == []
    assert model.timings.decoded_tokens == 0
    list(model.generate("x", 5, ignore_eos=True, **always_eos))
    assert model.timings.decoded_tokens == 5
    assert list(model.generate_tokens([1], 5, ignore_eos=True, **always_eos)) == [EOS] * 5


# ---------------------------------------------------------------------- the loop


def test_the_tokens_that_may_follow_are_asked_for_before_each_run(model, monkeypatch):
    events, runner, prepare = [], batcher_of(model).runner, Sampler.prepare
    run = runner.run
    monkeypatch.setattr(Sampler, "prepare", lambda self: (events.append("prepare"), prepare(self))[1])
    monkeypatch.setattr(runner, "run", lambda batch, *more: (events.append("run"), run(batch))[1])
    list(model.generate("x", grammar=Grammar.regex("[ab]{3}")))
    assert events == ["prepare", "run"] * 3


def test_the_tokens_of_a_vocabulary_are_prepared_once_and_freed_with_its_tokenizer(model, bytes_path, monkeypatch):
    import llguidance

    made, new = [], llguidance.LLTokenizer
    monkeypatch.setattr(llguidance, "LLTokenizer", lambda *args, **kwargs: made.append(1) or new(*args, **kwargs))
    model.tokenizer = tokenizer = tokenizer_of(bytes_path)
    for pattern in ("a", "b"):
        assert "".join(model.generate("x", grammar=Grammar.regex(pattern))) == pattern
    assert len(made) == 1
    alive = weakref.ref(tokenizer)
    model.tokenizer = None
    del tokenizer
    gc.collect()
    assert alive() is None


def test_several_grammars_share_runs(model):
    with ThreadPoolExecutor(8) as pool:
        grammars = [Grammar.regex(f"{i}[ab]{{{i}}}") for i in range(1, 9)]
        found = pool.map(lambda grammar: "".join(model.generate("x", grammar=grammar, **ANY)), grammars)
        for i, text in enumerate(found, 1):
            assert re.fullmatch(f"{i}[ab]{{{i}}}", text)


def test_an_exception_of_a_logits_processor_ends_its_request_only(model):
    def fail_later(token_ids, logits):
        if len(token_ids) == 8:
            raise ZeroDivisionError("on purpose")

    want = list(model.generate_tokens([5, 6], 20, stop_at_end=False))
    with ThreadPoolExecutor(4) as pool:
        good = [pool.submit(lambda: list(model.generate_tokens([5, 6], 20, stop_at_end=False))) for _ in range(3)]
        bad = pool.submit(lambda: list(model.generate_tokens([1, 2], 20, logits_processors=[fail_later])))
        with pytest.raises(ZeroDivisionError, match="on purpose"):
            bad.result()
        assert all(len(future.result()) == len(want) for future in good)
    assert not batcher_of(model).active
    stream = model.generate_tokens([1, 2], 20, stop_at_end=False, logits_processors=[fail_later])
    got = []
    with pytest.raises(ZeroDivisionError):
        got.extend(token for token in iter(lambda: next(stream), None))
    with pytest.raises(ZeroDivisionError):  # several prompts are one request of their caller
        list(model.generate(["xxxxx", "y"], 20, logits_processors=[fail_later]))
    assert list(model.generate_tokens([5, 6], 20, stop_at_end=False)) == want


@pytest.mark.timeout(60)  # it waited for itself
@pytest.mark.parametrize("use", ["forward", "generate", "cached", "close"])
def test_a_logits_processor_that_uses_its_model_is_refused(model, use):
    def processor(*_):
        {
            "forward": lambda: model.forward([1]),
            "generate": lambda: list(model.generate_tokens([1], 1)),
            "cached": lambda: model.cached,
            "close": lambda: model.batchers[0].close(),
        }[use]()

    with pytest.raises(RuntimeError, match="cannot use the model that called it: load a second one"):
        list(model.generate_tokens([1, 2], 3, logits_processors=[processor]))
    assert len(list(model.generate_tokens([1, 2], 3, stop_at_end=False))) == 3


def test_logits_processors_get_the_prompt_and_the_answer(model):
    seen = []

    def record(token_ids, logits):
        seen.append(token_ids.tolist())
        logits[:] = -1
        logits[100 + len(seen)] = 1

    assert list(model.generate_tokens([1, 2], 3, logits_processors=[record])) == [101, 102, 103]
    assert seen == [[1, 2], [1, 2, 101], [1, 2, 101, 102]]


def test_a_bias_beyond_the_vocabulary_is_refused_by_the_call(model):
    with pytest.raises(ValueError, match="token id 260 is not in the vocabulary of 260"):
        model.generate("x", logit_bias={260: 1.0})


def test_a_deterministic_model_has_equal_answers_with_a_grammar(bytes_path):
    with models.load(bytes_path, ["CPU"], n_ctx=512, n_threads=1, deterministic=True) as model:
        assert answers(model, 4, grammar=PERSON) == answers(model, 4, grammar=PERSON)


# ---------------------------------------------------------------------- log probabilities


def test_log_probabilities_of_an_answer_are_those_of_the_models_logits(devices, bytes_path):
    with models.load(bytes_path, devices, n_ctx=128) as model:
        stream = model.generate_tokens([1, 2, 3], 4, stop_at_end=False, logprobs=2, **ANY, seed=3)
        ids = list(stream)
        logits = model.forward([1, 2, 3, *ids])[2:-1].astype(np.float64)
        want = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        assert [found.token_id for found in stream.logprobs] == ids
        for found, row in zip(stream.logprobs, want, strict=True):
            np.testing.assert_allclose(found.logprob, row[found.token_id], atol=2e-3)
            best = np.sort(row)[::-1][:2]
            np.testing.assert_allclose([top.logprob for top in found.top], best, atol=2e-3)


def test_log_probabilities_grow_with_the_answer_and_leave_out_the_end_token(model):
    stream = model.generate("x", grammar=Grammar.regex("ab*"), logit_bias={ord("b"): -100.0, EOS: 9.0}, logprobs=0)
    assert stream.logprobs == []
    assert list(stream) == ["a"]
    assert [(found.token, found.bytes, found.top) for found in stream.logprobs] == [("a", b"a", ())]
    several = model.generate(["x", "y"], grammar=Grammar.choices(["ab", "c"]), logprobs=1, **ANY, seed=2)
    for answer in several.completions():
        assert answer.text in ("ab", "c")
        assert "".join(found.token for found in answer.logprobs) == answer.text
    without = model.generate("x", 3)
    assert without.completion().logprobs is None
    assert without.logprobs == []


# ---------------------------------------------------------------------- worker processes


def test_parameters_travel_to_a_worker_process(bytes_path):
    forced = ord("q")

    def force(token_ids, logits):
        logits[forced] = 100

    with Worker(lambda: models.load(bytes_path, ["CPU"], n_ctx=128)) as worker:
        assert "".join(worker.generate("x", grammar=Grammar.choices(["only this"]))) == "only this"
        assert "".join(worker.generate("x", 3, logits_processors=[force])) == "qqq"
        params = SamplingParams(logit_bias={ord("z"): 100.0}, presence_penalty=-1.0)
        assert "".join(worker.generate("x", 2, sampling=params)) == "zz"
        answer = worker.generate("x", grammar=Grammar.regex("[ab]{3}"), logprobs=1).completion()
        assert [found.token for found in answer.logprobs] == list(answer.text)
        with pytest.raises(ValueError, match="not in the vocabulary"):
            worker.generate("x", logit_bias={999: 1.0})

        def fail(token_ids, logits):
            raise KeyError(len(token_ids))

        with pytest.raises(KeyError):
            list(worker.generate("x", logits_processors=[fail]))
        file = (bytes_path).open("rb")
        with file, pytest.raises(TypeError, match="pickle"):
            worker.generate("x", logits_processors=[lambda ids, logits: file.read()])
