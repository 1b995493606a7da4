"""Sessions: arrays in, arrays out, traced once and replayed."""

import asyncio
import gc
import threading
import time
import warnings
from collections import namedtuple

import numpy as np
import pytest

import ggml_cffi as ggml
from tests.support import gguf_writer, relative_error


@pytest.fixture
def session(devices):
    with ggml.Session(devices) as made:
        yield made


def test_design_example(session, rng):
    w0, x = rng.standard_normal((6, 32)), rng.standard_normal((3, 32))
    w = session.weight(w0, dtype=ggml.F16)
    f = session.compile(lambda x: ggml.relu(ggml.linear(x, w)))
    want = np.maximum(x @ w0.T, 0)
    assert relative_error(f(x), want) < 5e-3
    assert relative_error(f.submit(x).result(), want) < 5e-3
    assert relative_error(asyncio.run(f.run_async(x)), want) < 5e-3
    assert len(f.programs) == 1


def test_traced_once_for_each_signature(session, rng):
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


def test_the_cache_is_bounded(devices):
    with ggml.Session(devices, max_programs=2) as session:
        f = session.compile(lambda x: ggml.scale(x, 2.0))
        for n in (1, 2, 1, 3):
            f(np.ones(n))
        assert [p.inputs[0].shape for p in f.programs] == [(1,), (3,)]


Pair = namedtuple("Pair", "total rest")


def test_structures(session, rng):
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


def test_types(session):
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


def test_nothing_to_compute(session):
    w = session.weight([1.0, 2.0])
    same = session.compile(lambda x: (x, w, 3))
    x, y, z = same(np.array([4.0, 5.0]))
    assert (x.tolist(), y.tolist(), z) == ([4, 5], [1, 2], 3)
    assert same.programs[0].graph is None


def test_weights(session, tmp_path, rng):
    values = rng.standard_normal((4, 64)).astype(np.float32)
    for dtype, error in ((None, 1e-7), ("f16", 1e-3), (ggml.Q8_0, 1e-2), ("q4_0", 0.12)):
        w = session.weight(values, dtype=dtype, name="w")
        assert w.name == "w"
        assert relative_error(w.numpy(), values) < error
    assert session.weight(values.astype(np.float64)).dtype is ggml.F32
    assert session.weight(np.arange(3, dtype=np.int32)).dtype is ggml.I32
    path = gguf_writer.write(tmp_path / "w.gguf", {"general.architecture": "none"}, {"w": (ggml.F32, values)})
    with ggml.GGUFFile(path) as file:
        assert repr(file["w"]) == "<GGUFTensor w F32 (4, 64)>"
        stored = session.weight(file["w"])
        half = session.weight(file["w"], dtype="f16")
        with pytest.raises(KeyError, match="no tensor 'v'"):
            file["v"]
    np.testing.assert_array_equal(stored.numpy(), values)
    assert half.dtype is ggml.F16
    assert session.weight(np.zeros((0, 3))).shape == (0, 3)


class OnlyDLPack:
    """An array that speaks nothing else."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **kwargs):
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_dlpack_in(session):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    w = session.weight(OnlyDLPack(values))
    np.testing.assert_array_equal(w.numpy(), values)
    f = session.compile(lambda x: ggml.scale(x, 2.0))
    np.testing.assert_array_equal(f(OnlyDLPack(values)), 2 * values)


def test_weights_say_where(two_gpus, rng):
    x = rng.standard_normal((2, 32))
    with ggml.Session() as session:
        assert [d.name for d in session.devices] == [*two_gpus, "CPU"]
        a, b = (rng.standard_normal((32, 32)) for _ in range(2))
        wa, wb = session.weight(a, on=two_gpus[0]), session.weight(b, on=session.devices[1])
        f = session.compile(lambda x: ggml.linear(ggml.linear(x, wa), wb))
        assert relative_error(f(x), x @ a.T @ b.T) < 5e-3
        splits = f.trace(x).scheduler.splits
        assert [s.backend.name for s in splits] == list(two_gpus)
        with pytest.raises(ValueError, match="'Vulkan9' is not one of this session's devices: Vulkan0, Vulkan1, CPU"):
            session.weight(a, on="Vulkan9")


def test_state_is_kept(session):
    total = session.zeros((3,), name="total")
    add = session.compile(lambda x: ggml.add_inplace(total, x))
    for _ in range(3):
        got = add(np.array([1.0, 2.0, 3.0]))
    assert got.tolist() == [3, 6, 9]
    assert total.numpy().tolist() == [3, 6, 9]


def test_errors_while_tracing(session):
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
    with pytest.raises(TypeError, match="compile takes a function, not int"):
        session.compile(3)
    with pytest.raises(ValueError, match="max_programs must be at least 1"):
        ggml.Session(max_programs=0)
    with pytest.raises(TypeError, match="put the one device in a list"):
        ggml.Session("CPU")
    with pytest.raises(ValueError, match="no device 'Nope'"):
        ggml.Session(["Nope"])


def test_closing(devices):
    session = ggml.Session(devices)
    w = session.weight(np.ones(3))
    f = session.compile(lambda x: ggml.add(x, w))
    f(np.ones(3))
    pending = [f.submit(np.ones(3)) for _ in range(3)]
    session.close()
    session.close()
    assert all(p.done() for p in pending)
    for use in (lambda: f(np.ones(3)), lambda: f.submit(np.ones(3)), lambda: session.weight([1.0])):
        with pytest.raises(ggml.ClosedError, match="is closed"):
            use()
    assert repr(session) == "<Session closed>"


def slow(session, steps, seconds=0.02):
    """A function that takes a while on the CPU, and what it has done."""
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


def test_futures_in_order_and_cancelled():
    with ggml.Session(["CPU"]) as session:
        f, done = slow(session, 20)
        first, second = f.submit(np.ones(2)), f.submit(np.ones(2))
        while not done:
            time.sleep(0.001)
        assert second.cancel()
        session.cancel()
        with pytest.raises(ggml.AbortedError, match="stopped"):
            first.result()
        assert len(done) < 20
        assert f.submit(np.ones(2)).result().tolist() == [1, 1]


def test_async_does_not_block_and_stops():
    with ggml.Session(["CPU"]) as session:
        f, done = slow(session, 30)
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
        session.start(lambda: None).result()
        assert len(done) < 30
        assert f(np.ones(2)).tolist() == [1, 1]


def test_sessions_in_threads(devices, rng):
    """Several sessions at once, and one session from several threads."""
    failures = []
    x = rng.standard_normal((2, 16)).astype(np.float32)

    def work(k, session):
        try:
            w = session.weight(np.full((4, 16), k, np.float32))
            f = session.compile(lambda x: ggml.linear(x, w))
            for _ in range(10):
                np.testing.assert_allclose(f(x), x @ np.full((16, 4), k), rtol=1e-2, atol=1e-2)
        except BaseException as error:
            failures.append(error)

    with ggml.Session(devices) as one, ggml.Session(devices) as two:
        threads = [threading.Thread(target=work, args=(k, (one, two)[k % 2])) for k in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not failures, failures


def test_a_session_forgotten_is_freed(devices):
    session = ggml.Session(devices)
    f = session.compile(lambda x: ggml.scale(x, 2.0))
    f(np.ones(3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del session, f
        gc.collect()
    assert {w.category for w in caught} == {ResourceWarning}
