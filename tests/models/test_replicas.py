"""Replicas of a model, and the distribution of requests over them."""

import threading
from contextlib import closing

import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.models.generation.requests import choose_batcher
from tests.support import PATIENCE, relative_error
from tests.support.splits import PROMPT, answers


def test_texts_are_dealt_to_replicas(two_gpus, path, monkeypatch):
    prompts = [[i, i + 1, i + 2, 4, 5, 6, 7, 8, 9, 10, 11] for i in range(6)]
    with models.load(path, two_gpus[:1], "layer") as model:
        want = answers(model, prompts)
        vectors = model.embed(prompts)
    with models.load(path, two_gpus, "data") as model:
        assert answers(model, prompts) == want
        assert len(model.cached) == 6
        # as one list, by both at once
        model.clear_cache()
        assert not model.cached
        let_both_begin(model, monkeypatch)
        found = {}
        for number, token in deal(model, prompts, 3):
            found.setdefault(number, []).append(token)
        # Keys are in other rows than before, which changes the rounding of sums: later tokens may differ.
        assert [found[i][0] for i in range(6)] == [ids[0] for ids in want]
        assert [len(found[i]) for i in range(6)] == [3] * 6
        each = [len(batcher.cache.kept) for batcher in model.batchers]
        assert sum(each) == 6
        assert all(each)
        assert {backend.name for _, backend in model.assignment()} == set(two_gpus)
        assert relative_error(model.embed(prompts), vectors) < 1e-3


def let_both_begin(model, monkeypatch):
    """Let the first run of each replica wait for that of the other: a quick one may take all texts before."""
    both = threading.Barrier(len(model.batchers))
    for batcher in model.batchers:
        first, run = iter([True]), batcher.runner.run

        def wait(*args, first=first, run=run):
            if next(first, False):
                both.wait(PATIENCE)
            return run(*args)

        monkeypatch.setattr(batcher.runner, "run", wait)


def deal(model, prompts, n):
    """Yield token ids for several prompts, because the model has no vocabulary for texts."""
    from ggml_cffi.models.generation.requests import Request, generate_on_replicas
    from ggml_cffi.models.generation.sampling import Sampler
    from ggml_cffi.models.generation.timings import Timings

    requests = [Request(list(ids), Sampler(), n, frozenset()) for ids in prompts]
    timings = Timings()
    with closing(generate_on_replicas(model.batchers, requests, 2, timings)) as dealt:  # one at each
        for number, token in dealt:
            if token is not None:
                yield number, token
    assert timings.prompt_tokens == sum(map(len, prompts))


def test_an_error_in_one_replica_ends_all(two_gpus, path, monkeypatch):
    with models.load(path, two_gpus, "data") as model:
        second = model.batchers[1]

        def fail(*args):
            raise ggml.GgmlError("the computation failed: failed")

        monkeypatch.setattr(second.runner, "run", fail)
        with pytest.raises(ggml.GgmlError, match="the computation failed"):
            list(deal(model, [PROMPT] * 6, 3))
        assert not any(batcher.active for batcher in model.batchers)
        # and one that is left early
        monkeypatch.undo()
        stream = deal(model, [PROMPT] * 6, 30)
        next(stream)
        stream.close()
        for batcher in model.batchers:
            with batcher.exclusive():
                assert not batcher.active
    assert not any(t.name == "ggml_cffi replica" for t in threading.enumerate())


def test_a_request_goes_to_the_replica_that_keeps_its_prefix(two_gpus, path):
    with models.load(path, two_gpus, "data") as model:
        first, second = model.batchers
        text = model.generate_tokens(PROMPT, 3, stop_at_end=False)
        next(text)  # the first replica is busy: the next request goes to the second
        other = [9] * 11
        answers(model, [other])
        assert [ids[:11] for ids in second.cache.kept.values()] == [other]
        text.close()
        answers(model, [other])
        assert model.timings.reused_tokens == 10
        assert choose_batcher(model.batchers) is first
