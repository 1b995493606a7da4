"""Replicas: right results from every replica, and no effect on the others when one of them fails."""

import asyncio
import gc
import multiprocessing
import os
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import c
from ggml_cffi.isolate.worker import Worker
from ggml_cffi.parallel import DataParallel, release
from tests.support import gguf_writer, isolated, relative_error

TWO = ["CPU", "CPU"]


def doubling(device):
    session = ggml.Session([device], n_threads=1)
    return session.compile(lambda x: ggml.scale(x, 2.0))


def plain(device):
    """Return a replica that is a plain Python function."""
    return lambda x: 2 * x


class Gate:
    """Maker of replicas whose calls wait until the test sets an event."""

    def __init__(self):
        self.began, self.go = threading.Semaphore(0), threading.Event()

    def make(self, device):
        def f(x):
            self.began.release()
            assert self.go.wait(60)
            return x

        return f


@pytest.fixture
def gate():
    made = Gate()
    yield made
    made.go.set()


# ---------------------------------------------------------------------- numbers


def test_right_numbers_from_every_thread(rng):
    xs = [rng.standard_normal((3, 5)).astype(np.float32) for _ in range(40)]
    with DataParallel(doubling, TWO) as double:
        assert [r.device for r in double.replicas] == TWO
        np.testing.assert_allclose(double(xs[0]), 2 * xs[0])
        wrong = []

        def work(k):
            futures = [double.submit(x) for x in xs[k::4]]
            wrong.extend(k for f, x in zip(futures, xs[k::4], strict=True) if not (f.result() == 2 * x).all())
            wrong.extend(k for x in xs[k::4] if not (double(x) == 2 * x).all())

        jobs = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        assert not wrong
        assert sum(r.calls for r in double.replicas) == 81
        assert all(r.calls > 0 for r in double.replicas)


def test_two_gpus_are_both_used(two_gpus, rng):
    weight = rng.standard_normal((16, 32))
    xs = [rng.standard_normal((1, 32)) for _ in range(12)]

    def make(device):
        session = ggml.Session([device])
        w = session.weight(weight)
        return session.compile(lambda x: ggml.linear(x, w))

    with DataParallel(make) as linear:
        assert [r.device for r in linear.replicas] == list(two_gpus)
        for y, x in zip(linear.map(xs), xs, strict=True):
            assert relative_error(y, x @ weight.T) < 5e-3
        assert all(r.calls > 0 for r in linear.replicas)


def test_a_call_goes_to_a_free_replica(gate):
    with DataParallel(gate.make, TWO) as dp:
        futures = [dp.submit(k) for k in range(6)]
        for _ in range(2):
            gate.began.acquire()
        assert not gate.began.acquire(timeout=0.05)  # two at once, not more
        gate.go.set()
        assert [f.result() for f in futures] == list(range(6))


def test_a_slow_replica_gets_fewer_calls():
    slow = threading.Event()

    def make(device):
        return lambda x: slow.wait(60) if x == "slow" else x

    with DataParallel(make, TWO) as dp:
        first = dp.submit("slow")
        assert list(dp.map(range(20))) == list(range(20))
        slow.set()
        assert first.result()
        assert sorted(r.calls for r in dp.replicas) == [1, 20]


def test_one_map_for_all_replicas(tmp_path, rng):
    """Each replica on the CPU computes with the mapped pages of the file."""
    values = rng.standard_normal((8, 32)).astype(np.float32)
    path = gguf_writer.write(tmp_path / "w.gguf", {"general.architecture": "none"}, {"w": (ggml.F32, values)})
    x = rng.standard_normal((1, 32)).astype(np.float32)
    addresses = []

    with ggml.GGUFFile(path) as file:

        @contextmanager
        def make(device):
            with ggml.Session([device], n_threads=1) as session:
                w = session.weight(file["w"], copy=False)
                addresses.append(int(c.ffi.cast("uintptr_t", w.ptr.data)))
                yield session.compile(lambda x: ggml.linear(x, w))

        with DataParallel(make, ["CPU"] * 3) as linear:
            assert addresses == [file.raw("w").ctypes.data] * 3
            for y in linear.map([x] * 6):
                np.testing.assert_allclose(y, x @ values.T, rtol=1e-5)
        gc.collect()


def test_weights_where_they_are(tmp_path, rng):
    values = rng.standard_normal((4, 8)).astype(np.float32)
    np.save(tmp_path / "w.npy", values)
    mapped = np.load(tmp_path / "w.npy", mmap_mode="r")

    def address(t):
        return int(c.ffi.cast("uintptr_t", t.ptr.data))

    with ggml.Session(["CPU"]) as session:
        w = session.weight(mapped, copy=False, name="w")
        assert (address(w), w.name) == (mapped.ctypes.data, "w")
        with pytest.raises(ValueError, match="read-only"):
            w.set(values)
        f = session.compile(lambda x: ggml.linear(x, w))
        del mapped
        gc.collect()
        np.testing.assert_allclose(f(np.ones((1, 8))), values.sum(1)[None], rtol=1e-5)
        # Other values are copied.
        for other in (values.astype(np.float64), values[:, ::2]):
            t = session.weight(other, copy=False)
            np.testing.assert_allclose(t.numpy(), other, rtol=1e-6)
            assert address(t) != other.ctypes.data
        assert session.weight(np.zeros((0, 3), np.float32), copy=False).shape == (0, 3)
        half = session.weight(np.load(tmp_path / "w.npy", mmap_mode="r"), dtype="f16", copy=False)
        assert half.dtype is ggml.F16


# ---------------------------------------------------------------------- map


def test_map_is_lazy_and_bounded():
    taken = []

    def elements():
        for i in range(100):
            taken.append(i)
            yield i

    with DataParallel(plain, TWO) as dp:
        results = dp.map(elements())
        assert not taken
        assert next(results) == 0
        assert len(taken) == 4
        assert [next(results) for _ in range(10)] == list(range(2, 22, 2))
        assert len(taken) == 14
        results.close()
        assert sorted(dp.map(elements(), ordered=False)) == list(range(0, 200, 2))
        assert list(dp.map(iter([]))) == []
        results = dp.map(elements(), in_flight=1)
        next(results)
        assert len(taken) == 115
        with pytest.raises(TypeError, match="map takes at least one iterable"):
            dp.map()
        with pytest.raises(ValueError, match="in_flight must be at least 1, not 0"):
            dp.map([1], in_flight=0)
    with DataParallel(lambda device: lambda a, b: a + b, TWO) as add:
        assert list(add.map([1, 2, 3], [10, 20])) == [11, 22]


def test_unordered_map_yields_results_as_they_finish():
    late = threading.Event()

    def make(device):
        def f(x):
            assert x or late.wait(60)
            return x

        return f

    with DataParallel(make, TWO) as dp:
        results = dp.map(range(4), ordered=False)
        assert [next(results) for _ in range(3)] == [1, 2, 3]
        late.set()
        assert list(results) == [0]


def test_map_ends_with_an_exception(gate):
    def make(device):
        def f(x):
            if x == 2:
                raise KeyError("two")
            return x

        return f

    with DataParallel(make, TWO) as dp:
        results = dp.map(range(100))
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(KeyError, match="two"):
            next(results)
        assert dp(5) == 5


# ---------------------------------------------------------------------- futures, tasks


def test_waiting_calls_can_be_cancelled(gate):
    with DataParallel(gate.make, ["CPU"]) as dp:
        running, waiting = dp.submit(1), dp.submit(2)
        gate.began.acquire()
        assert waiting.cancel()
        assert not running.cancel()
        gate.go.set()
        assert running.result() == 1
        assert dp.replicas[0].calls == 1


def test_async(gate):
    async def main():
        tasks = [asyncio.create_task(dp.run_async(k)) for k in range(4)]
        await asyncio.to_thread(gate.began.acquire)
        tasks[3].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[3]
        gate.go.set()
        assert await asyncio.gather(*tasks[:3]) == [0, 1, 2]

    with DataParallel(gate.make, ["CPU"]) as dp:
        asyncio.run(main())
        assert dp.replicas[0].calls == 3


# ---------------------------------------------------------------------- failures


def test_an_exception_is_one_calls_own():
    with DataParallel(doubling, TWO) as double:
        wrong = double.submit("text")
        right = [double.submit(np.full(3, float(k))) for k in range(6)]
        with pytest.raises(TypeError):
            wrong.result()
        assert [r.result()[0] for r in right] == [0, 2, 4, 6, 8, 10]
        assert all(r.error is None for r in double.replicas)


def test_a_device_where_make_fails_is_dropped(caplog):
    def make(device):
        if device != "CPU":
            raise ValueError(f"not on {device}")
        return doubling(device)

    with DataParallel(make, ["GPU7", "CPU"]) as double:
        assert [y[0] for y in double.map([np.full(3, float(k)) for k in range(6)])] == [0, 2, 4, 6, 8, 10]
        broken, good = double.replicas
        assert (broken.calls, good.calls) == (0, 6)
        assert repr(broken) == "<Replica on GPU7, dropped: ValueError>"
        assert repr(double) == f"<DataParallel: {broken!r}, <Replica on CPU, 6 calls>>"
    assert "the replica on GPU7 is dropped: ValueError: not on GPU7" in caplog.text
    with pytest.raises(ValueError, match="not on GPU7"):
        DataParallel(make, ["GPU7", "GPU8"])


def test_workers_that_crash_are_dropped(caplog):
    @contextmanager
    def make(device):
        with Worker(isolated.Crashes) as worker:
            yield lambda way: worker.call(way) if isinstance(way, str) else worker.same(way)

    with DataParallel(make, TWO) as dp:
        assert list(dp.map(range(4))) == [0, 1, 2, 3]
        with pytest.raises(ggml.BackendCrashedError, match="SIGSEGV"):
            dp("segfault")
        assert sum(r.error is not None for r in dp.replicas) == 1
        assert list(dp.map(range(4))) == [0, 1, 2, 3]
        crash, *after = [dp.submit("abort"), dp.submit(1), dp.submit(2)]
        with pytest.raises(ggml.BackendCrashedError, match="SIGABRT"):
            crash.result()
        for future in after:
            with pytest.raises(ggml.GgmlError, match="no replica is left: CPU: BackendCrashedError: the worker"):
                future.result()
    dropped = [r.getMessage() for r in caplog.records if r.name == "ggml_cffi.parallel"]
    assert len(dropped) == 2
    assert all(text.startswith("the replica on CPU is dropped: BackendCrashedError") for text in dropped)


def test_workers_with_restarts_go_on():
    def make(device):
        return Worker(lambda: lambda x: os.abort() if x is None else x, restarts=1)

    with DataParallel(make, ["CPU"]) as dp:
        for _ in range(2):
            with pytest.raises(ggml.BackendCrashedError, match="SIGABRT"):
                dp(None)
            if dp.replicas[0].error is None:
                assert dp(3) == 3
        with pytest.raises(ggml.GgmlError, match="no replica is left"):
            dp(3)


def test_impossible_arguments_are_refused():
    with pytest.raises(TypeError, match="make returned a Session, which cannot be called: return a function that uses"):
        DataParallel(lambda device: ggml.Session([device]), ["CPU"])
    with pytest.raises(TypeError, match="make must be a function of a device's name, not int"):
        DataParallel(3)
    with pytest.raises(ValueError, match="devices is empty"):
        DataParallel(plain, [])


# ---------------------------------------------------------------------- the end


def test_close_waits_for_running_calls(gate):
    closed = []

    @contextmanager
    def make(device):
        yield gate.make(device)
        closed.append(device)

    dp = DataParallel(make, ["CPU"])
    running, waiting = dp.submit(1), dp.submit(2)
    gate.began.acquire()
    direct = ThreadPoolExecutor(1)
    called = direct.submit(dp, 3)
    closer = threading.Thread(target=dp.close)
    closer.start()
    while not waiting.done():
        time.sleep(0.001)
    assert not closed
    gate.go.set()
    closer.join()
    direct.shutdown()
    assert running.result() == 1
    with pytest.raises(CancelledError):
        waiting.result()
    assert called.exception() is None or isinstance(called.exception(), ggml.ClosedError)
    assert closed == ["CPU"]
    dp.close()
    for use in (lambda: dp(1), lambda: dp.submit(1), lambda: dp.map([1])):
        with pytest.raises(ggml.ClosedError, match="this DataParallel is closed"):
            use()
    assert repr(dp) == "<DataParallel closed>"
    assert not [t for t in threading.enumerate() if "replica" in t.name]


# ---------------------------------------------------------------------- executors


def test_an_executor_of_threads(rng):
    """In this process nothing is pickled, so ``make`` may refer to any object."""
    lock, made = threading.Lock(), Counter()

    def make(device):
        with lock:
            made[device] += 1
        return doubling(device)

    with ThreadPoolExecutor(4) as executor:
        with DataParallel(make, TWO, executor=executor) as double:
            assert double.replicas == ()
            assert "ThreadPoolExecutor" in repr(double)
            assert not made
            assert [y[0] for y in double.map([np.full(3, float(k)) for k in range(8)])] == list(range(0, 16, 2))
            assert double(np.ones(2)).tolist() == [2, 2]
            assert asyncio.run(double.run_async(np.ones(2))).tolist() == [2, 2]
            assert 1 <= made["CPU"] <= 2
        assert executor.submit(lambda: 5).result() == 5  # stays open


def test_an_executor_of_processes():
    pids = set()

    def make(device):
        session = ggml.Session([device], n_threads=1)
        f = session.compile(lambda x: ggml.scale(x, 3.0))
        return lambda x: (os.getpid(), id(f), f(x)[0])

    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as executor:
        with DataParallel(make, ["CPU"], executor=executor) as triple:
            got = list(triple.map([np.full(2, float(k)) for k in range(20)]))
            assert [y for _, _, y in got] == list(range(0, 60, 3))
            pids = {pid for pid, _, _ in got}
            assert os.getpid() not in pids
            assert len({(pid, f) for pid, f, _ in got}) == len(pids)  # one replica in each
        assert executor.submit(release).result() is None


class Inline:
    """A minimal executor, with futures of its own class."""

    class Done:
        def __init__(self, value):
            self.value = value

        def result(self):
            return self.value

        def cancel(self):
            return False

        def add_done_callback(self, function):
            function(self)

    def submit(self, function, /, *args):
        return self.Done(function(*args))


def test_the_least_executor():
    with DataParallel(plain, ["CPU"], executor=Inline()) as dp:
        assert dp(3) == 6
        assert list(dp.map(range(3))) == [0, 2, 4]
        assert sorted(dp.map(range(3), ordered=False)) == [0, 2, 4]
        assert asyncio.run(dp.run_async(4)) == 8


def test_replicas_of_an_executor_that_fail(caplog):
    def make(device):
        raise OSError(f"{device} is broken")

    with ThreadPoolExecutor(1) as executor, DataParallel(make, ["A", "B"], executor=executor) as dp:
        with pytest.raises(ggml.GgmlError, match="left: A: OSError: A is broken; B: OSError: B is broken") as caught:
            dp(1)
        assert isinstance(caught.value.__cause__, OSError)


def test_close_with_an_executor(gate):
    with ThreadPoolExecutor(1) as executor:
        dp = DataParallel(gate.make, ["CPU"], executor=executor)
        running, waiting = dp.submit(1), dp.submit(2)
        gate.began.acquire()
        threading.Timer(0.05, gate.go.set).start()
        dp.close()
        assert running.result() == 1
        assert waiting.cancelled()
        with pytest.raises(ggml.ClosedError):
            dp(1)


def test_default_devices_are_the_processs_own(monkeypatch):
    used = []

    def make(device):
        used.append(device)
        return lambda x: x

    monkeypatch.setattr("ggml_cffi.parallel.replicas.gpus", list)
    with DataParallel(make) as dp:
        assert dp(1) == 1
    with DataParallel(make, executor=Inline()) as dp:
        assert dp(1) == 1
    with DataParallel(make, [ggml.device("CPU")]) as dp:
        assert dp(1) == 1
    assert used == ["CPU"] * 3
