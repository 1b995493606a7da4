"""What the kernels of the training and the recurrent operations take for granted of their operands."""

from __future__ import annotations

from ggml_cffi.core.dtypes import type_size
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.ops._args import INT_MAX
from ggml_cffi.ops._check import fail


def need_dense(op: str, **operands: Tensor) -> None:
    """Raise ``ValueError`` unless all are F32 with the strides of a new tensor.

    ggml calls more contiguous: any strides of axes of size 1, which some of its kernels use nevertheless.
    """
    for name, t in operands.items():
        if t.dtype is not Type.F32 or not t.head.dense:
            raise fail(op, f"{name} must be contiguous F32 (use cont)", **operands)


def need_rows(op: str, *dtypes: Type, **operands: Tensor) -> None:
    """Raise ``ValueError`` unless all are of one of the types, by default F32, with no gaps within a row."""
    for name, t in operands.items():
        if t.dtype not in (dtypes or (Type.F32,)) or t.nb[0] != type_size(t.dtype):
            kinds = " or ".join(kind.name for kind in dtypes) or "F32"
            raise fail(op, f"{name} must be {kinds} with contiguous rows (use cont)", **operands)


def need_axes(op: str, n: int, **operands: Tensor) -> None:
    """Raise ``ValueError`` unless all have ``n`` axes. ggml does not tell leading axes of size 1 from none."""
    for name, t in operands.items():
        if t.ndim != n:
            raise fail(op, f"{name} must have {n} {'axis' if n == 1 else 'axes'}", **operands)


def need_elements(op: str, **operands: Tensor) -> None:
    """Raise ``ValueError`` if an operand is empty though the result is not."""
    for name, t in operands.items():
        if not t.size:
            raise fail(op, f"{name} has no elements", **operands)


def need_int(op: str, **operands: Tensor) -> None:
    """Raise ``ValueError`` if an operand has more elements than a kernel counts in 32 bits."""
    for name, t in operands.items():
        if t.size > INT_MAX:
            raise fail(op, f"{name} has more than 2**31 - 1 elements", **operands)


def need_int_rows(op: str, **operands: Tensor) -> None:
    """Raise ``ValueError`` if an operand has more rows, or elements in one, than a kernel counts in 32 bits."""
    for name, t in operands.items():
        if t.ne[0] > INT_MAX or t.ne[1] * t.ne[2] * t.ne[3] > INT_MAX:
            raise fail(op, f"{name} has more than 2**31 - 1 rows, or elements in a row", **operands)
