"""Every way to split a model over devices gives what one device gives, and takes what was planned."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.core.op_sets import VIEWS
from ggml_cffi.models.placement import auto
from ggml_cffi.models.placement import calibration as calibrate
from ggml_cffi.models.runners.pipeline import StagedRunner
from ggml_cffi.models.runners.stage import Stage
from ggml_cffi.parallel import step_graphs as _step
from ggml_cffi.parallel.executors import arrivals as _arrivals
from ggml_cffi.parallel.program import ParallelProgram
from tests.support import llama_float64, relative_error

SPLITS = ("layer", "pipeline", "data", "tensor")
PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]


@pytest.fixture
def path(tmp_path, rng):
    return llama_float64.random_model(tmp_path / "m.gguf", rng)


@pytest.fixture(params=SPLITS)
def split(request):
    return request.param


def gpu_memory(monkeypatch, free):
    """Have GPUs say that they have so many bytes free."""
    real = ggml.Device.memory
    monkeypatch.setattr(ggml.Device, "memory", lambda self: real(self) if self.is_cpu else ggml.Memory(free, free))


def answers(model, prompts, n=3):
    return [[*model.generate_tokens(ids, n, stop_at_end=False)] for ids in prompts]


# ---------------------------------------------------------------------- two GPUs


def test_two_gpus_give_what_float64_does(two_gpus, path, split, rng):
    ids = [int(t) for t in rng.integers(0, 50, 41)]
    want = llama_float64.Reference(path).forward(ids)
    with models.load(path, two_gpus, split, n_batch=16) as model:
        assert relative_error(model.forward(ids), want) < 1e-2  # three batches
        made = [*model.generate_tokens(ids, 3, stop_at_end=False)]  # a prompt of three batches
        assert made[0] == model.forward(ids, last=True).argmax()
        used = {backend.name for _, backend in model.assignment()}
        assert used == ({"Vulkan0"} if split == "data" else set(two_gpus))  # one text: the other replica waits
        assert model.layer_backend(0).name == "Vulkan0"
        assert [len(share.layers) for share in model.placement if share.weight_bytes] == (
            [3, 3] if split in ("data", "tensor") else [1, 2]
        )
    with pytest.raises(ggml.ClosedError):
        model.assignment()


def test_batches_in_flight_are_those_one_after_another(two_gpus, path, monkeypatch):
    ids = [i % 50 for i in range(200)]
    real = StagedRunner._start
    seen = []

    def start(self, batch, slot):
        seen.append(len(batch.tokens))
        return real(self, batch, slot)

    monkeypatch.setattr(StagedRunner, "_start", start)
    with models.load(path, two_gpus, "layer", n_batch=16) as model:
        want = model.forward(ids)
        assert not seen
    with models.load(path, two_gpus, "pipeline", n_batch=16) as model:
        np.testing.assert_array_equal(model.forward(ids), want)
        assert sum(seen) == 200
        assert len(seen) == 13
        assert next(model.generate_tokens(ids, 1, stop_at_end=False)) == want[-1].argmax()
        assert len(seen) == 26
    names = ("ggml_cffi stage", "ggml_cffi inputs")
    assert not any(t.name.startswith(names) for t in threading.enumerate())


def test_both_ways_to_hand_over_give_the_same(two_gpus, path, monkeypatch):
    """To wait for the first GPU, and to see its result arrive."""
    with models.load(path, two_gpus, "layer", n_batch=16) as model:
        runner = model._runners[0]
        first, second = runner.stages
        found = []
        for watching in (True, False, True):
            with monkeypatch.context() as patch:
                if not watching:
                    patch.setattr(runner, "_run_watching", runner._run_waiting)
                model.clear_cache()
                found.append((answers(model, [PROMPT, PROMPT[:5]], 6), model.forward([3])))
            assert {backend.name for _, backend in model.assignment()} == set(two_gpus)
        assert found[0][0] == found[1][0] == found[2][0]
        np.testing.assert_array_equal(found[0][1], found[1][1])
        # The GPUs are done with their work whatever becomes of the run.
        finished = []
        for i, stage in enumerate(runner.stages):
            finish = stage.finish
            monkeypatch.setattr(stage, "finish", lambda i=i, finish=finish, **o: (finished.append((i, o)), finish(**o)))
        for failing in (first, second):
            for method in ("prepare", "run"):
                monkeypatch.setattr(failing, method, raise_interrupt)
                if failing is first and method == "run":
                    model.forward([3])  # it hands over
                else:
                    with pytest.raises(KeyboardInterrupt):
                        model.forward([3])
                assert finished[-2:] == [(1, {"if_free": False}), (0, {"if_free": False})]
                monkeypatch.delattr(failing, method)
        finished.clear()
        np.testing.assert_array_equal(model.forward([3]), found[1][1])
        assert finished == [(i, {"if_free": free}) for i, free in ((0, True), (1, False), (0, False))]


def test_a_later_stage_is_recorded_while_the_first_is_computed(two_gpus, path, monkeypatch):
    monkeypatch.setattr(_step, "_HELD", 12)
    with models.load(path, two_gpus, "layer", n_batch=16) as model:
        runner = model._runners[0]
        want = answers(model, [PROMPT, PROMPT[:5]], 6)
        first, second = runner.stages
        assert not any(step.held for p in first.programs for own in p.steps for step in own)
        ((step,),) = second.programs[-1].steps
        (_, held), rest = step.held, step.rest[1::2]
        (graph,) = second.programs[-1].plans[0].graphs
        assert len(graph) > 12 >= sum(t.op not in VIEWS for t in held_nodes(graph, held)) > 6
        assert sum(len(held_nodes(graph, part)) for part in (held, *rest)) == len(graph)
        counts, record = [], second.group.executor.record
        monkeypatch.setattr(second.group.executor, "record", lambda plans: (counts.append(done(runner)), record(plans)))
        model.clear_cache()
        assert answers(model, [PROMPT, PROMPT[:5]], 6) == want
        assert len(counts) >= 10
        assert all(one == other + 1 for one, other in counts)  # the first was begun, and the second not


def done(runner):
    """How many runs of each stage were begun."""
    return [stage.group.executor.computed[0] for stage in runner.stages]


def held_nodes(graph, pointer):
    """Nodes of ``graph`` that a C graph has, before what fills it up."""
    own = {t.ptr: t for t in graph.nodes}
    found = [ggml.c.ggml_graph_node(pointer, i) for i in range(ggml.c.ggml_graph_n_nodes(pointer))]
    return [*dict.fromkeys(own[p] for p in found if p in own)]


def test_what_is_not_seen_to_arrive_is_waited_for(two_gpus, path, monkeypatch):
    """What the next GPU has recorded is given up then, and recorded again."""
    with models.load(path, two_gpus, "layer", n_batch=16) as model:
        want = answers(model, [PROMPT, PROMPT[:5]], 12), model.forward([3])
    monkeypatch.setattr(_arrivals, "_PATIENCE", 0.0)
    with models.load(path, two_gpus, "layer", n_batch=16) as model:
        assert answers(model, [PROMPT, PROMPT[:5]], 12) == want[0]
        np.testing.assert_array_equal(model.forward([3]), want[1])
        first, second = model._runners[0].stages
        assert sum(p.landing.late for p in first.programs) > 10
        assert any(step.held for p in second.programs for own in p.steps for step in own)


def test_several_models_on_the_same_gpus(two_gpus, path):
    """Each holds the devices that it uses for a moment, and none waits for ever."""
    kinds = ("layer", "tensor", "layer", "pipeline")
    with ExitStack() as stack:
        loaded = [stack.enter_context(models.load(path, two_gpus, kind, n_batch=16)) for kind in kinds]
        loaded.append(stack.enter_context(models.load(path, two_gpus[::-1], "layer", n_batch=16)))
        want = [answers(model, [PROMPT, PROMPT[:5]], 12) for model in loaded]
        pool = stack.enter_context(ThreadPoolExecutor(len(loaded)))
        for _ in range(3):
            for model in loaded:
                model.clear_cache()
            going = [pool.submit(answers, model, [PROMPT, PROMPT[:5]], 12) for model in loaded]
            assert [future.result(120) for future in going] == want


def raise_interrupt(*_args, **_options):
    raise KeyboardInterrupt


def test_large_batches_of_the_cpus_layers_go_to_the_gpu(two_gpus, path):
    """ggml copies their weights there, from 32 tokens on."""
    ids = [i % 50 for i in range(64)]
    with models.load(path, ["CPU"], n_batch=128) as model:
        want = model.forward(ids)
    with models.load(path, [two_gpus[0], "CPU"], "layer", balance=(1, 2), n_batch=128) as model:
        assert {share.backend.name: bool(share.layers) for share in model.placement} == {two_gpus[0]: True, "CPU": True}
        for n, where in ((1, {two_gpus[0], "CPU"}), (64, {two_gpus[0]})):
            got = model.forward(ids[:n])
            products = [backend.name for t, backend in model.assignment() if t.op is ggml.Op.MUL_MAT]
            assert set(products) == where
            assert relative_error(got, want[:n]) < 1e-2
            model.clear_cache()


def test_inputs_are_written_while_a_batch_is_computed(two_gpus, path, monkeypatch):
    """The next batch's have other memory."""
    ids = [i % 50 for i in range(96)]
    prepare, compute = Stage.prepare, ParallelProgram.compute
    places, started, changed = [], [], threading.Condition()

    def note_prepare(self, *args):
        program = prepare(self, *args)
        with changed:
            places.append(program.puts[0].ctypes.data)
            changed.notify_all()
        return program

    def compute_late(self, *args):
        with changed:
            started.append(self)
            wanted = min(len(started) + 1, 6)  # of 6 batches
            assert changed.wait_for(lambda: len(places) >= wanted, timeout=20), "the next inputs were not written"
        compute(self, *args)

    with models.load(path, two_gpus[:1], n_batch=16) as model:
        want = model.forward(ids)
        monkeypatch.setattr(Stage, "prepare", note_prepare)
        monkeypatch.setattr(ParallelProgram, "compute", compute_late)
        np.testing.assert_array_equal(model.forward(ids), want)
    assert len(set(places)) == 2
    assert all(a != b for a, b in pairwise(places))


@pytest.mark.parametrize("what", ["writing", "computing"])
def test_a_batch_in_flight_that_fails(two_gpus, path, monkeypatch, what):
    with models.load(path, two_gpus, "pipeline", n_batch=16) as model:
        want = answers(model, [PROMPT * 4])
        model.clear_cache()
        stage = model._runners[0].stages[1]
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
        assert model._generators[0].cells.n_free == model._generators[0].cells.sequence.size
        assert answers(model, [PROMPT * 4]) == want


def test_a_caller_who_leaves_while_batches_are_in_flight(two_gpus, path, monkeypatch):
    """Nothing computes any more when the cache is others'."""
    ids = [i % 50 for i in range(96)]
    futures = []
    real = StagedRunner._start
    monkeypatch.setattr(StagedRunner, "_start", lambda *args: futures.append(real(*args)) or futures[-1])

    def leave(_done):
        raise KeyboardInterrupt

    with models.load(path, two_gpus, "pipeline", n_batch=16) as model:
        generator = model._generators[0]
        with pytest.raises(KeyboardInterrupt) as caught:
            generator.logits(ids, 96, leave)
        assert len(futures) > 1
        assert all(future.done() for future in futures)
        assert generator.cells.n_free == len(generator.cells)
        assert caught.traceback  # which keeps the frames, and what is in them, alive


def test_texts_are_dealt_to_replicas(two_gpus, path):
    prompts = [[i, i + 1, i + 2, 4, 5, 6, 7, 8, 9, 10, 11] for i in range(6)]
    with models.load(path, ["Vulkan0"], "layer") as model:
        want = answers(model, prompts)
        vectors = model.embed(prompts)
    with models.load(path, two_gpus, "data") as model:
        assert answers(model, prompts) == want
        assert len(model.cached) == 6
        # as one list, by both at once
        model.clear_cache()
        assert not model.cached
        found = {}
        for number, token in deal(model, prompts, 3):
            found.setdefault(number, []).append(token)
        # Keys lie in other rows than before, so that sums are rounded differently: later tokens may differ.
        assert [found[i][0] for i in range(6)] == [ids[0] for ids in want]
        assert [len(found[i]) for i in range(6)] == [3] * 6
        each = [len(generator.kept) for generator in model._generators]
        assert sum(each) == 6
        assert all(each)
        assert {backend.name for _, backend in model.assignment()} == set(two_gpus)
        assert relative_error(model.embed(prompts), vectors) < 1e-3


def deal(model, prompts, n):
    """Token ids of several texts: the model has no vocabulary."""
    from ggml_cffi.models.generation.batcher import Timings
    from ggml_cffi.models.generation.requests import Request, follow_everywhere
    from ggml_cffi.models.generation.sampling import Sampler

    requests = [Request(list(ids), Sampler(), n, frozenset()) for ids in prompts]
    timings = Timings()
    for number, token in follow_everywhere(model._generators, requests, 2, timings):  # one at each
        if token is not None:
            yield number, token
    assert timings.prompt_tokens == sum(map(len, prompts))


def test_an_error_in_one_replica_ends_all(two_gpus, path, monkeypatch):
    with models.load(path, two_gpus, "data") as model:
        second = model._generators[1]

        def fail(batch):
            raise ggml.GgmlError("the computation failed: failed")

        monkeypatch.setattr(second.runner, "run", fail)
        with pytest.raises(ggml.GgmlError, match="the computation failed"):
            list(deal(model, [PROMPT] * 6, 3))
        assert not any(generator._growing for generator in model._generators)
        # and one that is left early
        monkeypatch.undo()
        stream = deal(model, [PROMPT] * 6, 30)
        next(stream)
        stream.close()
        for generator in model._generators:
            generator.settle()
        assert not any(generator._growing for generator in model._generators)
    assert not any(t.name == "ggml_cffi replica" for t in threading.enumerate())


def test_a_text_goes_where_its_beginning_is(two_gpus, path):
    with models.load(path, two_gpus, "data") as model:
        first, second = model._generators
        text = model.generate_tokens(PROMPT, 3, stop_at_end=False)
        next(text)  # grows on the first: the next text goes to the second
        other = [9] * 11
        answers(model, [other])
        assert [ids[:11] for ids in second.kept.values()] == [other]
        text.close()
        answers(model, [other])
        assert model.timings.reused_tokens == 10
        assert model._choose() is first


# ---------------------------------------------------------------------- caches to files


def test_a_cache_goes_from_one_split_to_another(two_gpus, path, tmp_path):
    with models.load(path, two_gpus, "layer") as model:
        want = answers(model, [PROMPT])
        assert model.save_cache(tmp_path / "layer.kv") == len(PROMPT) + 2
    with models.load(path, two_gpus, "tensor") as model:
        assert model.load_cache(tmp_path / "layer.kv") == len(PROMPT) + 2
        assert answers(model, [PROMPT]) == want
        assert model.timings.reused_tokens == len(PROMPT) - 1
        model.save_cache(tmp_path / "tensor.kv")
    with models.load(path, two_gpus, "data") as model:
        model.load_cache(tmp_path / "tensor.kv")
        assert answers(model, [PROMPT]) == want
        assert model.timings.reused_tokens == len(PROMPT) - 1
        model.save_cache(tmp_path / "data.kv")
    for name in ("layer", "tensor"):
        with ggml.GGUFFile(tmp_path / f"{name}.kv") as a, ggml.GGUFFile(tmp_path / "tensor.kv") as b:
            assert {k: t.shape for k, t in a.tensors.items()} == {k: t.shape for k, t in b.tensors.items()}


# ---------------------------------------------------------------------- plans


def test_every_split_takes_what_was_planned(two_gpus, path, split, monkeypatch):
    gpu_memory(monkeypatch, 1 << 30)  # software devices share the memory of the machine, which others use meanwhile
    plan = models.plan(path, two_gpus, split, n_batch=16)
    assert plan.fits
    assert plan.split == split
    with models.load(path, two_gpus, split, n_batch=16) as model:
        model.forward(PROMPT, last=True)
        for planned, share in zip(plan.devices, model.placement, strict=True):
            assert planned.device == share.backend.name
            for kind in ("weight_bytes", "cache_bytes", "compute_bytes"):
                assert abs(getattr(planned, kind) - getattr(share, kind)) <= 0.03 * getattr(share, kind), kind
    assert f"split {split}" in str(plan)


@pytest.mark.parametrize("split", ["data", "tensor"])
def test_what_does_not_fit_is_refused(two_gpus, path, split, monkeypatch):
    gpu_memory(monkeypatch, 300_000)
    plan = models.plan(path, two_gpus, split, n_batch=16)
    assert not plan.fits
    with pytest.raises(ggml.OutOfMemoryError, match=r"Vulkan0 lacks .*Vulkan1 lacks .* These would fit"):
        models.load(path, two_gpus, split, n_batch=16)


def test_wrong_splits(path, tmp_path, rng):
    with pytest.raises(ValueError, match="split 'rows' is not known; 'layer', 'pipeline'"):
        models.load(path, ["CPU"], "rows")
    for split in ("data", "tensor"):
        with pytest.raises(ValueError, match=f"split '{split}' gives every device the same: balance is for layers"):
            models.plan(path, ["CPU"], split, balance="speed")


@pytest.mark.parametrize("split", ["data", "tensor", "pipeline"])
def test_the_cpu_alone(path, split):
    ids = PROMPT * 3
    with models.load(path, ["CPU"]) as model:
        want, made = model.forward(ids), answers(model, [ids])
        vectors = model.embed([ids])
    with models.load(path, ["CPU"], split, n_batch=16) as model:
        assert relative_error(model.forward(ids), want) < 1e-5
        assert answers(model, [ids]) == made
        assert {backend.name for _, backend in model.assignment()} == {"CPU"}
        if split == "tensor":
            with pytest.raises(ValueError, match="embed needs layers that are whole on a device"):
                model.embed([ids])
            with pytest.raises(ValueError, match="have no scheduler"):
                model.scheduler  # noqa: B018
        else:
            assert relative_error(model.embed([ids]), vectors) < 1e-5
            assert model.scheduler.graph is not None


# ---------------------------------------------------------------------- the best of them


@pytest.fixture
def costs(monkeypatch):
    """Seconds that a layer takes by kind of run: for a token, for a batch, and for one of many; tests change them."""
    found = {"one": (1e-3, 0.1, 0.1), "pipeline": (1.1e-3, 0.1, 0.06), "tensor": (2e-3, 0.2, 0.2)}

    def fake(self, kind, n, n_batch, *, whole_attention=False):
        token, batch, long = found[kind]
        return auto.Costs(token if n < 8 else batch if n <= n_batch else long * n / n_batch, 1e-5)

    monkeypatch.setattr(auto.Timer, "costs", fake)
    return found


def test_auto_takes_what_is_never_far_from_the_best(two_gpus, path, costs):
    def chosen(**options):
        plan = models.plan(path, two_gpus, "auto", n_batch=16, **options)
        assert plan.reasons[0].startswith("Of the splits, ")
        assert plan.fits
        return plan.split, [share.device for share in plan.devices if share.layers]

    # Batches in flight are worth more than what handing over costs a token.
    assert chosen() == ("pipeline", list(two_gpus))
    costs["tensor"] = 0.5e-3, 0.05, 0.05
    assert chosen() == ("tensor", list(two_gpus))
    costs["tensor"] = 2e-3, 0.2, 0.2
    assert chosen(n_sequences=2) == ("data", list(two_gpus))


def test_auto_takes_what_suits_what_is_expected(two_gpus, path, costs):
    def chosen(expect, **options):
        plan = models.plan(path, two_gpus, "auto", n_batch=16, expect=expect, **options)
        return plan.split, len([share for share in plan.devices if share.layers]), plan.reasons[0]

    assert chosen((0, 64))[:2] == ("layer", 1)
    assert chosen((16, 0))[:2] == ("layer", 1)
    split, n, why = chosen((128, 16))
    assert (split, n) == ("pipeline", 2)
    assert "pipeline has 100% of the best speed" in why
    # Three layers: one GPU takes 8 x 0.3 s for the prompt and 3 ms for a token.
    assert f" one 128 + 16 {(128 + 16) / (8 * 0.3 + 16 * 3e-3):.0f};" in why
    costs["tensor"] = 0.5e-3, 0.2, 0.2
    assert chosen((16, 128))[:2] == ("layer", 1)
    assert chosen((1, 128))[:2] == ("tensor", 2)
    costs["tensor"] = 2e-3, 0.2, 0.2
    assert chosen((128, 16), n_sequences=2)[:2] == ("data", 2)
    for wrong in ((1, 2, 3), (0, 0), (-1, 4)):
        with pytest.raises(ValueError, match="expect is a number of tokens of a prompt and one of an answer"):
            chosen(wrong)
    with pytest.raises(ValueError, match=r"\(4000, 1000\) tokens are expected, 5000 together, but n_ctx is"):
        models.load(path, two_gpus, "auto", expect=(4000, 1000))


def test_auto_takes_one_gpu_where_more_do_not_pay(two_gpus, path, costs, monkeypatch):
    gpu_memory(monkeypatch, 1 << 30)
    monkeypatch.setattr(auto, "_rates", lambda a, found, *rest: {"decode": 1 if found.members == (0, 2) else 0.5})
    plan = models.plan(path, two_gpus, "auto", n_batch=16)
    with models.load(path, two_gpus, "auto", n_batch=16) as model:
        assert model.plan.reasons == plan.reasons
        assert model.plan.split == "layer"
        assert "one has 100% of the best speed or more in each case. Tokens/s, timed: " in plan.reasons[0]
        assert "Vulkan0 has 3 of 3 layers: it has room for all." in plan.reasons
        model.forward(PROMPT)
        assert {backend.name for _, backend in model.assignment()} == {"Vulkan0"}


def test_auto_without_a_choice(two_gpus, path, costs, monkeypatch):
    plan = models.plan(path, ["CPU"], "auto")
    assert plan.split == "layer"
    assert plan.reasons[0] == "Of the splits, layer is the only one that is possible."
    gpu_memory(monkeypatch, 900_000)
    plan = models.plan(path, two_gpus, "auto", n_batch=16)
    assert plan.split in ("pipeline", "tensor")  # one has no room for all
    assert " one prompt " not in plan.reasons[0]
    gpu_memory(monkeypatch, 600_000)
    plan = models.plan(path, two_gpus, "auto", n_batch=16)
    assert [len(share.layers) for share in plan.devices] == [1, 1, 1]
    with pytest.raises(ValueError, match="n_sequences must be at least 1, not 0"):
        models.plan(path, two_gpus, "auto", n_sequences=0)


def test_layers_are_timed_once(two_gpus, path, tmp_path, monkeypatch):
    monkeypatch.setenv("GGML_CFFI_CACHE", str(tmp_path / "cache"))
    plan = models.plan(path, two_gpus, "auto", n_batch=16)
    kept = json.loads(calibrate.path().read_text())
    assert len(kept) == 3 * 3  # a token, a batch and several, on one GPU, by two in turn, and by two together
    assert all(" tokens by " in name and all(x >= 0 for x in value) for name, value in kept.items())
    monkeypatch.setattr(auto.Timer, "_measure", None)
    assert models.plan(path, two_gpus, "auto", n_batch=16).reasons[0] == plan.reasons[0]
