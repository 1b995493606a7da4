"""Ctrl-C during long runs on the CPU. Each test is a process of its own, which sends the signal to itself."""

from textwrap import dedent

import pytest

from tests.support import run_python

PRELUDE = """
import asyncio, os, signal, threading, time
import numpy as np
import ggml_cffi as ggml

N, STEPS = 384, 20_000  # about half a minute without an interrupt

def chain(x, steps):
    y = x
    for _ in range(steps):
        y = ggml.mul_mat(x, y)
    return y

def interrupt(after=0.5):
    timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return time.perf_counter() + after

def check(sent):
    late = time.perf_counter() - sent
    assert late < 60, late  # the exception came during the run, not at its end

def nothing_left():
    assert signal.set_wakeup_fd(-1) == -1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

class Run:
    # A graph of `steps` products on the CPU.
    def __init__(self, steps):
        self.cpu = ggml.Backend("CPU", n_threads=2)  # equally slow on large machines
        self.ctx, self.s = ggml.Context(), ggml.Scheduler([self.cpu])
        self.x = self.ctx.new_tensor("f32", (N, N))
        self.y = chain(self.x, steps)
        self.graph = ggml.Graph(self.y)
        self.s.alloc(self.graph)
        self.x.set(np.eye(N))

    def __call__(self):
        self.s.compute()
        np.testing.assert_array_equal(self.y.numpy(), np.eye(N))

    def close(self):
        for handle in (self.s, self.graph, self.ctx, self.cpu):
            handle.close()

def raises(kind, call):
    try:
        call()
    except kind:
        return
    raise AssertionError("not raised")
"""


def child(code):
    done = run_python(PRELUDE + dedent(code) + "\nprint('done')\n", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("call", ["s.compute()", "s.compute_async()", "s.compute(observe=lambda t: None, only=[y])"])
def test_ctrl_c_stops_a_run_of_a_scheduler(call):
    child(f"""
    long, short = Run(STEPS), Run(5)
    s, y = long.s, long.y
    for _ in range(2):
        sent = interrupt()
        raises(KeyboardInterrupt, lambda: {call})
        check(sent)
        nothing_left()
        short()
    long.close(), short.close()
    """)


def test_a_scheduler_can_be_used_after_ctrl_c():
    child("""
    run, slow = Run(20), []
    def step(out, a):
        if slow:
            time.sleep(0.05)
        out[...] = a
    y = run.x
    for _ in range(200):
        y = ggml.map_custom1(y, step)
    with ggml.Graph(y) as graph:
        run.s.alloc(graph)
        slow.append(1)
        sent = interrupt()
        raises(KeyboardInterrupt, run.s.compute)
        check(sent)
        slow.clear()
        run.s.compute()
        np.testing.assert_array_equal(y.numpy(), np.eye(N))
    run.s.alloc(run.graph)
    run()
    nothing_left()
    run.close()
    """)


def test_ctrl_c_stops_a_session():
    child("""
    with ggml.Session(["CPU"]) as session:
        f = session.compile(chain)
        x = np.eye(N, dtype=np.float32)
        f.trace(x, STEPS)
        sent = interrupt()
        raises(KeyboardInterrupt, lambda: f(x, STEPS))
        check(sent)
        np.testing.assert_array_equal(f(x, 5), x)
        nothing_left()
    """)


def test_ctrl_c_raises_while_the_main_thread_waits_for_a_future():
    """Ctrl-C raises in the main thread only: the run in the session's thread continues until it is cancelled."""
    child("""
    with ggml.Session(["CPU"]) as session:
        f = session.compile(chain)
        x = np.eye(N, dtype=np.float32)
        f.trace(x, STEPS)
        future = f.submit(x, STEPS)
        sent = interrupt()
        raises(KeyboardInterrupt, future.result)
        check(sent)
        assert future.running()
        session.cancel()
        raises(ggml.AbortedError, future.result)
        check(sent)
        nothing_left()
    """)


def test_an_applications_signal_handler_decides():
    """With a signal handler of the application, the run continues to its end."""
    child("""
    got = []
    signal.signal(signal.SIGINT, lambda *_: got.append(1))
    run = Run(400)
    run()
    interrupt(0.02)
    while not got:
        run()
    assert signal.set_wakeup_fd(-1) == -1
    run.close()
    """)


def test_an_ignored_sigint_does_not_stop_a_run():
    child("""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = Run(400)
    interrupt(0.1)
    run()
    run.close()
    """)


def test_another_wakeup_descriptor_is_respected():
    child("""
    import socket
    mine, other = socket.socketpair()
    mine.setblocking(False), other.setblocking(False)
    signal.set_wakeup_fd(other.fileno())
    run = Run(400)
    run()
    interrupt(0.1)
    raises(KeyboardInterrupt, run)  # when the run is over
    assert mine.recv(9) == bytes([signal.SIGINT])
    assert signal.set_wakeup_fd(-1) == other.fileno()
    run(), run.close(), mine.close(), other.close()
    """)


def test_ctrl_c_does_not_stop_a_run_in_another_thread():
    """A run in another thread continues, and the main thread raises at once."""
    child("""
    run, done = Run(1500), []
    thread = threading.Thread(target=lambda: (run(), done.append(1)))
    thread.start()
    sent = interrupt(0.2)
    def wait():
        while True:
            time.sleep(0.01)
    raises(KeyboardInterrupt, wait)
    check(sent)
    thread.join()
    assert done
    nothing_left()
    run.close()
    """)


def test_a_run_in_another_thread_is_not_stopped_with_the_main_threads():
    child("""
    run, done, long = Run(1500), [], Run(STEPS)
    thread = threading.Thread(target=lambda: (run(), done.append(1)))
    thread.start()
    sent = interrupt(0.2)
    raises(KeyboardInterrupt, long.s.compute)
    check(sent)
    thread.join()
    assert done
    nothing_left()
    run.close(), long.close()
    """)


def test_asyncio_cancels_the_awaited_task():
    child("""
    session = ggml.Session(["CPU"])
    f = session.compile(chain)
    x = np.eye(N, dtype=np.float32)
    f.trace(x, STEPS)
    async def main():
        await f.run_async(x, STEPS)
    sent = interrupt()
    raises(KeyboardInterrupt, lambda: asyncio.run(main(), debug=False))
    check(sent)
    session.submit(lambda: None).result()
    check(sent)
    np.testing.assert_array_equal(f(x, 5), x)
    nothing_left()
    session.close()
    """)


def test_ctrl_c_stops_a_run_inside_the_event_loop():
    """asyncio has its own signal handler, which cancels the task: the run itself continues to its end."""
    child("""
    run = Run(400)
    async def main():
        interrupt(0.1)
        run()
        await asyncio.sleep(10)
    raises(KeyboardInterrupt, lambda: asyncio.run(main(), debug=False))
    run()
    nothing_left()
    run.close()
    """)


def test_a_signal_handler_of_the_event_loop_is_called():
    child("""
    run, got = Run(400), []
    async def main():
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, lambda: got.append(1))
        interrupt(0.1)
        run()
        while not got:
            await asyncio.sleep(0.01)
    asyncio.run(main(), debug=False)
    assert got == [1]
    run.close()
    """)


def test_no_exception_is_lost_in_a_callback():
    """ggml computes in the main thread too, where a signal handler may raise on any line of a Python operation."""
    child("""
    class Timeout(Exception):
        pass

    def alarm(*_):
        raise Timeout

    def step(out, a):
        out[...] = a + 1

    signal.signal(signal.SIGALRM, alarm)
    found = {"right": 0, "wrong": 0, "late": 0}
    with ggml.Context() as ctx, ggml.Backend("CPU", n_threads=1) as cpu, ggml.Scheduler([cpu]) as s:
        x = y = ctx.new_tensor("f32", (4,))
        for _ in range(200):
            y = ggml.map_custom1(y, step)
        with ggml.Graph(y) as g:
            s.alloc(g)
            for k in range(1000):
                x.set(np.full(4, k))
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.0002 + k % 97 * 1e-5)
                    s.compute()
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    found["right" if (y.numpy() == k + 200).all() else "wrong"] += 1
                except Timeout:
                    found["late"] += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert found["late"] and not found["wrong"], found
    """)
