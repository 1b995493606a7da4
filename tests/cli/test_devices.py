"""The command ``devices``."""

import json

import pytest

from ggml_cffi.c import library
from ggml_cffi.core.vulkan_setup import find_loader
from tests.support import software_vulkan
from tests.support.command import run
from tests.support.libraries import compile_stub, copy_libraries, use_stub_loader


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
    if not software_vulkan.DRIVER.exists() or find_loader().error:
        pytest.skip("tools/system.sh has installed no software Vulkan device of its own, or no loader, on this machine")
    if "vulkan" not in {plugin.name for plugin in library.plugins()}:
        pytest.skip("the libraries have no Vulkan plug-in")
    monkeypatch.delenv("VK_DRIVER_FILES", raising=False)
    monkeypatch.setenv("GGML_VK_VISIBLE_DEVICES", "0,0")
    assert [device["name"] for device in json.loads(run("devices", "--json").stdout)] == ["Vulkan0", "Vulkan1", "CPU"]


@pytest.fixture
def two_views(tmp_path, monkeypatch):
    """Let the command find a card that CUDA and Vulkan show."""
    core = copy_libraries(tmp_path / "core", plugins=())
    use_stub_loader(core, monkeypatch)
    monkeypatch.setenv("GGML_CFFI_LIBRARY_PATH", str(core))
    for name in ("GGML_BACKEND_PATH", "GGML_CFFI_BACKENDS"):
        monkeypatch.delenv(name, raising=False)
    compile_stub(core / "libggml-cuda.so", ADDRESS="0000:0a:00.0")
    compile_stub(core / "libggml-vulkan.so", NAME="Vulkan", ADDRESS="0000:0a:00.0")


def test_a_card_of_two_backends_is_one_row_and_a_note(two_views):
    lines = run("devices").stdout.splitlines()
    assert [line.split()[0] for line in lines[3:5]] == ["CUDA0", "CPU"]
    assert "Vulkan0 is the card of CUDA0, by Vulkan." in lines
    assert "It can be named, and --all lists it." in lines
    lines = run("devices", "--all").stdout.splitlines()
    assert [line.split()[0] for line in lines[3:6]] == ["CUDA0", "Vulkan0", "CPU"]
    assert "Vulkan0 is the card of CUDA0, by Vulkan." in lines
    assert not any("--all" in line for line in lines)


def test_json_tells_the_backend_and_the_card(two_views):
    names = ("name", "backend", "same_card_as")
    rows = [
        [[device[name] for name in names] for device in json.loads(run("devices", "--json", *more).stdout)]
        for more in ((), ("--all",))
    ]
    assert rows[0] == [["CUDA0", "CUDA", None], ["CPU", "CPU", None]]
    assert rows[1] == [["CUDA0", "CUDA", None], ["Vulkan0", "Vulkan", "CUDA0"], ["CPU", "CPU", None]]


def test_doctor_lists_both_devices_of_a_card(two_views):
    page = run("doctor").stdout
    assert "  -    Vulkan0 is the card of CUDA0, and is used only if it is named" in page
    assert "GPUs that are used by default: CUDA0\n" in page
