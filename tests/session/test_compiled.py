"""Compiled functions: arrays in, arrays out, one trace for each signature, replays after that."""

import asyncio
import time
from collections import namedtuple

import numpy as np
import pytest

import ggml_cffi as ggml
from tests.support import relative_error


def test_a_compiled_function_gives_the_same_when_called_submitted_and_awaited(session, rng):
    w0, x = rng.standard_normal((6, 32)), rng.standard_normal((3, 32))
    w = session.weight(w0, dtype=ggml.F16)
    f = session.compile(lambda x: ggml.relu(ggml.linear(x, w)))
    want = np.maximum(x @ w0.T, 0)
    assert relative_error(f(x), want) < 5e-3
    assert relative_error(f.submit(x).result(), want) < 5e-3
    assert relative_error(asyncio.run(f.run_async(x)), want) < 5e-3
    assert len(f.programs) == 1


def test_a_function_is_traced_once_for_each_signature(session, rng):
    traced = []

    @session.compile
    def f(x, factor, *, bias=0.0):
        traced.append((x.shape, factor, bias))
        return ggml.scale_bias(x, factor, bias)

    x = rng.standard_normal((2, 3))
    for _ in range(3):
        np.testing.assert_allclose(f(x, 2.0), 2 * x, rtol=1e-5)
    np.testing.assert_allclose(f(x.T, 2.0), 2 * x.T, rtol=1e-5)
    np.testing.assert_allclose(f(x, 3.0), 3 * x, rtol=1e-5)
    np.testing.assert_allclose(f(x, 2.0, bias=1.0), 2 * x + 1, rtol=1e-5)
    np.testing.assert_allclose(f(x.astype(np.float32), 2.0), 2 * x, rtol=1e-5)
    assert len(traced) == len(f.programs) == 5
    f.clear()
    assert not f.programs
    np.testing.assert_allclose(f(x, 2.0), 2 * x, rtol=1e-5)


def test_the_least_recently_used_program_is_closed_at_the_limit(devices):
    with ggml.Session(devices, max_programs=2) as session:
        f = session.compile(lambda x: ggml.scale(x, 2.0))
        for n in (1, 2, 1, 3):
            f(np.ones(n))
        assert [p.inputs[0].shape for p in f.programs] == [(1,), (3,)]


Pair = namedtuple("Pair", "total rest")


def test_arguments_and_results_may_be_nested(session, rng):
    a, b = rng.standard_normal((2, 4)), rng.standard_normal((2, 4))

    @session.compile
    def f(tensors, options):
        x, y = tensors["x"], tensors["more"][0]
        return Pair(ggml.add(x, y), {"x": x, "list": [ggml.mul(x, y), options["name"], None]})

    got = f({"x": a, "more": [b]}, {"name": "n", "flag": None})
    assert isinstance(got, Pair)
    np.testing.assert_allclose(got.total, a + b, rtol=1e-5)
    np.testing.assert_allclose(got.rest["x"], a, rtol=1e-6)
    np.testing.assert_allclose(got.rest["list"][0], a * b, rtol=1e-5)
    assert got.rest["list"][1:] == ["n", None]


def test_input_and_output_types_are_converted_or_refused(session):
    rows = session.weight(np.arange(12.0).reshape(4, 3))
    f = session.compile(lambda i: ggml.get_rows(rows, i))
    for dtype in (np.int64, np.int32, np.uint8):
        assert f(np.array([2, 0], dtype)).tolist() == [[6, 7, 8], [0, 1, 2]]
    with pytest.raises(ValueError, match="4 rows"):
        f(np.array([4, 0]))
    half = session.compile(lambda x: ggml.add(x, x))
    assert half(np.ones(3, np.float16)).dtype == np.float16
    argmax = session.compile(lambda x: ggml.argmax(x))
    assert argmax(np.array([[1.0, 5.0, 2.0]])).tolist() == [1]
    with pytest.raises(TypeError, match="numbers are needed, not object"):
        argmax(object())
    with pytest.raises(TypeError, match="is a tensor: compiled functions take arrays"):
        argmax(rows)


def test_a_function_may_return_its_inputs_without_a_graph(session):
    w = session.weight([1.0, 2.0])
    same = session.compile(lambda x: (x, w, 3))
    x, y, z = same(np.array([4.0, 5.0]))
    assert (x.tolist(), y.tolist(), z) == ([4, 5], [1, 2], 3)
    assert same.programs[0].graph is None


def test_errors_of_the_function_are_raised(session):
    def wrong(x):
        raise KeyError("mine")

    f = session.compile(wrong)
    with pytest.raises(KeyError, match="mine"):
        f(np.ones(3))
    with pytest.raises(KeyError, match="mine"):
        f.submit(np.ones(3)).result()
    g = session.compile(lambda x: ggml.mul_mat(x, ggml.transpose(x)))
    with pytest.raises(ValueError, match="mul_mat: inner sizes differ"):
        g(np.ones((2, 3)))
    assert not g.programs


def slow_function(session, steps, seconds=0.02):
    """Return a compiled function that takes ``steps * seconds`` on the CPU, and a list that grows with each step."""
    done = []

    def step(out, a):
        time.sleep(seconds)
        done.append(1)
        out[...] = a

    def f(x):
        for _ in range(steps):
            x = ggml.map_custom1(x, step)
        return x

    return session.compile(f), done


def test_submitted_runs_keep_their_order_and_can_be_cancelled():
    with ggml.Session(["CPU"]) as session:
        f, done = slow_function(session, 20)
        first, second = f.submit(np.ones(2)), f.submit(np.ones(2))
        while not done:
            time.sleep(0.001)
        assert second.cancel()
        session.cancel()
        with pytest.raises(ggml.AbortedError, match="stopped"):
            first.result()
        assert len(done) < 20
        assert f.submit(np.ones(2)).result().tolist() == [1, 1]


def test_run_async_does_not_block_the_event_loop_and_stops_when_cancelled():
    with ggml.Session(["CPU"]) as session:
        f, done = slow_function(session, 30)
        f.trace(np.ones(2))

        async def main():
            ticks = 0
            task = asyncio.create_task(f.run_async(np.ones(2)))
            while len(done) < 5:
                await asyncio.sleep(0.005)
                ticks += 1
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return ticks

        assert asyncio.run(main()) > 3
        session.submit(lambda: None).result()
        assert len(done) < 30
        assert f(np.ones(2)).tolist() == [1, 1]
