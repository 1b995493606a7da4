"""Workspace: memory that ggml's GPU backends allocate themselves, in addition to the buffers of the caller."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

from ggml_cffi.enums import Op, Type

_COLUMNS = 8  # products with more columns have kernels that take their inputs in F16
_DEEP = 2048  # elements of a sum; from this size on it is divided, if a product is too narrow for all processors
_PARTIAL_SUMS = 8 << 20  # bytes of divided sums: a tile of 64 KiB for each of about 130 processors
_KERNELS = 4 << 20


def workspace_bytes(nodes: Iterable[Any]) -> int:
    """Return an estimate of the bytes that ggml's Vulkan backend allocates in the first run of nodes (C pointers).

    The backend copies inputs of products to F16, stores partial sums of narrow products, and holds compiled kernels. It
    does not report the size of this memory.
    """
    inputs, deep = 0, False
    for p in nodes:
        if p.op == Op.MUL_MAT and p.ne[1] > _COLUMNS:
            x = p.src[1]
            deep = deep or x.ne[0] >= _DEEP
            if x.type == Type.F32:
                inputs = max(inputs, 2 * prod(x.ne[i] for i in range(4)))
    return inputs + (_PARTIAL_SUMS + _KERNELS if deep else 0)
