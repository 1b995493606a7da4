"""The Vulkan installation: manifests of drivers in made-up file systems, GPUs on the bus, device files."""

import ctypes
import json
import os
import sys
from pathlib import Path

import pytest

from ggml_cffi.core.vulkan_setup import Card, VulkanDriver, find_cards, find_drivers, find_loader, find_vulkan

#: A library that is loaded already: the loader finds it by its name alone.
PRESENT = "libc.so.6"


def write_manifest(file, library=PRESENT, version="1.3.0"):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        json.dumps({"file_format_version": "1.0.0", "ICD": {"library_path": library, "api_version": version}})
    )
    return str(file)


def test_drivers_are_found_in_the_folders_of_the_system_and_of_the_user(tmp_path):
    root, home = tmp_path / "root", tmp_path / "home"
    expected = [
        write_manifest(home / ".config/vulkan/icd.d/a.json"),
        write_manifest(root / "etc/xdg/vulkan/icd.d/b.json"),
        write_manifest(root / "etc/vulkan/icd.d/c.json"),
        write_manifest(home / ".local/share/vulkan/icd.d/d.json"),
        write_manifest(root / "usr/local/share/vulkan/icd.d/e.json"),
        write_manifest(root / "usr/share/vulkan/icd.d/f.json"),
        write_manifest(root / "usr/share/vulkan/icd.d/g.json"),
    ]
    (root / "usr/share/vulkan/icd.d/README").touch()
    assert [d.manifest for d in find_drivers({"HOME": str(home)}, root)] == expected


def test_the_variables_of_xdg_replace_the_usual_folders(tmp_path):
    write_manifest(tmp_path / "usr/share/vulkan/icd.d/usual.json")
    mine = write_manifest(tmp_path / "mine/vulkan/icd.d/mine.json")
    found = find_drivers({"XDG_DATA_DIRS": f"{tmp_path / 'mine'}:{tmp_path / 'missing'}"}, tmp_path)
    assert [d.manifest for d in found] == [mine]


@pytest.mark.parametrize("variable", ["VK_DRIVER_FILES", "VK_ICD_FILENAMES"])
def test_a_variable_names_the_only_manifests_or_folders(tmp_path, variable):
    write_manifest(tmp_path / "etc/vulkan/icd.d/usual.json")
    one = write_manifest(tmp_path / "one.json", version="1.2.3")
    more = write_manifest(tmp_path / "folder/more.json")
    missing = str(tmp_path / "missing.json")
    environ = {variable: os.pathsep.join([one, str(tmp_path / "folder"), missing])}
    assert list(find_drivers(environ, tmp_path)) == [
        VulkanDriver(one, PRESENT, "1.2.3"),
        VulkanDriver(more, PRESENT, "1.3.0"),
        VulkanDriver(missing, error="No such file or directory"),
    ]


def test_vk_add_driver_files_comes_before_the_usual_folders(tmp_path):
    usual = write_manifest(tmp_path / "etc/vulkan/icd.d/usual.json")
    added = write_manifest(tmp_path / "added.json")
    assert [d.manifest for d in find_drivers({"VK_ADD_DRIVER_FILES": added}, tmp_path)] == [added, usual]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"ICD": {}}', '{"ICD": 1}', "\udcff"])
def test_a_broken_manifest_has_an_error(tmp_path, text):
    file = tmp_path / "broken.json"
    file.write_text(text, errors="surrogateescape")
    (driver,) = find_drivers({"VK_DRIVER_FILES": str(file)}, tmp_path)
    assert driver.error == "it is no manifest of a driver: JSON with ICD and library_path"


def test_a_driver_whose_library_cannot_be_loaded_has_the_reason(tmp_path):
    """A path is relative to the manifest."""
    file = write_manifest(tmp_path / "icd.json", "./libmissing.so")
    (driver,) = find_drivers({"VK_DRIVER_FILES": file}, tmp_path)
    assert driver.library == str(tmp_path / "libmissing.so")
    assert "libmissing.so: cannot open shared object file" in driver.error
    (driver,) = find_drivers({"VK_DRIVER_FILES": file}, tmp_path, load=False)
    assert driver.error == ""


def test_a_driver_for_other_processors_is_left_out(tmp_path):
    """The Vulkan loader ignores a library of another class too."""
    header = bytearray(Path(sys.executable).read_bytes()[:4096])
    header[4] = 1 if ctypes.sizeof(ctypes.c_void_p) == 8 else 2
    (tmp_path / "libother.so").write_bytes(header)
    file = write_manifest(tmp_path / "icd.json", "./libother.so")
    assert list(find_drivers({"VK_DRIVER_FILES": file}, tmp_path)) == []


def write_card(root, address, kind, vendor):
    folder = root / "sys/bus/pci/devices" / address
    folder.mkdir(parents=True)
    (folder / "class").write_text(f"{kind}\n")
    (folder / "vendor").write_text(f"{vendor}\n")


def test_cards_are_display_and_3d_controllers_of_known_vendors(tmp_path):
    write_card(tmp_path, "0000:01:00.0", "0x030200", "0x10de")
    write_card(tmp_path, "0000:02:00.0", "0x030000", "0x1002")
    write_card(tmp_path, "0000:03:00.0", "0x038000", "0x8086")
    write_card(tmp_path, "0000:04:00.0", "0x020000", "0x8086")  # a network card
    write_card(tmp_path, "0000:05:00.0", "0x030000", "0x1234")  # a virtual screen
    (tmp_path / "sys/bus/pci/devices/0000:06:00.0").mkdir()
    assert list(find_cards(tmp_path)) == [
        Card("0000:01:00.0", "NVIDIA"),
        Card("0000:02:00.0", "AMD"),
        Card("0000:03:00.0", "Intel"),
    ]
    assert list(find_cards(tmp_path / "nothing")) == []


def test_a_missing_loader_has_an_error():
    found = find_loader("libvulkan-of-nobody.so.1")
    assert found.version == ""
    assert "libvulkan-of-nobody.so.1: cannot open shared object file" in found.error
    assert "vkEnumerateInstanceVersion" in find_loader(PRESENT).error


def test_device_files_that_the_user_may_not_open_are_told(tmp_path, monkeypatch):
    for name in ("dri/card0", "dri/renderD128", "nvidia0", "nvidiactl", "null"):
        (tmp_path / "dev" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "dev" / name).touch()
    monkeypatch.setattr(os, "access", lambda file, mode: not file.endswith("D128"))
    found = find_vulkan({"HOME": str(tmp_path)}, tmp_path)
    files = [os.path.relpath(file, tmp_path / "dev") for file in found.device_files]
    assert files == ["dri/renderD128", "nvidia0", "nvidiactl"]
    assert found.closed_files == (str(tmp_path / "dev/dri/renderD128"),)
    assert found.drivers == found.cards == ()
