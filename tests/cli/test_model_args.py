"""The arguments of commands that load a model: text to values."""

from __future__ import annotations

from ggml_cffi.cli._model_args import parse_balance, parse_devices, parse_expect


def test_a_balance_is_a_name_or_numbers():
    assert parse_balance("3,1") == [3, 1]
    assert parse_balance("speed") == "speed"


def test_expected_tokens_are_two_numbers():
    assert parse_expect("4096,128") == (4096, 128)


def test_devices_are_names_separated_by_commas():
    assert parse_devices("Vulkan0, CPU") == ["Vulkan0", "CPU"]
    assert parse_devices(None) is None
