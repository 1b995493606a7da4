"""Dry runs predict the bytes that loading and a first run take."""

import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.core.context import Context
from ggml_cffi.core.dry_run import DryRunContext
from ggml_cffi.models import Sampler
from ggml_cffi.models.generation.requests import Request, generate_many
from ggml_cffi.models.generation.timings import Timings
from ggml_cffi.models.runners.pipeline import PipelineRunner
from ggml_cffi.models.runners.scheduled import largest_graphs, untiled_batch
from tests.support import bert_float64, llama_float64, need
from tests.support.memory import memory


def close(predicted, actual):
    return abs(predicted - actual) <= 0.03 * actual


def check(path, devices, counted, **options):
    """Compare a plan with the bytes that loading and a first run take on each device. Planning allocates nothing."""
    plan = models.plan(path, devices, **options)
    assert not counted
    assert plan.fits
    with models.load(path, devices, **options) as model:
        loaded = dict(counted)
        runner = model.batchers[0].runner
        in_stages = isinstance(runner, PipelineRunner)
        if in_stages:
            model.forward([1] * plan.n_batch, last=True)
        else:
            ranges, untiled = runner.attends_to_ranges, untiled_batch(runner.weights)
            for key, n_ranges in largest_graphs(plan.n_batch, runner.n_slots, ranges=ranges, untiled=untiled):
                runner.allocated(key, n_ranges)
            assert model.scheduler.buffer_sizes() == {
                backend: placed.compute_bytes
                for backend, placed in zip(model.scheduler.backends, model.placement, strict=True)
            }
        for planned, share in zip(plan.devices, model.placement, strict=True):
            assert planned.layers == tuple(share.layers)
            assert close(planned.weight_bytes, share.weight_bytes)
            assert close(planned.cache_bytes, share.cache_bytes)
            assert close(planned.compute_bytes, share.compute_bytes)
            held = planned.weight_bytes - planned.mapped_bytes + planned.cache_bytes + in_stages * planned.compute_bytes
            assert close(held + planned.input_bytes, counted.get(planned.device, 0)), (planned, counted)
            assert loaded.get(planned.device, 0) <= counted.get(planned.device, 0)
    return plan


@pytest.mark.parametrize(
    "options",
    [{}, {"n_ctx": 8}, {"n_ctx": 300, "n_batch": 64}, {"kv_dtype": "q8_0"}, {"kv_dtype": ggml.F32, "n_batch": 9}],
    ids=str,
)
def test_the_cpu_takes_the_planned_bytes(path, counted, options):
    plan = check(path, ["CPU"], counted, **options)
    assert plan.devices[-1].total > 0
    assert plan.kv_dtype == ("F32" if options.get("kv_dtype") == ggml.F32 else options.get("kv_dtype", "f16").upper())


@pytest.mark.parametrize("variant", [{"tied": True}, {"name": "gemma3", ".attention.sliding_window": 16}], ids=str)
def test_other_architectures_take_the_planned_bytes(tmp_path, rng, counted, variant):
    check(llama_float64.random_model(tmp_path / "m.gguf", rng, **variant), ["CPU"], counted, n_ctx=64)


@pytest.mark.parametrize("n_batch", [1, 2, 3, 8])
@pytest.mark.parametrize("n_vocab", [50, 3000])
def test_several_sequences_on_the_cpu_fit_the_plan(tmp_path, rng, n_batch, n_vocab):
    """Each token of a batch attends to the slots of its sequence, and has an output: more than a small prompt takes."""
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, n_vocab=n_vocab)
    options = {"n_ctx": 64, "kv_slots": 512, "n_batch": n_batch}
    (planned,) = models.plan(path, ["CPU"], **options).devices
    with models.load(path, ["CPU"], **options) as model:
        (batcher,) = model.batchers
        runner, numbers = batcher.runner, set()

        compute = runner.run

        def run(batch, meanwhile=None):
            numbers.add(0 if batch.query_ids is None else len(batch.query_ids))
            return compute(batch, meanwhile)

        runner.run = run
        requests = [Request([1 + i] * (4 * i + 1), Sampler(), 20, frozenset()) for i in range(8)]
        for _ in generate_many(batcher, enumerate(requests), 8, Timings()):
            pass
        assert n_batch < 8 or max(numbers) > 1
        for n_ranges in range(n_batch + 1):
            for n in range(max(1, -(-n_ranges // 2)), n_batch + 1):
                runner.allocated((n, runner.n_slots, n), n_ranges)
        (taken,) = model.scheduler.buffer_sizes().values()
        assert close(planned.compute_bytes, taken)


@pytest.mark.parametrize(
    ("n_batch", "n_slots", "want"),
    [
        (1, 256, [((1, 256, 1), 0), ((1, 256, 1), 1)]),
        (8, 256, [((8, 256, 1), 0), ((8, 256, 8), 8)]),
        (512, 256, [((512, 256, 1), 0), ((16, 256, 16), 8)]),
        (512, 4096, [((512, 4096, 1), 0), ((16, 4096, 16), 32)]),
    ],
)
def test_the_largest_graphs_are_those_of_a_prompt_and_of_many_sequences(n_batch, n_slots, want):
    assert largest_graphs(n_batch, n_slots, ranges=True) == want
    assert largest_graphs(n_batch, n_slots, ranges=False) == want[:1]
    assert largest_graphs(n_batch, n_slots, ranges=False, untiled=n_batch) == want[:1]
    assert largest_graphs(n_batch + 3, n_slots, ranges=False, untiled=n_batch)[1:] == want[:1]


@pytest.mark.parametrize(("size", "kv_dtype", "n"), [(32, "f16", 62), (256, "f32", 248), (256, "bf16", 0)])
def test_the_largest_graph_without_tiles_is_known(tmp_path, rng, monkeypatch, size, kv_dtype, n):
    monkeypatch.setattr(llama_float64, "HEAD", size)
    path = llama_float64.random_model(tmp_path / "m.gguf", rng)
    with models.load(path, ["CPU"], n_ctx=32, kv_dtype=kv_dtype) as model:
        assert untiled_batch(model.batchers[0].runner.weights) == n


@pytest.mark.parametrize("beside", [(), ("Vulkan0",)], ids=["the CPU alone", "beside a GPU"])
def test_prompts_too_short_for_tiles_take_no_more_than_planned(tmp_path, rng, monkeypatch, beside):
    """They have scores, and take more memory than the largest batch of large heads, which has none."""
    beside = need(beside)
    monkeypatch.setattr(llama_float64, "HEAD", 256)
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, **{".context_length": 2048})
    devices, options = [*beside, "CPU"], {"n_ctx": 2048, "balance": (1, 2) if beside else "memory"}
    plan = models.plan(path, devices, **options)
    with models.load(path, devices, **options) as model:
        runner = model.batchers[0].runner
        for n in (512, 62, 64, 248, 256):
            runner.allocated((n, runner.n_slots, 1))
        taken = model.scheduler.buffer_sizes()
        for planned, (backend, size) in zip(plan.devices, taken.items(), strict=True):
            assert backend.name == planned.device
            assert close(planned.compute_bytes, size)


def test_smollm2_takes_the_planned_bytes(smollm2, counted):
    plan = check(smollm2, ["CPU"], counted, n_ctx=512, n_batch=64)
    (share,) = plan.devices
    assert share.mapped_bytes == share.weight_bytes > 80 * 2**20


def test_encoders_take_the_planned_bytes(tmp_path, rng, counted):
    path = bert_float64.random_model(tmp_path / "m.gguf", rng)
    plan = models.plan(path, ["CPU"], n_batch=48)
    assert not counted
    with models.load(path, ["CPU"], n_batch=48) as model:
        (planned,), (share,) = plan.devices, model.placement
        assert close(planned.compute_bytes, share.compute_bytes)
        assert close(planned.input_bytes + planned.weight_bytes - planned.mapped_bytes, sum(counted.values()))
    assert (planned.cache_bytes, planned.has_output, planned.has_embeddings) == (0, False, True)
    assert len(planned.layers) == model.architecture.n_layers


def test_two_gpus_take_the_planned_bytes(two_gpus, path, counted, monkeypatch):
    memory(monkeypatch, Vulkan0=1 << 30, Vulkan1=1 << 30)  # they share the machine's, which others use meanwhile
    plan = check(path, two_gpus, counted, n_batch=16)
    first, second, cpu = plan.devices
    assert first.layers
    assert second.layers
    assert not cpu.layers
    assert second.has_output
    assert first.compute_bytes > 0 < second.compute_bytes


@pytest.mark.parametrize(
    ("balance", "layers"),
    [([2, 1], [(0, 1), (2,), ()]), ([1, 1, 1], [(1,), (2,), (0,)]), ([0, 1], [(), (0, 1, 2), ()])],
    ids=str,
)
def test_two_unequal_gpus_and_the_cpu_take_the_planned_bytes(two_gpus, path, counted, balance, layers):
    """In batches of 64 the first GPU computes with copies of the CPU's weights, which count as well."""
    plan = check(path, two_gpus, counted, n_batch=64, balance=balance)
    assert [share.layers for share in plan.devices] == layers


def test_a_dry_run_allocates_no_memory(counted):
    with DryRunContext() as dry_run:
        t = dry_run.new_tensor(ggml.F32, (1 << 20, 1 << 20))
        (buffer,) = dry_run.alloc("CPU", usage=ggml.Usage.WEIGHTS)
        assert (buffer.size, buffer.usage, buffer.is_host) == (0, ggml.Usage.WEIGHTS, True)
        assert dry_run.taken == {buffer.buffer_type: 1 << 42}
        assert t.is_allocated
        with pytest.raises(ValueError, match="has memory already"):
            dry_run.alloc("CPU", [t])
    assert not counted
    assert Context.readable
