"""Byte-pair encoding compared with a simple implementation."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggml_cffi.models.tokenizers.bpe import merge


def naive_merge(symbols, ranks, joint):
    parts = list(symbols)
    while True:
        pairs = [joint.join(pair) for pair in itertools.pairwise(parts)]
        at = min((i for i, pair in enumerate(pairs) if pair in ranks), key=lambda i: (ranks[pairs[i]], i), default=None)
        if at is None:
            return parts
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@settings(deadline=None)
@given(
    st.text("abc", max_size=30),
    st.dictionaries(st.text("abc", min_size=2, max_size=5), st.integers(-3, 3), max_size=20),
    st.sampled_from(["", " "]),
)
def test_the_pair_with_the_lowest_rank_is_merged_first(text, wanted, joint):
    ranks = {f"{t[:i]}{joint}{t[i:]}": rank for t, rank in wanted.items() for i in range(1, len(t))}
    assert merge(text, ranks, joint) == naive_merge(text, ranks, joint)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.text("abc", min_size=1, max_size=3), st.integers(100, 200)), min_size=1, max_size=3),
    st.dictionaries(st.text("abc", min_size=2, max_size=8), st.integers(-30, 30), max_size=40),
    st.sampled_from(["", " "]),
)
def test_repeated_pairs_of_long_words_are_merged_in_the_same_order(runs, wanted, joint):
    text = "".join(part * n for part, n in runs)
    ranks = {f"{t[:i]}{joint}{t[i:]}": rank for t, rank in wanted.items() for i in range(1, len(t))}
    assert merge(text, ranks, joint) == naive_merge(text, ranks, joint)


@pytest.mark.parametrize(
    "wanted",
    [
        {"ab": 1, "abab": 2},
        {"ab": 1, "aba": 0},  # a pair that exists only while the second "ab" waits comes first
        {"ab": 1, "aba": 1},
        {"ab": 1, "abab": 0},
        {"ab": 1, "cab": 0, "caba": 0.5},  # a pair with the symbol before comes first
        {"ab": 1, "ba": 1},
        {"ab": 1, "bc": 1, "ca": 1, "ba": 1},
        {"ba": 1, "ab": 2},
        {"ab": 0, "abab": 1, "abababab": 2, "aba": 3},
    ],
)
def test_the_order_of_merges_of_a_repeated_pair(wanted):
    ranks = {f"{t[:i]}{t[i:]}": rank for t, rank in wanted.items() for i in range(1, len(t))}
    for text in ("ab" * 300, "a" * 50 + "ab" * 300 + "b" * 50, "abc" * 200, "cabab" * 200):
        assert merge(text, ranks) == naive_merge(text, ranks, "")


class Counting(dict):
    """A dictionary that counts its look-ups."""

    n = 0

    def get(self, *args):
        self.n += 1
        return super().get(*args)


def test_a_run_of_a_million_characters_needs_few_look_ups():
    ranks = Counting({"a" * 2**k: k for k in range(1, 6)})
    assert merge("a" * 1_000_000, ranks) == ["a" * 32] * 31_250
    assert ranks.n < 100_000
