"""Worker processes: numbers there and back, crashes of every kind as exceptions, and nothing left behind."""

import asyncio
import gc
import logging
import os
import pickle
import threading
import time
import warnings

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.isolate.worker import Stream, Worker
from tests.support import isolated, llama_float64, relative_error, run_python


@pytest.fixture(scope="module")
def worker():
    with Worker(isolated.things) as made:
        yield made


@pytest.fixture
def crashing():
    with Worker(isolated.Crashes, np.arange(10_000)) as made:
        yield made


def channel(worker):
    return worker._processes[0]._channel


# ---------------------------------------------------------------------- values


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
def test_values_there_and_back(worker, value):
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


def test_one_array_twice_stays_one(worker):
    a, b = worker.same([LARGE, LARGE])
    assert a is b


def test_arrays_are_the_receivers_own(worker):
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


def test_what_is_kept_stays_right():
    """More of it than there are views, on both sides, while the blocks of what is not kept are used again."""
    with Worker(isolated.things) as worker:
        kept = []
        for i in range(30):
            kept.append(worker.same(np.full(20_000, i)))
            worker.keep(np.full(20_000, i))
            worker.same(np.full(20_000, 99))
        assert [a[7] for a in kept] == list(range(30))
        assert all((a == a[0]).all() for a in kept)
        assert worker.kept_sums() == [20_000 * i for i in range(30)]
        assert len(channel(worker)._viewed) == 8
        part = kept[0][5:7]
        del kept
        gc.collect()
        assert len(channel(worker)._viewed) == 1
        for i in range(20):
            worker.same(np.full(20_000, i))
        assert part.tolist() == [0, 0]
    assert part.tolist() == [0, 0]


def test_blocks_are_used_again_and_given_up():
    with Worker(isolated.things) as worker:
        blocks = channel(worker)._blocks
        for _ in range(20):
            worker.same(LARGE)
        assert len(blocks) == 2  # the answer is the argument, so that the next one finds its block still in use
        worker.same(np.zeros(1 << 20))
        assert len(blocks) == 3
        for _ in range(40):
            worker.same(1)
        assert not blocks
        assert (worker.same(LARGE) == LARGE).all()
    with Worker(isolated.things, np.zeros(1 << 20)) as worker:
        worker.same(1)
        assert not channel(worker)._free  # the weights' block is not kept for later


def test_many_threads_at_once(worker):
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


# ---------------------------------------------------------------------- what is called


def test_names(worker):
    assert worker.call("n") == 7
    assert worker.call("same", 1) == worker.same(1) == 1
    assert worker.same(1, 2) == (1, 2)
    assert worker.call("kept.__len__") == 0
    with pytest.raises(TypeError, match="'n' is a int, which cannot be called"):
        worker.n(1)
    with pytest.raises(AttributeError, match="'Things' object has no attribute 'nothing'"):
        worker.nothing()
    with pytest.raises(AttributeError, match="_ipython_display_"):
        worker._ipython_display_  # noqa: B018
    assert repr(worker).startswith("<Worker 'things ")
    assert repr(worker.same).startswith("<'same' of <Worker 'things ")


def test_a_dict_of_local_functions():
    factor = 3
    table = np.arange(5000)

    def make(offset):
        return {"f": lambda x: factor * x + offset, "table": table, "which": type("Local", (), {"x": 5})}

    with Worker(make, 4) as worker:
        assert worker.f(2) == 10
        np.testing.assert_array_equal(worker.table(), table)
        assert worker.call("which").x == 5
        with pytest.raises(AttributeError, match="there is no 'g'; there are f, table, which"):
            worker.g()
        with pytest.raises(AttributeError, match="there is no '__call__'"):
            worker()


def test_a_function_by_its_name_with_environment():
    with Worker("isolated:things", env={"GGML_CFFI_TEST": "here"}, name="mine") as worker:
        assert worker.env("GGML_CFFI_TEST") == "here"
        assert "GGML_CFFI_TEST" not in os.environ
        assert worker.name == "mine"
        assert worker.pid == worker.call("pid") != os.getpid()


def test_a_context_manager_is_entered_and_left(tmp_path):
    from contextlib import contextmanager

    left = tmp_path / "left"

    @contextmanager
    def make():
        yield lambda x: 2 * x
        left.touch()

    with Worker(make) as worker:
        assert worker(4) == 8
        assert not left.exists()
    assert left.exists()


def test_a_session(devices, rng):
    weight, x = rng.standard_normal((8, 32)), rng.standard_normal((1, 32))

    def make():
        session = ggml.Session(devices)
        w = session.weight(weight)
        return session.compile(lambda x: ggml.linear(x, w))

    with Worker(make) as worker:
        assert relative_error(worker(x), x @ weight.T) < 5e-3
        assert relative_error(worker.submit("__call__", x).result(), x @ weight.T) < 5e-3
        with pytest.raises(ValueError, match="linear"):
            worker(rng.standard_normal((1, 31)))


def test_a_model_streams(tmp_path, rng):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng)
    with models.load(path, ["CPU"], n_threads=1) as model:
        want, logits = list(model.generate_tokens([1, 2], 5, stop_at_end=False)), model.forward([1, 2])
    with Worker(lambda: models.load(path, ["CPU"], n_threads=1)) as worker:
        stream = worker.generate_tokens([1, 2], 5, stop_at_end=False)
        assert isinstance(stream, Stream)
        assert list(stream) == want
        assert worker.call("n_ctx") == 512
        assert relative_error(worker.forward([1, 2]), logits) < 1e-5


def test_streams_piece_by_piece(worker):
    before = worker.n_closed()
    one, two = worker.count(3), worker.count(3)
    assert [next(one)[0], next(two)[0], next(one)[0], worker.same(9), next(two)[0]] == [0, 0, 1, 9, 1]
    one.close()
    one.close()
    assert worker.n_closed() == before + 1
    assert list(one) == []
    assert [piece[0] for piece in two] == [2]
    assert list(two) == []
    assert worker.n_closed() == before + 2
    forgotten = worker.count(3)
    next(forgotten)
    del forgotten
    gc.collect()
    worker.same(1)
    assert worker.n_closed() == before + 3
    failing = worker.count(3, 1)
    next(failing)
    with pytest.raises(ValueError, match="enough"):
        next(failing)
    assert list(failing) == []


def test_futures_and_tasks(worker):
    pending = [worker.submit("same", i) for i in range(5)]
    assert [p.result() for p in pending] == list(range(5))
    assert worker.same.submit(8).result() == 8

    async def main():
        slow = asyncio.create_task(worker.sleep.run_async(0.1))
        dropped = asyncio.create_task(worker.run_async("keep", 1))
        await asyncio.sleep(0.02)
        dropped.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dropped
        return await slow, await worker.run_async("n")

    kept = len(worker.kept_sums())
    assert asyncio.run(main()) == (0.1, 7)
    assert len(worker.kept_sums()) == kept


# ---------------------------------------------------------------------- exceptions


def test_exceptions_keep_their_type(worker):
    with pytest.raises(isolated.LocalError, match="mine") as caught:
        worker.fail(isolated.LocalError, "mine")
    (note,) = caught.value.__notes__
    assert note.startswith(f"In the worker process {worker.pid}:\nTraceback")
    assert "isolated.py" in note
    assert "raise kind(*args)" in note
    assert "_worker_main" not in note
    for kind in (ggml.OutOfMemoryError, ggml.ClosedError, KeyError, KeyboardInterrupt, StopIteration):
        with pytest.raises(kind, match="text"):
            worker.fail(kind, "text")

    class HereError(Exception):
        pass

    with pytest.raises(HereError, match="local"):
        worker.fail(HereError, "local")


def test_an_exception_that_cannot_be_pickled(worker):
    with pytest.raises(ValueError, match="OddError") as caught:
        worker.fail(isolated.OddError, "one", "two")
    assert (type(caught.value), str(caught.value)) == (ValueError, "OddError: one and two")
    assert "isolated.OddError: one and two" in caught.value.__notes__[0]

    class HoldingError(Exception):
        def __init__(self):
            super().__init__("it")
            self.lock = threading.Lock()

    with pytest.raises(Exception, match=r"HoldingError: it") as caught:
        worker.fail(HoldingError)
    assert type(caught.value) is Exception


def test_what_cannot_be_sent(worker):
    with pytest.raises(TypeError, match="an argument of 'same' cannot be sent to another process: cannot pickle '_thr"):
        worker.same(threading.Lock())
    with ggml.Session(["CPU"]) as session, pytest.raises(TypeError, match="an argument of 'same' cannot be sent"):
        worker.same(lambda: session)
    with pytest.raises(TypeError, match=r"a lock cannot be sent to the parent process: cannot pickle '_thread\.lock'"):
        worker.lock()
    with pytest.raises(TypeError, match="make, or an argument of it, cannot be sent"):
        Worker(isolated.things, threading.Lock())
    assert worker.same(3) == 3


def test_make_that_fails():
    with pytest.raises(isolated.LocalError, match="not today") as caught:
        Worker(isolated.raising, "not today")
    assert "isolated.py" in caught.value.__notes__[0]
    with pytest.raises(ggml.BackendCrashedError, match=r"worker 'dying \d+' .* was killed by SIGSEGV during 'make'"):
        Worker(isolated.dying)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        Worker("no_such_module:make")
    with pytest.raises(ggml.BackendTimeoutError, match=r"gave no answer to 'make' within 0\.5 s"):
        Worker(time.sleep, 60, start_timeout=0.5)


def test_wrong_arguments():
    with pytest.raises(TypeError, match="make is a function, or the name of one, not int"):
        Worker(3)
    with pytest.raises(ValueError, match="restarts must be at least 0, not -1"):
        Worker(isolated.things, restarts=-1)
    with pytest.raises(ValueError, match="start_timeout must be more than 0 seconds, not 0"):
        Worker(isolated.things, start_timeout=0)


# ---------------------------------------------------------------------- crashes


def test_a_crash_is_an_exception(crashing):
    worker = crashing
    for way, what, code, line in (
        ("ggml_assert", "was killed by SIGABRT", -6, "GGML_ASSERT(ggml_can_mul_mat(a, b)) failed"),
        ("abort", "was killed by SIGABRT", -6, "Fatal Python error: Aborted"),
        ("segfault", "was killed by SIGSEGV", -11, "Fatal Python error: Segmentation fault"),
        ("kill", "was killed by SIGKILL", -9, ""),
        ("fork_and_abort", "was killed by SIGABRT", -6, "Fatal Python error: Aborted"),
        ("leave", "exited with status 3", 3, ""),
        ("sys_exit", "exited with status 4", 4, ""),
    ):
        pid = worker.pid
        result = worker.restored()
        pending = [worker.submit(way), worker.submit("same", 1), worker.same.submit(2)]
        for future in pending:
            with pytest.raises(ggml.BackendCrashedError) as caught:
                future.result()
            assert f"(process {pid}) {what} during '{way}'" in str(caught.value)
            assert caught.value.exitcode == code
            assert line in str(caught.value)
            assert line in "\n".join(caught.value.log)
        assert not worker.alive
        assert repr(worker).endswith("died>")
        with pytest.raises(ggml.BackendCrashedError, match=what):
            worker.same(1)
        assert (result == np.arange(10_000)).all()
        worker.restart()
        assert worker.alive
        assert worker.pid != pid
        assert (worker.restored() == np.arange(10_000)).all()


def test_killed_while_idle():
    with Worker(isolated.things) as worker:
        os.kill(worker.pid, 9)
        while worker.alive:
            time.sleep(0.01)
        with pytest.raises(ggml.BackendCrashedError, match=r"SIGKILL between two calls\. It wrote nothing before"):
            worker.same(1)
    with Worker(isolated.things, restarts=1) as worker:
        os.kill(worker.pid, 9)
        while not worker._processes[0].dead:
            time.sleep(0.01)
        assert worker.alive
        assert worker.same(1) == 1


def test_automatic_restarts(caplog):
    with Worker(isolated.Crashes, 5, restarts=2) as worker:
        for _ in range(2):
            crash, waiting = worker.submit("abort"), worker.submit("restored")
            with pytest.raises(ggml.BackendCrashedError, match="SIGABRT during 'abort'"):
                crash.result()
            assert waiting.result() == 5
        assert worker.alive
        with pytest.raises(ggml.BackendCrashedError, match="during 'abort'"):
            worker.abort()
        assert not worker.alive
        with pytest.raises(ggml.BackendCrashedError, match="during 'abort'"):
            worker.restored()
    replaced = [r.getMessage() for r in caplog.records if "is replaced" in r.getMessage()]
    assert len(replaced) == 2
    assert "was killed by SIGABRT during 'abort', and is replaced" in replaced[0]


def test_a_stream_ends_with_its_process():
    with Worker(isolated.things) as worker:
        stream = worker.count(3)
        next(stream)
        worker.restart()
        with pytest.raises(ggml.BackendCrashedError, match=r"was ended by restart\(\)"):
            next(stream)
        stream.close()
        assert worker.same(1) == 1


def test_a_hang_is_ended():
    with Worker(isolated.Crashes, 5, timeout=1, restarts=1) as worker:
        for way in ("hang", "hang_in_c"):
            with pytest.raises(TimeoutError, match=f"gave no answer to '{way}' within 1 s and was killed") as caught:
                worker.call(way)
            assert isinstance(caught.value, ggml.BackendTimeoutError)
            assert isinstance(caught.value, ggml.BackendCrashedError)
            if worker.alive:
                assert worker.restored() == 5


def test_a_restart_ends_a_hang_and_an_error_has_the_last_words(crashing):
    hanging, waiting = crashing.submit("hang"), crashing.submit("same", 1)
    with pytest.raises(TimeoutError):
        hanging.result(0.1)
    crashing.restart()
    for future in (hanging, waiting):
        with pytest.raises(ggml.BackendCrashedError, match=r"was ended by restart\(\)"):
            future.result()
    assert crashing.same(1) == 1
    with pytest.raises(ggml.BackendCrashedError) as caught:
        crashing.ggml_assert()
    log = "\n".join(caught.value.log)
    assert log.index("WARNING isolated: about to multiply") < log.index("GGML_ASSERT") < log.index("in ggml_assert")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (type(caught.value), str(caught.value))
    assert (again.exitcode, again.log) == (-6, caught.value.log)


def test_restart_that_fails(tmp_path):
    flag = tmp_path / "flag"

    def make():
        if flag.exists():
            raise ValueError("the flag is set")
        return {"f": lambda: 1}

    with Worker(make) as worker:
        flag.touch()
        with pytest.raises(ValueError, match="the flag is set"):
            worker.restart()
        with pytest.raises(ggml.BackendCrashedError, match=r"could not make .*: ValueError: the flag is set"):
            worker.f()
        flag.unlink()
        worker.restart()
        assert worker.f() == 1


# ---------------------------------------------------------------------- ends


def started(worker, future):
    """Wait until a worker's second question, the first after ``make``, is asked."""
    while not (future.running() and worker._processes[0]._tag == 2):
        time.sleep(0.01)


def test_close_during_a_call():
    worker = Worker(isolated.Crashes)
    running, waiting = worker.submit("hang"), worker.submit("same", 1)
    started(worker, running)
    worker.close(timeout=0.1)
    with pytest.raises(ggml.ClosedError, match=r"the worker 'Crashes \d+' \(process \d+\) was closed"):
        running.result()
    assert waiting.cancelled()
    worker.close()


def test_close_waits_for_what_runs():
    worker = Worker(isolated.things)
    running = worker.submit("sleep", 0.3)
    started(worker, running)
    worker.close(timeout=60)
    assert running.result() == 0.3


def test_use_after_close():
    worker = Worker(isolated.things)
    stream, remote = worker.count(3), worker.same
    next(stream)
    worker.close()
    worker.close()
    asked = (
        lambda: worker.same(1),
        lambda: remote(1),
        lambda: worker(1),
        lambda: worker.submit("same", 1),
        lambda: next(stream),
        worker.restart,
    )
    for use in asked:
        with pytest.raises(ggml.ClosedError, match=r"the worker 'things \d+' is closed"):
            use()
    assert not worker.alive
    assert repr(worker).endswith("closed>")


def test_a_worker_forgotten_is_ended():
    worker = Worker(isolated.things)
    pid = worker.pid
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del worker
        gc.collect()
    assert [str(w.message)[:14] for w in caught] == ["Worker 'things"]
    assert not os.path.exists(f"/proc/{pid}")


# ---------------------------------------------------------------------- logs


def test_logs_are_forwarded(caplog):
    caplog.set_level(logging.DEBUG, "isolated")
    with Worker(isolated.things, name="w") as worker:
        worker.log()
    got = [(r.name, r.levelname, r.getMessage()) for r in caplog.records]
    assert ("isolated.deep", "DEBUG", "details 1") in got
    assert ("isolated", "WARNING", "a warning of mine") in got
    (mine,) = [r for r in caplog.records if r.name == "isolated"]
    assert (mine.colour, mine.processName) == ("red", "w")
    assert any(name == "py.warnings" and "be warned" in text for name, _, text in got)
    written = [text for name, level, text in got if (name, level) == ("ggml_cffi.isolate", "WARNING")]
    assert written == ["w: from C", "w: and more", "w: than one line"]


def test_only_what_is_wanted_is_sent(caplog):
    caplog.set_level(logging.ERROR, "isolated")
    with Worker(isolated.things) as worker:
        worker.log()
        lines = list(worker._processes[0]._listener.lines)
    assert not any("details" in line or "of mine" in line for line in lines)


def test_a_long_message_and_a_broken_one(caplog):
    def make():
        import logging

        def f():
            logging.getLogger("isolated").warning("x" * 10**6)
            logging.getLogger("isolated").warning("y", extra={"lock": threading.Lock()})

        return {"f": f}

    with Worker(make) as worker:
        worker.f()
    texts = [r.getMessage() for r in caplog.records]
    assert any(text.endswith("xxx ...") and len(text) < 10**5 for text in texts)
    assert any("cannot pickle '_thread.lock'" in text for text in texts)


# ---------------------------------------------------------------------- nothing is left behind


def test_nothing_is_left_behind():
    done = run_python("""
import contextlib, gc, os, pathlib, sys, threading
import numpy as np
from tests.support import isolated
import ggml_cffi as ggml
from ggml_cffi.isolate.worker import Worker

def children():
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rsplit(")", 1)[1].split()[:2]
            found += [state] if int(parent) == os.getpid() else []
    return found

def state():
    gc.collect()
    maps = pathlib.Path("/proc/self/maps").read_text().count("memfd:ggml_cffi")
    return os.listdir("/proc/self/fd"), os.listdir("/dev/shm"), threading.active_count(), children(), maps

big = np.ones(1 << 20, np.float32)
def use():
    with Worker(isolated.scaled, big) as worker:
        assert (worker(big) == 1).all()
        worker.submit("__call__", big).result()
    with Worker(isolated.Crashes, big) as worker:
        try:
            worker.abort()
        except ggml.BackendCrashedError:
            worker.restart()
    try:
        Worker(isolated.raising, "x")
    except isolated.LocalError:
        pass

import logging
logging.disable()
use()
before = state()
use()
after = state()
assert before == after, (before, after)
assert after[2:] == (1, [], 0), after
""")
    assert done.stderr == ""


def gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"  # nobody here inherits and reaps it
    except FileNotFoundError:
        return True


def test_the_child_dies_with_its_parent():
    """While it is busy in C, and the parent has no time to say anything."""
    done = run_python(
        """
import os, sys, time
from tests.support import isolated
from ggml_cffi.isolate.worker import Worker
worker = Worker(isolated.Crashes)
worker.submit("hang_in_c")
time.sleep(0.2)
print(worker.pid)
fork = os.fork()
if not fork:  # which lives on for a while, with all that it has inherited
    os.close(1), os.close(2)
    time.sleep(60)
    os._exit(0)
print(fork, flush=True)
os.kill(os.getpid(), 9)
""",
        check=False,
    )
    pid, fork = map(int, done.stdout.split())
    while not gone(pid):
        time.sleep(0.02)
    assert not gone(fork)
    os.kill(fork, 9)


def test_a_worker_left_at_exit_is_ended():
    done = run_python("""
import sys
from tests.support import isolated
from ggml_cffi.isolate.worker import Worker
worker = Worker(isolated.Crashes)
worker.same(1)
print(worker.pid)
""")
    assert gone(int(done.stdout))
    assert done.stderr == ""


def test_a_script_without_a_guard(tmp_path):
    """Functions and classes of the program itself, which the worker does not import."""
    script = tmp_path / "script.py"
    script.write_text("""
import numpy as np
from ggml_cffi.isolate.worker import Worker
print("started")
SCALE = 3
class Mine(Exception):
    pass
class Thing:
    def __init__(self, x):
        self.x = x
def make():
    def fail():
        raise Mine("mine")
    return {"f": lambda t: Thing(SCALE * t.x), "fail": fail}
with Worker(make) as worker:
    got = worker.f(Thing(np.ones(2)))
    assert type(got) is Thing and got.x.tolist() == [3, 3]
    try:
        worker.fail()
    except Mine as error:
        print(error)
""")
    done = run_python(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')")
    assert done.stdout == "started\nmine\n"


def test_ctrl_c_is_the_parents():
    """The call is given up, the process lives on, and its late answer is nobody's."""
    done = run_python("""
import os, signal, sys, threading
from tests.support import isolated
from ggml_cffi.isolate.worker import Worker
os.setpgid(0, 0)
with Worker(isolated.things) as worker:
    threading.Timer(0.2, os.killpg, (0, signal.SIGINT)).start()
    try:
        worker.sleep(1)
    except KeyboardInterrupt:
        print("interrupted")
    print(worker.same(5))
""")
    assert done.stdout == "interrupted\n5\n"
    assert done.stderr == ""


def test_a_fork_has_no_worker():
    done = run_python("""
import os, sys, warnings
from tests.support import isolated
from ggml_cffi.isolate.worker import Worker
with Worker(isolated.things) as worker:
    pid = os.fork()
    if not pid:
        try:
            worker.same(1)
        except Exception as error:
            print(type(error).__name__, error, flush=True)
            worker.close()
        os._exit(0)
    os.waitpid(pid, 0)
    print(worker.same(2))
""")
    assert "ClosedError the worker 'things 1' was opened before a fork; open another one here\n2\n" in done.stdout
