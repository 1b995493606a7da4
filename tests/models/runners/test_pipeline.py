"""Pipeline stages: failures, graphs for all lengths. The order of work is in ``tests/internals``."""

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.models.runners.stage_spec import interleave
from ggml_cffi.parallel.program import ParallelProgram
from tests.models.runners.test_shards import batch, opened, run
from tests.support import llama_float64, relative_error
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

        write, submit = stage.write, ParallelProgram.submit
        if what == "writing":
            monkeypatch.setattr(stage, "write", lambda *args: fail_at_second(write, True, *args))
        else:
            monkeypatch.setattr(
                ParallelProgram,
                "submit",
                lambda self, *args: fail_at_second(submit, self in stage.programs, self, *args),
            )
        with pytest.raises(ggml.GgmlError, match="the computation failed"):
            answers(model, [PROMPT * 4])
        monkeypatch.undo()
        assert model.batchers[0].cache.slots.n_free == model.batchers[0].cache.slots.sequence.size
        assert answers(model, [PROMPT * 4]) == want


def test_some_outputs_of_a_batch_are_those_of_their_tokens(two_gpus, path, rng):
    """The graph has more rows and more outputs than the batch."""
    ids = [int(t) for t in rng.integers(0, 50, 40)]
    for split in ("layer", "tensor"):
        with models.load(path, two_gpus, split, n_ctx=256, n_batch=64) as model:
            for n, n_out in ((10, 2), (12, 11), (15, 3), (20, 17), (40, 33), (16, 5)):
                want = model.forward(ids[:n])[-n_out:]
                assert relative_error(model.batchers[0].logits(ids[:n], n_out), want) < 5e-3


def test_an_answer_passes_the_step_at_256_kv_slots_the_first_time_as_the_second(two_gpus, path):
    """In the first pass the devices may have to allocate for the new number of slots, with work recorded ahead."""
    with models.load(path, two_gpus, n_ctx=512, deterministic=True) as model:
        answers = [list(model.generate_tokens([7], 280, stop_at_end=False)) for _ in range(2)]
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 1


def test_prompts_of_any_length_use_the_graphs_of_a_warm_up(two_gpus, tmp_path, rng):
    """Heads have 64 elements: for smaller ones CUDA has no flash attention, but graphs for each number of slots."""
    path = llama_float64.random_model(tmp_path / "model.gguf", rng, head=64)
    ids = [int(t) for t in rng.integers(0, 50, 200)]
    lengths = [1, 7, 9, 16, 17, 47, 64, 65, 129, 200]
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
            list(model.generate_tokens(ids, 60, stop_at_end=False))  # through the limit of 256 KV slots
            assert [stage.n_built for stage in stages] == built
        for a, b, c in zip(got, last, want, strict=True):
            assert relative_error(a, c) < 5e-3
            assert relative_error(b, c[-1]) < 5e-3


@pytest.mark.parametrize(("n_layers", "stages"), [(17, [4, 4, 4, 5]), (14, [7, 7])])
def test_gpus_take_turns_if_each_has_enough_layers(two_gpus, tmp_path, rng, n_layers, stages):
    path = llama_float64.random_model(tmp_path / "model.gguf", rng, n_layers=n_layers)
    ids = [int(t) for t in rng.integers(0, 50, 100)]
    want = llama_float64.Reference(path).forward(np.array(ids))
    tokens = []
    for split in ("layer", "pipeline"):
        options = {"n_ctx": 256, "n_batch": 16, "balance": [1, 1]}
        with models.load(path, two_gpus, split, **options) as model:
            runner = model.batchers[0].runner
            found = [len(stage.graph.layers) for stage in runner.stages]
            assert found == (stages if split == "pipeline" else [sum(stages[::2]), sum(stages[1::2])])
            assert relative_error(model.forward(ids), want) < 1e-2
            tokens.append(answers(model, [ids, ids[:7]], 12))
            planned = models.plan(path, two_gpus, split, **options)
            for plan, share in zip(planned.devices, model.placement, strict=True):
                assert plan.layers == tuple(share.layers)
                assert plan.compute_bytes == share.compute_bytes
    assert tokens[0] == tokens[1]


def test_devices_take_turns_of_at_least_four_layers():
    assert interleave([0] * 8 + [1] * 9) == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 5
    assert interleave([0] * 7 + [1] * 9) == [0] * 7 + [1] * 9
    assert interleave([2] * 40) == [2] * 40
    four = interleave([d for d in range(4) for _ in range(20)])
    assert four == [d for _ in range(4) for d in range(4) for _ in range(5)]
    assert interleave(four) == four


def test_a_device_computes_while_the_caller_works(two_gpus, path, monkeypatch):
    with opened(path, two_gpus[:1]) as runner:
        want = run(runner, [3, 4], 0)
        executor, seen = runner.stages[0].group.executor, []
        for name in ("submit", "finish"):
            call = getattr(executor, name)
            monkeypatch.setattr(executor, name, lambda *args, n=name, call=call: (seen.append(n), call(*args))[1])
        got = runner.run(batch([3, 4], 0), lambda: seen.append("work"))
        assert seen == ["submit", "work", "finish"]
        np.testing.assert_array_equal(got, want)
