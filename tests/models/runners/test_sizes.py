"""Sizes of graphs, and inputs for more tokens than a batch has."""

import numpy as np

from ggml_cffi.models.runners.base import n_kv_for
from ggml_cffi.models.runners.sizes import Buckets, fill


def test_buckets_are_larger_by_a_step_or_a_part_of_a_power_of_two():
    buckets = Buckets(16, 4)
    assert [buckets.of(n) for n in (1, 7, 8, 9, 16, 17, 64, 65, 128, 129, 200, 257)] == [
        *(1, 7, 8, 16, 16, 32, 64, 80, 128, 160, 224, 320),
    ]
    assert [Buckets(4, 16).of(n) for n in (9, 13, 61, 65, 127, 129)] == [12, 16, 64, 68, 128, 136]


def test_sizes_have_room_for_tokens_and_outputs():
    buckets = Buckets(16, 4)
    assert buckets.sizes(20, 1, 512) == (32, 1)
    assert buckets.sizes(20, 20, 512) == (32, 32)
    assert buckets.sizes(20, 20, 24) == (24, 24)
    assert buckets.sizes(20, 3, 512) == (32, 16)
    assert buckets.sizes(16, 15, 512) == (16, 15)
    assert buckets.sizes(8, 3, 512) == (8, 3)


def test_the_last_token_fills_the_rest_of_an_input():
    target = np.zeros((4, 2))
    fill(target, np.array([[1, 2], [3, 4]]))
    assert target.tolist() == [[1, 2], [3, 4], [3, 4], [3, 4]]


def test_attention_reads_whole_steps_of_kv_slots():
    assert [n_kv_for(end, 1024) for end in (0, 1, 256, 257, 1024)] == [256, 256, 256, 512, 1024]
    assert n_kv_for(300, 320) == 320
