"""How weights are cut for several devices.

A product ``x @ w.T`` is shared out over devices in one of two ways: each has some rows of ``w`` and computes those
outputs, or each has some columns and those inputs, and the products are summed. Rows first and columns after it
(the two halves of a feed-forward part, or projections to heads and back) need one sum in all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from math import prod

import numpy as np
import numpy.typing as npt

from ggml_cffi.core.dtypes import block_size, row_size
from ggml_cffi.enums import Type


@dataclass(frozen=True)
class ShardSpec:
    """How one weight is cut: ``MIRROR``, ``ROWS``, ``COLUMNS``, or one of them with shares.

    Parameters
    ----------
    axis
        0 for rows, -1 for columns, None where every device has the whole.
    shares
        Parts of the axis that each device gets, ``(2, 1)`` for two thirds and one. Default about equal, whole blocks
        of quantized types.
    """

    axis: int | None
    shares: tuple[int, ...] = ()

    def of(self, *shares: int) -> ShardSpec:
        """The same axis, so many parts for each device: ``ROWS.of(2, 1)``."""
        return ShardSpec(self.axis, shares)

    def spans(self, dtype: Type, shape: Sequence[int], n: int) -> list[tuple[int, int]]:
        """First and last-plus-one of the axis for each of ``n`` devices.

        Raises
        ------
        ValueError
            If the tensor cannot be cut so: too few rows or blocks, or shares that do not fit.
        """
        if self.axis is None:
            return [(0, 0)] * n
        if not shape:
            raise ValueError("a tensor of no axes cannot be cut: mirror it")
        size = shape[self.axis]
        columns = self.axis == -1 or len(shape) == 1
        block = block_size(dtype) if columns else 1
        if self.shares:
            if len(self.shares) != n or min(self.shares) < 1:
                raise ValueError(f"shares {self.shares} are not one above 0 for each of {n} devices")
            unit, rest = divmod(size, sum(self.shares))
            if rest or any(unit * k % block for k in self.shares):
                raise ValueError(
                    f"an axis of {size} cannot be cut {':'.join(map(str, self.shares))}"
                    + (f" into whole blocks of {block} ({dtype.name})" if not rest else "")
                )
            sizes = [unit * k for k in self.shares]
        else:
            sizes = [k * block for k in split_evenly(size // block, n, f"{dtype.name} {tuple(shape)}")]
        edges = np.cumsum([0, *sizes]).tolist()
        return list(pairwise(edges))

    def shapes(self, dtype: Type, shape: Sequence[int], n: int) -> list[tuple[int, ...]]:
        """What each of ``n`` devices gets of a tensor of ``shape``; errors as :meth:`spans`."""
        spans = self.spans(dtype, shape, n)
        if self.axis is None:
            return [tuple(shape)] * n
        axis = self.axis % len(shape)
        return [(*shape[:axis], stop - start, *shape[axis + 1 :]) for start, stop in spans]


MIRROR = ShardSpec(None)
"""Every device has the whole."""
ROWS = ShardSpec(0)
"""Each device has some rows of ``(n_out, n_in)``: some outputs."""
COLUMNS = ShardSpec(-1)
"""Each device has some columns of ``(n_out, n_in)``: some inputs. The products are to be summed."""


def split_evenly(units: int, n: int, what: str = "", *, whole: int = 1) -> tuple[int, ...]:
    """``units`` things for ``n`` devices, as evenly as goes, each share but the last a multiple of ``whole``.

    Raises
    ------
    ValueError
        If a device would get none.
    """
    groups = -(-units // whole)
    if groups < n:
        raise ValueError(
            f"{what or 'this'} has {units} parts that stay whole"
            + (f", {whole} at a time" if whole > 1 else "")
            + f": too few for {n} devices"
        )
    edges = [min(groups * k // n * whole, units) for k in range(n + 1)]
    return tuple(b - a for a, b in pairwise(edges))


def shard_bytes(
    dtype: Type, shape: Sequence[int], raw: npt.NDArray[np.uint8], cut: ShardSpec, n: int
) -> list[npt.NDArray[np.uint8]]:
    """The bytes ``raw`` of a tensor, cut for ``n`` devices: views of it, of columns with two axes."""
    if cut.axis is None:
        return [raw] * n
    columns = cut.axis == -1 or len(shape) == 1
    rest = shape[1:]
    found = []
    for start, stop in cut.spans(dtype, shape, n):
        if columns:
            low, high = row_size(dtype, start), row_size(dtype, stop)
            found.append(raw.reshape(-1, row_size(dtype, shape[-1]))[:, low:high])
        else:
            step = row_size(dtype, rest[-1]) * prod(rest[:-1])
            found.append(raw[start * step : stop * step])
    return found


def spec_for(name: str, rules: Mapping[str, ShardSpec]) -> ShardSpec:
    """The cut of the first pattern (``"*.down.weight"``) that ``name`` fits; :data:`MIRROR` where none does."""
    return next((cut for pattern, cut in rules.items() if fnmatchcase(name, pattern)), MIRROR)
