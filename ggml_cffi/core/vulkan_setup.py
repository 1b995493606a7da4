"""The Vulkan installation of this machine: loader, drivers, GPUs on the bus, device files.

The functions take the environment and the root of the file system, so that tests can make others up.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_LOADER = {"darwin": "libvulkan.1.dylib", "win32": "vulkan-1.dll"}.get(sys.platform, "libvulkan.so.1")

#: Vendors of GPUs by their PCI numbers.
_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
_DISPLAY = "0x03"  # PCI class of display and 3D controllers

#: Files through which a driver reaches its GPUs.
_NODES = ("dri/renderD*", "nvidia[0-9]*", "nvidiactl")


@dataclass(frozen=True)
class VulkanLoader:
    """The Vulkan loader, the library between programs and drivers."""

    file: str
    """Name that the system's loader knows it by."""
    version: str = ""
    """Newest version of Vulkan that it supports; empty if it cannot be loaded."""
    error: str = ""
    """Reason why it cannot be loaded; empty if it can."""


@dataclass(frozen=True)
class VulkanDriver:
    """A Vulkan driver, as its manifest describes it."""

    manifest: str
    """Path of the manifest, a JSON file."""
    library: str = ""
    """Path or name of its library."""
    api_version: str = ""
    """Version of Vulkan that it supports."""
    error: str = ""
    """Reason why it cannot be used; empty if its library can be loaded."""


@dataclass(frozen=True)
class Card:
    """A GPU on the machine's bus, with a driver or without."""

    address: str
    """PCI address, such as ``"0000:c1:00.0"``."""
    vendor: str
    """``"NVIDIA"``, ``"AMD"`` or ``"Intel"``."""


@dataclass(frozen=True)
class VulkanSetup:
    """The Vulkan installation of this machine."""

    loader: VulkanLoader
    """The Vulkan loader."""
    drivers: tuple[VulkanDriver, ...]
    """The drivers that the loader would try."""
    cards: tuple[Card, ...]
    """The GPUs on the bus, as far as the system tells them."""
    device_files: tuple[str, ...]
    """Files through which drivers reach GPUs."""
    closed_files: tuple[str, ...]
    """Those of ``device_files`` that this user must not open."""


def find_vulkan(environ: Mapping[str, str], root: Path, *, load_drivers: bool = True) -> VulkanSetup:
    """Return the Vulkan installation of a machine with this environment and file system.

    Parameters
    ----------
    environ, root
        The environment, and the root of the file system.
    load_drivers
        False to read the manifests of the drivers only, without a check that their libraries can be loaded.
    """
    files = tuple(str(path) for pattern in _NODES for path in sorted((root / "dev").glob(pattern)))
    return VulkanSetup(
        find_loader(),
        tuple(find_drivers(environ, root, load=load_drivers)),
        tuple(find_cards(root)),
        files,
        tuple(file for file in files if not os.access(file, os.R_OK | os.W_OK)),
    )


def find_loader(name: str = _LOADER) -> VulkanLoader:
    """Return the Vulkan loader of a name with its version."""
    version = ctypes.c_uint32()
    try:
        ctypes.CDLL(name).vkEnumerateInstanceVersion(ctypes.byref(version))
    except (OSError, AttributeError) as error:
        return VulkanLoader(name, error=str(error))
    n = version.value
    return VulkanLoader(name, f"{n >> 22 & 0x7F}.{n >> 12 & 0x3FF}.{n & 0xFFF}")


def find_drivers(environ: Mapping[str, str], root: Path, *, load: bool = True) -> Iterator[VulkanDriver]:
    """Yield the drivers that the Vulkan loader would try, in its order. Those of other processors are left out.

    Source: the documentation of the Vulkan loader, "Driver Interface to the Vulkan Loader".
    """
    for manifest in _manifests(environ, root):
        driver = _read_manifest(manifest, load)
        if "wrong ELF class" not in driver.error:
            yield driver


def _manifests(environ: Mapping[str, str], root: Path) -> Iterator[Path]:
    given = environ.get("VK_DRIVER_FILES") or environ.get("VK_ICD_FILENAMES") or ""
    named = _paths(environ.get("VK_ADD_DRIVER_FILES", "")) + _paths(given)
    folders = [] if given else [folder / "vulkan" / "icd.d" for folder in _folders(environ, root)]
    for place in dict.fromkeys([*named, *folders]):
        if place.is_dir():
            yield from sorted(place.glob("*.json"))
        elif place in named:  # unlike one of the usual folders, it is meant to be there
            yield place


def _folders(environ: Mapping[str, str], root: Path) -> list[Path]:
    """Return the folders whose ``vulkan/icd.d`` may have manifests: the user's and the system's."""
    home = Path(environ.get("HOME") or root)

    def folders(name: str, *default: Path) -> list[Path]:
        return _paths(environ.get(name, "")) or list(default)

    return [
        *folders("XDG_CONFIG_HOME", home / ".config"),
        *folders("XDG_CONFIG_DIRS", root / "etc/xdg"),
        root / "etc",
        *folders("XDG_DATA_HOME", home / ".local/share"),
        *folders("XDG_DATA_DIRS", root / "usr/local/share", root / "usr/share"),
    ]


def _paths(text: str) -> list[Path]:
    return [Path(part) for part in text.split(os.pathsep) if part]


def _read_manifest(manifest: Path, load: bool) -> VulkanDriver:
    name = str(manifest)
    try:
        described = json.loads(manifest.read_text(encoding="utf-8"))["ICD"]
        library, version = str(described["library_path"]), str(described.get("api_version", ""))
    except OSError as error:
        return VulkanDriver(name, error=error.strerror or str(error))
    except (ValueError, KeyError, TypeError, AttributeError):
        return VulkanDriver(name, error="it is no manifest of a driver: JSON with ICD and library_path")
    # A path is relative to the manifest. A plain name is for the system's loader.
    file = str(manifest.parent / library) if os.sep in library else library
    try:
        if load:
            ctypes.CDLL(file)
    except OSError as error:
        return VulkanDriver(name, file, version, str(error))
    return VulkanDriver(name, file, version)


def find_cards(root: Path) -> Iterator[Card]:
    """Yield the GPUs of known vendors on the PCI bus."""
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        try:
            kind = (device / "class").read_text(encoding="ascii").strip()
            vendor = (device / "vendor").read_text(encoding="ascii").strip()
        except OSError:
            continue
        if kind.startswith(_DISPLAY) and vendor in _VENDORS:
            yield Card(device.name, _VENDORS[vendor])
