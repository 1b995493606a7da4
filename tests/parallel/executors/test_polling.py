"""Results that are polled in host memory."""

import threading

import numpy as np
import pytest

from ggml_cffi import ops, parallel
from ggml_cffi.parallel.executors import polling
from tests.support import relative_error
from tests.support.ranks import DIM


def test_polling_returns_when_all_numbers_are_written():
    places = [np.zeros(5, np.uint32) for _ in range(2)]
    polled = polling.PolledResults([places, places])
    polled.clear(1)
    polled.clear(2)  # there is no result 2
    assert all((place == polling.UNWRITTEN).all() for place in places)
    waited = []

    def write():
        for place in places:
            for i in (4, 0, 1, 3, 2):
                place[i] = i

    writer = threading.Timer(0.005, write)
    writer.start()
    polled.wait(1, lambda: waited.append(1) or writer.join())
    assert [place.tolist() for place in places] == 2 * [[0, 1, 2, 3, 4]]
    assert len(waited) == polled.n_timeouts <= 1  # the timer may come late
    places[0][2] = polling.UNWRITTEN
    polled.wait(0, lambda: waited.append(2))
    assert waited[-1] == 2
    polled.wait(2, lambda: waited.append(3))
    assert waited[-1] == 2
    before = polled.timeout
    for _ in range(3):
        polled.wait(0, lambda: waited.append(4))
    assert polled.timeout == before / 64
    places[0][2] = 0
    for _ in range(20):
        polled.wait(0, lambda: waited.append(5))
    assert waited[-3:] == [4, 4, 4]
    assert polled.timeout == polling.TIMEOUT


def test_a_sum_may_be_read_after_the_next_one_has_arrived(two_gpus, rng):
    """The second sum does not depend on the first: it may be complete before all nodes that read the first one are."""
    w = (rng.standard_normal((DIM, DIM)) / 8).astype(np.float32)
    with parallel.TensorParallel(two_gpus) as group:
        whole = group.weight(w)

        def run(rank, x):
            first = rank.all_reduce(ops.scale(x, 2.0))
            late = first
            second = rank.all_reduce(ops.scale(x, 3.0))
            for _ in range(20):
                late = ops.linear(late, whole[rank])
            third = rank.all_reduce(ops.scale(x, 5.0))
            return ops.add(late, first), second, third

        f = group.compile(run)
        x = rng.standard_normal((1, DIM)).astype(np.float32)
        f(x)
        late = 4 * x.astype(np.float64)
        for _ in range(20):
            late = late @ w.T
        for _ in range(5):
            got = f(x)
            assert relative_error(got[0], late + 4 * x) < 1e-2
            np.testing.assert_array_equal(got[1], 6 * x)
            np.testing.assert_array_equal(got[2], 10 * x)


@pytest.mark.usefixtures("vulkan")
def test_sums_that_cannot_be_polled(two_gpus, rng):
    """They are sums of operations that may write a number twice, and sums whose partial sum each device keeps."""
    w = rng.standard_normal((DIM, DIM)).astype(np.float32) / 8
    with parallel.TensorParallel(two_gpus) as group:
        whole = group.weight(w)
        norms = group.compile(lambda rank, x: rank.all_reduce(ops.rms_norm(ops.linear(x, whole[rank]), 1e-5)))
        products = group.compile(lambda rank, x: rank.all_reduce(ops.linear(x, whole[rank])))
        for rows in (2, 300):
            x = rng.standard_normal((rows, DIM)).astype(np.float32)
            want = x.astype(np.float64) @ w.T
            assert relative_error(products(x), 2 * want) < 2e-3
            scale = np.sqrt((want * want).mean(-1, keepdims=True) + 1e-5)
            assert relative_error(norms(x), 2 * want / scale) < 2e-3
        assert [p.polled_sums is None for p in (*products.programs, *norms.programs)] == [False, True, True, True]


@pytest.mark.usefixtures("vulkan")
def test_results_with_the_pattern_of_unwritten_numbers(two_gpus, monkeypatch):
    monkeypatch.setattr(polling, "TIMEOUT", 0.05)
    x = np.arange(DIM, dtype=np.float32)
    x.view(np.uint32)[[3, -1]] = polling.UNWRITTEN
    with parallel.TensorParallel(two_gpus) as group:
        f = group.compile(lambda rank, x: rank.all_reduce(ops.scale(x, 2.0)))
        f(x)
        (program,) = f.programs
        for _ in range(2):
            np.testing.assert_array_equal(f(x), 4 * x)
        assert program.polled_sums.n_timeouts in (0, 2)  # 0 where a device changes the bits of a NaN
