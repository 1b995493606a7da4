"""Every sentence about a placement is true."""

import pytest

from ggml_cffi import models
from tests.support import llama_float64
from tests.support.memory import memory

TWO = ["1G", "1G", "CPU:1G"]
FIRST = "The embeddings are on {}, where the first layer is."
LAST = "The output is on {}, where the last layer is."


def reasons(path, devices, **options):
    """Return the sentences of a plan without the one about hypothetical devices."""
    plan = models.plan(path, devices, **({"n_batch": 16} | options))
    return [sentence for sentence in plan.reasons if "hypothetical" not in sentence]


@pytest.mark.parametrize(
    ("devices", "options", "want"),
    [
        (
            ["1G", "CPU:1G"],
            {},
            ["GPU0 has 3 of 3 layers: it has room for all.", FIRST.format("GPU0"), LAST.format("GPU0")],
        ),
        (
            TWO,
            {"balance": [1, 2]},
            [
                "GPU0 has 1 of 3 layers: its part is 33%, as requested.",
                "GPU1 has 2 of 3 layers: its part is 67%, as requested.",
                FIRST.format("GPU0"),
                LAST.format("GPU1"),
            ],
        ),
        (
            TWO,
            {"balance": [1, 0]},
            [
                "GPU0 has 3 of 3 layers: its part is 100%, as requested.",
                "GPU1 has 0 of 3 layers: its part is 0%, as requested.",
                FIRST.format("GPU0"),
                LAST.format("GPU0"),
            ],
        ),
        (
            ["1G", "CPU:1G"],
            {"balance": [0, 1]},
            [
                "GPU0 has 0 of 3 layers: its part is 0%, as requested.",
                "CPU has 3 of 3 layers: its part is 100%, as requested.",
                FIRST.format("CPU"),
                LAST.format("CPU"),
            ],
        ),
        (
            ["10K", "CPU:1G"],
            {},
            [
                "GPU0 has 0 of 3 layers: none fits in 9.4 KiB, its free memory without a reserve of 0.6 KiB.",
                "CPU has 3 of 3 layers: the GPUs have no room for them.",
                FIRST.format("CPU"),
                LAST.format("CPU"),
            ],
        ),
        (
            ["600K", "CPU:1G"],
            {},
            [
                "GPU0 has 1 of 3 layers: as many as fit in 562.5 KiB, its free memory without a reserve of 37.5 KiB.",
                "CPU has 2 of 3 layers: the GPUs have no room for them.",
                FIRST.format("CPU"),
                LAST.format("GPU0"),
            ],
        ),
        (
            ["CPU:1G"],
            {},
            ["CPU has all 3 layers: it is the only device.", FIRST.format("CPU"), LAST.format("CPU")],
        ),
        (TWO, {"split": "data"}, ["Each of GPU0, GPU1 has the whole model."]),
        (TWO, {"split": "tensor"}, ["Each of GPU0, GPU1 has all heads and some feed-forward columns of every layer."]),
    ],
    ids=str,
)
def test_reasons_are_those_of_the_placement(path, devices, options, want):
    found = reasons(path, devices, **options)
    assert sorted(found) == sorted(want)


def test_the_device_of_tied_embeddings_is_told(tmp_path, rng):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, tied=True)
    assert "The output is on GPU0, where the last layer is: the embeddings." in reasons(path, ["1G", "CPU:1G"])
    assert "The output is on GPU1, where the last layer is: a copy of the embeddings." in reasons(path, TWO)


def test_ends_that_a_gpu_cannot_use_are_on_the_cpu_for_that_reason(two_gpus, path, monkeypatch):
    memory(monkeypatch, Vulkan0=1 << 30, Vulkan1=1 << 30)
    for name in ("can_look_up", "can_multiply"):
        monkeypatch.setattr(f"ggml_cffi.models.runners.weights.{name}", lambda backend, _: backend.device.is_cpu)
    found = reasons(path, two_gpus)
    assert f"The embeddings are on CPU, since {two_gpus[0]} cannot look up F32." in found
    assert f"The output is on CPU, since {two_gpus[1]} cannot multiply by weights in F32." in found
    assert not any("the last layer is" in sentence for sentence in found)


def test_a_refused_balance_has_no_reason_about_the_cpu(path):
    plan = models.plan(path, ["1M", "100K", "CPU:1G"], balance=[1, 2], n_batch=16)
    assert not plan.fits
    assert not any("CPU" in sentence for sentence in plan.reasons)


def test_a_gpu_without_room_for_copies_is_told(path):
    found = reasons(path, ["400K", "CPU:1G"], n_batch=512)
    assert "CPU has 3 of 3 layers: the GPUs have no room for them." in found
    assert "GPUs do not compute with weights of the CPU: one has no room for copies of them." in found
