"""Processes of workers: crashes and hangs raise, logs reach the parent, and no process, file or memory is left."""

import logging
import os
import pickle
import signal
import threading
import time

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi.isolate import Worker
from tests.support import isolated, run_python
from tests.support.processes import has_ended


def test_a_make_that_fails_raises_in_the_parent():
    with pytest.raises(isolated.LocalError, match="not today") as caught:
        Worker(isolated.raising, "not today")
    assert "isolated.py" in caught.value.__notes__[0]
    with pytest.raises(ggml.BackendCrashedError, match=r"worker 'dying \d+' .* was killed by SIGSEGV during 'make'"):
        Worker(isolated.dying)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        Worker("no_such_module:make")
    with pytest.raises(ggml.BackendTimeoutError, match=r"gave no answer to 'make' within 0\.5 s"):
        Worker(time.sleep, 60, start_timeout=0.5)


def test_a_crash_of_any_kind_is_an_exception(crashing):
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
        restored = worker.restored()
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
        assert (restored == np.arange(10_000)).all()
        worker.restart()
        assert worker.alive
        assert worker.pid != pid
        assert (worker.restored() == np.arange(10_000)).all()


def test_a_call_that_takes_too_long_is_killed():
    with Worker(isolated.Crashes, 5, timeout=1, restarts=1) as worker:
        for way in ("hang", "hang_in_c"):
            with pytest.raises(TimeoutError, match=f"gave no answer to '{way}' within 1 s and was killed") as caught:
                worker.call(way)
            assert isinstance(caught.value, ggml.BackendTimeoutError)
            assert isinstance(caught.value, ggml.BackendCrashedError)
            if worker.alive:
                assert worker.restored() == 5


def test_a_restart_ends_a_hang_and_the_next_error_has_the_log(crashing):
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


def test_records_below_the_parents_level_are_not_sent(caplog):
    caplog.set_level(logging.ERROR, "isolated")
    with Worker(isolated.things) as worker:
        worker.log()
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(ggml.BackendCrashedError) as caught:
            worker.log()
    lines = caught.value.log
    assert "from C" in lines
    assert not any("details" in line or "of mine" in line for line in lines)


def test_long_log_messages_are_cut_and_broken_ones_reported(caplog):
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


def test_no_process_file_thread_or_memory_is_left_behind():
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


def test_a_worker_dies_with_its_parent_even_if_a_fork_lives_on():
    """The worker is busy in C when SIGKILL ends the parent."""
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
if not fork:  # the fork lives on for a while, with all open files of the parent
    os.close(1), os.close(2)
    time.sleep(60)
    os._exit(0)
print(fork, flush=True)
os.kill(os.getpid(), 9)
""",
        check=False,
    )
    pid, fork = map(int, done.stdout.split())
    while not has_ended(pid):
        time.sleep(0.02)
    assert not has_ended(fork)
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
    assert has_ended(int(done.stdout))
    assert done.stderr == ""


def test_a_script_without_a_main_guard_can_use_workers(tmp_path):
    """Functions and classes of ``__main__`` are sent with their code: the worker does not import the script."""
    script = tmp_path / "script.py"
    script.write_text("""
import numpy as np
from ggml_cffi.isolate.worker import Worker
print("wait_until_running")
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
    assert done.stdout == "wait_until_running\nmine\n"


def test_ctrl_c_interrupts_the_parent_and_not_the_worker():
    """The parent abandons the call, the process stays alive, and the parent ignores its late answer."""
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


def test_a_forked_process_cannot_use_the_parents_worker():
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
    assert (
        "ClosedError the worker 'things 1' was opened before a fork; open another one in this process\n2\n"
        in done.stdout
    )
