"""Choice of the executor. All executors give the same results."""

import numpy as np
import pytest

from ggml_cffi import parallel
from ggml_cffi.parallel.executors import RecordAhead, Threads, Turns
from tests.support import relative_error
from tests.support.ranks import DIM, Blocks, Ranks


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("threads", [None, False, True])
def test_every_executor_gives_the_same(two_gpus, rows, threads, rng):
    blocks = Blocks(rng)
    with parallel.TensorParallel(two_gpus, threads=threads) as group:
        f = blocks.network(group)
        x = rng.standard_normal((rows, DIM)).astype(np.float32)
        want = blocks.expected(x)
        first = f(x)
        for _ in range(4):
            got = f(x)
            assert all(relative_error(a, b) < 2e-3 for a, b in zip(got, want, strict=True))
            for one, other in zip(first, got, strict=True):
                np.testing.assert_array_equal(one, other)
        (program,) = f.programs
        assert (program.polled_sums is None) == (not group.executor.records_ahead)


@pytest.mark.usefixtures("vulkan")
def test_gpus_record_ahead_unless_threads_are_chosen(two_gpus):
    for threads, kind in ((None, RecordAhead), (False, Turns), (True, Threads)):
        with parallel.TensorParallel(two_gpus, threads=threads) as group:
            assert type(group.executor) is kind
            assert group.executor.records_ahead == (kind is RecordAhead)


def test_ranks_on_the_cpu_have_turns_or_threads():
    for n, threads, kind in ((1, None, Turns), (1, True, Turns), (2, False, Turns), (2, True, Threads)):
        with Ranks(n, threads=threads) as group:
            assert type(group.executor) is kind
