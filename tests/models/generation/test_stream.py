"""Streams: the end of a call from another thread, at any point of its computation."""

import threading
import time

import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from tests.support.generation import batcher_of, n_free_slots, random_prompts

LONG = 4 * ("The rain in Spain stays mainly in the plain, and the river carries it slowly to the sea. " * 5)


def consume_until_cancelled(stream):
    """Read a stream in a thread, cancel it from this one until the thread leaves its loop, and return the items."""
    items = []
    reader = threading.Thread(target=lambda: items.extend(stream))
    reader.start()
    while reader.is_alive():
        stream.cancel()
        reader.join(0.01)
    return items


def test_a_run_on_the_cpu_stops_when_another_thread_cancels_the_prompt(smollm2):
    with models.load(smollm2, ["CPU"], n_ctx=512, n_threads=1) as model:
        stream = model.generate(LONG, 5)
        assert consume_until_cancelled(stream) == []
        assert stream.cancelled
        assert stream.timings.prompt_tokens in (0, len(model.tokenize(LONG)))
        assert not model.cached  # the run did not reach its end
        assert not batcher_of(model).active
        assert n_free_slots(model) == 512
        assert list(stream) == []
        assert "".join(model.generate("The capital of France is", 1)) == " Paris"


def test_a_run_that_has_not_begun_to_compute_is_stopped_too(path, monkeypatch):
    with models.load(path, ["CPU"], n_ctx=256) as model:
        runner, allocated = batcher_of(model).runner, type(batcher_of(model).runner).allocated
        stream = model.generate_tokens([*range(40)], stop_at_end=False)

        def cancel_and_allocate(*sizes, **options):
            stream.cancel()
            return allocated(runner, *sizes, **options)

        monkeypatch.setattr(runner, "allocated", cancel_and_allocate)
        assert list(stream) == []
        assert not model.cached
        monkeypatch.undo()
        model.forward([*range(40)])  # the end of the other run did not leave a request to stop
        assert len(list(model.generate_tokens([1, 2], 5, stop_at_end=False))) == 5


def test_a_long_prompt_on_gpus_ends_with_the_batches_in_flight(two_gpus, path, monkeypatch):
    with models.load(path, two_gpus, "pipeline", n_ctx=512, n_batch=16) as model:
        runner, seen = batcher_of(model).runner, []
        run_all = runner.run_all
        stream = model.generate_tokens(4 * [*range(50)], stop_at_end=False)

        def cancel_at_the_third(batches):
            for batch in batches:
                seen.append(batch)
                if len(seen) == 3:
                    stream.cancel()
                yield batch

        monkeypatch.setattr(runner, "run_all", lambda batches: run_all(cancel_at_the_third(batches)))
        assert list(stream) == []
        assert len(seen) == 3  # of 13
        assert not batcher_of(model).active
        model.clear_cache()
        assert n_free_slots(model) == 512
        assert len(list(model.generate_tokens([1, 2], 5, stop_at_end=False))) == 5


@pytest.mark.parametrize("n_seen", [0, 1, 3])
def test_a_cancelled_stream_ends_and_frees_its_slots(devices, path, n_seen):
    with models.load(path, devices, n_ctx=256) as model:
        stream = model.generate_tokens([1, 2, 3], stop_at_end=False)
        for _ in range(n_seen):
            next(stream)
        canceller = threading.Thread(target=stream.cancel)
        canceller.start()
        canceller.join()
        assert list(stream) == []
        assert stream.timings.decoded_tokens == n_seen
        assert not batcher_of(model).active
        model.clear_cache()
        assert n_free_slots(model) == 256


def test_a_stream_ends_with_its_block(path):
    with models.load(path, ["CPU"]) as model:
        with model.generate_tokens([1, 2], stop_at_end=False) as stream:
            next(stream)
            assert len(batcher_of(model).active) == 1
        assert not batcher_of(model).active
        stream.close()
        with pytest.raises(StopIteration):
            next(stream)


@pytest.mark.parametrize("split", ["layer", "data"])
def test_a_cancelled_list_of_prompts_ends_on_all_replicas(two_gpus, path, rng, split):
    with models.load(path, two_gpus, split, n_ctx=256) as model:
        requests = [
            models.generation.Request(ids, models.Sampler(), 50, frozenset()) for ids in random_prompts(rng, [9] * 6)
        ]
        timings = models.Timings()
        tokens = models.generation.generate_on_replicas(model.batchers, requests, 4, timings)
        stream = models.Stream(tokens, requests, timings)
        next(stream)
        assert all(isinstance(number, int) for number, _ in consume_until_cancelled(stream))
        for batcher in model.batchers:  # their threads may still end their last run
            while batcher.workload:
                time.sleep(0.01)
        assert timings.decoded_tokens < 6 * 50
        assert len(list(model.generate_tokens([1, 2], 5, stop_at_end=False))) == 5


def test_cancelling_disturbs_no_other_sequence(path, rng):
    """Some threads generate, others begin and cancel; a run that was stopped by mistake would raise or lose tokens."""
    failures = []

    def generate(ids):
        try:
            for _ in range(8):
                if len(list(model.generate_tokens(ids, 20, stop_at_end=False))) != 20:
                    failures.append("a token is missing")
        except ggml.GgmlError as error:
            failures.append(repr(error))

    def begin_and_cancel(ids):
        for _ in range(20):
            consume_until_cancelled(model.generate_tokens(ids, stop_at_end=False))

    with models.load(path, ["CPU"], n_ctx=512, n_batch=16, n_threads=2) as model:
        prompts = random_prompts(rng, [5, 9, 60, 40])
        work = [generate, generate, begin_and_cancel, begin_and_cancel]
        threads = [threading.Thread(target=f, args=(ids,)) for f, ids in zip(work, prompts, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not batcher_of(model).active
        model.clear_cache()
        assert n_free_slots(model) == 512
    assert not failures


def test_parameters_are_checked_by_the_call(smollm2):
    with models.load(smollm2, ["CPU"], n_ctx=256) as model:
        for error, message, options in (
            (TypeError, "temperature must be a number, not 'hot'", {"temperature": "hot"}),
            (TypeError, "top_k must be an integer, not None", {"top_k": None}),
            (TypeError, "seed must be an integer, not 1.5", {"seed": 1.5}),
            (TypeError, "max_tokens must be an integer, not 1.5", {"max_tokens": 1.5}),
            (ValueError, "max_tokens must be at least 0, not -1", {"max_tokens": -1}),
            (TypeError, "max_sequences must be an integer, not True", {"max_sequences": True}),
            (TypeError, "stop must be a string or several strings, not 5", {"stop": 5}),
            (TypeError, "sampling must be SamplingParams, not .*as keyword arguments", {"sampling": {"seed": 1}}),
            (ValueError, "documents and template_kwargs are for messages", {"tools": [{"name": "clock"}]}),
        ):
            with pytest.raises(error, match=message):
                model.generate("Hello", **options)
        for wrong in ({"max_tokens": "4"}, {"min_p": "high"}):
            with pytest.raises(TypeError, match="must be"):
                model.generate_tokens([1], **wrong)
    with pytest.raises(ggml.ClosedError, match="model is closed"):
        model.generate("Hello")
    with pytest.raises(ggml.ClosedError, match="model is closed"):
        model.generate_tokens([1])
