"""Facts of the logits of a batch: those of each row alone, and the same choices of samplers."""

import numpy as np
import pytest

from ggml_cffi import models
from ggml_cffi.models import Sampler, Timings
from ggml_cffi.models.generation import Request, generate_many
from ggml_cffi.models.generation.logits_facts import LogitsFacts, log_sum_exp, logits_facts
from ggml_cffi.models.generation.logprobs import Logprobs, TokenLogprob, token_logprob
from tests.support.byte_level_model import byte_level_model
from tests.support.generation import batcher_of


@pytest.mark.parametrize("n_vocab", [5, 8193, 50_001])
def test_facts_of_rows_are_those_of_each_row_alone(rng, n_vocab):
    logits = (rng.standard_normal((7, n_vocab)) * 5).astype(np.float32)
    logits[3, 2] = np.nan
    logits[4, 1] = -np.inf
    facts = logits_facts(logits, range(7), [0, 4, 6])
    assert [each.best for each in facts] == [int(row.argmax()) for row in logits]
    before = logits.copy()
    logits[:] = 0  # the next run
    assert [i for i, each in enumerate(facts) if each.kept is not None] == [0, 4, 6]
    for i in (0, 4, 6):
        np.testing.assert_array_equal(facts[i].kept.logits[facts[i].row], before[i])
        assert facts[i].kept.log_sum(facts[i].row) == log_sum_exp(before[i : i + 1])[0]
    want = np.logaddexp.reduce(before[0].astype(np.float64))
    np.testing.assert_allclose(facts[0].kept.log_sum(0), want, rtol=1e-6)
    assert logits_facts(before[:2], [], [1])[0] == LogitsFacts()
    whole = logits_facts(logits, [], range(7))
    logits[:] = 1
    assert not whole[6].kept.logits.any()


def test_samplers_use_the_facts_that_they_are_given_once():
    sampler, logits = Sampler(), np.array([0.0, 1.0, 0.5], np.float32)
    sampler.facts = LogitsFacts(best=2)
    assert [sampler(logits), sampler(logits)] == [2, 1]
    assert (Sampler().needs_best, Sampler().needs_kept) == (True, False)
    assert not Sampler(temperature=1).needs_best
    assert not Sampler(logit_bias={1: 1.0}).needs_best


def test_answers_together_have_the_tokens_and_log_probabilities_of_those_alone(tmp_path):
    prompts = [[1, 2, 3], [4], [5, 6], [7] * 9]
    options = [{"logprobs": 2}, {}, {"logprobs": 0, "logit_bias": {9: 30.0}}, {"temperature": 1.0, "seed": 3}]
    with models.load(byte_level_model(tmp_path / "m.gguf"), ["CPU"], n_ctx=64, kv_slots=256, n_threads=1) as model:

        def run(chosen):
            found = [
                Request(prompts[i], Sampler(tokenizer=model.tokenizer, **options[i]), 6, frozenset()) for i in chosen
            ]
            steps = []
            tokens = generate_many(
                batcher_of(model), iter([*enumerate(found)]), 4, Timings(), lambda: steps.append(len(numbers))
            )
            numbers = []
            for number, _ in tokens:
                numbers.append(number)
            # The tokens of a step come before the next one, which takes several runs if it has prompts.
            assert steps == sorted(steps)
            assert set(steps) == {*range(0, 6 * len(found), len(found))}
            return found

        alone, together = [run([i])[0] for i in range(4)], run(range(4))
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        np.testing.assert_allclose([t.logprob for t in one.logprobs], [t.logprob for t in other.logprobs], atol=1e-2)
    assert together[2].token_ids == [9] * 6


def test_log_probabilities_are_computed_when_they_are_read(tmp_path):
    calls = []

    def compute(i):
        calls.append(i)
        return entries[i]

    entries = [TokenLogprob(i, "", b"", 0.0) for i in range(3)]
    found = Logprobs()
    found.append(entries[0])
    found.append(lambda: compute(1))
    found.append(lambda: compute(2))
    assert (len(found), calls) == (3, [])
    assert [found[-2], found[1]] == [entries[1]] * 2
    assert calls == [1]
    assert [*found] == found[:] == entries
    assert (calls, found[3:]) == ([1, 2], [])
    with pytest.raises(IndexError):
        found[3]
    # A sampler computes what was not read before it appends the next.
    with models.load(byte_level_model(tmp_path / "m.gguf"), ["CPU"], n_ctx=64, n_threads=1) as model:
        sampler, logits = Sampler(tokenizer=model.tokenizer, logprobs=1), np.zeros((1, 260), np.float32)
        for token in (7, 9):
            logits[:] = 0
            logits[0, token] = 1
            (sampler.facts,) = logits_facts(logits, [], [0])
            assert sampler(logits[0]) == token
            logits[:] = np.nan
        assert [(t.token_id, t.top[0].token_id) for t in sampler.logprobs] == [(7, 7), (9, 9)]
        assert sampler.logprobs[0].logprob == sampler.logprobs[1].logprob == pytest.approx(1 - np.log(259 + np.e))


def test_a_known_log_sum_is_taken(tmp_path):
    with models.load(byte_level_model(tmp_path / "m.gguf"), ["CPU"], n_ctx=64, n_threads=1) as model:
        logits = np.zeros(260, np.float32)
        assert token_logprob(logits, 1, 0, model.tokenizer, 3.0).logprob == -3.0
        assert token_logprob(logits, 1, 0, model.tokenizer).logprob == pytest.approx(-np.log(260))
