"""Byte-pair encoding: merge neighbouring symbols by rank. GPT-2's and SentencePiece's vocabularies share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise


def merge(symbols: Sequence[str], ranks: Mapping[str, float], joint: str = "") -> list[str]:
    """Return ``symbols`` after all merges: the pair with the lowest rank is merged first, until no pair has a rank.

    Parameters
    ----------
    symbols
        The symbols of a word, in their order.
    ranks
        Rank of each pair that may be merged, spelled with ``joint`` between the two. The leftmost of several pairs with
        equal rank is merged first.
    joint
        Text between the two symbols of a pair in ``ranks``.

    Notes
    -----
    ``O(n log n)`` for ``n`` symbols: pairs are in a heap. A pair whose symbols have changed stays in the heap, and is
    skipped when it comes up.
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
        # An empty text marks a symbol that was merged into another one.
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
