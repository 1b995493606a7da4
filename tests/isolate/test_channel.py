"""IPC channels: values of every type in both directions, arrays that are kept, shared memory reused."""

import gc
import threading

import numpy as np
import pytest

from ggml_cffi.isolate import Worker
from tests.support import isolated

LARGE = np.arange(120_000, dtype=np.float32).reshape(300, 400)


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6.0).reshape(2, 3),
        np.float32(2.5),
        np.array(3),
        np.zeros((0, 4), np.int16),
        np.array([True, False]),
        np.array([1 + 2j]),
        np.array([1, 2], ">i4"),
        np.array(["text", None], object),
        np.array([(1, 2.0)], [("a", "i4"), ("b", "f8")]),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        LARGE,
        LARGE[::3, ::2],
        np.asfortranarray(LARGE),
        {"a": [LARGE, (LARGE, "text")], "b": None},
        [np.full(5000, i) for i in range(1500)],
        "x" * 100_000,
        b"y" * 100_000,
    ],
    ids=lambda value: f"{type(value).__name__}{getattr(value, 'dtype', '')}{getattr(value, 'shape', '')}"[:40],
)
def test_values_arrive_and_return_unchanged(worker, value):
    def check(got, want):
        assert type(got) is type(want)
        if isinstance(want, np.ndarray):
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got, want)
        elif isinstance(want, dict):
            assert got.keys() == want.keys()
            check(list(got.values()), list(want.values()))
        elif isinstance(want, list | tuple):
            assert len(got) == len(want)
            for a, b in zip(got, want, strict=True):
                check(a, b)
        else:
            assert got == want

    check(worker.same(value), value)


def test_an_array_that_is_sent_twice_arrives_as_one_object(worker):
    a, b = worker.same([LARGE, LARGE])
    assert a is b


def test_the_receiver_may_write_to_its_arrays(worker):
    x = LARGE.copy()
    got = worker.spoil(x)
    assert (got == -1).all()
    np.testing.assert_array_equal(x, LARGE)
    got[0] = 5
    assert (worker.spoil(x) == -1).all()
    assert (got[0] == 5).all()
    fixed = LARGE.copy()
    fixed.flags.writeable = False
    assert not worker.same(fixed).flags.writeable


def test_kept_arrays_are_not_overwritten_when_blocks_are_reused():
    """Both sides keep more arrays than there are views, while the blocks of other arrays are reused."""
    with Worker(isolated.things) as worker:
        kept = []
        for i in range(30):
            kept.append(worker.same(np.full(20_000, i)))
            worker.keep(np.full(20_000, i))
            worker.same(np.full(20_000, 99))
        assert [a[7] for a in kept] == list(range(30))
        assert all((a == a[0]).all() for a in kept)
        assert worker.kept_sums() == [20_000 * i for i in range(30)]
        part = kept[0][5:7]
        del kept
        gc.collect()
        for i in range(20):
            worker.same(np.full(20_000, i))
        assert part.tolist() == [0, 0]
    assert part.tolist() == [0, 0]


def test_a_worker_can_be_called_from_several_threads(worker):
    wrong = []

    def work(k):
        for i in range(20):
            x = np.full(20_000 * (i % 2) + 3, k * 100 + i)
            if not (worker.same(x) == x).all():
                wrong.append((k, i))

    jobs = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert not wrong
