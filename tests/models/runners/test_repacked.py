"""Repacked weights: results, memory in plans, and refused reads and writes."""

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.core.repack import repacked_memories
from ggml_cffi.models.placement import options
from tests.support import need, relative_error
from tests.support.llama_float64 import Reference, random_model


@pytest.fixture
def memory():
    found = repacked_memories()
    if "CPU_REPACK" not in found:
        pytest.skip("the library has no kernels for repacked weights")
    return found["CPU_REPACK"]


def is_repacked(model, name):
    kind = model.batchers[0].runner.weights.by_device[-1][name].buffer_type
    return kind in repacked_memories().values()


@pytest.mark.parametrize("dtype", [ggml.Q4_0, ggml.Type.IQ4_NL, ggml.Q4_1, ggml.Q8_0], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("biases", [False, True])
def test_answers_with_repacked_weights_agree_with_float64(memory, tmp_path, rng, dtype, biases):
    path = random_model(tmp_path / "model.gguf", rng, dtype=dtype, biases=biases)
    ids = [int(t) for t in rng.integers(0, 50, 40)]
    want = Reference(path).forward(ids)
    kinds = {}
    for repack in (None, True, False):
        plan = models.plan(path, ["CPU"], n_ctx=64, repack=repack)
        with models.load(path, ["CPU"], n_ctx=64, repack=repack) as model:
            assert model.plan.devices[0].mapped_bytes == plan.devices[0].mapped_bytes
            assert model.plan.devices[0].total == plan.devices[0].total
            kinds[repack] = is_repacked(model, "blk.0.ffn_up.weight"), plan.devices[0].mapped_bytes
            joined = "blk.0.attn_q+attn_k+attn_v.weight" in model.batchers[0].runner.weights.by_device[0]
            assert joined == (not biases)  # biases are mapped, and apart from one another
            assert not is_repacked(model, "token_embd.weight")
            for n in (1, 7, 40):  # ggml rounds the tokens to 8 bits
                assert relative_error(model.forward(ids[:n]), want[:n]) < 3e-2
    assert kinds[None] == kinds[True]
    if kinds[True][0]:  # the processor has kernels for this type
        assert kinds[True][1] < kinds[False][1]


def test_weights_stay_mapped_where_memory_is_short(memory, tmp_path, rng, monkeypatch):
    path = random_model(tmp_path / "model.gguf", rng, dtype=ggml.Q4_0)
    monkeypatch.setattr(options, "REPACKED", 1e-9)
    with models.load(path, ["CPU"], n_ctx=64) as model:
        assert not is_repacked(model, "blk.0.ffn_up.weight")


def test_other_types_stay_in_mapped_pages(memory, tmp_path, rng):
    path = random_model(tmp_path / "model.gguf", rng, dtype=ggml.Q5_0)
    with models.load(path, ["CPU"], n_ctx=64, repack=True) as model:
        assert not any(is_repacked(model, name) for name in model.batchers[0].runner.weights.by_device[0])


def test_a_repacked_output_head_is_a_copy_if_it_is_the_embeddings(memory, tmp_path, rng):
    sizes = {}
    for tied in (False, True):
        path = random_model(tmp_path / f"{tied}.gguf", rng, dtype=ggml.Q4_0, tied=tied, n_vocab=64)
        plan = models.plan(path, ["CPU"], n_ctx=64)
        with models.load(path, ["CPU"], n_ctx=64) as model:
            if not is_repacked(model, "blk.0.ffn_up.weight"):
                pytest.skip("this processor has no kernels for repacked Q4_0")
            assert is_repacked(model, "output.weight")
            assert not is_repacked(model, "token_embd.weight")
            assert plan.devices[0].total == model.plan.devices[0].total
            sizes[tied] = plan.devices[0].weight_bytes
        with models.load(path, ["CPU"], n_ctx=64, repack=False) as model:
            own = model.batchers[0].runner.weights.by_device[0]
            assert (own["output.weight"] is own["token_embd.weight"]) == tied
    assert sizes[True] == sizes[False]


def test_layers_of_the_cpu_beside_a_gpu_are_repacked_on_request(memory, tmp_path, rng):
    (gpu,) = need(("Vulkan0",))
    path = random_model(tmp_path / "model.gguf", rng, dtype=ggml.Q4_0)
    ids = [int(t) for t in rng.integers(0, 50, 40)]
    want = Reference(path).forward(ids)
    for repack in (None, True):
        options = {"n_ctx": 64, "balance": [1, 2], "repack": repack}
        with models.load(path, [gpu, "CPU"], **options) as model:
            assert not is_repacked(model, "blk.0.ffn_up.weight") or repack
            assert relative_error(model.forward(ids), want) < 3e-2


def test_nothing_but_products_reads_a_repacked_tensor(memory):
    with ggml.Context() as ctx:
        w, v = (ctx.new_tensor("q4_0", (16, 64)) for _ in range(2))
        other = ctx.new_tensor("q8_0", (16, 64))  # has no kernels
        ctx.alloc(memory, [w, v, other])
        values = np.linspace(-1, 1, 1024, dtype=np.float32).reshape(16, 64)
        for call in (w.numpy, w.get_bytes, lambda: np.asarray(w), lambda: w.numpy(copy=False)):
            with pytest.raises(ValueError, match="is repacked for matrix products: nothing else can read it"):
                call()
        for call in (lambda: w.set_bytes(bytes(18), 0), lambda: other.set(values)):
            with pytest.raises(ValueError, match="only set and set_bytes write it, as a whole"):
                call()
