"""Keys and values that one node writes into the cache, as CUDA devices do: here Vulkan devices do it too.

Heads have 64 elements: CUDA has no flash attention for smaller ones, and then writes values on their own.
"""

from collections import Counter
from types import SimpleNamespace

import pytest

from ggml_cffi import F16, F32, models
from ggml_cffi.models.runners import weights
from ggml_cffi.models.runners.queries import writes_at_once
from tests.support import relative_error
from tests.support.llama_float64 import Reference, random_model
from tests.support.splits import answers

OPTIONS = {"n_ctx": 512, "n_batch": 16}


@pytest.fixture
def at_once(monkeypatch):
    """Let all devices write keys and values at once."""
    monkeypatch.setattr(weights, "writes_at_once", lambda backend: True)


def nodes(model):
    """Return for each device the numbers of nodes of the last run, by operation."""
    found = {}
    for t, backend in model.assignment():
        found.setdefault(backend.name, Counter())[t.op.name] += 1
    return found


def test_cuda_devices_write_at_once():
    def backend(name):
        return SimpleNamespace(device=SimpleNamespace(backend_name=name))

    found = [name for name in ("CUDA", "ROCm", "MUSA", "CPU", "Vulkan", "RPC") if writes_at_once(backend(name))]
    assert found == ["CUDA", "ROCm", "MUSA"]


@pytest.mark.parametrize("kv_dtype", ["f16", "q8_0"])
@pytest.mark.parametrize("split", ["tensor", "pipeline", "layer"])
def test_results_agree_with_float64(two_gpus, tmp_path, rng, at_once, split, kv_dtype):
    path = random_model(tmp_path / "model.gguf", rng, n_layers=2, biases=True, head=64)
    reference, ids = Reference(path), [int(t) for t in rng.integers(0, 50, 40)]
    options = {"kv_dtype": kv_dtype, **OPTIONS}
    if split != "tensor":
        options["balance"] = [1, 1]
    with models.load(path, two_gpus, split, **options) as model:
        planned = models.plan(path, two_gpus, split, **options)
        for plan, placed in zip(planned.devices[:2], model.placement[:2], strict=True):
            assert (plan.cache_bytes, plan.compute_bytes) == (placed.cache_bytes, placed.compute_bytes)
        for n in (1, 7, 40):
            assert relative_error(model.forward(ids[:n]), reference.forward(ids[:n])) < 2e-2
        assert len(list(model.generate_tokens(ids, 300, stop_at_end=False))) == 300  # more KV slots than one step
        layers = 2 if split == "tensor" else 1
        found = nodes(model)
        assert all(found[name]["SET_ROWS"] == found[name]["ROPE"] == layers for name in two_gpus)


def test_a_snapshot_serves_devices_that_write_twice(two_gpus, tmp_path, rng, monkeypatch):
    path = random_model(tmp_path / "model.gguf", rng, head=64)
    ids = [int(t) for t in rng.integers(0, 50, 40)]
    with monkeypatch.context() as patch:
        patch.setattr(weights, "writes_at_once", lambda backend: True)
        with models.load(path, two_gpus, "tensor", **OPTIONS) as model:
            want = answers(model, [ids])
            model.save_cache(tmp_path / "cache.kv")
    for at_once, devices in ((False, two_gpus), (True, two_gpus[:1])):
        monkeypatch.setattr(weights, "writes_at_once", lambda backend, at_once=at_once: at_once)
        with models.load(path, devices, **OPTIONS) as model:
            assert model.load_cache(tmp_path / "cache.kv")
            assert answers(model, [ids]) == want
            assert model.timings.reused_tokens == len(ids) - 1


@pytest.mark.parametrize("what", ["norms", "larger values", "values of another type"])
def test_other_layers_write_twice(two_gpus, tmp_path, rng, at_once, what):
    """Heads with a norm, values of another size, and weights of several types have two nodes that write."""

    def each_layer(name, shape, dtype=F32):
        return {f"blk.{i}.{name}.weight": (dtype, rng.standard_normal(shape) / shape[1] ** 0.5) for i in range(3)}

    changes = {
        "norms": {"name": "qwen3"},
        "larger values": {
            ".attention.value_length": 128,
            "more": each_layer("attn_v", (256, 64)) | each_layer("attn_output", (64, 512)),
        },
        "values of another type": {"more": each_layer("attn_v", (128, 64), F16)},
    }
    path = random_model(tmp_path / "model.gguf", rng, head=64, **changes[what])
    ids = [int(t) for t in rng.integers(0, 50, 20)]
    with models.load(path, two_gpus, "tensor", **OPTIONS) as model:
        assert relative_error(model.forward(ids), Reference(path).forward(ids)) < 1e-2
        assert nodes(model)[two_gpus[0]]["SET_ROWS"] == 6
