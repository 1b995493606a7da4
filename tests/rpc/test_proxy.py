"""The RPC proxy: the loss of a server at any moment raises an exception, and a new server can be connected."""

import gc
import os
import signal
import struct
import threading
import time

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import c, models, rpc
from tests.support import llama_float64
from tests.support.fake_rpc import Pretender
from tests.support.remote import weight_and_input


def kill(server):
    os.kill(server.pid, signal.SIGKILL)


def repeat_until_error(*calls):
    while True:
        for call in calls:
            call()


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"ALLOC_BUFFER": struct.pack("<Q", 3)}, "answered ALLOC_BUFFER with 3 bytes instead of 16"),
        ({"ALLOC_BUFFER": struct.pack("<QQQ", 16, 1, 8)}, "gave less memory than was asked for"),
        ({"BUFFER_GET_BASE": struct.pack("<QQ", 8, 0)}, "gave memory without an address"),
        ({"ALLOC_BUFFER": None}, r"has been silent for 0.5 s"),
        ({"GET_TENSOR": None}, "has been silent for 0.5 s"),
        (
            {"SET_TENSOR": bytes(8), "SET_TENSOR_HASH": struct.pack("<QB", 1, 0)},
            "answered GET_TENSOR with 0 bytes|sent data without a request",
        ),
    ],
)
def test_a_server_that_fails_after_the_handshake_is_lost(answers, message):
    with Pretender(**answers) as peer, ggml.Context() as ctx:
        rpc.connect(peer.endpoint, patience=0.5 if None in answers.values() else 30)
        t = ctx.new_tensor(ggml.F32, (10, 1 << 20))
        message = f"{peer.endpoint}: the server ({message})"
        with pytest.raises(ggml.BackendCrashedError, match=message):
            repeat_until_error(
                lambda: t.is_allocated or ctx.alloc(peer.endpoint), lambda: t.set_bytes(bytes(t.nbytes)), t.numpy
            )
        assert not any(d.is_remote for d in ggml.devices())


def test_a_server_killed_between_runs_raises_and_can_be_started_again(victim, servers, rng):
    W, X = weight_and_input(rng)
    lost = ggml.device(victim.endpoint)
    with ggml.Session([servers[0], lost]) as s, ggml.Session([servers[0]]) as other:
        w, v = s.weight(W, on=servers[0]), s.weight(W, on=lost)
        f = s.compile(lambda x: ggml.linear(ggml.linear(x, w), v))
        f(X)
        kill(victim)
        victim.stop()
        message = f"{victim.endpoint}: the server closed the connection.*close the objects that used it, start it again"
        for use in (lambda: f(X), v.numpy, lambda: v.set(W), lost.memory, lambda: s.zeros((4,), on=lost)):
            with pytest.raises(ggml.BackendCrashedError, match=message):
                use()
        for use in (lambda: ggml.Backend(lost), lambda: ggml.Buffer(lost, 64), lambda: lost.capabilities):
            with pytest.raises(ggml.BackendCrashedError, match=message):
                use()
        with pytest.raises(ggml.RemoteError, match="nothing listens there"):
            rpc.health(victim.endpoint)
        assert lost not in ggml.devices()
        with pytest.raises(ggml.RemoteError, match="nothing listens there"):
            ggml.device(lost.name)
        assert (other.compile(lambda x: ggml.scale(x, 2))(X) == 2 * X).all()
        with rpc.Server(["CPU"], port=int(victim.endpoint.split(":")[1])) as again:
            found = ggml.device(lost.name)
            assert found != lost
            assert found.name == lost.name
            with ggml.Session([found]) as s2:
                assert (s2.compile(lambda x: ggml.scale(x, 2))(X) == 2 * X).all()
            with pytest.raises(ggml.GgmlError):
                f(X)
            rpc.disconnect(again.endpoint)


def test_a_server_killed_in_a_run_raises(victim, servers, rng):
    W, X = weight_and_input(rng)
    with ggml.Session([victim.endpoint, servers[0]]) as s:
        weights = [s.weight(W, on=on) for on in (victim.endpoint, servers[0])] * 20

        def chain(x):
            for w in weights:
                x = ggml.linear(x, w)
            return x

        f = s.compile(chain)
        f(X)
        threading.Timer(0.05, kill, (victim,)).start()
        with pytest.raises(ggml.BackendCrashedError, match=victim.endpoint):
            repeat_until_error(lambda: f(X))
    with ggml.Session([servers[0]]) as s:
        assert (s.compile(lambda x: ggml.scale(x, 2))(X) == 2 * X).all()


def test_a_server_killed_in_a_transfer_raises(victim, servers):
    values = np.ones((8, 1 << 20), np.float32)
    with ggml.Context() as ctx:
        a, b = (ctx.new_tensor(ggml.F32, values.shape) for _ in range(2))
        ctx.alloc(victim.endpoint, [a])
        ctx.alloc(servers[0], [b])
        threading.Timer(0.1, kill, (victim,)).start()
        with pytest.raises(ggml.BackendCrashedError, match=victim.endpoint):
            repeat_until_error(lambda: a.set(values), lambda: ggml.transfer(a, b))
        b.set(values)
        assert (b.numpy() == values).all()


def test_a_model_whose_server_is_killed_raises(victim, servers, rng, tmp_path):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng)
    with models.load(path, [victim.endpoint, servers[0]], n_ctx=512, n_threads=1) as model:
        tokens = model.generate_tokens([1, 2, 3], stop_at_end=False)
        for _ in range(3):
            next(tokens)
        kill(victim)
        with pytest.raises(ggml.BackendCrashedError, match=victim.endpoint):
            list(tokens)
        with pytest.raises(ggml.BackendCrashedError, match=victim.endpoint):
            model.forward([1, 2, 3])


def test_a_server_that_crashes_in_a_computation_raises(victim):
    with ggml.Context() as ctx, ggml.Scheduler([victim.endpoint]) as scheduler:
        rows, table = ctx.new_tensor(ggml.I32, (1,)), ctx.new_tensor(ggml.F32, (4, 8))
        y = ggml.get_rows(table, rows)
        with ggml.Graph(y) as graph:
            scheduler.alloc(graph)
            with pytest.raises(ValueError, match="holds row numbers"):
                rows.set([99])
            with rows.memory_lock(rows.ptr):  # without the check of row numbers
                c.ggml_backend_tensor_set(rows.ptr, c.ffi.new("int32_t *", 99), 0, 4)
            with pytest.raises(ggml.BackendCrashedError, match="closed the connection"):
                scheduler.compute(graph)
    while victim.alive:
        time.sleep(0.001)


def test_a_proxy_that_is_killed_raises_and_can_be_replaced(servers, rng):
    W, X = weight_and_input(rng)
    with ggml.Session(servers) as s:
        w = s.weight(W, on=servers[0])
        f = s.compile(lambda x: ggml.linear(x, w))
        f(X)
        (connection,) = [found for found in rpc.connections() if found.name == servers[0]]
        connection.proxy.kill()
        connection.proxy.wait()
        del connection
        with pytest.raises(ggml.BackendCrashedError, match="the server lost its proxy, which was killed"):
            f(X)
    gc.collect()
    assert ggml.device(servers[0]).memory().total
