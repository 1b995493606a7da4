"""The facts that ``ggml-cffi doctor`` prints: library, plug-ins, Vulkan, devices, CPU, Python, environment."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version as version_of
from pathlib import Path

from ggml_cffi import c
from ggml_cffi.c import cuda_peers, library, versions
from ggml_cffi.c.library import Plugin, RefusedPlace
from ggml_cffi.core.device import Capabilities, Device, device, devices, gpus, same_cards
from ggml_cffi.core.threads import default_threads
from ggml_cffi.core.vulkan_setup import VulkanSetup, find_vulkan
from ggml_cffi.errors import LibraryNotFoundError

_PREFIXES = ("GGML_", "VK_", "CUDA_", "HIP_", "ROCR_", "NVIDIA_", "MESA_VK_", "ONEAPI_")
_NAMES = ("DRI_PRIME", "LD_LIBRARY_PATH", "XDG_DATA_DIRS", "XDG_CONFIG_DIRS")

# One device in the messages of the Vulkan plug-in: its number, its name, and "key: value" pairs.
_DEVICE_LINE = re.compile(r"ggml_vulkan: (\d+) = .*? \| (\w[\w ]*: .+)")
_EMULATED = "Device type is CPU"

#: The start of a plug-in's ``reason`` if it ended an earlier process.
CRASHES = "loading it ends the process"


@dataclass(frozen=True)
class LibraryFacts:
    """The core of ggml, or the reason why there is none."""

    version: str = ""
    """Version; empty if no core was loaded."""
    folder: str | None = None
    """Its folder, None if the system does not tell it."""
    place: str = ""
    """Kind of the place, such as ``"the system's libraries"``."""
    supported: str = ""
    """The supported versions in words."""
    refused: tuple[RefusedPlace, ...] = ()
    """Places that come first in the search, and were not used."""
    error: str = ""
    """Reason why no core was loaded; empty if one was."""


@dataclass(frozen=True)
class DeviceFacts:
    """A device that ggml lists."""

    name: str
    """ggml's name."""
    type: str
    """Name of its :class:`~ggml_cffi.DeviceType`."""
    backend: str
    """Name of the part of ggml that drives it."""
    description: str
    """The hardware's name."""
    memory_free: int
    """Free memory in bytes."""
    memory_total: int
    """Memory in bytes."""
    pci_id: str | None
    """PCI address, None without one."""
    same_card_as: str | None
    """Name of the device of the same card, by a better backend, that is used instead; None without one."""
    capabilities: Capabilities
    """Abilities besides computing."""
    features: Mapping[str, str]
    """Features that the Vulkan plug-in reports, such as ``fp16`` and ``matrix_cores``, with its values."""
    emulated: bool
    """True if the Vulkan driver emulates a GPU on the CPU."""


@dataclass(frozen=True)
class CpuFacts:
    """The CPU backend."""

    description: str
    """The processor's name."""
    file: str
    """Path of the backend's library: of several variants the chosen one."""
    features: tuple[str, ...]
    """Instruction sets that it was built with and uses."""
    threads: int
    """Default number of threads."""


@dataclass(frozen=True)
class PythonFacts:
    """The Python that runs this."""

    version: str
    executable: str
    platform: str
    packages: Mapping[str, str]
    """Versions of the packages that matter."""


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found."""

    library: LibraryFacts
    plugins: tuple[Plugin, ...]
    plugins_error: str
    """Reason why plug-ins and devices are not listed; empty if they are."""
    vulkan: VulkanSetup
    devices: tuple[DeviceFacts, ...]
    gpus: tuple[str, ...]
    """Names of the GPUs that are used where no device is named."""
    peer_access: str
    """State of the access of CUDA devices to one another; empty if it does not matter here."""
    cpu: CpuFacts | None
    """The CPU backend, None without a core."""
    python: PythonFacts
    environment: Mapping[str, str]
    """The variables that matter, as far as they are set."""


def collect(
    crashes: Mapping[str, str] | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
    root: Path = Path("/"),
) -> Diagnosis:
    """Return the facts about this machine and this process.

    Parameters
    ----------
    crashes
        The plug-ins that ended an earlier process when they were loaded, each with the end of that process. If it is
        not None, the libraries of Vulkan drivers are not loaded either.
    environ, root
        The environment to show, and the root of the file system. Vulkan is looked for in both.
    """
    facts = _library()
    plugins: list[Plugin] = []
    found: list[Device] = []
    used: list[Device] = []
    views: dict[Device, Device] = {}
    error = ""
    if facts.version:
        found = [device("CPU")]
        try:
            found, used, plugins = devices(all=True), gpus(), library.plugins()
            views = same_cards()
        except ValueError as raised:  # GGML_CFFI_BACKENDS has an unknown name
            error = str(raised).removesuffix(f"; {library.ADVICE}")
    reports = vulkan_features(message for plugin in plugins for message in plugin.messages)
    return Diagnosis(
        facts,
        tuple(_with_crash(plugin, crashes or {}) for plugin in plugins),
        error,
        find_vulkan(environ, root, load_drivers=crashes is None),
        tuple(_device(d, views.get(d), reports) for d in found),
        tuple(d.name for d in used),
        cuda_peers.state(),
        _cpu() if facts.version else None,
        _python(),
        {name: value for name, value in sorted(environ.items()) if name.startswith(_PREFIXES) or name in _NAMES},
    )


def _with_crash(plugin: Plugin, crashes: Mapping[str, str]) -> Plugin:
    if plugin.name not in crashes:
        return plugin
    return Plugin(plugin.name, plugin.file, reason=f"{CRASHES} ({crashes[plugin.name]})")


def vulkan_features(messages: Iterable[str]) -> dict[str, tuple[dict[str, str], bool]]:
    """Return the features of Vulkan devices from the messages of the plug-in.

    Returns
    -------
    dict
        For each device's name, its features, and True if it emulates a GPU on the CPU.
    """
    found: dict[str, tuple[dict[str, str], bool]] = {}
    name = ""
    for message in messages:
        if line := _DEVICE_LINE.match(message):
            name = f"Vulkan{line[1]}"
            pairs = (pair.partition(": ") for pair in line[2].split(" | "))
            found[name] = ({key.replace(" ", "_"): value for key, _, value in pairs}, False)
        elif _EMULATED in message and name in found:
            found[name] = (found[name][0], True)
    return found


def _library() -> LibraryFacts:
    try:
        version = library.version()
    except LibraryNotFoundError as error:
        refused = tuple(library.refused_places())
        return LibraryFacts(supported=versions.supported(), refused=refused, error=str(error))
    return LibraryFacts(
        version,
        library.location(),
        library.place_label(),
        versions.supported(),
        tuple(library.refused_places()),
    )


def _device(found: Device, better: Device | None, reports: Mapping[str, tuple[dict[str, str], bool]]) -> DeviceFacts:
    memory = found.memory()
    features, emulated = reports.get(found.name, ({}, False))
    return DeviceFacts(
        found.name,
        found.type.name,
        found.backend_name,
        found.description,
        memory.free,
        memory.total,
        found.pci_id,
        better.name if better else None,
        found.capabilities,
        features,
        emulated,
    )


def _cpu() -> CpuFacts:
    has = "ggml_cpu_has_"
    names = [name for name in dir(c) if name.startswith(has) and library.provides(name)]
    features = tuple(name.removeprefix(has) for name in names if getattr(c, name)())
    return CpuFacts(device("CPU").description, library.cpu_file(), features, default_threads())


def _python() -> PythonFacts:
    packages = {name: version_of(name) for name in ("cffi", "numpy")}
    return PythonFacts(platform.python_version(), sys.executable, platform.platform(), packages)
