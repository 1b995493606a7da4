"""Products with the accuracy of F32, on every device.

GPUs round F32 operands to F16 or TF32. There are two ways around that:

- Batches of few rows, where a device has kernels for these that keep F32.
- Each operand as the sum of three BF16 tensors, which hold all 24 bits of F32 and have its range. Every backend
  multiplies BF16 exactly and sums in F32. Six of the nine products of parts matter; the others are below the rounding
  of F32. Source: Henry, Tang, Heinecke, Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
  Computations, 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce

from ggml_cffi.core.context import Context
from ggml_cffi.core.precision import FEW_ROWS
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Prec, Type
from ggml_cffi.ops.elementwise import add, sub
from ggml_cffi.ops.shape import cast, concat, cont, view

#: Batches read a matrix once for each; with this number, dividing it into parts moves as many bytes.
_MOST_BATCHES = 16
_ALIGNMENT = 256  # bytes: the largest that a GPU may need for the start of an operand
_PARTS = 3
#: Longest sum that a GPU may compute at once: matrix units cut off the last bits of each partial sum.
_LONGEST_SUM = 2048
#: Parts that hold all bits of a type.
_NEEDED = {Type.BF16: 1, Type.F16: 2}


def is_f32(op: str, prec: Prec, ctx: Context) -> bool:
    """Return whether the accuracy of F32 is requested, by ``prec`` or as the default of the context.

    Raises
    ------
    ValueError
        If ``prec`` is neither ``DEFAULT`` nor ``F32``.
    """
    prec = Prec(prec)
    if prec not in (Prec.DEFAULT, Prec.F32):
        raise ValueError(f"{op}: prec must be DEFAULT or F32, not {prec.name}")
    return Prec.F32 in (prec, ctx.prec)


def decoded(t: Tensor, ctx: Context) -> Tensor:
    """Return ``t`` as F32, which is exact for float types."""
    return t if t.dtype is Type.F32 else cast(t, Type.F32, ctx=ctx)


def fits_batches(b: Tensor, ctx: Context) -> bool:
    """Return whether batches of the rows of ``b`` are exact, and quicker than parts."""
    one_matrix = b.ne[2] * b.ne[3] == 1
    return one_matrix and b.ne[1] <= _MOST_BATCHES * FEW_ROWS and ctx.keeps_f32(FEW_ROWS, 1)


def batched_product(multiply: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, ctx: Context) -> Tensor:
    """Return a product of ``a`` and ``b``, both F32, as the products of ``a`` and batches of the rows of ``b``."""
    k, m, stride = b.ne[0], b.ne[1], b.nb[1]
    found = []
    for first in range(0, m, FEW_ROWS):
        shape = (min(FEW_ROWS, m - first), k)
        rows = view(b, shape, strides=(stride, b.nb[0]), offset=first * stride, ctx=ctx)
        found.append(multiply(a, cont(rows, ctx=ctx) if first * stride % _ALIGNMENT else rows))
    while len(found) > 1:  # joined in pairs, so that few bytes are copied twice
        pairs = [concat(x, y, -2, ctx=ctx) for x, y in zip(found[::2], found[1::2], strict=False)]
        found = pairs + found[2 * len(pairs) :]
    return found[0]


def split_product(multiply: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, ctx: Context) -> Tensor:
    """Return a product of ``a`` and ``b`` as the sum of products of their parts.

    Parameters
    ----------
    multiply
        The product of a BF16 tensor of ``a``'s shape and an F32 tensor of ``b``'s shape with values of BF16.
    a, b
        F32, F16 or BF16, not empty.
    """
    k = a.ne[0]
    if k > _LONGEST_SUM:
        ranges = [(first, min(first + _LONGEST_SUM, k)) for first in range(0, k, _LONGEST_SUM)]
        columns = [(_columns(a, *each, ctx), _columns(b, *each, ctx)) for each in ranges]
        return reduce(partial(add, ctx=ctx), [split_product(multiply, x, y, ctx) for x, y in columns])
    parts_a = [part for part, _ in _split(a, ctx)]
    parts_b = [decoded(part, ctx) if wide is None else wide for part, wide in _split(b, ctx)]
    pairs = [(i, j) for i in range(len(parts_a)) for j in range(len(parts_b)) if i + j < _PARTS]
    pairs.sort(key=sum, reverse=True)  # the smallest first, so that the sum loses nothing of them
    (i, j), *rest = pairs
    out = multiply(parts_a[i], parts_b[j])
    for i, j in rest:
        out = add(out, multiply(parts_a[i], parts_b[j]), ctx=ctx)
    return out


def _columns(t: Tensor, first: int, end: int, ctx: Context) -> Tensor:
    """Return some columns of ``t``. Parts of F32 and F16 are copies anyway, and BF16 is copied here."""
    strides = tuple(reversed(t.nb[: t.ndim]))
    found = view(t, (*t.shape[:-1], end - first), strides=strides, offset=first * t.nb[0], ctx=ctx)
    return cont(found, ctx=ctx) if t.dtype is Type.BF16 else found


def _split(t: Tensor, ctx: Context) -> list[tuple[Tensor, Tensor | None]]:
    """Return BF16 tensors with sum ``t``, the largest first, each with its F32 copy if one was made."""
    if t.dtype is Type.BF16:
        return [(t, None)]
    rest = decoded(t, ctx)
    found: list[tuple[Tensor, Tensor | None]] = []
    for _ in range(_NEEDED.get(t.dtype, _PARTS) - 1):
        part = cast(rest, Type.BF16, ctx=ctx)
        wide = decoded(part, ctx)
        found.append((part, wide))
        rest = sub(rest, wide, ctx=ctx)
    return [*found, (cast(rest, Type.BF16, ctx=ctx), None)]
