"""Heads for which GPUs have no flash attention: attention is two products there, and the values are transposed."""

import pytest

from ggml_cffi import models
from tests.support import golden, llama_float64, relative_error
from tests.support.llama_float64 import Reference, random_model
from tests.support.splits import answers


@pytest.fixture
def model_path(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(llama_float64, "HEAD", 12)  # Vulkan's kernel needs a multiple of 8
    return random_model(tmp_path / "model.gguf", rng)


@pytest.mark.parametrize("split", ["layer", "pipeline", "tensor"])
def test_gpus_agree_with_float64(two_gpus, model_path, tmp_path, rng, split):
    reference, ids = Reference(model_path), [int(t) for t in rng.integers(0, 50, 40)]
    greedy, margins = reference.greedy(ids, 3)
    follows = golden.decided({"greedy": greedy, "margins": margins}, 0.02)
    assert follows
    options = {"n_ctx": 512, "n_batch": 16}
    if split != "tensor":
        options["balance"] = [1, 2]  # free memory, the default, changes while other programs run
    with models.load(model_path, two_gpus, split, **options) as model:
        planned = models.plan(model_path, two_gpus, split, **options)
        assert [d.compute_bytes for d in planned.devices[:2]] == [p.compute_bytes for p in model.placement[:2]]
        for n in (1, 7, 40):
            assert relative_error(model.forward(ids[:n]), reference.forward(ids[:n])) < 1e-2
        used = {(t.op.name, backend.name) for t, backend in model.assignment()}
        assert {("SOFT_MAX", name) for name in two_gpus} <= used
        assert not any(op == "FLASH_ATTN_EXT" for op, _ in used)
        assert len(list(model.generate_tokens(ids, 300, stop_at_end=False))) == 300  # more KV slots than one step
        model.clear_cache()
        answers(model, [ids])
        model.save_cache(tmp_path / "cache.kv")
    for devices in (["CPU"], two_gpus):
        with models.load(model_path, devices, n_ctx=512, n_batch=16) as model:
            assert model.load_cache(tmp_path / "cache.kv")
            assert answers(model, [ids], len(follows)) == [follows]
            assert model.timings.reused_tokens == len(ids) - 1
