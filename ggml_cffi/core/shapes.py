"""Checks of shapes and sizes, in numpy's order and in ggml's."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from ggml_cffi import c
from ggml_cffi.core import dtypes
from ggml_cffi.enums import Type

_MAX_ELEMENTS = 2**62


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return ``shape`` as a tuple of at most 4 sizes that ggml can hold.

    Raises
    ------
    TypeError
        If it is not a sequence of integers.
    ValueError
        If it has more axes, a negative size, or too many elements.
    """
    try:
        if isinstance(shape, str | bytes):
            raise TypeError
        sizes = tuple(int(n.__index__()) for n in shape)
    except (AttributeError, TypeError):
        raise TypeError(f"a shape is a sequence of integers, not {shape!r}") from None
    if len(sizes) > c.GGML_MAX_DIMS:
        raise ValueError(f"shape {sizes} has {len(sizes)} axes; ggml has at most {c.GGML_MAX_DIMS}")
    if any(n < 0 for n in sizes) or prod(max(n, 1) for n in sizes) > _MAX_ELEMENTS:
        raise ValueError(f"shape {sizes} is not possible: sizes must be at least 0 and their product below 2**62")
    return sizes


def check_bytes(dtype: Type, ne: Sequence[int]) -> None:
    """Raise ``ValueError`` if a tensor of these sizes has more bytes than C can count."""
    if dtypes.row_size(dtype, ne[0]) * prod(max(n, 1) for n in ne[1:]) >= _MAX_ELEMENTS:
        raise ValueError(f"sizes {tuple(ne)} of {dtype.name} take 2**62 bytes or more")


def ne_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a numpy shape in ggml's order, padded with ones to four sizes."""
    return (*reversed(shape), *(1,) * (4 - len(shape)))


def fits_in_32_bits(p: Any) -> bool:
    """Return whether the sizes and strides of a C tensor fit the 32 bits that the RPC protocol has for them."""
    return all(n <= 1 or (n < 2**32 and stride < 2**32) for n, stride in zip(p.ne, p.nb, strict=True))
