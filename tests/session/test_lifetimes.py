"""Lifetimes in a session: what nobody refers to any more is freed before the session ends."""

import gc
import weakref

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi.core.handle import live

X = np.ones((2, 4), np.float32)


def n_buffers():
    gc.collect()
    return live()["Buffer"]


def test_a_dropped_function_is_freed_with_its_programs(devices):
    with ggml.Session(devices) as s:
        kept = s.compile(lambda x: x * 2)
        kept(X)
        before = live()

        def use():
            f = s.compile(lambda x: x + 1)
            assert f(X).tolist() == (X + 1).tolist()
            return weakref.ref(f)

        dropped = [use() for _ in range(5)]
        gc.collect()
        assert not any(ref() for ref in dropped)
        assert live() == before
        assert kept(X).tolist() == (X * 2).tolist()


def test_a_submitted_call_keeps_its_function():
    with ggml.Session(["CPU"]) as s:
        futures = [s.compile(lambda x, i=i: x + i).submit(X) for i in range(3)]
        gc.collect()
        assert [future.result()[0, 0] for future in futures] == [1, 2, 3]


def test_a_dropped_weight_is_freed_once_no_function_uses_it(devices):
    with ggml.Session(devices) as s:
        before = n_buffers()
        w = s.weight(np.eye(4))
        assert n_buffers() == before + 1
        del w
        assert n_buffers() == before
        w = s.weight(np.eye(4))
        f = s.compile(lambda x, w=w: x @ w)
        part = w[1:]
        del w
        assert f(X).tolist() == X.tolist()
        assert part.numpy().tolist() == np.eye(4)[1:].tolist()
        del f
        gc.collect()
        assert part.numpy().shape == (3, 4)
        del part
        assert n_buffers() == before


def test_a_weight_can_be_freed_at_once(devices):
    with ggml.Session(devices) as s, ggml.Session(["CPU"]) as other:
        a, b, state = s.weight(np.eye(4)), s.weight(2 * np.eye(4)), s.zeros((4,))
        both = s.compile(lambda x: x @ a + x @ b + state)
        one = s.compile(lambda x: x @ b)
        assert both(X)[0, 0] == 3
        assert one(X)[0, 0] == 2
        before = n_buffers()
        s.free(a)
        assert n_buffers() < before  # the weight's, and those of the program
        with pytest.raises(ggml.ClosedError):
            a.numpy()
        with pytest.raises(ggml.ClosedError):
            both(X)
        assert one(X)[0, 0] == 2
        s.free(state)
        s.free(state)
        for wrong in (b[1:], b @ b, other.weight(np.eye(2)), None):
            with pytest.raises(ValueError, match="is not a tensor that weight"):
                s.free(wrong)


def test_the_memory_of_a_shared_array_is_given_up(tmp_path):
    np.save(tmp_path / "w.npy", np.eye(8, dtype=np.float32))
    values = np.load(tmp_path / "w.npy", mmap_mode="r")
    with ggml.Session(["CPU"]) as s:
        w = s.weight(values, copy=False)
        before = n_buffers()
        s.free(w)
        assert n_buffers() == before - 1
