"""The command ``devices``."""

import json

import pytest

from ggml_cffi.c import library
from tests.support import software_vulkan
from tests.support.command import run


def test_devices_prints_ggmls_version_and_a_table_with_the_cpu_last():
    version, empty, *lines = run("devices").stdout.splitlines()
    assert version == f"ggml {library.version()}, from {library.location()}"
    assert empty == ""
    assert lines[0].split() == ["device", "type", "free", "total", "description"]
    assert lines[-1].startswith("CPU")
    assert "GiB" in lines[-1]


def test_devices_prints_json():
    found = json.loads(run("devices", "--json").stdout)
    assert found[-1]["name"] == "CPU"
    assert found[-1]["ggml_version"] == library.version()
    assert found[-1]["memory_total"] >= found[-1]["memory_free"] > 0


def test_the_software_device_of_the_setup_is_found_without_settings(monkeypatch):
    if not software_vulkan.DRIVER.exists():
        pytest.skip("tools/system.sh has installed no software Vulkan device of its own on this machine")
    if "vulkan" not in {plugin.name for plugin in library.plugins()}:
        pytest.skip("the libraries have no Vulkan plug-in")
    monkeypatch.delenv("VK_DRIVER_FILES", raising=False)
    monkeypatch.setenv("GGML_VK_VISIBLE_DEVICES", "0,0")
    assert [device["name"] for device in json.loads(run("devices", "--json").stdout)] == ["Vulkan0", "Vulkan1", "CPU"]
