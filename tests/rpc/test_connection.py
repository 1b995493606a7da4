"""Connections: one lock for all threads, freeing without waiting, signals, forks."""

import threading

import numpy as np

import ggml_cffi as ggml
from ggml_cffi import rpc
from ggml_cffi.rpc.protocol import Command
from tests.support import run_python
from tests.support.fake_rpc import Pretender
from tests.support.remote import weight_and_input


def test_threads_may_share_a_server(servers, rng):
    W, X = weight_and_input(rng)
    with ggml.Session([servers[0]]) as one, ggml.Session([servers[0]]) as other:
        functions = []
        for s in (one, other):
            w = s.weight(W)
            functions.append(s.compile(lambda x, w=w: ggml.linear(x, w)))
        futures = [f.submit(X) for _ in range(50) for f in functions]
        for future in futures:
            np.testing.assert_allclose(future.result(), X @ W.T, rtol=1e-4, atol=1e-5)


def test_closing_while_another_thread_holds_the_lock_frees_later():
    inside, over = threading.Event(), threading.Event()

    def talk():
        with connection:
            inside.set()
            over.wait()

    with Pretender() as peer:
        ctx = ggml.Context()
        ctx.new_tensor(ggml.F32, (4,))
        ctx.alloc(peer.endpoint)
        (connection,) = rpc.connections()
        thread = threading.Thread(target=talk)
        thread.start()
        inside.wait()
        ctx.close()  # returns at once
        assert Command.FREE_BUFFER not in peer.asked  # only the thread that holds the lock may free the memory
        over.set()
        thread.join()
        rpc.health(peer.endpoint)  # answered after all earlier requests
        assert peer.asked.count(Command.FREE_BUFFER) == 1
        rpc.disconnect(peer.endpoint)


def test_signals_do_not_interrupt_a_call_to_the_server(servers):
    code = (
        "import os, signal, threading\nimport numpy as np\nimport ggml_cffi as ggml\nfrom ggml_cffi import rpc\n"
        "count = 0\n"
        "def note(*_):\n    global count\n    count += 1\n"
        "signal.signal(signal.SIGALRM, note)\n"
        "W = np.ones((256, 256), np.float32) / 256\n"
        "with rpc.Server(['CPU'], n_threads=1) as server, ggml.Session([server.endpoint]) as s:\n"
        "    w = s.weight(W)\n"
        "    f = s.compile(lambda x: ggml.linear(ggml.linear(ggml.linear(x, w), w), w))\n"
        "    x = np.ones((256, 256), np.float32)\n"
        "    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)\n"
        "    while count < 20:\n        np.testing.assert_allclose(f(x), x, rtol=1e-4)\n"
        "    signal.setitimer(signal.ITIMER_REAL, 0)\n"
        "    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    try:\n        while True:\n            f(x)\n"
        "    except KeyboardInterrupt:\n        print('interrupted')\n"
        "    np.testing.assert_allclose(f(x), x, rtol=1e-4)\n"
    )
    assert run_python(code).stdout == "interrupted\n"


def test_a_forked_process_cannot_use_the_parents_connection(victim):
    code = (
        "import os\nimport ggml_cffi as ggml\n"
        f"d = ggml.device({victim.endpoint!r})\n"
        "buffer = ggml.Buffer(d, 64)\n"
        "if not os.fork():\n"
        "    for use in (d.memory, lambda: ggml.Backend(d), lambda: buffer.size):\n"
        "        try:\n            use()\n"
        "        except ggml.GgmlError as error:\n            print(error, flush=True)\n"
        "    assert d not in ggml.devices()\n"
        "    raise SystemExit\n"
        "os.wait()\nassert d.memory().total\nbuffer.close()\nprint('parent')\n"
    )
    lines = run_python(code).stdout.splitlines()
    assert "connected before this process was forked" in lines[0]
    assert "connected before this process was forked" in lines[1]
    assert "opened before a fork" in lines[2]
    assert lines[3:] == ["parent"]


def test_compute_waits_for_the_server():
    with Pretender() as peer, ggml.Context() as ctx, ggml.Scheduler([peer.endpoint]) as scheduler:
        y = ggml.scale(ctx.new_tensor(ggml.F32, (4,)), 2)
        with ggml.Graph(y) as graph:
            scheduler.alloc(graph)
            scheduler.compute(graph)
            assert peer.asked[-2:] == [Command.GRAPH_COMPUTE, Command.GET_DEVICE_MEMORY]
            scheduler.compute(graph)
            assert peer.asked[-2:] == [Command.GRAPH_RECOMPUTE, Command.GET_DEVICE_MEMORY]
            scheduler.reset()
        scheduler.close()
        ctx.close()
        rpc.disconnect(peer.endpoint)
