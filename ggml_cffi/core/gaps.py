"""Gaps in a diagnosis, each with its remedy: places that were refused, plug-ins that failed, drivers, devices."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ggml_cffi.c.library import BACKENDS, Plugin
from ggml_cffi.core.diagnosis import CRASHES, Diagnosis
from ggml_cffi.core.vulkan_setup import VulkanDriver

#: Plug-ins without GPUs of their own.
_HELPERS = frozenset({"rpc", "blas", "zendnn"})

#: Part of the name of a driver's manifest or library, for each vendor of GPUs.
_DRIVERS = {"NVIDIA": ("nvidia", "nouveau"), "AMD": ("radeon", "amd"), "Intel": ("intel",)}
_PACKAGES = {
    "NVIDIA": "install the Vulkan part of NVIDIA's driver (Debian: nvidia-vulkan-icd, Ubuntu: libnvidia-gl-<version>)",
    "AMD": "install Mesa's drivers (Debian, Ubuntu: mesa-vulkan-drivers, Fedora: mesa-vulkan-drivers)",
    "Intel": "install Mesa's drivers (Debian, Ubuntu: mesa-vulkan-drivers, Fedora: mesa-vulkan-drivers)",
}
_CAPABILITIES = "start the container with NVIDIA_DRIVER_CAPABILITIES=graphics,compute,utility"

#: Libraries that plug-ins need, by the start of their names.
_RUNTIMES = (
    (("libvulkan",), "install the Vulkan loader (Debian, Ubuntu: libvulkan1, Fedora: vulkan-loader)"),
    (("libcuda.",), "install NVIDIA's driver; in a container, start it with access to the GPU (docker run --gpus all)"),
    (("libcud", "libcublas", "libnccl"), "install the CUDA runtime that the plug-in was built with"),
    (("libamdhip", "libhip", "librocblas", "libhsa"), "install the ROCm runtime that the plug-in was built with"),
    (("libsycl", "libze_", "libmkl", "libdnnl"), "install the oneAPI runtime that the plug-in was built with"),
    (("libOpenCL",), "install an OpenCL loader (Debian, Ubuntu: ocl-icd-libopencl1)"),
    (("libopenblas", "libblas", "libcblas"), "install the BLAS library (Debian, Ubuntu: libopenblas0)"),
)
_MISSING = re.compile(r"(\S+): cannot open shared object file")
_OTHER_BUILD = ("it is of ggml", "incompatible API version", "undefined symbol", "version `")

#: Features of the Vulkan plug-in that make products fast, their values for "no", and their names.
_FEATURES = (("fp16", "0", "fp16"), ("int_dot", "0", "integer dot products"), ("matrix_cores", "none", "matrix cores"))


@dataclass(frozen=True)
class Gap:
    """Something that was not found or does not work, and the remedy."""

    part: str
    """Part of the page: ``"library"``, ``"plugins"``, ``"vulkan"`` or ``"devices"``."""
    problem: str
    """The fact."""
    remedy: str
    """The advice."""
    asked: bool = False
    """True if the environment asks for the missing thing, or no program can do without it."""


def find_gaps(found: Diagnosis) -> list[Gap]:
    """Return the gaps of a diagnosis in the order of the page."""
    return [*_library(found), *_plugins(found), *_vulkan(found), *_devices(found)]


def _library(found: Diagnosis) -> Iterator[Gap]:
    facts = found.library
    for place in facts.refused:
        if place.label == "$GGML_CFFI_LIBRARY_PATH":
            problem = f"{place.folder} of GGML_CFFI_LIBRARY_PATH is not used: {place.reason}"
            yield Gap("library", problem, f"name a folder that holds ggml {facts.supported}, or unset it", asked=True)
    if facts.error:
        yield Gap(
            "library",
            f"no usable libggml was found; supported are {facts.supported}",
            "install the prebuilt CPU library (pip install libggml-python), or run ./build_lib.sh in a source checkout",
            asked=True,
        )


def _plugins(found: Diagnosis) -> Iterator[Gap]:
    if not found.library.version:
        return
    asked = BACKENDS in found.environment
    if found.plugins_error:
        yield Gap("plugins", found.plugins_error, f"correct {BACKENDS}, or unset it", asked=True)
        return
    for plugin in found.plugins:
        if plugin.excluded:
            continue
        if not plugin.loaded:
            problem = f"{plugin.name} is not loaded: {plugin.reason} ({plugin.file})"
            crashes = plugin.reason.startswith(CRASHES)
            yield Gap("plugins", problem, _plugin_remedy(plugin, found), asked or crashes)
        elif plugin.n_devices == 0 and plugin.name not in _HELPERS:
            yield Gap("plugins", f"{plugin.name} has no device", _plugin_remedy(plugin, found), asked)
    if not found.gpus and all(plugin.name in _HELPERS for plugin in found.plugins):
        yield Gap(
            "plugins",
            "there is no plug-in for GPUs",
            "build the Vulkan plug-in with ./build_lib.sh in a source checkout, and install from there (pip install .)",
        )


def _plugin_remedy(plugin: Plugin, found: Diagnosis) -> str:
    if plugin.reason.startswith(CRASHES):
        others = ",".join(p.name for p in found.plugins if not p.excluded and not p.reason.startswith(CRASHES))
        return f"update or remove its driver, or exclude the plug-in: {BACKENDS}={others}"
    if any(text in plugin.reason for text in _OTHER_BUILD):
        return "use the plug-in of the same build as the core; ./build_lib.sh builds both"
    if missing := _MISSING.search(plugin.reason):
        for starts, remedy in _RUNTIMES:
            if missing[1].startswith(starts):
                return remedy
        return f"install the library {missing[1]}, or add its folder to LD_LIBRARY_PATH"
    visible = found.environment.get("GGML_VK_VISIBLE_DEVICES")
    if plugin.name != "vulkan":
        return "check its driver, and the variables that hide devices below"
    if visible is not None:
        return f"GGML_VK_VISIBLE_DEVICES={visible} may name no device of this machine: unset it, or count from 0"
    if not plugin.loaded:
        return "see the drivers below"
    return (
        "the drivers list no GPU; devices that emulate one on the CPU are hidden, and GGML_VK_VISIBLE_DEVICES=0 lists "
        "the first of them"
    )


def _vulkan(found: Diagnosis) -> Iterator[Gap]:
    plugin = next((p for p in found.plugins if p.name == "vulkan"), None)
    if plugin.excluded if plugin else found.gpus:
        return  # nobody wants Vulkan, or the GPUs are reached without it
    setup = found.vulkan
    if setup.loader.error:
        remedy = "install the Vulkan loader (Debian, Ubuntu: libvulkan1, Fedora: vulkan-loader)"
        yield Gap("vulkan", f"there is no Vulkan loader: {setup.loader.error}", remedy)
    given = next((name for name in ("VK_DRIVER_FILES", "VK_ICD_FILENAMES") if found.environment.get(name)), "")
    for driver in setup.drivers:
        if driver.error:
            remedy = "install the package of this driver again, or remove the manifest"
            problem = f"the driver {driver.manifest} cannot be used: {driver.error}"
            yield Gap("vulkan", problem, f"correct {given}, or unset it" if given else remedy)
    yield from _cards(found)
    if all(driver.error for driver in setup.drivers) and not setup.cards and not given:
        remedy = "install the driver of the GPU; Mesa's (mesa-vulkan-drivers) has a software device too"
        yield Gap("vulkan", "there is no Vulkan driver", remedy)
    if setup.closed_files:
        remedy = "add this user to their groups (sudo usermod -aG render,video USER), and log in again"
        yield Gap("vulkan", f"this user may not open {', '.join(setup.closed_files)}", remedy)


def _cards(found: Diagnosis) -> Iterator[Gap]:
    """Yield the gaps of GPUs on the bus that no driver can reach, one for each vendor."""
    setup = found.vulkan
    for vendor in sorted({card.vendor for card in setup.cards}):
        cards = ", ".join(card.address for card in setup.cards if card.vendor == vendor)
        files = [file for file in setup.device_files if ("nvidia" in file) == (vendor == "NVIDIA")]
        if not files:
            remedy = "install its kernel driver; in a container, pass the device on (docker run --device /dev/dri)"
            if vendor == "NVIDIA":
                remedy = "install NVIDIA's driver; in a container, start it with the GPU (docker run --gpus all)"
            yield Gap("vulkan", f"the {vendor} GPU at {cards} has no device file", remedy)
        elif not any(_is_for(driver, vendor) for driver in setup.drivers):
            remedy = _PACKAGES[vendor]
            if vendor == "NVIDIA" and "NVIDIA_VISIBLE_DEVICES" in found.environment:
                remedy = _CAPABILITIES
            yield Gap("vulkan", f"there is no Vulkan driver for the {vendor} GPU at {cards}", remedy)


def _is_for(driver: VulkanDriver, vendor: str) -> bool:
    return any(part in f"{driver.manifest} {driver.library}".lower() for part in _DRIVERS[vendor])


def _devices(found: Diagnosis) -> Iterator[Gap]:
    for device in found.devices:
        missing = [name for key, no, name in _FEATURES if device.features.get(key) == no]
        if missing and not device.emulated:
            yield Gap(
                "devices",
                f"{device.name} has no {', no '.join(missing)}",
                "update the driver, and build the plug-in with a newer glslc; older GPUs lack them, and are slower",
            )
