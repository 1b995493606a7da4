"""Dry runs predict the bytes that loading and a first run take."""

import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.core.context import Context
from ggml_cffi.core.dry_run import DryRunContext
from ggml_cffi.models.runners.pipeline import PipelineRunner
from tests.support import bert_float64, llama_float64
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
            runner.allocated((plan.n_batch, runner.n_slots, 1))
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
