"""The arguments of commands that load a model: text to values."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import ggml_cffi
from ggml_cffi import cli, models
from tests.support import llama_float64


@pytest.fixture
def planned(monkeypatch):
    """Return a function that runs ``ggml-cffi plan`` with arguments, and returns the options of the plan."""

    def plan(path, devices, *rest, **options):
        found.update(options, devices=devices)
        return SimpleNamespace(fits=True)

    def run(*arguments):
        found.clear()
        assert cli.main(["plan", "m.gguf", *arguments]) == 0
        return found

    found = {}
    monkeypatch.setattr(models, "plan", plan)
    return run


@pytest.fixture
def loaded(monkeypatch):
    """The options of each call of ``models.load``, all of which fail."""
    found = []

    def load(path, *_, **options):
        found.append(options)
        raise ggml_cffi.OutOfMemoryError("too large")

    monkeypatch.setattr(models, "load", load)
    return found


def test_a_balance_is_a_name_or_numbers(planned):
    assert planned("--balance", "3,1")["balance"] == [3, 1]
    assert planned("--balance", "speed")["balance"] == "speed"


def test_a_reserve_is_a_size(planned):
    assert planned("--reserve", "1G")["reserve"] == "1G"
    assert planned()["reserve"] is None
    assert planned()["measure_speed"] is False
    assert planned("--measure-speed")["measure_speed"] is True


def test_every_command_that_loads_a_model_takes_a_reserve(loaded, capsys, tmp_path, rng):
    model = llama_float64.random_model(tmp_path / "m.gguf", rng)
    for command in (["run", "-p", "a"], ["bench"], ["embed", "-t", "a"], ["perplexity"]):
        name, *rest = command
        more = [__file__] if name == "perplexity" else []
        assert cli.main([name, str(model), *more, *rest, "--reserve", "1G"]) == 2
    assert [options["reserve"] for options in loaded] == ["1G"] * 4
    assert cli.main(["plan", __file__, "--devices", "24G", "--reserve", "much"]) == 2
    assert "reserve 'much' is no size" in capsys.readouterr().err


def test_weights_are_repacked_or_not_as_the_caller_says(planned, loaded, tmp_path, rng):
    assert planned()["repack"] is None
    assert planned("--repack")["repack"] is True
    assert planned("--no-repack")["repack"] is False
    model = llama_float64.random_model(tmp_path / "m.gguf", rng)
    for command in (["run", str(model), "-p", "a"], ["bench", str(model)], ["perplexity", str(model), __file__]):
        assert cli.main([*command, "--no-repack"]) == 2
    assert [options["repack"] for options in loaded] == [False] * 3


def test_expected_tokens_are_two_numbers(planned):
    assert planned("--expect", "4096,128")["expected_tokens"] == (4096, 128)


def test_devices_are_names_separated_by_commas(planned):
    assert planned("--devices", "Vulkan0, CPU")["devices"] == ["Vulkan0", "CPU"]
    assert planned()["devices"] is None
