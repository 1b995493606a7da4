"""Estimates of a model's speed from calibrated devices."""

import json

import pytest

import ggml_cffi as ggml
from ggml_cffi import cli, models
from ggml_cffi.models.placement import calibration
from tests.support import bert_float64

#: Seconds for each element of a weight and each token.
DECODE, PREFILL = 1e-9, 1e-11


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Give each test a calibration of its own, in which nothing is measured."""
    monkeypatch.setenv("GGML_CFFI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "measure", lambda *_: pytest.fail("a device was measured"))


def store(*names, factor=1):
    """Store the speed of devices with these descriptions."""
    calibration.path().parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(calibration.path().read_text()) if calibration.path().exists() else {}
    known |= {f"{name}, Vulkan, F32, ggml {ggml.GGML_VERSION}": [factor * DECODE, factor * PREFILL] for name in names}
    calibration.path().write_text(json.dumps(known))


def elements(path, layers=range(3)):
    """Return the elements of the weights by which a token is multiplied, the output head included."""
    with ggml.GGUFFile(path) as file:
        return sum(
            info.nbytes // 4
            for name, info in file.tensors.items()
            if name == "output.weight" or any(name.startswith(f"blk.{i}.") for i in layers)
        )


def test_the_speed_of_calibrated_devices_is_estimated(path, capsys):
    machine = ["A:1G", "B:1G", "CPU:1G"]
    plan = models.plan(path, machine)
    assert plan.speed is None
    assert "Estimate" not in str(plan)
    store("A")
    assert models.plan(path, machine).speed is None  # the other is not calibrated
    store("B", factor=3)
    one = models.plan(path, ["A:1G", "CPU:1G"]).speed
    assert one.decode == pytest.approx(1 / (DECODE * elements(path)))
    assert one.prefill == pytest.approx(1 / (PREFILL * elements(path)))
    # In turn, with layers 0 and 1 on A, or at the same time.
    own = elements(path) - elements(path, [2]), 3 * elements(path, [2])
    plan = models.plan(path, machine, balance=[2, 1])
    assert [len(d.layers) for d in plan.devices] == [2, 1, 0]
    assert plan.speed.decode == pytest.approx(1 / (DECODE * sum(own)))
    assert plan.speed.prefill == pytest.approx(1 / (PREFILL * sum(own)))
    plan = models.plan(path, machine, "pipeline", balance=[2, 1])
    assert plan.speed.decode == pytest.approx(1 / (DECODE * sum(own)))
    assert plan.speed.prefill == pytest.approx(1 / (PREFILL * max(own)))
    assert models.plan(path, machine, "tensor").speed.decode == pytest.approx(2 / 3 / (DECODE * elements(path)))
    assert models.plan(path, machine, "data").speed.decode == pytest.approx(1 / 3 / (DECODE * elements(path)))
    text = f"Estimate from calibrated products, without attention: prefill {one.prefill:,.0f} tokens/s, decode "
    assert text in str(models.plan(path, ["A:1G", "CPU:1G"]))
    assert cli.main(["plan", str(path), "--devices", "A:1G,CPU:1G", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["speed"] == {"prefill": one.prefill, "decode": one.decode}


def test_devices_are_measured_only_if_that_is_asked_for(path, tmp_path, rng, monkeypatch, capsys):
    assert models.plan(path, ["CPU"]).speed is None
    assert models.plan(path, ["A:1G"], measure_speed=True).speed is None  # it is not here
    seconds = {1: DECODE, 512: PREFILL}
    monkeypatch.setattr(calibration, "measure", lambda backend, dtype, tokens: seconds[tokens])
    plan = models.plan(path, ["CPU"], measure_speed=True)
    assert plan.speed.decode == pytest.approx(1 / (DECODE * elements(path)))
    monkeypatch.setattr(calibration, "measure", None)
    assert models.plan(path, ["CPU"]).speed == plan.speed
    assert cli.main(["plan", str(path), "--devices", "CPU", "--measure-speed"]) == 0
    assert str(plan.speed) in capsys.readouterr().out
    with models.load(path, ["CPU"]) as model:
        assert model.plan.speed == plan.speed
    assert models.plan(bert_float64.random_model(tmp_path / "b.gguf", rng), ["CPU"]).speed is None


def test_a_calibration_of_another_form_is_measured_again(path, monkeypatch):
    for stored in (1e-9, [1e-9], [1e-9, -1.0], ["fast", "faster"], [0.0, 0.0], None):
        store("A")
        name = f"A, Vulkan, F32, ggml {ggml.GGML_VERSION}"
        calibration.path().write_text(json.dumps({name: stored}))
        assert models.plan(path, ["A:1G"]).speed is None
