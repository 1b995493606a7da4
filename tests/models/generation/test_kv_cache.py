"""The KV cache: reuse of prefixes, eviction, dtypes."""

import itertools
import threading

import pytest

from ggml_cffi import models
from ggml_cffi.core.dtypes import as_type
from ggml_cffi.models.generation.kv_cache import common_length
from tests.support import llama_float64, relative_error
from tests.support.generation import batcher_of, generate_alone, generate_together, n_free_slots, random_prompts


def test_common_length_counts_equal_tokens_at_the_beginning():
    assert common_length([1, 2, 3], [1, 2, 4]) == 2
    assert common_length([1, 2], [1, 2, 3]) == 2
    assert common_length([], [1]) == 0
    for n, length in itertools.product(range(70), (1, 2, 69, 300)):
        other = [*range(n), -1, *range(n + 1, length)]
        assert common_length([*range(length)], other) == min(n, length)
    assert common_length([5], [6]) == 0


def test_a_prompt_reuses_the_slots_of_its_prefix(path, rng):
    (ids,) = random_prompts(rng, [60])
    with models.load(path, ["CPU"], n_ctx=256) as model:
        first = list(model.generate_tokens(ids, 8, stop_at_end=False))
        assert model.timings.reused_tokens == 0
        assert model.cached == [ids + first[:7]]
        again = list(model.generate_tokens(ids, 8, stop_at_end=False))
        assert again == first
        assert model.timings.reused_tokens == 59
        longer = list(model.generate_tokens(ids + first, 4, stop_at_end=False))
        assert model.timings.reused_tokens == 67
        assert longer == generate_alone(model, ids + first, 4)
        list(model.generate_tokens(ids, 2, stop_at_end=False, reuse=False))
        assert model.timings.reused_tokens == 0
        assert len(model.cached) == 2
        model.clear_cache()
        assert model.cached == []
        assert n_free_slots(model) == 256


def test_kept_sequences_are_evicted_oldest_first(path, rng):
    with models.load(path, ["CPU"], n_ctx=256) as model:
        for ids in random_prompts(rng, [100, 101, 102]):
            list(model.generate_tokens(ids, 2, stop_at_end=False))
        assert [len(ids) for ids in model.cached] == [102, 103]
        model.forward([1] * 200)
        assert model.cached == []


def test_sequences_that_do_not_fit_together_are_evicted_and_computed_anew(path, rng):
    """Two long sequences share a cache that holds one and a half: the later one is computed anew where necessary."""
    ids = random_prompts(rng, [150, 150])
    with models.load(path, ["CPU"], n_ctx=256) as model:
        want = [generate_alone(model, one, 40) for one in ids]
        got = [[], []]
        for number, token in generate_together(model, ids, 40, max_sequences=2):
            got[number].append(token)
        assert got == want
        one, two = (model.generate_tokens(text, 40, stop_at_end=False) for text in ids)
        assert [next(one), next(two), next(one), next(two)] == [want[0][0], want[1][0], want[0][1], want[1][1]]
        two.close()
        assert list(one) == want[0][2:]
        results = [None, None]

        def work(i):
            results[i] = list(model.generate_tokens(ids[i], 40, stop_at_end=False))

        jobs = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        assert results == want


@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 1e-2), ("bf16", 3e-2), ("q8_0", 3e-2)])
def test_the_cache_can_have_other_dtypes(path, rng, kind, tolerance):
    (ids,) = random_prompts(rng, [40])
    want = llama_float64.Reference(path).forward(ids)
    with models.load(path, ["CPU"], kv_dtype=kind, n_batch=16) as model:
        assert relative_error(model.forward(ids), want) < tolerance
        assert batcher_of(model).cache.layers[0][0].k.dtype is as_type(kind)


def test_impossible_dtypes_of_the_cache_are_refused(path):
    with pytest.raises(ValueError, match="kv_dtype"):
        models.load(path, ["CPU"], kv_dtype="i32")
    with pytest.raises(ValueError, match="blocks of 256"):
        models.load(path, ["CPU"], kv_dtype="q4_k")
