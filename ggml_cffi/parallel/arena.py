"""Memory for what is computed, where a piece serves many results in turns."""

from __future__ import annotations

from collections.abc import Sequence


def arrange(sizes: Sequence[int], spans: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """An offset for each piece, and bytes in all. Pieces whose spans share a moment do not overlap.

    Parameters
    ----------
    sizes
        Bytes of each, multiples of the alignment.
    spans
        First and last moment at which each is in use, sorted by the first.
    """
    offsets: list[int] = []
    live: list[tuple[int, int, int]] = []  # start, end, last moment
    total = 0
    for size, (first, last) in zip(sizes, spans, strict=True):
        live = sorted(piece for piece in live if piece[2] >= first)
        at = 0
        for start, end, _ in live:  # the first gap that is large enough
            if start - at >= size:
                break
            at = max(at, end)
        offsets.append(at)
        live.append((at, at + size, last))
        total = max(total, at + size)
    return offsets, total
