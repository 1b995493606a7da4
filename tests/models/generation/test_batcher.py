"""Continuous batching: several sequences together, threads, iterators that end early, failed runs."""

import gc
import math
import threading

import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.models import Sampler
from tests.support import PATIENCE
from tests.support.generation import batcher_of, generate_alone, generate_together, n_free_slots, random_prompts


def test_sequences_generated_together_are_as_generated_alone(devices, path, rng):
    """Sixteen prompts are in generation and two wait; runs mix chunks of some prompts with single tokens of others."""
    ids = random_prompts(rng, [3, 40, 12, 9, 30, 21, 14, 10, 2, 33, 17, 28, 5, 19, 8, 25, 11, 16])
    with models.load(path, devices, n_ctx=512, n_batch=128) as model:
        want = [generate_alone(model, one, 10) for one in ids]
        got = [[] for _ in ids]
        for number, token in generate_together(model, ids, 10, max_sequences=16):
            got[number].append(token)
        same = sum(a == b for a, b in zip(got, want, strict=True))
    # Rounding depends on the number of rows in a product: two almost equal logits may change their order.
    assert same >= len(ids) - 2
    assert all(len(one) == 10 for one in got)


def test_two_iterators_can_be_read_in_turns(path):
    with models.load(path, ["CPU"]) as model:
        want = [generate_alone(model, ids, 6) for ids in ([1, 2], [3, 4])]
        one, two = (model.generate_tokens(ids, 6, stop_at_end=False) for ids in ([1, 2], [3, 4]))
        pairs = list(zip(one, two, strict=True))
        assert [[a for a, _ in pairs], [b for _, b in pairs]] == want
        model.forward([3])


def test_threads_that_share_runs_get_their_own_results(path, rng):
    ids = random_prompts(rng, [5, 9, 14, 30])
    with models.load(path, ["CPU"], n_ctx=256, n_batch=16) as model:
        want = [generate_alone(model, one, 20) for one in ids]
        wrong = []

        def work(one, expected):
            for _ in range(10):
                got = list(model.generate_tokens(one, 20, stop_at_end=False))
                if got != expected:
                    wrong.append(got)

        jobs = [threading.Thread(target=work, args=pair) for pair in zip(ids, want, strict=True)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        assert not batcher_of(model).active
    assert len(wrong) <= 2  # where two logits were almost equal


def test_a_closed_or_deleted_iterator_frees_its_slots(path):
    with models.load(path, ["CPU"]) as model:
        for leave in ("close", "delete"):
            tokens = model.generate_tokens([1, 2], stop_at_end=False)
            next(tokens)
            if leave == "close":
                tokens.close()
            del tokens
            gc.collect()
            assert not batcher_of(model).active
        never_started = model.generate_tokens([1, 2], stop_at_end=False)
        del never_started
        model.clear_cache()
        assert n_free_slots(model) == len(batcher_of(model).cache.slots)


def test_a_failed_run_does_not_damage_the_cache(path, monkeypatch):
    with models.load(path, ["CPU"]) as model:
        want = generate_alone(model, [1, 2, 3], 6)
        tokens = model.generate_tokens([1, 2, 3], 6, stop_at_end=False, reuse=False)
        got = [next(tokens), next(tokens)]
        run = batcher_of(model).runner.run

        def fail(batch, *more):
            raise ggml.AbortedError("the run was stopped")

        monkeypatch.setattr(batcher_of(model).runner, "run", fail)
        other = model.generate_tokens([4], 1, stop_at_end=False)
        with pytest.raises(ggml.AbortedError):
            next(other)
        monkeypatch.setattr(batcher_of(model).runner, "run", run)
        assert got + list(tokens) == want


def test_closing_the_model_ends_generation(path):
    with models.load(path, ["CPU"]) as model:
        tokens = model.generate_tokens([1], stop_at_end=False)
        next(tokens)
    with pytest.raises(ggml.ClosedError, match="closed"):
        next(tokens)
    with pytest.raises(ggml.ClosedError):
        next(model.generate_tokens([1], stop_at_end=False))


# ---------------------------------------------------------------------- work of the caller during a step


def watch_runs(monkeypatch, runner, seen):
    """Append to ``seen`` each run of one batch, and of several, when it begins."""
    run, run_all = runner.run, runner.run_all
    monkeypatch.setattr(runner, "run", lambda *args: (seen.append("run"), run(*args))[1])
    monkeypatch.setattr(runner, "run_all", lambda *args: (seen.append("run all"), run_all(*args))[1])


def test_a_caller_works_in_the_run_of_its_next_token_and_before_those_of_a_long_prompt(
    two_gpus, path, rng, monkeypatch
):
    (ids,), seen = random_prompts(rng, [60]), []
    with models.load(path, two_gpus[:1], n_ctx=256, n_batch=16) as model:
        batcher = batcher_of(model)
        watch_runs(monkeypatch, batcher.runner, seen)
        sequence = batcher.add(ids, Sampler())
        for _ in range(3):
            sequence.ask()
            batcher.step(sequence, lambda: seen.append("work"))
            sequence.take()
        batcher.finish(sequence)
    assert seen == ["work", "run all"] + ["run", "work"] * 2


def test_a_caller_works_before_it_waits_for_the_model(path):
    """Another thread may embed texts for longer than a step takes."""
    with models.load(path, ["CPU"]) as model:
        batcher, works = batcher_of(model), threading.Event()
        sequence = batcher.add([1], Sampler())
        sequence.ask()
        thread = threading.Thread(target=batcher.step, args=(sequence, works.set))
        with batcher.exclusive():
            thread.start()
            assert works.wait(PATIENCE)
            assert not sequence.ready
        thread.join()
        assert sequence.ready


def test_a_caller_works_in_a_step_that_must_wait_for_slots(path):
    """One sequence at a time has the cache of a deterministic model; the caller of the first one is busy."""
    with models.load(path, ["CPU"], n_ctx=64, deterministic=True) as model:
        batcher, seen = batcher_of(model), []
        one, two = batcher.add([1], Sampler()), batcher.add([2], Sampler())
        batcher.next(one)
        one.last_call = 0, math.inf  # in another thread, which is about to ask for the next token
        two.ask()
        batcher.step(two, lambda: seen.append(two.n_cached))
        assert seen == [0]
        assert not two.ready
