"""The arguments of commands that load a model: text to values."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ggml_cffi import cli, models


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


def test_a_balance_is_a_name_or_numbers(planned):
    assert planned("--balance", "3,1")["balance"] == [3, 1]
    assert planned("--balance", "speed")["balance"] == "speed"


def test_expected_tokens_are_two_numbers(planned):
    assert planned("--expect", "4096,128")["expected_tokens"] == (4096, 128)


def test_devices_are_names_separated_by_commas(planned):
    assert planned("--devices", "Vulkan0, CPU")["devices"] == ["Vulkan0", "CPU"]
    assert planned()["devices"] is None
