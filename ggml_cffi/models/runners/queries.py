"""Queries of a backend: whether it can compute an operation of a model, with tensors of these types and sizes."""

from __future__ import annotations

from ggml_cffi import c, ops
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.buffer import Buffer
from ggml_cffi.core.context import Context
from ggml_cffi.core.cuda import has_cuda_kernels
from ggml_cffi.core.repack import repacked_memory
from ggml_cffi.enums import Type
from ggml_cffi.files.gguf import TensorInfo
from ggml_cffi.models.architectures.base import Architecture
from ggml_cffi.scheduler import cuda_rules


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


def can_repack(dtype: Type, shape: tuple[int, ...]) -> bool:
    """Return whether the processor has products of repacked weights of this type and shape."""
    memory = repacked_memory()
    if memory is None or len(shape) != 2:
        return False
    with Context() as context, Buffer.empty(memory) as buffer:
        weight = context.new_tensor(dtype, shape)
        product = ops.mul_mat(weight, context.new_tensor(Type.F32, (1, shape[1])))
        weight.ptr.buffer = buffer.ptr
        return bool(c.ggml_backend_dev_supports_op(memory.device.ptr, product.ptr))


def can_attend(backend: Backend, architecture: Architecture, dtype: Type) -> bool:
    """Return whether a backend has flash attention for the heads of a model and a cache of this type."""
    with Context() as context:
        node = architecture.flash_attention(context, dtype)
        if has_cuda_kernels(backend.device) and cuda_rules.fault(node.ptr):
            return False
        return bool(c.ggml_backend_dev_supports_op(backend.device.ptr, node.ptr))
