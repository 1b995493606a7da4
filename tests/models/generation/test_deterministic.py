"""Deterministic models: equal calls have equal logits, bit for bit, beside other sequences and after any others."""

import threading

import numpy as np
import pytest

from ggml_cffi import models
from ggml_cffi.models import Sampler, Timings
from ggml_cffi.models.generation import Request, generate_one
from tests.support.generation import batcher_of, n_free_slots, random_prompts

N = 4


class Recorder(Sampler):
    """A greedy sampler that keeps the logits."""

    def __init__(self):
        super().__init__()
        self.logits = []

    def __call__(self, logits, previous=()):
        self.logits.append(logits.copy())
        return super().__call__(logits, previous)


def begin(model, ids, *, reuse=True):
    """Return an iterator of the tokens after a prompt, and the recorder of their logits."""
    recorder = Recorder()
    request = Request(ids, recorder, N, frozenset(), reuse)
    batcher = min(model.batchers, key=lambda batcher: batcher.workload)
    return generate_one(batcher, request, Timings()), recorder


def logits_of(model, ids, *, reuse=True):
    """Return the logits of the tokens after a prompt."""
    tokens, recorder = begin(model, ids, reuse=reuse)
    assert len(list(tokens)) == N
    return np.stack(recorder.logits)


def load(path, devices, split="layer", **options):
    return models.load(path, devices, split, n_ctx=256, n_batch=16, deterministic=True, **options)


@pytest.fixture
def prompts(rng):
    first, *others = random_prompts(rng, [40, 40, 23, 12])
    return [first, [*first[:35], *others[0][35:]], *others[1:]]  # the second begins as the first


def test_logits_do_not_depend_on_the_cache(devices, path, prompts):
    with load(path, devices) as model:
        want = [logits_of(model, ids) for ids in prompts]
        assert model.deterministic
        for ids, expected in zip(prompts, want, strict=True):  # the cache holds another prompt
            np.testing.assert_array_equal(logits_of(model, ids), expected)
            np.testing.assert_array_equal(logits_of(model, ids), expected)  # the cache holds this prompt
            np.testing.assert_array_equal(logits_of(model, ids, reuse=False), expected)
        logits_of(model, prompts[0])
        np.testing.assert_array_equal(logits_of(model, prompts[1]), want[1])  # the cache holds its beginning
        assert model.cached == [prompts[1][:32]]
        model.clear_cache()
        np.testing.assert_array_equal(logits_of(model, prompts[1]), want[1])
        model.clear_cache()
        assert n_free_slots(model) == 256


def test_logits_do_not_depend_on_sequences_in_turns(devices, path, prompts):
    with load(path, devices) as model:
        want = [logits_of(model, ids) for ids in prompts]
        forward = model.forward(prompts[0])
        streams, recorders = zip(*(begin(model, ids) for ids in prompts), strict=True)
        for _ in range(N):
            for stream in streams:
                next(stream)
            np.testing.assert_array_equal(model.forward(prompts[0]), forward)
        for recorder, expected in zip(recorders, want, strict=True):
            np.testing.assert_array_equal(np.stack(recorder.logits), expected)


@pytest.mark.parametrize("split", ["layer", "data"])
def test_logits_do_not_depend_on_other_threads(two_gpus, path, prompts, split):
    with load(path, two_gpus, split) as model:
        want = [logits_of(model, ids) for ids in prompts]
        found = [[] for _ in prompts]
        threads = [
            threading.Thread(target=lambda ids=ids, own=own: own.extend(logits_of(model, ids) for _ in range(2)))
            for ids, own in zip(prompts, found, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for own, expected in zip(found, want, strict=True):
        assert len(own) == 2
        for logits in own:
            np.testing.assert_array_equal(logits, expected)


def test_texts_of_a_list_are_those_of_single_calls(smollm2):
    prompts = ["The weather today is nice and", "In 1492 Columbus", "def fibonacci(n):\n    if"]
    options = {"temperature": 0.9, "top_k": 0, "top_p": 1.0, "seed": 3}
    with models.load(smollm2, ["CPU"], n_ctx=256, n_threads=1, deterministic=True) as model:
        assert not batcher_of(model).runner.weights.backends[-1].follows_load
        # Each prompt of a list has a seed of its own.
        want = ["".join(model.generate(text, 6, **options | {"seed": 3 + i})) for i, text in enumerate(prompts)]
        for _ in range(2):
            got = dict.fromkeys(range(3), "")
            for number, chunk in model.generate(prompts, 6, **options):
                got[number] += chunk
            assert [got[i] for i in range(3)] == want


def test_vectors_do_not_depend_on_the_texts_beside_them(devices, path, prompts):
    with load(path, devices) as model:
        together = model.embed(prompts)
        for ids, vector in zip(prompts, together, strict=True):
            np.testing.assert_array_equal(model.embed([ids])[0], vector)


def test_saved_keys_and_values_are_refused(path, tmp_path):
    with load(path, ["CPU"]) as model:
        list(model.generate_tokens([*range(20)], 2, stop_at_end=False))
        assert model.save_cache(tmp_path / "cache.gguf") == 16
        with pytest.raises(ValueError, match="uses no results of another process: load it without deterministic"):
            model.load_cache(tmp_path / "cache.gguf")


def test_replicas_must_be_on_devices_of_one_kind(two_gpus, path, monkeypatch):
    from ggml_cffi.core.device import Device

    monkeypatch.setattr(Device, "description", property(lambda self: f"GPU {self.name}"))
    with pytest.raises(ValueError, match=r"different kinds round in different ways.*choose devices of one kind"):
        load(path, two_gpus, "data")
