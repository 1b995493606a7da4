"""The scheduled runner: graphs for all lengths, batches in flight, and layers of the CPU that GPUs compute."""

import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.models.runners.buckets import bucket, cpu_bucket, output_bucket
from ggml_cffi.models.runners.scheduled import ScheduledRunner, logits_graph
from tests.support import llama_float64, relative_error
from tests.support.splits import answers


@pytest.fixture(params=["CPU", "one GPU", "two GPUs"])
def load(request, tmp_path, rng):
    """Return a function that loads a model of a long context whose batches a scheduler computes."""
    path = llama_float64.random_model(tmp_path / "long.gguf", rng, **{".context_length": 2048})

    def load(**options):
        if request.param == "CPU":
            return models.load(path, ["CPU"], **options)
        gpus = request.getfixturevalue("two_gpus")[: 1 if request.param == "one GPU" else 2]
        return models.load(path, [*gpus, "CPU"], balance=[1] * (len(gpus) + 1), **options)

    return load


@pytest.mark.parametrize(("kind", "count"), [(bucket, 24), (cpu_bucket, 96)])
def test_buckets_are_few_and_not_much_larger(kind, count):
    sizes = [kind(n) for n in range(1, 513)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == count
    for n, size in enumerate(sizes, 1):
        assert n <= size <= (max(n * 1.25, n + 15) if kind is bucket else n * 17 / 16)
        assert kind(size) == size
        for n_out in {1, min(n, 2), n // 2 or 1, n - 1 or 1, n}:
            outputs = output_bucket(n, n_out, size)
            assert (outputs == size) if n_out == n else n_out <= outputs < size
    assert sizes[:8] == [*range(1, 9)]


def test_prompts_of_any_length_use_the_graphs_of_a_warm_up(load, rng):
    """This holds for the number of KV slots too: one graph serves all of them."""
    with load(n_ctx=2048, n_batch=40) as model:
        (runner,) = [batcher.runner for batcher in model.batchers]
        assert isinstance(runner, ScheduledRunner)
        longest = 2000 if runner.best_prefill_batch else 300  # software GPUs are slow
        ids = [int(t) for t in rng.integers(0, 50, longest)]
        every = {end - start for n in range(1, 2001) for start, end in runner.batch_ranges(0, n)}
        for n in sorted({cpu_bucket(size) for size in every}):
            model.forward(ids[:n], last=True)
        built = runner.n_built
        assert built <= len({cpu_bucket(size) for size in every}) + 1
        lengths = [1, 5, 31, 33, 65, 129, 255, 257, *map(int, rng.integers(1, longest, 3)), longest]
        got = [model.forward(ids[:n], last=True) for n in lengths]
        list(model.generate_tokens(ids[:250], 12, stop_at_end=False))  # through the limit of 256 KV slots
        assert runner.n_built == built
        want = model.forward(ids)
        for n, logits in zip(lengths, got, strict=True):
            assert relative_error(logits, want[n - 1]) < 5e-3


def test_some_outputs_of_a_batch_are_those_of_their_tokens(load, rng):
    """The graph has more rows and more outputs than the batch."""
    ids = [int(t) for t in rng.integers(0, 50, 200)]
    with load(n_ctx=256, n_batch=256) as model:
        want = model.forward(ids)
        for n, n_out in ((10, 2), (17, 11), (33, 33), (65, 17), (129, 129), (150, 149)):
            assert relative_error(model.batchers[0].logits(ids[:n], n_out), want[n - n_out : n]) < 5e-3


def test_a_window_has_a_mask_of_its_own(tmp_path, rng, two_gpus):
    variant = {"name": "gemma3", ".attention.sliding_window": 16}
    path = llama_float64.random_model(tmp_path / "window.gguf", rng, **variant)
    ids = [int(t) for t in rng.integers(0, 50, 300)]
    with models.load(path, ["CPU"], n_ctx=512) as model:
        want = model.forward(ids)
    with models.load(path, [two_gpus[0], "CPU"], balance=(2, 1), n_ctx=512, n_batch=64) as model:
        for n in (300, 17, 70):
            assert relative_error(model.forward(ids[:n]), want[:n]) < 1e-2


def test_the_next_batch_is_built_while_gpus_compute(two_gpus, path, rng, monkeypatch):
    ids = [int(t) for t in rng.integers(0, 50, 50)]
    events = []

    def noted(name):
        real = getattr(ggml.Scheduler, name)
        monkeypatch.setattr(ggml.Scheduler, name, lambda *args: (events.append(name), real(*args))[1])

    with models.load(path, [two_gpus[0], "CPU"], balance=(2, 1), n_ctx=256, n_batch=16) as model:
        runner = model.batchers[0].runner
        run_all = runner.run_all
        monkeypatch.setattr(runner, "run_all", lambda batches: run_all(events.append("built") or b for b in batches))
        noted("compute_async")
        noted("synchronize")
        want = answers(model, [ids])
        first = ["built", "synchronize", "compute_async"]
        assert events[:9] == 3 * first
        monkeypatch.undo()
        assert answers(model, [ids]) == want


def test_a_batch_that_fails_ends_after_the_one_before(two_gpus, path, rng, monkeypatch):
    ids = [int(t) for t in rng.integers(0, 50, 100)]
    with models.load(path, [two_gpus[0], "CPU"], balance=(2, 1), n_ctx=256, n_batch=16) as model:
        want = answers(model, [ids])
        model.clear_cache()
        runner, calls = model.batchers[0].runner, []
        allocated = runner.allocated

        def fail_at_third(*args, **kwargs):
            calls.append(args)
            if len(calls) == 3:
                raise ggml.GgmlError("no more graphs")
            return allocated(*args, **kwargs)

        monkeypatch.setattr(runner, "allocated", fail_at_third)
        with pytest.raises(ggml.GgmlError, match="no more graphs"):
            answers(model, [ids])
        monkeypatch.undo()
        assert model.batchers[0].cache.slots.n_free == model.batchers[0].cache.slots.sequence.size
        assert answers(model, [ids]) == want


def test_a_graph_knows_the_tensors_that_depend_on_the_kv_slots(path):
    with models.load(path, ["CPU"], n_ctx=256) as model, ggml.Context() as context:
        weights = model.batchers[0].runner.weights
        for n, n_ranges, n_results in ((4, 0, 1 + 3 * 2), (1, 0, 2 + 3 * 4), (4, 5, 2 + 3 * 4), (64, 0, 3)):
            inputs, _ = logits_graph(context, weights, n, 256, 1, n_ranges=n_ranges)
            is_tiled = n == 64
            assert [view.axis for view in inputs.kv_views] == [2, 1, 0, *[1] * is_tiled] * 3
            assert {axis for _, axis in inputs.kv_results} == {int(is_tiled)}
            assert {t.shape[::-1][axis] for t, axis in inputs.kv_results} == {32 if n_ranges else 256}
            assert len(inputs.kv_results) == n_results


def test_large_batches_of_the_cpus_layers_go_to_the_gpu(two_gpus, path):
    """From 32 tokens on, ggml copies the weights of these layers to the GPU."""
    ids = [i % 50 for i in range(64)]
    with models.load(path, ["CPU"], n_batch=128) as model:
        want = model.forward(ids)
    with models.load(path, [two_gpus[0], "CPU"], "layer", balance=(1, 2), n_batch=128) as model:
        assert {share.device: bool(share.layers) for share in model.placement} == {two_gpus[0]: True, "CPU": True}
        for n, where in ((1, {two_gpus[0], "CPU"}), (64, {two_gpus[0]})):
            got = model.forward(ids[:n])
            products = [backend.name for t, backend in model.assignment() if t.op is ggml.Op.MUL_MAT]
            assert set(products) == where
            assert relative_error(got, want[:n]) < 1e-2
            model.clear_cache()
