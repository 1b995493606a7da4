"""Offsets in an arena."""

from hypothesis import given, settings
from hypothesis import strategies as st

from ggml_cffi.parallel.arena import assign_offsets


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 30), st.integers(0, 9)), max_size=30).map(
        lambda found: sorted(found, key=lambda piece: piece[1])
    )
)
@settings(max_examples=200, deadline=None)
def test_tensors_in_use_at_once_do_not_overlap(found):
    sizes = [256 * size for size, _, _ in found]
    spans = [(first, first + length) for _, first, length in found]
    offsets, total = assign_offsets(sizes, spans)
    for i, (a, (first, last)) in enumerate(zip(offsets, spans, strict=True)):
        assert a % 256 == 0
        assert a + sizes[i] <= total
        for j in range(i):
            if spans[j][0] <= last and first <= spans[j][1]:
                assert offsets[j] + sizes[j] <= a or a + sizes[i] <= offsets[j]


def test_memory_is_reused():
    spans = [(k, k + 1) for k in range(50)]
    assert assign_offsets([256] * 50, spans)[1] == 512
