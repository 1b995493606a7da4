"""Repacked weights: memory of the CPU that arranges quantized weights for its matrix products.

ggml has kernels that multiply several rows of a weight at once, if the blocks of these rows lie side by side. A buffer
of the type CPU_REPACK arranges them so when a tensor is written, and one of the type AMX arranges them for the matrix
unit of some Intel processors. Nothing can read the tensor then, except a product.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.buffer import BufferType
from ggml_cffi.core.device import device

_NAMES = frozenset({"AMX", "CPU_REPACK"})


@cache
def repacked_memories() -> dict[str, BufferType]:
    """Return the buffer types by name, as far as the library and the processor have them.

    C: ``ggml_backend_dev_get_extra_bufts``.
    """
    cpu = device("CPU").ptr
    registry = c.ggml_backend_dev_backend_reg(cpu)
    found = c.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    memories: dict[str, BufferType] = {}
    if not found:
        return memories
    extra_types: Any = c.ffi.cast("ggml_backend_dev_get_extra_bufts_t", found)
    kinds = extra_types(cpu)
    k = 0
    while kinds and kinds[k]:
        memory = BufferType(kinds[k])
        if memory.name in _NAMES:
            memories[memory.name] = memory
        k += 1
    return memories


def is_repacked(buffer: Any) -> bool:
    """Return whether a buffer (a C pointer) holds repacked weights."""
    kind = c.ggml_backend_buffer_get_type(buffer)
    return any(kind == memory.ptr for memory in repacked_memories().values())
