"""Pipeline stages: failures, graphs for all lengths. The order of work is in ``tests/internals``."""

import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.parallel.program import ParallelProgram
from tests.support import relative_error
from tests.support.splits import PROMPT, answers


@pytest.mark.parametrize("what", ["writing", "computing"])
def test_a_batch_in_flight_that_fails(two_gpus, path, monkeypatch, what):
    with models.load(path, two_gpus, "pipeline", n_batch=16) as model:
        want = answers(model, [PROMPT * 4])
        model.clear_cache()
        stage = model.batchers[0].runner.stages[1]
        calls = []

        def fail_at_second(real, concerned, *args):
            if concerned:
                calls.append(args)
                if len(calls) == 2:
                    raise ggml.GgmlError("the computation failed: failed")
            return real(*args)

        prepare, compute = stage.prepare, ParallelProgram.compute
        if what == "writing":
            monkeypatch.setattr(stage, "prepare", lambda *args: fail_at_second(prepare, True, *args))
        else:
            monkeypatch.setattr(
                ParallelProgram,
                "compute",
                lambda self, *args: fail_at_second(compute, self in stage.programs, self, *args),
            )
        with pytest.raises(ggml.GgmlError, match="the computation failed"):
            answers(model, [PROMPT * 4])
        monkeypatch.undo()
        assert model.batchers[0].cache.slots.n_free == model.batchers[0].cache.slots.sequence.size
        assert answers(model, [PROMPT * 4]) == want


def test_prompts_of_any_length_use_the_graphs_of_a_warm_up(two_gpus, path, rng):
    ids = [int(t) for t in rng.integers(0, 50, 200)]
    lengths = [1, 2, 7, 9, 15, 16, 17, 31, 33, 47, 63, 64, 65, 100, 129, 200]
    with models.load(path, ["CPU"], n_ctx=512) as model:
        want = [model.forward(ids[:n]) for n in lengths]
    for split in ("layer", "pipeline", "tensor"):
        with models.load(path, two_gpus, split, n_ctx=512, n_batch=64) as model:
            stages = model.batchers[0].runner.stages
            for n in (*range(1, 9), 16, 32, 48, 64, 65, 96, 128):  # the last three are two batches in flight
                model.forward(ids[:n])
                model.forward(ids[:n], last=True)
            built = [stage.n_built for stage in stages]
            got = [model.forward(ids[:n]) for n in lengths]
            last = [model.forward(ids[:n], last=True) for n in lengths]
            list(model.generate_tokens(ids[:100], 200, stop_at_end=False))  # through the limit of 256 KV slots
            assert [stage.n_built for stage in stages] == built
        for a, b, c in zip(got, last, want, strict=True):
            assert relative_error(a, c) < 5e-3
            assert relative_error(b, c[-1]) < 5e-3
