"""Loading: progress, placement by free memory, wrong arguments, damaged files."""

import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from tests.support import llama_float64, relative_error


def test_progress_is_reported_while_loading(tmp_path, rng):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng)
    seen = []
    models.load(path, ["CPU"], progress=lambda done, total: seen.append((done, total))).close()
    assert seen[-1][0] == seen[-1][1] > 0
    assert seen == sorted(seen)


def test_layers_go_to_the_cpu_where_gpus_are_full(two_gpus, tmp_path, rng, monkeypatch):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng)
    tokens = list(range(12))
    with models.load(path, ["CPU"]) as model:
        want = model.forward(tokens)
    real = ggml.Device.memory
    options = {"n_batch": 16, "reserve": 0}
    # Bytes of one layer with its cache, the output, and the intermediate results.
    limit = max(share.needed for share in models.plan(path, two_gpus, balance=[1, 1, 1], **options).devices[:2])
    monkeypatch.setattr(ggml.Device, "memory", lambda self: real(self) if self.is_cpu else ggml.Memory(limit, limit))
    with models.load(path, two_gpus, **options) as model:
        assert [model.layer_backend(i).name for i in range(3)] == ["CPU", *two_gpus]
        assert relative_error(model.forward(tokens), want) < 1e-2
    monkeypatch.setattr(ggml.Device, "memory", lambda self: real(self) if self.is_cpu else ggml.Memory(0, 0))
    with models.load(path, two_gpus) as model:
        assert {model.layer_backend(i).name for i in range(3)} == {"CPU"}


def test_weights_that_a_gpu_cannot_use_stay_on_the_cpu(two_gpus, tmp_path, rng, monkeypatch):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng)
    for name in ("can_look_up", "can_multiply"):
        monkeypatch.setattr(f"ggml_cffi.models.runners.weights.{name}", lambda backend, _: backend.device.is_cpu)
    with models.load(path, two_gpus) as model:
        model.forward([1, 2, 3] * 4)
        computed = {t.name: backend.name for t, backend in model.assignment()}
        assert computed["logits"] == "CPU"
        assert computed["layer 2"] == two_gpus[1]
        assert model.placement[-1].has_output
        assert model.placement[-1].has_embeddings
        assert not any(placed.has_output or placed.has_embeddings for placed in model.placement[:2])


def test_wrong_arguments_of_load_are_refused(tmp_path, rng):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng)
    for arguments, message in (
        ({"devices": ["Vulkan99"]}, "there is no device 'Vulkan99'"),
        ({"devices": ["CPU", "CPU"]}, "the CPU comes last"),
        (
            {"split": "sideways"},
            "split 'sideways' does not exist: use one of 'layer', 'pipeline', 'data', 'tensor', 'auto'",
        ),
        ({"n_ctx": 513}, "n_ctx must be 1 to 512"),
        ({"n_ctx": 0}, "n_ctx must be 1 to 512"),
        ({"n_batch": 0}, "n_batch must be at least 1"),
        ({"devices": ["CPU"], "n_threads": 0}, "n_threads must be 1 to 512"),
    ):
        with pytest.raises(ValueError, match=message):
            models.load(path, **arguments)
    with pytest.raises(TypeError, match="a device is given by its name, position or Device object, not 1"):
        models.load(path, [1.5])
    with pytest.raises(FileNotFoundError):
        models.load(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba' is not supported; .*llama.* are"),
        ({"general.architecture": 7}, "architecture 7 is not supported"),
        ({"llama.block_count": 4}, "no tensor 'blk.3"),
        ({"llama.block_count": 0}, "block_count is 0, not a positive number"),
        ({"llama.block_count": "x"}, "'llama.block_count' is 'x', not a int"),
        ({"llama.embedding_length": 32}, "shape"),
        ({"llama.attention.head_count_kv": 3}, "4 query heads are not a multiple of 3 KV heads"),
        ({"llama.rope.dimension_count": 7}, "impossible rotary"),
        ({"llama.rope.scaling.type": "longrope"}, "rope scaling 'longrope' is not supported"),
        ({"llama.expert_count": 8}, "expert_count is 8: only 0 is supported"),
        ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "epsilon is -1.0, not a number of 0 or more"),
    ],
)
def test_files_without_a_valid_model_are_refused(tmp_path, rng, change, message):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, **change)
    with pytest.raises(ggml.FormatError, match=message):
        models.load(path, ["CPU"])


def test_too_large_a_context_for_memory_is_an_error(tmp_path, rng):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, **{"llama.context_length": 2**31 - 512})
    with pytest.raises(ggml.OutOfMemoryError):
        models.load(path, ["CPU"], n_ctx=2**31 - 512, n_batch=2**20)


def test_truncated_files_are_refused(smollm2, tmp_path):
    cut = tmp_path / "cut.gguf"
    with open(smollm2, "rb") as f:
        start = f.read(3_000_000)
    for n in (0, 3, 100, 100_000, 1_700_000, 3_000_000):
        cut.write_bytes(start[:n])
        with pytest.raises(ggml.FormatError):
            models.load(cut, ["CPU"])


def test_damaged_files_are_refused_or_work(tmp_path, rng):
    whole = llama_float64.random_model(tmp_path / "m.gguf", rng).read_bytes()
    path = tmp_path / "changed.gguf"
    worked = 0
    for _ in range(50):
        data = bytearray(whole)
        data[rng.integers(0, 3000)] = rng.integers(0, 256)
        path.write_bytes(data)
        try:
            with models.load(path, ["CPU"], n_ctx=8) as model:
                model.forward([1, 2, 3])
                worked += 1
        except (ggml.GgmlError, ValueError):
            pass
    assert worked
