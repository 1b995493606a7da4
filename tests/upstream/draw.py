"""Input tensors, and the values that upstream's program draws for them.

Sizes are in ggml's order, contiguous axis first, as in upstream's text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import ggml_cffi as ggml
from ggml_cffi.core import dtypes

Array = npt.NDArray[Any]
Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]


class Inputs:
    """Input tensors of a case, with their values.

    The first device fills ``drawn``, and the others reuse it, so that all devices get the same bytes.
    """

    def __init__(self, ctx: ggml.Context, device: str, rng: np.random.Generator, drawn: list[Array]) -> None:
        self.ctx, self.device = ctx, device
        self.read: ggml.Tensor | None = None
        """Tensor to compare, if not the one that the builder returns."""
        self._rng, self._drawn = rng, drawn
        self._made: list[tuple[ggml.Tensor, tuple[float, float] | Draw]] = []

    def new(
        self, dtype: str | ggml.Type, ne: Sequence[int], values: tuple[float, float] | Draw = (-1.0, 1.0)
    ) -> ggml.Tensor:
        """Create a tensor of sizes ``ne``, uniform in an interval or by a function of generator and shape."""
        tensor = self.ctx.new_tensor(dtype, tuple(reversed(ne)))
        self._made.append((tensor, values))
        return tensor

    def ids(self, dtype: str, ne: Sequence[int], limit: int) -> ggml.Tensor:
        """Create random integers below ``limit``."""
        return self.new(dtype, ne, lambda rng, shape: rng.integers(0, limit, shape))

    def shuffled(self, dtype: str, ne: Sequence[int], limit: int | None = None) -> ggml.Tensor:
        """Create rows that shuffle 0, 1, …; the numbers start again at ``limit``."""

        def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
            row = np.arange(shape[-1]) % (limit or shape[-1])
            return rng.permuted(np.broadcast_to(row, shape), axis=-1)

        return self.new(dtype, ne, draw)

    def chosen(self, dtype: str, ne: Sequence[int], limit: int) -> ggml.Tensor:
        """Create rows of different integers below ``limit``."""

        def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
            all_of = rng.permuted(np.broadcast_to(np.arange(limit), (*shape[:-1], limit)), axis=-1)
            return all_of[..., : shape[-1]]

        return self.new(dtype, ne, draw)

    def write(self) -> None:
        """Write the values of every input that has memory."""
        if not self._drawn:
            self._drawn += [self._bytes(t, values) for t, values in self._made]
        for (t, _), raw in zip(self._made, self._drawn, strict=True):
            if raw.size and t.is_allocated:  # a tensor that no node uses has no memory
                t.set_bytes(raw)

    def _bytes(self, t: ggml.Tensor, values: tuple[float, float] | Draw) -> Array:
        kind = t.dtype
        if callable(values):
            drawn = values(self._rng, t.shape)
        elif kind in dtypes.INTEGERS:
            # As in upstream, integer tensors without a meaning hold the bits of floats.
            floats = self._rng.uniform(*values, t.size).astype(np.float32)
            return np.resize(floats.view(np.uint8), t.nbytes) if t.size else np.empty(0, np.uint8)
        else:
            drawn = self._rng.uniform(*values, t.shape).astype(np.float32)
        if kind in dtypes.INTEGERS:
            return np.ascontiguousarray(drawn.astype(dtypes.numpy_dtype(kind))).reshape(-1).view(np.uint8)
        imatrix = np.ones(t.shape[-1]) if dtypes.is_quantized(kind) else None
        return ggml.quantize(drawn, kind, imatrix).reshape(-1)


def mask(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Return an attention mask: uniform, with some blocks all 0 and some -inf."""
    drawn = rng.uniform(-1, 1, shape).astype(np.float32)
    for _ in range(int(0.2 * drawn.size / (128 * 64))):
        *lead, row, column = (int(rng.integers(n)) for n in shape)
        drawn[(*lead, slice(row, row + 64), slice(column, column + 128))] = -np.inf if rng.integers(2) else 0.0
    return drawn


def sparse_mask(visible: int) -> Draw:
    """Return a function that draws an attention mask with ``visible`` keys in each row."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        drawn = np.full(shape, -np.inf, np.float32)
        keys = np.argsort(rng.random(shape), axis=-1)[..., :visible]
        np.put_along_axis(drawn, keys, rng.uniform(-0.25, 0.0, keys.shape).astype(np.float32), axis=-1)
        return drawn

    return draw


def lower(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Return a lower triangular matrix that can be solved."""
    return np.tril(rng.uniform(0.1, 1.0, shape))


def view(t: ggml.Tensor, ne: Sequence[int], *, nb: Sequence[int] | None = None, offset: int = 0) -> ggml.Tensor:
    """Return ``ne`` elements of ``t`` from byte ``offset`` on, with its strides, or ``nb[1:]`` for the axes after the
    first.
    """
    strides = (t.nb[0], *(nb or t.nb)[1:])[: len(ne)]
    return ggml.view(t, tuple(reversed(ne)), strides=tuple(reversed(strides)), offset=offset)


def permute(t: ggml.Tensor, to: Sequence[int]) -> ggml.Tensor:
    """Permute as ggml does: axis ``i`` of ``t`` becomes axis ``to[i]``."""
    axes = [0] * 4
    for i, place in enumerate(to):
        axes[3 - place] = 3 - i
    return ggml.permute(t, axes)


def times(ne: Sequence[int], factors: Sequence[int]) -> tuple[int, ...]:
    """Multiply sizes by factors."""
    return tuple(n * f for n, f in zip(ne, factors, strict=True))


def work(result: ggml.Tensor) -> int:
    """Estimate the number of arithmetic operations of a result, from the tensors of its context."""
    total = 0
    for t in result.context.tensors():
        sources = [s for s in t.ptr.src if s]
        each = 1
        if t.op in (ggml.Op.MUL_MAT, ggml.Op.MUL_MAT_ID):
            each = sources[0].ne[0]
        elif t.op is ggml.Op.OUT_PROD:
            each = sources[0].ne[1]
        elif t.op is ggml.Op.FLASH_ATTN_EXT:
            each = 2 * sources[1].ne[1]
        elif t.op in (ggml.Op.CONV_2D, ggml.Op.CONV_2D_DW, ggml.Op.CONV_3D):
            each = math.prod(list(sources[0].ne)[:3])
        elif t.op in (ggml.Op.CONV_TRANSPOSE_1D, ggml.Op.CONV_TRANSPOSE_2D):
            each = sources[0].ne[0] * sources[0].ne[3]
        elif t.op is ggml.Op.SOLVE_TRI:
            each = sources[0].ne[0]
        total += t.size * max(each, 1)
    return total
