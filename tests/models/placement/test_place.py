"""The device of each layer."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.models.placement import RESERVE, LoadOptions, calibration, split_layers
from ggml_cffi.models.placement.options import parse_reserve
from ggml_cffi.models.placement.place import main_dtype, proportions_of
from ggml_cffi.models.runners import link
from tests.support import llama_float64
from tests.support.memory import GIB, memory


@pytest.mark.parametrize(
    ("parts", "capacity", "want"),
    [
        ((1, 1, 0), (99, 99), [4, 4, 0]),
        ((3, 1, 0), (99, 99), [6, 2, 0]),
        ((1, 1, 2), (99, 99), [2, 2, 4]),
        ((0, 0, 1), (99, 99), [0, 0, 8]),
        ((1, 3, 0), (99, 99), [2, 6, 0]),
        ((99, 0, 0), (99, 0), [8, 0, 0]),
        ((0, 0, 0), (0, 0), [0, 0, 8]),
        ((1, 1, 0), (99, 20), [6, 2, 0]),
        ((1, 1, 0), (30, 99), [3, 5, 0]),
        ((1, 3, 0), (59, 39), [5, 3, 0]),
        ((1, 1, 0), (29, 39), [2, 3, 3]),
        ((1, 1, 2), (10, 10), [1, 1, 6]),
    ],
    ids=str,
)
def test_layers_are_split_by_proportions_within_capacity(parts, capacity, want):
    layer_devices = split_layers([10] * 8, parts, [*capacity, 0])
    assert [layer_devices.count(i) for i in range(3)] == want
    order = [2, 0, 1]  # the CPU has the first layers, the last GPU the last ones
    assert layer_devices == sorted(layer_devices, key=order.index)


def test_no_layer_is_on_the_cpu_if_any_division_of_unequal_layers_fits(rng):
    spilled = 0
    for _ in range(200):
        sizes = rng.integers(1, 20, 9).tolist()
        capacity = [*rng.integers(0, sum(sizes), 3).tolist(), 0]
        found = split_layers(sizes, capacity, capacity)
        held = [sum(size for size, device in zip(sizes, found, strict=True) if device == i) for i in range(4)]
        assert all(held[i] <= capacity[i] for i in range(3))
        # Every division into neighbouring layers, the CPU's first.
        fewest = min(
            a
            for a, b, c in itertools.combinations_with_replacement(range(10), 3)
            if sum(sizes[a:b]) <= capacity[0] and sum(sizes[b:c]) <= capacity[1] and sum(sizes[c:]) <= capacity[2]
        )
        assert found.count(3) == fewest
        spilled += fewest > 0
    assert 20 < spilled < 180


def test_the_reserve_is_in_bytes():
    options = LoadOptions(512, 16, ggml.F16)
    assert (
        options.reserve_of(24 * GIB, is_cpu=False) == options.reserve_of(8 * GIB, is_cpu=False) == RESERVE == GIB // 2
    )
    assert options.reserve_of(4 * GIB, is_cpu=False) == GIB // 4
    assert options.reserve_of(24 * GIB, is_cpu=True) == 0
    assert replace(options, reserve=5).reserve_of(24 * GIB, is_cpu=False) == 5
    given = (None, 7, "1G", "1.5GiB", "512m", "0")
    assert [parse_reserve(each) for each in given] == [None, 7, GIB, 3 * GIB // 2, GIB // 2, 0]
    for wrong in ("much", "-1G", -1, "1X", True, ""):
        with pytest.raises(ValueError, match=r"reserve .* is no size: use a number of bytes, or a text such as 512M"):
            parse_reserve(wrong)


def test_models_leave_the_reserve_free(two_gpus, path, monkeypatch):
    memory(monkeypatch, Vulkan0=900_000, Vulkan1=900_000)
    plan = models.plan(path, two_gpus, n_batch=16)
    assert [len(share.layers) for share in plan.devices] in ([1, 2, 0], [2, 1, 0])
    assert [share.reserve for share in plan.devices] == [900_000 // 16, 900_000 // 16, 0]
    options = {"n_batch": 16, "reserve": "400K"}
    plan = models.plan(path, two_gpus, **options)
    assert all(share.fits and share.total <= 900_000 - 400 * 1024 for share in plan.devices[:2])
    assert plan.devices[-1].layers
    with models.load(path, two_gpus, **options) as model:
        assert model.plan.devices == plan.devices
    with pytest.raises(ggml.OutOfMemoryError, match=r"lacks .* beside a reserve of 400.0 KiB"):
        models.load(path, two_gpus, balance=[1, 1], **options)


def test_balance_by_ratios_and_by_speed(path, monkeypatch):
    with ggml.GGUFFile(path) as file, ggml.Backend("CPU") as cpu, ggml.Backend("CPU") as other:
        architecture = models.ARCHITECTURES["llama"](file)
        proportions = lambda balance, chosen=None: proportions_of(balance, architecture, [other, cpu], chosen)  # noqa: E731
        assert proportions("memory") == (None, False)
        assert proportions([3, 1]) == ([3, 1], True)
        assert proportions(np.array([2])) == ([2, 0], True)
        seconds = {other: 1e-3, cpu: 4e-3}
        monkeypatch.setattr(calibration, "seconds", lambda backend, dtype: seconds[backend])
        assert proportions("speed", ["A", "CPU"]) == ([1000, 250], False)
        for wrong in ([], [1, 2, 3], [-1, 2], [0, 0], [float("nan"), 1]):
            with pytest.raises(ValueError, match="not one number of 0 or more for each of CPU, CPU"):
                proportions(wrong)
        with pytest.raises(ValueError, match="balance 'luck' does not exist: use 'memory', 'speed'"):
            proportions("luck")
        assert main_dtype(architecture) is ggml.F32


def test_unequal_devices_by_speed(two_gpus, path, monkeypatch):
    fast = dict(zip((*two_gpus, "CPU"), (1e-9, 2e-9, 1e-6), strict=True))
    monkeypatch.setattr(calibration, "seconds", lambda backend, dtype: fast[backend.name])
    plan = models.plan(path, two_gpus, n_batch=16, balance="speed")
    assert [share.layers for share in plan.devices] == [(0, 1), (2,), ()]
    assert f"{two_gpus[0]} has 2 of 3 layers: its part is 67% by measured speed, within what fits." in plan.reasons
    fast["CPU"] = 1e-9
    plan = models.plan(path, [two_gpus[0], "CPU"], n_batch=16, balance="speed")
    assert [len(share.layers) for share in plan.devices] in ([1, 2], [2, 1])
    with models.load(path, two_gpus, n_batch=16, balance="speed") as model:
        assert [share.layers for share in model.placement] == [[0, 1], [2], []]


def test_layers_that_fit_no_gpu_go_to_the_cpu(two_gpus, path, monkeypatch):
    memory(monkeypatch, Vulkan0=600_000, Vulkan1=600_000)
    plan = models.plan(path, two_gpus, n_batch=16)
    assert [share.layers for share in plan.devices] == [(1,), (2,), (0,)]
    assert plan.fits
    assert "CPU has 1 of 3 layers: the GPUs have no room for them." in plan.reasons
    assert "n_ctx=256" in plan.proposals
    assert "one more device" in plan.proposals[-1]
    assert "Every layer would be on a GPU with:" in str(plan)
    memory(monkeypatch, Vulkan0=0, Vulkan1=600_000)
    plan = models.plan(path, [two_gpus[1]], n_batch=16)
    assert "one more device" in plan.proposals[-1]  # the other GPU would not help
    memory(monkeypatch, Vulkan0=5_000_000, Vulkan1=600_000)
    plan = models.plan(path, [two_gpus[1]], n_batch=16)
    assert plan.proposals[-1] == f"devices={[*reversed(two_gpus)]}"
    assert not models.plan(path, two_gpus[::-1], n_batch=16).devices[-1].layers


def test_devices_take_no_turns_if_only_these_lack_memory(two_gpus, tmp_path, rng, monkeypatch):
    """With turns there are more links, and more slots in each."""
    monkeypatch.setattr(link, "are_peers", lambda devices: True)
    path = llama_float64.random_model(tmp_path / "model.gguf", rng, n_layers=16)
    options = {"n_batch": 512, "n_ctx": 512, "balance": [1, 1], "reserve": 0}
    needed = {}
    for split in ("layer", "pipeline"):
        needed[split] = max(share.total for share in models.plan(path, two_gpus, split, **options).devices[:2])
    assert needed["layer"] < needed["pipeline"]
    del options["balance"]
    for split, turns in (("pipeline", 2), ("layer", 1)):
        memory(monkeypatch, Vulkan0=needed[split], Vulkan1=needed[split])
        plan = models.plan(path, two_gpus, "pipeline", **options)
        assert plan.fits
        assert [len(stages_of(share.layers)) for share in plan.devices] == [turns, turns, 0]


def stages_of(layers):
    """Return the first layer of each stage of a device."""
    return [i for i in layers if i - 1 not in layers]


def test_gpus_without_any_room_take_no_part(two_gpus, path, monkeypatch):
    memory(monkeypatch, Vulkan0=0, Vulkan1=0)
    plan = models.plan(path, two_gpus)
    assert [share.total for share in plan.devices[:2]] == [0, 0]
    assert any("GPUs do not compute with weights of the CPU" in reason for reason in plan.reasons)


def test_intermediate_tensors_need_memory_too(two_gpus, path, monkeypatch):
    """Weights and caches alone would leave some memory, which is too little for large batches."""
    memory(monkeypatch, Vulkan0=1_300_000, Vulkan1=0)
    small, large = (models.plan(path, two_gpus[:1], n_batch=n) for n in (16, 512))
    assert small.fits
    assert large.fits
    assert len(large.devices[0].layers) < len(small.devices[0].layers)
