"""Mapped weights of the CPU, of which those that follow one another in the file are one product."""

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from tests.support import relative_error
from tests.support.llama_float64 import Reference, random_model

N_PROMPT = 12


def by_name_of_hugging_face(names):
    """Return names in the order of llama.cpp's converter."""
    return sorted(names, key=lambda name: name.replace("ffn_norm", "post_attention_layernorm"))


@pytest.mark.parametrize(
    ("order", "dtype", "n", "joined"),
    [
        (None, ggml.F32, 4, ["attn_q+attn_k+attn_v", "ffn_gate+ffn_up"]),
        (None, ggml.Q8_0, 4, ["attn_q+attn_k+attn_v", "ffn_gate+ffn_up"]),
        (by_name_of_hugging_face, ggml.F16, 6, ["ffn_gate+ffn_up"]),
        (lambda names: sorted(names, reverse=True), ggml.F16, 7, []),
    ],
    ids=["F32", "Q8_0", "converted", "backwards"],
)
def test_mapped_weights_that_follow_one_another_are_one_product(tmp_path, rng, order, dtype, n, joined):
    path = random_model(tmp_path / "model.gguf", rng, order=order, dtype=dtype)
    reference, ids = Reference(path), rng.integers(0, 50, N_PROMPT)
    with models.load(path, "CPU", n_ctx=64, repack=False) as model:
        assert relative_error(model.forward(ids), reference.forward(ids)) < (3e-2 if dtype is ggml.Q8_0 else 2e-3)
        nodes = [t for t, _ in model.assignment() if t.op is ggml.Op.MUL_MAT]
        own = model.batchers[0].runner.weights.by_device[0]
        assert [name.split(".")[2] for name in own if name.startswith("blk.1.") and "+" in name] == joined
        assert sum(t.ptr.src[0].op == ggml.Op.NONE for t in nodes) == 3 * n + 1
        assert model.plan.devices[0].mapped_bytes == sum(t.nbytes for name, t in own.items() if "+" not in name)


@pytest.mark.parametrize("dtype", [ggml.F32, ggml.F16, ggml.Q8_0, ggml.Q4_0])
def test_one_product_has_the_same_bits_as_several(tmp_path, dtype):
    found = []
    for order in (None, lambda names: sorted(names, reverse=True)):
        path = random_model(tmp_path / "model.gguf", np.random.default_rng(5), order=order, dtype=dtype)
        with models.load(path, "CPU", n_ctx=64, repack=False) as model:
            found.append([model.forward(range(n)) for n in (1, N_PROMPT)])
            found[-1].append(any("+" in name for name in model.batchers[0].runner.weights.by_device[0]))
    (one, many, joined), (one_apart, many_apart, joined_apart) = found
    assert joined
    assert not joined_apart
    np.testing.assert_array_equal(one, one_apart)
    np.testing.assert_array_equal(many, many_apart)


def test_mapped_weights_beside_a_gpu_are_products_of_their_own(two_gpus, tmp_path, rng):
    path = random_model(tmp_path / "model.gguf", rng)
    reference, ids = Reference(path), rng.integers(0, 50, N_PROMPT)
    with models.load(path, [two_gpus[0], "CPU"], balance=[0, 1], n_ctx=64) as model:
        assert relative_error(model.forward(ids), reference.forward(ids)) < 1e-2
        assert not any("+" in name for own in model.batchers[0].runner.weights.by_device for name in own)
