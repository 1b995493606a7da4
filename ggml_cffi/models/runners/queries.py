"""Queries of a backend: whether it can compute an operation of a model, with tensors of these types and sizes."""

from __future__ import annotations

from ggml_cffi import c, ops
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.buffer import Buffer, BufferType
from ggml_cffi.core.context import Context
from ggml_cffi.core.cuda import has_cuda_kernels
from ggml_cffi.core.repack import repacked_memories
from ggml_cffi.enums import Type
from ggml_cffi.files.gguf import TensorInfo
from ggml_cffi.models.architectures.base import Architecture
from ggml_cffi.models.runners.amx import TYPES, amx_works
from ggml_cffi.scheduler import cuda_rules

#: For each kind of repacked memory, best first, the types of weights whose products it makes faster, with one token
#: and with many (docs/tested.md).
_REPACKED = {"AMX": frozenset(TYPES), "CPU_REPACK": frozenset({Type.Q4_0, Type.IQ4_NL})}


def can_look_up(backend: Backend, table: TensorInfo) -> bool:
    """Return whether a backend can look up rows of a tensor of this type and size."""
    with Context() as context:
        rows = ops.get_rows(context.new_tensor(table.dtype, table.shape), context.new_tensor(Type.I32, (1,)))
        return bool(c.ggml_backend_dev_supports_op(backend.device.ptr, rows.ptr))


def can_multiply(backend: Backend, weight: TensorInfo) -> bool:
    """Return whether a backend can multiply by a tensor of this type and size."""
    with Context() as context:
        x = context.new_tensor(Type.F32, (1, weight.shape[-1]))
        product = ops.mul_mat(context.new_tensor(weight.dtype, weight.shape), x)
        return bool(c.ggml_backend_dev_supports_op(backend.device.ptr, product.ptr))


def repacked_memory_for(dtype: Type, shape: tuple[int, ...]) -> BufferType | None:
    """Return the memory in which the processor multiplies fastest by weights of this type and shape, if they fit it.

    None stands for pages of the file, which are as fast or faster for the other types (docs/tested.md).
    """
    memories = repacked_memories()
    for name, types in _REPACKED.items():
        memory = memories.get(name)
        if memory and dtype in types and _can_multiply_in(memory, dtype, shape) and (name != "AMX" or amx_works()):
            return memory
    return None


def _can_multiply_in(memory: BufferType, dtype: Type, shape: tuple[int, ...]) -> bool:
    """Return whether the processor has products of weights of this type and shape in a kind of memory."""
    if len(shape) != 2:
        return False
    with Context() as context, Buffer.empty(memory) as buffer:
        weight = context.new_tensor(dtype, shape)
        product = ops.mul_mat(weight, context.new_tensor(Type.F32, (1, shape[1])))
        weight.ptr.buffer = buffer.ptr
        return bool(c.ggml_backend_dev_supports_op(memory.device.ptr, product.ptr))


def writes_at_once(backend: Backend) -> bool:
    """Return whether a backend is faster if one node writes keys and values into the cache.

    On CUDA, nodes run one after another. Vulkan runs the rotation of queries, that of keys with their write, and the
    write of values side by side.
    """
    return has_cuda_kernels(backend.device)


def can_attend(backend: Backend, architecture: Architecture, dtype: Type) -> bool:
    """Return whether a backend has flash attention for the heads of a model and a cache of this type."""
    with Context() as context:
        node = architecture.flash_attention(context, dtype)
        if has_cuda_kernels(backend.device) and cuda_rules.fault(node.ptr):
            return False
        return bool(c.ggml_backend_dev_supports_op(backend.device.ptr, node.ptr))
