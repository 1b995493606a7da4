"""Shards of weights for several devices.

Several devices compute a product ``x @ w.T`` in one of two ways. Either each device has some rows of ``w`` and computes
some outputs. Or each device has some columns and uses some inputs, and the products are all-reduced. A product by rows
followed by one by columns (the two halves of a feed-forward part, or projections to heads and back) needs one
all-reduce.
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
    """Division of one weight among devices: ``MIRROR``, ``ROWS``, ``COLUMNS``, or one of them with proportions.

    Parameters
    ----------
    axis
        0 for rows, -1 for columns, None if every device has the whole weight.
    shares
        Proportions of the axis for each device, such as ``(2, 1)`` for two thirds and one third. Default about equal
        parts, in whole blocks of quantized types.
    """

    axis: int | None
    shares: tuple[int, ...] = ()

    def of(self, *shares: int) -> ShardSpec:
        """Return a specification with the same axis and these proportions: ``ROWS.of(2, 1)``."""
        return ShardSpec(self.axis, shares)

    def spans(self, dtype: Type, shape: Sequence[int], n: int) -> list[tuple[int, int]]:
        """Return start and end along the axis for each of ``n`` devices.

        Raises
        ------
        ValueError
            If the tensor has too few rows or blocks, or the proportions do not fit.
        """
        if self.axis is None:
            return [(0, 0)] * n
        if not shape:
            raise ValueError("a tensor without axes cannot be sharded: use MIRROR")
        size = shape[self.axis]
        columns = self.axis == -1 or len(shape) == 1
        block = block_size(dtype) if columns else 1
        if self.shares:
            if len(self.shares) != n or min(self.shares) < 1:
                raise ValueError(f"shares {self.shares} are not one number above 0 for each of {n} devices")
            unit, rest = divmod(size, sum(self.shares))
            if rest or any(unit * k % block for k in self.shares):
                raise ValueError(
                    f"an axis of {size} cannot be divided {':'.join(map(str, self.shares))}"
                    + (f" into whole blocks of {block} ({dtype.name})" if not rest else "")
                )
            sizes = [unit * k for k in self.shares]
        else:
            sizes = [k * block for k in split_evenly(size // block, n, f"{dtype.name} {tuple(shape)}")]
        edges = np.cumsum([0, *sizes]).tolist()
        return list(pairwise(edges))

    def shapes(self, dtype: Type, shape: Sequence[int], n: int) -> list[tuple[int, ...]]:
        """Return the shape of the shard of each of ``n`` devices. See :meth:`spans` for the errors."""
        spans = self.spans(dtype, shape, n)
        if self.axis is None:
            return [tuple(shape)] * n
        axis = self.axis % len(shape)
        return [(*shape[:axis], stop - start, *shape[axis + 1 :]) for start, stop in spans]


MIRROR = ShardSpec(None)
"""Every device has the whole weight."""
ROWS = ShardSpec(0)
"""Each device has some rows of ``(n_out, n_in)``: some outputs."""
COLUMNS = ShardSpec(-1)
"""Each device has some columns of ``(n_out, n_in)``: some inputs. The products must be all-reduced."""


def split_evenly(units: int, n: int, name: str = "", *, whole: int = 1) -> tuple[int, ...]:
    """Return the number of units for each of ``n`` devices, as equal as possible.

    Parameters
    ----------
    name
        Name of the whole, for the error message.
    whole
        Number of units that stay together: each result except the last is a multiple of it.

    Raises
    ------
    ValueError
        If there are too few units for every device to get one.
    """
    groups = -(-units // whole)
    if groups < n:
        raise ValueError(
            f"{name or 'this'} has {units} parts that stay whole"
            + (f", {whole} at a time" if whole > 1 else "")
            + f": too few for {n} devices"
        )
    edges = [min(groups * k // n * whole, units) for k in range(n + 1)]
    return tuple(b - a for a, b in pairwise(edges))


def shard_bytes(
    dtype: Type, shape: Sequence[int], raw: npt.NDArray[np.uint8], spec: ShardSpec, n: int
) -> list[npt.NDArray[np.uint8]]:
    """Return the bytes of each of ``n`` devices' shard: views of ``raw``, with two axes for columns."""
    if spec.axis is None:
        return [raw] * n
    columns = spec.axis == -1 or len(shape) == 1
    rest = shape[1:]
    found = []
    for start, stop in spec.spans(dtype, shape, n):
        if columns:
            low, high = row_size(dtype, start), row_size(dtype, stop)
            found.append(raw.reshape(-1, row_size(dtype, shape[-1]))[:, low:high])
        else:
            step = row_size(dtype, rest[-1]) * prod(rest[:-1])
            found.append(raw[start * step : stop * step])
    return found


def spec_for(name: str, rules: Mapping[str, ShardSpec]) -> ShardSpec:
    """Return the rule of the first pattern (``"*.down.weight"``) that matches ``name``, :data:`MIRROR` if none does."""
    return next((spec for pattern, spec in rules.items() if fnmatchcase(name, pattern)), MIRROR)
