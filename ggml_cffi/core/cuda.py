"""Devices that compute with ggml's CUDA kernels."""

from ggml_cffi.core.device import Device

#: Backends that ggml builds from its CUDA sources: for NVIDIA, AMD and Moore Threads.
_BUILT_FROM_CUDA = frozenset({"CUDA", "ROCm", "MUSA"})


def has_cuda_kernels(device: Device) -> bool:
    """Return whether a device computes with ggml's CUDA kernels."""
    return device.backend_name in _BUILT_FROM_CUDA
