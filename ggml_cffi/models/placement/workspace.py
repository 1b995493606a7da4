"""Workspace: memory that ggml's GPU backends allocate themselves, in addition to the buffers of the caller."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

from ggml_cffi.c import library
from ggml_cffi.enums import Op, Type

_COLUMNS = 8  # products with more columns have kernels that take their inputs in F16
_DEEP = 2048  # elements of a sum; from this size on it is divided, if a product is too narrow for all processors
_PARTIAL_SUMS = 8 << 20  # bytes of divided sums: a tile of 64 KiB for each of about 130 processors
_KERNELS = 4 << 20
_ATTENTION_ROWS = 64  # with as many queries, ggml 0.25 decodes quantized keys and values to F16 first
_FLOATS = (Type.F32, Type.F16, Type.BF16)


def workspace_bytes(nodes: Iterable[Any]) -> int:
    """Return an estimate of the bytes that ggml's Vulkan backend allocates in the first run of nodes (C pointers).

    The backend copies inputs of products to F16, decodes quantized keys and values to F16 (not with NVIDIA's newest
    matrix extension, so that the estimate is too high there), stores partial sums of narrow products, and holds
    compiled kernels. It does not report the size of this memory.
    """
    inputs, decoded, deep = 0, 0, False
    for p in nodes:
        if p.op == Op.MUL_MAT and p.ne[1] > _COLUMNS:
            x = p.src[1]
            deep = deep or x.ne[0] >= _DEEP
            if x.type == Type.F32:
                inputs = max(inputs, 2 * prod(x.ne[i] for i in range(4)))
        elif p.op == Op.FLASH_ATTN_EXT and p.src[0].ne[1] >= _ATTENTION_ROWS:
            caches = p.src[1], p.src[2]
            if not any(t.type in _FLOATS for t in caches) and library.provides("ggml_prec_set_acc"):
                decoded = max(decoded, 2 * sum(prod(t.ne[i] for i in range(4)) for t in caches))
    return inputs + decoded + (_PARTIAL_SUMS + _KERNELS if deep else 0)
