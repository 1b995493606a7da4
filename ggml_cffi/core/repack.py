"""Repacked weights: memory of the CPU that arranges quantized weights for its matrix products.

ggml has kernels that multiply several rows of a weight at once, if the blocks of these rows lie side by side. A buffer
of the type CPU_REPACK arranges them so when a tensor is written. Nothing can read the tensor then, except a product.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.buffer import BufferType
from ggml_cffi.core.device import device

_NAME = b"CPU_REPACK"


@cache
def repacked_memory() -> BufferType | None:
    """Return the buffer type, None if the library has none.

    C: ``ggml_backend_dev_get_extra_bufts``.
    """
    cpu = device("CPU").ptr
    registry = c.ggml_backend_dev_backend_reg(cpu)
    found = c.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not found:
        return None
    extra_types: Any = c.ffi.cast("ggml_backend_dev_get_extra_bufts_t", found)
    kinds = extra_types(cpu)
    k = 0
    while kinds and kinds[k]:
        if c.ffi.string(c.ggml_backend_buft_name(kinds[k])) == _NAME:
            return BufferType(kinds[k])
        k += 1
    return None


def is_repacked(buffer: Any) -> bool:
    """Return whether a buffer (a C pointer) holds repacked weights."""
    memory = repacked_memory()
    return memory is not None and bool(c.ggml_backend_buffer_get_type(buffer) == memory.ptr)
