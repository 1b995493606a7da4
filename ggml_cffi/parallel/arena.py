"""Memory for intermediates: one arena, whose parts are reused by tensors with different lifetimes."""

from __future__ import annotations

from collections.abc import Sequence


def assign_offsets(sizes: Sequence[int], lifetimes: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Return an offset for each tensor, and the bytes of the whole arena.

    Tensors whose lifetimes overlap get memory that does not overlap.

    Parameters
    ----------
    sizes
        Bytes of each tensor, multiples of the alignment.
    lifetimes
        First and last moment at which each tensor is in use, sorted by the first.
    """
    offsets: list[int] = []
    live: list[tuple[int, int, int]] = []  # start, end, last moment
    total = 0
    for size, (first, last) in zip(sizes, lifetimes, strict=True):
        live = sorted(block for block in live if block[2] >= first)
        at = 0
        for start, end, _ in live:  # the first gap that is large enough
            if start - at >= size:
                break
            at = max(at, end)
        offsets.append(at)
        live.append((at, at + size, last))
        total = max(total, at + size)
    return offsets, total
