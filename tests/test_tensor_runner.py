"""Models whose layers several devices share, against float64."""

import numpy as np
import pytest
from conftest import relative_error
from llama_float64 import Reference, random_model
from test_tensor_parallel import Ranks

import ggml_cffi as ggml
from ggml_cffi.models.architecture import Architecture
from ggml_cffi.models.llama import Llama
from ggml_cffi.parallel import tensor_runner
from ggml_cffi.parallel.tensor_runner import TensorRunner


def run(model, ids, at, n_out=1):
    n = len(ids)
    positions = np.arange(at, at + n)
    mask = np.where(np.arange(256) <= positions[:, None], np.float16(0), np.float16(-np.inf))
    wanted = np.arange(n - n_out, n, dtype=np.int32)
    return model.logits(np.asarray(ids, np.int32), positions.astype(np.int32), positions, mask, wanted)


def check(path, devices, rng, n_prompt=12, most=1e-2, **options):
    """A prompt, then tokens one by one, against float64; what the runner's driver and shares were."""
    reference = Reference(path)
    ids = rng.integers(0, 50, n_prompt + 2)
    want = reference.forward(ids)
    with ggml.GGUFFile(path) as file, TensorRunner(Llama(file), devices, 256, **options) as model:
        got = [run(model, ids[:n_prompt], 0, n_prompt)]
        got += [run(model, ids[i : i + 1], i) for i in range(n_prompt, len(ids))]
        assert relative_error(np.concatenate(got), want) < most
        steps = len(model.programs[0].plans[0].graphs)
        assert model.group.driver.computed == [3 * steps] * len(devices)
        heads = [part.n_kv_heads for part in model.shares.parts]
        for rank, tensors in enumerate(zip(*model._weights.values(), strict=True)):
            assert {t.buffer_type.device.name for t in tensors} == {devices[rank]}
    assert model.closed
    return steps, heads


@pytest.fixture
def on_the_cpu(monkeypatch):
    """As many ranks as wanted, all on the CPU."""
    monkeypatch.setattr(
        tensor_runner, "TensorParallel", lambda devices, **options: Ranks(len(devices), **_without(options))
    )


def _without(options):
    return {name: value for name, value in options.items() if name != "n_threads"}


@pytest.mark.parametrize(
    ("n", "changes", "heads"),
    [
        (1, {}, [2]),
        (2, {}, [1, 1]),
        (2, {"biases": True, "tied": True}, [1, 1]),
        (2, {"dtype": ggml.Q8_0}, [1, 1]),
        (2, {"n_heads": 6, "n_kv": 3}, [1, 2]),
        (3, {}, [2, 2, 2]),  # fewer KV heads than devices: each has them all
    ],
    ids=str,
)
def test_ranks_compute_what_float64_does(on_the_cpu, tmp_path, rng, n, changes, heads):
    path = tmp_path / "model.gguf"
    random_model(path, rng, **changes)
    # ggml's CPU rounds what it multiplies with Q8_0 to 8 bits.
    steps, found = check(path, ["CPU"] * n, rng, most=3e-2 if "dtype" in changes else 2e-3)
    assert found == heads
    assert steps == (1 if n == 1 else 4 if n == 3 else 7)


def test_gpus_compute_what_float64_does(two_gpus, tmp_path, rng):
    path = tmp_path / "model.gguf"
    random_model(path, rng)
    assert check(path, two_gpus, rng) == (7, [1, 1])


def test_models_that_cannot_be_shared(on_the_cpu, tmp_path, rng):
    path = tmp_path / "model.gguf"
    random_model(path, rng, dtype=ggml.Q8_0)
    with ggml.GGUFFile(path) as file:
        with pytest.raises(ValueError, match=r"model\.gguf has 3 parts that stay whole: too few for 4 devices"):
            TensorRunner(Llama(file), ["CPU"] * 4, 256)
        with pytest.raises(ValueError, match="'llama' cannot be shared by several devices"):
            Architecture.shares(Llama(file), 2)


def test_wrong_tokens_and_a_closed_model(on_the_cpu, tmp_path, rng):
    path = tmp_path / "model.gguf"
    random_model(path, rng)
    seen = []
    with (
        ggml.GGUFFile(path) as file,
        TensorRunner(Llama(file), ["CPU"] * 2, 256, progress=lambda *a: seen.append(a)) as model,
    ):
        with pytest.raises(ValueError, match="50 rows, but got values from 50"):
            run(model, [50], 0)
        assert not model.closed
        assert seen[-1][0] == seen[-1][1]
    with pytest.raises(ggml.ClosedError):
        run(model, [1], 0)
