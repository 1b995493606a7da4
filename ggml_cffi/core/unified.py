"""Unified addresses: kernels of a device read and write pinned host memory, and memory of peers, in place.

CUDA gives each piece of pinned memory and of device memory one address that holds on every device. A tensor of one
device can therefore be an operand on another, and a tensor in pinned memory on all of them, without a copy before it.
"""

from __future__ import annotations

from collections.abc import Collection

from ggml_cffi.c import cuda_peers
from ggml_cffi.core.device import Device

#: Backends whose devices have unified addresses.
_UNIFIED = frozenset({"CUDA"})


def has_unified_addresses(device: Device) -> bool:
    """Return whether kernels of a device read and write pinned host memory in place."""
    return device.backend_name in _UNIFIED


def are_peers(devices: Collection[Device]) -> bool:
    """Return whether kernels of each of some devices read and write the memory of the others in place."""
    return all(map(has_unified_addresses, devices)) and cuda_peers.all_reach()
