"""Devices and backends, by C's names."""

from __future__ import annotations

import sys
from operator import index

from ggml_cffi.c import library
from ggml_cffi.core import device as core_device
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.device import Device, Memory
from ggml_cffi.flat._checks import close, require
from ggml_cffi.flat._objects import FlatBackend

__all__ = [
    "ggml_backend_cpu_init",
    "ggml_backend_cpu_set_n_threads",
    "ggml_backend_free",
    "ggml_backend_name",
    "ggml_vulkan_available",
    "ggml_vulkan_backend_name",
    "ggml_vulkan_device_count",
    "ggml_vulkan_device_description",
    "ggml_vulkan_device_memory",
    "ggml_vulkan_free",
    "ggml_vulkan_init",
    "ggml_vulkan_status",
]


def ggml_vulkan_available() -> bool:
    """Return whether the Vulkan plug-in can be loaded. Even then there may be no device: ``ggml-cffi doctor`` tells."""
    return library.available("vulkan")


def ggml_vulkan_device_count() -> int:
    """Return the number of Vulkan devices, 0 without Vulkan."""
    return sum(d.name.startswith("Vulkan") for d in core_device.devices(all=True))


def _vulkan(i: int) -> Device:
    n = ggml_vulkan_device_count()
    if not 0 <= index(i) < n:
        raise IndexError(f"there is no Vulkan device {i}: this machine has {n}, counted from 0; {library.ADVICE}")
    return core_device.device(f"Vulkan{index(i)}")


def ggml_vulkan_device_description(device: int = 0) -> str:
    """Return the hardware's name; devices are counted from 0. Raise ``IndexError`` if there is no such device."""
    return _vulkan(device).description


def ggml_vulkan_device_memory(device: int = 0) -> Memory:
    """Return the bytes ``free`` and ``total`` of a device."""
    return _vulkan(device).memory()


def ggml_vulkan_status() -> None:
    """Print the Vulkan devices."""
    lines = [f"{_vulkan(i).name}: {_vulkan(i).description}" for i in range(ggml_vulkan_device_count())]
    sys.stdout.write("\n".join(lines or ["no Vulkan device"]) + "\n")


def ggml_vulkan_init(device: int = 0) -> Backend:
    """Open a Vulkan device, counted from 0. Raise ``IndexError`` if there is no such device."""
    return FlatBackend(_vulkan(device))


def ggml_backend_cpu_init() -> Backend:
    """Open the CPU, with as many threads as this process may use."""
    return FlatBackend("CPU")


def ggml_backend_cpu_set_n_threads(backend_cpu: Backend, n_threads: int) -> None:
    """Set the threads of the CPU, 1 to 512. Raise ``ValueError`` for another backend."""
    require(backend_cpu, Backend).n_threads = n_threads


def ggml_backend_name(backend: Backend) -> str:
    """Return a backend's name, such as ``"Vulkan0"`` or ``"CPU"``."""
    return require(backend, Backend).name


def ggml_vulkan_backend_name(backend: Backend) -> str:
    """Return a backend's name; see :func:`ggml_backend_name`."""
    return ggml_backend_name(backend)


def ggml_backend_free(backend: Backend | None) -> None:
    """Close a backend. A scheduler that uses the backend stays valid."""
    close(backend, Backend)


def ggml_vulkan_free(backend: Backend | None) -> None:
    """Close a backend; see :func:`ggml_backend_free`."""
    close(backend, Backend)
