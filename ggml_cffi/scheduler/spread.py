"""Nodes with operands in the memory of several CUDA devices.

ggml's scheduler copies operands to the device of their node. Its CUDA backend nevertheless reports no support for a
node while an operand is in the memory of another CUDA device. Such a node would be computed by the CPU, or refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.cuda import has_cuda_kernels
from ggml_cffi.core.op_sets import VIEWS
from ggml_cffi.enums import BackendBufferUsage as Usage
from ggml_cffi.scheduler.graph import Graph


def find_spread(graph: Graph, backends: Sequence[Backend]) -> dict[Any, Backend]:
    """Return the nodes with operands on several CUDA devices, by C pointer, each with the backend to compute it.

    This is the backend of the node's own memory, else of its first weight, else of its first operand. A node whose own
    memory is the host's is not among them: the CPU computes it.
    """
    on_cuda = {b.device.ptr: b for b in reversed(backends) if has_cuda_kernels(b.device)}
    if len(on_cuda) < 2:
        return {}
    found = {}
    for p in graph.node_pointers():
        buffers = [t.buffer for t in p.src if t and t.buffer]
        used = [device for buffer in buffers if (device := _device(buffer)) in on_cuda]
        if len(set(used)) > 1 and p.op not in VIEWS:
            own = p.view_src.buffer if p.view_src else p.buffer
            weights = [b for b in buffers if c.ggml_backend_buffer_get_usage(b) == Usage.WEIGHTS]
            if own and _device(own) not in on_cuda:
                continue
            chosen = [_device(buffer) for buffer in ([own] if own else weights)]
            found[p] = next((on_cuda[device] for device in chosen if device in on_cuda), on_cuda[used[0]])
    return found


def supports_copied(backend: Backend, p: Any) -> bool:
    """Return whether a CUDA device can compute a node once its operands are copied to the device."""
    if not has_cuda_kernels(backend.device):
        return False
    node, operands = c.ffi.new("struct ggml_tensor *", p[0]), []
    for i, t in enumerate(p.src):
        if t:
            operands.append(c.ffi.new("struct ggml_tensor *", t[0]))
            operands[-1].buffer = c.NULL
            node.src[i] = operands[-1]
    return bool(c.ggml_backend_dev_supports_op(backend.device.ptr, node))


def _device(buffer: Any) -> Any:
    """Return the device of a buffer (a C pointer), None for memory of the host, also for pinned memory of a device."""
    if c.ggml_backend_buffer_is_host(buffer):
        return None
    return c.ggml_backend_buft_get_device(c.ggml_backend_buffer_get_type(buffer))
