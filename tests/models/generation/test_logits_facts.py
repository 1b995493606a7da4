"""Facts of the logits of a batch: those of each row alone, and the same choices of samplers."""

import numpy as np
import pytest

from ggml_cffi import models
from ggml_cffi.models import Sampler, Timings
from ggml_cffi.models.generation import Request, generate_many
from ggml_cffi.models.generation.logits_facts import LogitsFacts, log_sum_exp, logits_facts
from ggml_cffi.models.generation.logprobs import token_logprob
from tests.support.byte_level_model import byte_level_model
from tests.support.generation import batcher_of


@pytest.mark.parametrize("n_vocab", [5, 8193, 50_001])
def test_facts_of_rows_are_those_of_each_row_alone(rng, n_vocab):
    logits = (rng.standard_normal((7, n_vocab)) * 5).astype(np.float32)
    logits[3, 2] = np.nan
    logits[4, 1] = -np.inf
    facts = logits_facts(logits, range(7), [0, 4, 6])
    assert [each.best for each in facts] == [int(row.argmax()) for row in logits]
    for i, each in enumerate(facts):
        assert each.log_sum == (log_sum_exp(logits[i : i + 1])[0] if i in (0, 4, 6) else None)
    want = np.logaddexp.reduce(logits[0].astype(np.float64))
    np.testing.assert_allclose(facts[0].log_sum, want, rtol=1e-6)
    assert logits_facts(logits[:2], [], [1])[0] == LogitsFacts()


def test_samplers_use_the_facts_that_they_are_given_once():
    sampler, logits = Sampler(), np.array([0.0, 1.0, 0.5], np.float32)
    sampler.facts = LogitsFacts(best=2)
    assert [sampler(logits), sampler(logits)] == [2, 1]
    assert (Sampler().needs_best, Sampler().needs_log_sum) == (True, False)
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


def test_a_known_log_sum_is_taken(tmp_path):
    with models.load(byte_level_model(tmp_path / "m.gguf"), ["CPU"], n_ctx=64, n_threads=1) as model:
        logits = np.zeros(260, np.float32)
        assert token_logprob(logits, 1, 0, model.tokenizer, 3.0).logprob == -3.0
        assert token_logprob(logits, 1, 0, model.tokenizer).logprob == pytest.approx(-np.log(260))
