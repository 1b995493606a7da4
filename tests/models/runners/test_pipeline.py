"""Pipeline stages of one device each: failures. ``tests/internals/test_models_pipeline.py`` has the order of work."""

import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.parallel.program import ParallelProgram
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
