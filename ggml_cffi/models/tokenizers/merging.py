"""Merging neighbours: what byte-pair encoding and SentencePiece's have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise


def merge(symbols: Sequence[str], ranks: Mapping[str, float], joint: str = "") -> list[str]:
    """``symbols``, with neighbours joined for as long as there are two that may be.

    Parameters
    ----------
    symbols
        The parts of a text.
    ranks
        Which neighbours may be joined, written with ``joint`` between them. Lower ranks come first, and among equal
        ones the leftmost.
    joint
        What stands between the two in ``ranks``.

    Notes
    -----
    ``O(n log n)`` for ``n`` symbols: a heap of pairs, those that are no more are left in it and passed over.
    """
    texts = list(symbols)
    n = len(texts)
    after = list(range(1, n + 1))
    before = list(range(-1, n - 1))
    neighbours = [left + joint + right for left, right in pairwise(texts)]
    pairs = [(rank, i, text) for i, text in enumerate(neighbours) if (rank := ranks.get(text)) is not None]
    heapify(pairs)
    while pairs:
        _, left, text = heappop(pairs)
        right = after[left]
        # An empty text is a symbol that went into another one.
        if not texts[left] or right == n or texts[left] + joint + texts[right] != text:
            continue
        texts[left] += texts[right]
        texts[right] = ""
        following = after[left] = after[right]
        if following < n:
            before[following] = left
            text = texts[left] + joint + texts[following]
            if (rank := ranks.get(text)) is not None:
                heappush(pairs, (rank, left, text))
        preceding = before[left]
        if preceding >= 0:
            text = texts[preceding] + joint + texts[left]
            if (rank := ranks.get(text)) is not None:
                heappush(pairs, (rank, preceding, text))
    return [text for text in texts if text]
