"""Byte-pair encoding: merge neighbouring symbols by rank. GPT-2's and SentencePiece's vocabularies share it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from math import inf
from operator import add

#: Symbols of a word from which on a common pair is merged everywhere at once.
_LONG_WORD = 256
#: Part of a word's symbols that a common pair begins with.
_COMMON = 1 / 16


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
    if len(texts) >= _LONG_WORD:
        texts = _merge_common(texts, ranks, joint)
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


def _merge_common(texts: list[str], ranks: Mapping[str, float], joint: str) -> list[str]:
    """Return ``texts`` after the first merges, for as long as the pair to merge is common.

    A character stands for each symbol, so that ``str.replace`` merges a pair everywhere, from left to right. That is
    the order of :func:`merge` unless a merged symbol forms a pair of a lower or equal rank, or another pair has the
    same rank: the rest is left to :func:`merge` then. Each round is linear, and removes a part of the symbols.
    """
    names = list(dict.fromkeys(texts))  # the symbol of each character
    if len(names) > len(texts) * _COMMON:
        return texts
    characters = {name: chr(i) for i, name in enumerate(names)}
    word = "".join([characters[text] for text in texts])
    if max(Counter(map(add, word, word[1:])).values()) <= len(word) * _COMMON:
        return texts

    def rank_of(left: str, right: str) -> float:
        return ranks.get(names[ord(left)] + joint + names[ord(right)], inf)

    def first(word: str) -> tuple[float, str]:
        """Return the lowest rank, and its pair; no pair if there is none, or several."""
        found = [(rank_of(*pair), pair) for pair in set(map(add, word, word[1:]))]
        rank = min((rank for rank, _ in found), default=inf)
        pairs = [pair for other, pair in found if other == rank]
        return rank, pairs[0] if len(pairs) == 1 and rank < inf else ""

    rank, pair = first(word)
    while pair and word.count(pair) > len(word) * _COMMON:
        left, right = pair[0], pair[1]
        merged = names[ord(left)] + names[ord(right)]
        if merged not in characters:
            characters[merged] = chr(len(names))
            names.append(merged)
        shorter = word.replace(pair, characters[merged])
        next_rank, next_pair = first(shorter)
        # The second pair exists while the symbol after the merged one waits for its own merge.
        if min(next_rank, rank_of(characters[merged], left)) <= rank:
            break
        word, rank, pair = shorter, next_rank, next_pair
    return [names[ord(character)] for character in word]
