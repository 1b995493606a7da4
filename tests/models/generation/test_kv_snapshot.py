"""Snapshots of the KV cache in files."""

from contextlib import suppress

import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from tests.support import llama_float64
from tests.support.generation import n_free_slots, random_prompts


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_a_snapshot_restores_sequences_keys_and_values(devices, rng, tmp_path, kind):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, head=64)  # CUDA: flash attention, for a quantized cache
    one, two = random_prompts(rng, [40, 25])
    file = tmp_path / "cache.gguf"
    with models.load(path, devices, n_ctx=256, kv_dtype=kind) as model:
        first = list(model.generate_tokens(one, 3, stop_at_end=False))
        list(model.generate_tokens(two, 3, stop_at_end=False))
        kept = model.cached
        assert model.save_cache(file) == 42 + 27
    with models.load(path, devices, n_ctx=256, kv_dtype=kind) as model:
        want = model.forward(one + first, last=True)
        model.forward([7] * 50)
        assert model.load_cache(file) == 42 + 27
        assert model.cached == kept
        got = list(model.generate_tokens(one + first, 1, stop_at_end=False))
        assert model.timings.reused_tokens == 42
        assert got == [want.argmax()]
        assert n_free_slots(model) == 256 - 43 - 27


def test_snapshots_of_other_models_and_damaged_ones_are_refused(path, rng, tmp_path):
    file, other = tmp_path / "cache.gguf", tmp_path / "other.gguf"
    with models.load(path, ["CPU"], n_ctx=256) as model:
        list(model.generate_tokens([1, 2, 3], 1, stop_at_end=False))
        model.save_cache(file)
        with pytest.raises(ggml.FormatError, match=r"not a snapshot of .* cache: ggml_cffi.kv_cache.version is None"):
            model.load_cache(path)
        whole = file.read_bytes()
        for _ in range(100):
            data = bytearray(whole)
            data[rng.integers(0, len(data))] = rng.integers(0, 256)
            other.write_bytes(data)
            with suppress(ggml.FormatError, ValueError):
                model.load_cache(other)
            model.clear_cache()
        assert n_free_slots(model) == 256
    with (
        models.load(path, ["CPU"], kv_dtype="f32") as model,
        pytest.raises(ggml.FormatError, match="key_type is 'F16', not 'F32'"),
    ):
        model.load_cache(file)
