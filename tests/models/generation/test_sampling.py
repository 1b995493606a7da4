"""Sampling: parameters, and the choice of a token from logits."""

from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest

from ggml_cffi.models import Sampler, SamplingParams
from ggml_cffi.models.generation import SamplingOptions

WRONG = (
    {"temperature": float("inf")},
    {"top_k": -1},
    {"top_p": 1.5},
    {"min_p": 2},
    {"repeat_penalty": 0},
    {"repeat_last_n": -2},
    {"seed": -1},
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


def test_logits_that_are_not_finite_give_some_token():
    assert Sampler(temperature=1.0)(np.full(4, np.nan, np.float32)) in range(4)


def test_sampling_params_are_checked_when_they_are_made():
    for wrong in WRONG:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SamplingParams(**wrong)
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
