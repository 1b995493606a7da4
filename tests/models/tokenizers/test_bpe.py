"""Byte-pair encoding compared with a simple implementation."""

import itertools

from hypothesis import given
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


@given(
    st.text("abc", max_size=30),
    st.dictionaries(st.text("abc", min_size=2, max_size=5), st.integers(-3, 3), max_size=20),
    st.sampled_from(["", " "]),
)
def test_the_pair_with_the_lowest_rank_is_merged_first(text, wanted, joint):
    ranks = {f"{t[:i]}{joint}{t[i:]}": rank for t, rank in wanted.items() for i in range(1, len(t))}
    assert merge(text, ranks, joint) == naive_merge(text, ranks, joint)
