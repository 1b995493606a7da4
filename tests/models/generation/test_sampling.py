"""Sampling: parameters, and the choice of a token from logits."""

import warnings
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest

from ggml_cffi.models import Sampler, SamplingParams
from ggml_cffi.models.generation import SamplingOptions
from ggml_cffi.models.generation.best_tokens import best_tokens

WRONG = (
    {"temperature": float("inf")},
    {"top_k": -1},
    {"top_p": 1.5},
    {"min_p": 2},
    {"repeat_penalty": 0},
    {"repeat_last_n": -2},
    {"seed": -1},
    {"presence_penalty": float("nan")},
    {"frequency_penalty": float("inf")},
    {"logit_bias": {0: float("nan")}},
    {"logit_bias": {-1: 0.0}},
    {"logprobs": -1},
)
MISTYPED = (
    {"logit_bias": [1]},
    {"logit_bias": {"1": 0.0}},
    {"logits_processors": print},
    {"logits_processors": [1]},
    {"grammar": "root"},
    {"logprobs": True},
    {"ignore_eos": 1},
)
LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


def chosen(n, **options):
    """Return the tokens that ``n`` samplers with different seeds choose from :data:`LOGITS`."""
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    return [Sampler(seed=seed, **options)(LOGITS) for seed in range(n)]


def test_sampled_frequencies_follow_the_probabilities():
    assert Sampler()(LOGITS) == 0
    np.testing.assert_allclose(np.bincount(chosen(2000), minlength=4) / 2000, [0.5, 0.3, 0.15, 0.05], atol=0.04)


def test_top_k_top_p_and_temperature_limit_the_choice():
    assert set(chosen(200, top_k=2)) == {0, 1}
    assert set(chosen(200, top_p=0.75)) == {0, 1}
    assert set(chosen(50, top_p=1e-9)) == {0}
    assert set(chosen(50, temperature=0.01)) == {0}


def test_min_p_limits_the_choice_before_the_temperature_is_applied():
    assert set(chosen(200, min_p=0.5)) == {0, 1}
    assert set(chosen(300, min_p=0.2, temperature=5.0)) == {0, 1, 2}


def test_repeat_penalty_covers_the_last_tokens():
    logits = np.array([2.0, 1.9], np.float32)
    assert Sampler(repeat_penalty=3.0)(np.array([2.0, 1.9, -1.0], np.float32), [0]) == 1
    assert Sampler(repeat_penalty=3.0, repeat_last_n=1)(logits, [0, 1]) == 0
    assert Sampler(repeat_penalty=3.0, repeat_last_n=-1)(np.array([-1.0, -2.0], np.float32), [0]) == 1
    assert Sampler(repeat_penalty=3.0, repeat_last_n=0)(logits, [0]) == 0
    assert Sampler(repeat_penalty=3.0)(logits, np.array([0, 0])) == 1


def test_logits_that_are_not_finite_give_some_token():
    assert Sampler(temperature=1.0)(np.full(4, np.nan, np.float32)) in range(4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{}, {"top_k": 0}, {"top_k": 0, "top_p": 1.0}, {"top_k": 0, "min_p": 0.1}])
def test_a_single_logit_that_is_not_finite_is_chosen_from_a_large_vocabulary(rng, value, options):
    logits = rng.standard_normal(5001).astype(np.float32)
    for token in (0, 2345, 5000):
        broken = logits.copy()
        broken[token] = value
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert {Sampler(temperature=1.0, **options)(broken) for _ in range(5)} == {token}


def test_extreme_parameters_give_tokens_without_a_warning():
    logits = np.array([0.0, 3.0, 2.0, -1.0], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Sampler(logit_bias={3: 1e300})(logits) == 3
        assert Sampler(logit_bias={1: -1e300})(logits) == 2
        assert Sampler(repeat_penalty=1e300)(logits, [0, 3]) == 1
        assert Sampler(repeat_penalty=1e-300)(logits, [0, 2]) == 2
        assert Sampler(repeat_penalty=1e308)(np.array([-1e3, 2.0, 1.0], np.float32), [0, 1]) == 2
        assert Sampler(temperature=5e-324, seed=0)(logits) == 1
        for penalty in ("presence_penalty", "frequency_penalty"):
            often, never = Sampler(**{penalty: -1e300}), Sampler(**{penalty: 1e300})
            assert [often(logits) for _ in range(3)] == [1, 1, 1]
            assert [never(logits) for _ in range(3)] == [1, 2, 0]


def test_logits_that_a_processor_makes_nan_are_refused():
    def broken(_, logits):
        logits[2] = np.nan

    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="NaN after logits_processors: exclude a token with -inf"):
            Sampler(logits_processors=[broken], temperature=temperature)(LOGITS)
    with pytest.raises(ValueError, match="the model's logits are NaN"):
        Sampler(logit_bias={0: 1.0})(np.full(4, np.nan, np.float32))


def test_sampling_params_are_checked_when_they_are_made():
    for wrong in WRONG:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SamplingParams(**wrong)
    for mistyped in MISTYPED:
        with pytest.raises(TypeError, match=next(iter(mistyped))):
            SamplingParams(**mistyped)
    with pytest.raises(FrozenInstanceError):
        SamplingParams().top_k = 3


def test_options_replace_fields_of_sampling_params():
    params = SamplingParams(temperature=0.5, seed=1)
    assert SamplingParams.from_options() == SamplingParams()
    assert SamplingParams.from_options(params) is params
    assert SamplingParams.from_options(params, seed=2) == SamplingParams(temperature=0.5, seed=2)
    assert Sampler(params, top_k=3).params == SamplingParams(temperature=0.5, seed=1, top_k=3)
    with pytest.raises(TypeError, match="unknown sampling option 'temprature': the options are temperature, top_k"):
        SamplingParams.from_options(temprature=1.0)
    with pytest.raises(ValueError, match="top_k"):
        SamplingParams.from_options(params, top_k=-1)


def test_options_and_sampling_params_have_the_same_fields():
    assert set(SamplingOptions.__annotations__) == {field.name for field in fields(SamplingParams)}


def test_each_of_several_sequences_has_its_own_seed():
    params = SamplingParams(temperature=1.0, seed=5)
    assert [params.for_sequence(i).seed for i in range(3)] == [5, 6, 7]
    assert SamplingParams().for_sequence(3).seed is None


def test_presence_and_frequency_penalty_cover_the_tokens_of_the_answer():
    logits = np.array([2.0, 1.9, 1.0], np.float32)
    sampler = Sampler(presence_penalty=0.2)
    assert [sampler(logits, [0, 1, 2]) for _ in range(3)] == [0, 1, 0]  # the prompt's tokens do not count
    # frequency: 2.0, 1.9 | 1.6, 1.9 | 1.6, 1.5 | 1.2, 1.5 | 1.2, 1.1
    sampler = Sampler(frequency_penalty=0.4)
    assert [sampler(logits) for _ in range(5)] == [0, 1, 0, 1, 0]
    sampler = Sampler(presence_penalty=-2.0)
    assert [sampler(np.roll(logits, i)) for i in range(3)] == [0, 0, 0]
    np.testing.assert_array_equal(logits, np.array([2.0, 1.9, 1.0], np.float32))


def test_logit_bias_forces_and_excludes_tokens():
    assert Sampler(logit_bias={3: 100.0})(LOGITS) == 3
    assert set(chosen(200, logit_bias={0: -np.inf, 2: -100})) == {1, 3}
    counts = np.bincount(chosen(2000, logit_bias={3: np.log(9)}), minlength=4) / 2000
    np.testing.assert_allclose(counts, np.array([0.5, 0.3, 0.15, 0.45]) / 1.4, atol=0.04)
    with pytest.raises(ValueError, match="together exclude every token"):
        Sampler(logit_bias=dict.fromkeys(range(4), -np.inf))(LOGITS)


def test_logits_processors_change_a_copy_in_order_before_all_other_steps():
    seen = []

    def double(token_ids, logits):
        seen.append((token_ids.copy(), logits.copy()))
        logits *= 2

    def exclude_the_last_token(token_ids, logits):
        seen.append((token_ids.copy(), logits.copy()))
        logits[token_ids[-1]] = -np.inf

    before = LOGITS.copy()
    sampler = Sampler(logits_processors=[double, exclude_the_last_token], logit_bias={1: -9.0}, repeat_penalty=2.0)
    assert sampler(LOGITS, [2, 0]) == 3
    assert seen[0][0].dtype == np.int32
    assert seen[0][1].dtype == np.float32
    for ids, _ in seen:
        np.testing.assert_array_equal(ids, [2, 0])
    np.testing.assert_array_equal(seen[0][1], before)
    np.testing.assert_array_equal(seen[1][1], 2 * before)
    np.testing.assert_array_equal(LOGITS, before)


def test_a_logits_processor_that_returns_logits_is_refused():
    with pytest.raises(TypeError, match="must change the logits in place, and return nothing"):
        Sampler(logits_processors=[lambda ids, logits: logits * 2])(LOGITS)


def test_log_probabilities_are_those_of_the_unmodified_logits(rng, tokenizer):
    def reference(logits):
        shifted = logits.astype(np.float64) - logits.max()
        return shifted - np.log(np.exp(shifted).sum())

    ban = {int(i): -np.inf for i in range(100)}
    sampler = Sampler(tokenizer=tokenizer, temperature=0.7, top_k=3, logit_bias=ban, repeat_penalty=2.0, logprobs=5)
    for scale in (1, 30):
        logits = (rng.standard_normal(260) * scale).astype(np.float32)
        token, want = sampler(logits, [200, 201]), reference(logits)
        found = sampler.logprobs[-1]
        assert found.token_id == token
        np.testing.assert_allclose(found.logprob, want[token], rtol=1e-6, atol=1e-6)
        best = np.argsort(want)[::-1][:5]
        assert [t.token_id for t in found.top] == best.tolist()
        np.testing.assert_allclose([t.logprob for t in found.top], want[best], rtol=1e-6, atol=1e-6)
    sampler = Sampler(tokenizer=tokenizer, logprobs=0)
    sampler(np.eye(260, dtype=np.float32)[0xC3])
    (found,) = sampler.logprobs
    assert (found.bytes, found.token, found.top) == (b"\xc3", "\ufffd", ())
    with pytest.raises(ValueError, match="need the tokenizer"):
        Sampler(logprobs=1)


@pytest.mark.parametrize("size", [1, 31, 1000, 5000])
def test_best_tokens_are_the_first_of_all_in_order(rng, size):
    logits = rng.permutation(size).astype(np.float32) - size / 2
    logits[rng.choice(size, size // 3, replace=False)] = -np.inf
    order = np.argsort(logits)[::-1][: np.isfinite(logits).sum()]
    for k in (1, 2, 20, 100, size):
        np.testing.assert_array_equal(best_tokens(logits, k), order[:k])
    few = np.full(size, -np.inf, np.float32)
    few[-1] = 1
    assert best_tokens(few, 10).tolist() == [size - 1]
    assert best_tokens(np.full(size, np.nan, np.float32), 10).size == min(size, 10)
    few[0] = np.nan
    assert best_tokens(few, 10).tolist() == [0, size - 1][:size]


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.4},
        {"min_p": 0.001},
        {"min_p": 0.01},
        {"top_p": 0.9999},
        {"top_k": 700},
        {"top_k": 700, "top_p": 0.1},
        {},
    ],
)
def test_a_large_vocabulary_is_limited_as_a_sort_of_all_limits_it(rng, options):
    logits = (2 * rng.standard_normal(20_000)).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p = np.sort(p / p.sum())[::-1]
    k = options.get("top_k", p.size)
    n_p = np.searchsorted(np.cumsum(p[:k]), options.get("top_p", 1.0) * p[:k].sum()) + 1
    n = min(k, n_p, np.count_nonzero(p >= options.get("min_p", 0) * p[0]))
    allowed = set(np.argsort(logits)[::-1][:n].tolist())
    # At this temperature all are drawn about equally often.
    sampler = Sampler(**({"top_k": 0, "top_p": 1.0, "temperature": 1000.0, "seed": 1} | options))
    drawn = {sampler(logits) for _ in range(300)}
    assert drawn <= allowed
    assert len(drawn) > 0.9 * n * (1 - np.exp(-300 / n))
