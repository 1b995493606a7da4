"""The device of each layer."""

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.models.placement import calibration
from ggml_cffi.models.placement.place import main_dtype, proportions_of, split_layers
from tests.support import llama_float64
from tests.support.memory import GIB, memory


class Sized:
    """A device with this number of free bytes."""

    def __init__(self, free, is_cpu=False):
        self.device, self.is_cpu, self.free = self, is_cpu, free

    def memory(self):
        return ggml.Memory(self.free, self.free)


@pytest.mark.parametrize(
    ("free", "parts", "want"),
    [
        ((GIB, GIB), None, [4, 4, 0]),
        ((3 * GIB, GIB), None, [6, 2, 0]),
        ((GIB, GIB), (3, 1, 0), [6, 2, 0]),
        ((GIB, GIB), (1, 1, 2), [2, 2, 4]),
        ((GIB, GIB), (0, 0, 1), [0, 0, 8]),
        ((GIB, 0), None, [8, 0, 0]),
        ((0, 0), None, [0, 0, 8]),
        ((2_600_000, GIB), (1, 1, 0), [4, 4, 0]),
        ((GIB, 1_000_000), (1, 1, 0), [6, 2, 0]),
    ],
    ids=str,
)
def test_layers_are_split_by_memory_and_proportions(tmp_path, rng, free, parts, want):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, n_layers=8)
    with ggml.GGUFFile(path) as file:
        architecture = models.ARCHITECTURES["llama"](file)
        backends = [*map(Sized, free), Sized(0, is_cpu=True)]
        layer_devices = split_layers(architecture, backends, 131_072, proportions=parts)
    assert [layer_devices.count(i) for i in range(3)] == want
    order = [2, 0, 1]  # the CPU has the first layers, the last GPU the last ones
    assert layer_devices == sorted(layer_devices, key=order.index)


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
    fast = {"Vulkan0": 1e-9, "Vulkan1": 2e-9, "CPU": 1e-6}
    monkeypatch.setattr(calibration, "seconds", lambda backend, dtype: fast[backend.name])
    plan = models.plan(path, two_gpus, n_batch=16, balance="speed")
    assert [share.layers for share in plan.devices] == [(0, 1), (2,), ()]
    assert "Vulkan0 has 2 of 3 layers: its part is 67% by measured speed, within what fits." in plan.reasons
    fast["CPU"] = 1e-9
    plan = models.plan(path, ["Vulkan0", "CPU"], n_batch=16, balance="speed")
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
    plan = models.plan(path, ["Vulkan1"], n_batch=16)
    assert plan.proposals[-1].startswith("Vulkan0 as well, which has ")


def test_gpus_without_any_room_take_no_part(two_gpus, path, monkeypatch):
    memory(monkeypatch, Vulkan0=0, Vulkan1=0)
    plan = models.plan(path, two_gpus)
    assert [share.total for share in plan.devices[:2]] == [0, 0]
    assert any("GPUs do not compute with weights of the CPU" in reason for reason in plan.reasons)


def test_intermediate_tensors_need_memory_too(two_gpus, path, monkeypatch):
    """Weights and caches alone would leave 15 % of the memory, which is too little for large batches."""
    memory(monkeypatch, Vulkan0=1_300_000, Vulkan1=0)
    small, large = (models.plan(path, ["Vulkan0"], n_batch=n) for n in (16, 512))
    assert small.fits
    assert large.fits
    assert len(large.devices[0].layers) < len(small.devices[0].layers)
