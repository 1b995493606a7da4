"""Counts and times of ``generate``."""

import copy
import dataclasses
import pickle
from functools import partial

import pytest

from ggml_cffi import models
from ggml_cffi.isolate import Worker


def test_counts_are_those_of_the_ids(path):
    with models.load(path, ["CPU"], n_ctx=64, n_threads=1) as model:
        ids = list(model.generate_tokens([1, 2, 3], 5, stop_at_end=False))
        t = model.timings
        assert (t.prompt_tokens, t.reused_tokens, t.decoded_tokens, t.decode_steps) == (3, 0, len(ids), len(ids) - 1)
        assert t.decode_rate == pytest.approx(4 / t.decode_seconds)
        list(model.generate_tokens([1, 2, 3], 0, stop_at_end=False))
        assert model.timings.decoded_tokens == 0


def test_timings_are_copied_pickled_and_compared(path):
    with models.load(path, ["CPU"], n_ctx=64, n_threads=1) as model:
        list(model.generate_tokens([1, 2, 3], 2, stop_at_end=False))
        t = model.timings
    for other in (
        copy.copy(t),
        copy.deepcopy(t),
        pickle.loads(pickle.dumps(t)),
        models.Timings(**dataclasses.asdict(t)),
    ):
        assert other == t
        other.add_token()
        assert other.decoded_tokens == t.decoded_tokens + 1


def test_results_of_a_model_leave_a_worker_process(path):
    with Worker(partial(models.load, n_ctx=64, n_threads=1), path, ["CPU"]) as worker:
        assert len(list(worker.generate_tokens([1, 2, 3], 3, stop_at_end=False))) == 3
        assert worker.timings().decoded_tokens == 3
        (placed,) = worker.placement()
        assert (placed.device, placed.layers) == ("CPU", [0, 1, 2])
        assert worker.plan().devices[0].layers == (0, 1, 2)
