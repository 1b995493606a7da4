"""Models whose layers several devices share, against float64."""

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi.models.architectures.base import Architecture
from ggml_cffi.models.architectures.gemma3 import Gemma3
from ggml_cffi.models.architectures.llama import Llama
from ggml_cffi.models.architectures.qwen3 import Qwen3
from ggml_cffi.models.runners import tensor as tensor_runner
from ggml_cffi.models.runners.base import Batch
from ggml_cffi.models.runners.tensor import TensorRunner
from tests.parallel.test_tensor_parallel import Ranks
from tests.support import relative_error
from tests.support.llama_float64 import HEAD, Reference, random_model

N_PROMPT, WINDOW = 12, 5
GEMMA = {"name": "gemma3", ".attention.sliding_window": WINDOW, ".attention.sliding_window_pattern": 2}


def run(model, ids, at, n_out=1):
    n = len(ids)
    positions = np.arange(at, at + n)
    back = positions[:, None] - np.arange(256)
    mask, near = (
        np.where((back >= 0) & (back < window), np.float16(0), np.float16(-np.inf)) for window in (256, WINDOW)
    )
    wanted = np.arange(n - n_out, n, dtype=np.int32)
    return model.run(Batch(np.asarray(ids, np.int32), positions.astype(np.int32), positions, mask, wanted, near)).copy()


def check(path, devices, rng, kind=Llama, most=1e-2, **options):
    """A prompt, then tokens one by one, against float64; the steps of a run, and the KV heads of each device."""
    reference = Reference(path)
    ids = rng.integers(0, 50, N_PROMPT + 2)
    want = reference.forward(ids)
    with ggml.GGUFFile(path) as file, TensorRunner(kind(file), devices, 256, **options) as model:
        got = [run(model, ids[:N_PROMPT], 0, N_PROMPT), run(model, ids[:N_PROMPT], 0)]
        np.testing.assert_allclose(got.pop(), got[0][-1:], atol=1e-3 * np.abs(got[0]).max())
        got += [run(model, ids[i : i + 1], i) for i in range(N_PROMPT, len(ids))]
        assert relative_error(np.concatenate(got), want) < most
        steps = len(model.programs[0].plans[0].graphs)
        assert model.group.executor.computed == [4 * steps] * len(devices)
        for rank, tensors in enumerate(zip(*model.weights.values(), strict=True)):
            assert {t.buffer_type.device.name for t in tensors} == {devices[rank]}
        heads = [w.shape[0] // HEAD for w in model.weights["blk.0.attn_k.weight"]]
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
    ("n", "kind", "changes", "heads"),
    [
        (1, Llama, {}, [2]),
        (2, Llama, {}, [1, 1]),
        (2, Llama, {"biases": True, "tied": True}, [1, 1]),
        (2, Llama, {"dtype": ggml.Q8_0}, [1, 1]),
        (2, Llama, {"n_heads": 6, "n_kv": 3}, [1, 2]),
        (3, Llama, {}, [2, 2, 2]),  # fewer KV heads than devices: each has them all
        (2, Qwen3, {"name": "qwen3"}, [1, 1]),
        (2, Gemma3, GEMMA, [1, 1]),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_ranks_compute_what_float64_does(on_the_cpu, tmp_path, rng, n, kind, changes, heads):
    path = tmp_path / "model.gguf"
    random_model(path, rng, **changes)
    # ggml's CPU rounds what it multiplies with Q8_0 to 8 bits.
    steps, found = check(path, ["CPU"] * n, rng, kind, most=3e-2 if "dtype" in changes else 2e-3)
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
        with pytest.raises(
            ValueError, match=r"model\.gguf: the feed-forward part has 3 parts that stay whole: too few for 4 devices"
        ):
            TensorRunner(Llama(file), ["CPU"] * 4, 256)
        with pytest.raises(ValueError, match="'llama' cannot be shared by several devices"):
            Architecture.tensor_parallel(Llama(file), 2)


def test_wrong_tokens_and_a_closed_model(on_the_cpu, tmp_path, rng):
    path = tmp_path / "model.gguf"
    random_model(path, rng)
    seen = []
    with (
        ggml.GGUFFile(path) as file,
        TensorRunner(Llama(file), ["CPU"] * 2, 256, progress=lambda *a: seen.append(a)) as model,
    ):
        with pytest.raises(ValueError, match="token ids are 0 to 49, not 50 to 50"):
            run(model, [50], 0)
        assert not model.closed
        assert seen[-1][0] == seen[-1][1]
    with pytest.raises(ggml.ClosedError):
        run(model, [1], 0)
