"""Remote devices: listed beside local ones, in sessions, schedulers, transfers and models."""

import struct
import threading
import time

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import c, models, rpc
from ggml_cffi.core.device_choice import find
from ggml_cffi.core.shapes import fits_in_32_bits
from ggml_cffi.rpc.handshake import protocol
from ggml_cffi.rpc.protocol import Command, version_text
from tests.support import llama_float64, need, relative_error
from tests.support.fake_rpc import Pretender
from tests.support.remote import weight_and_input


def test_remote_devices_are_listed_beside_local_ones(servers):
    before = ggml.devices()
    one, other = (ggml.device(name) for name in servers)
    assert ggml.devices() == [*before[:-1], one, other, ggml.device("CPU")]
    assert one.name == servers[0]
    assert one.is_remote
    assert not one.is_cpu
    assert one.type is ggml.DeviceType.GPU
    assert f"RPC server (protocol {version_text(protocol())})" in one.description
    assert 0 < one.memory().free <= one.memory().total
    assert one.capabilities.asynchronous is (protocol() >= (7, 0, 0))
    assert one.pci_id is None
    assert not ggml.device("CPU").is_remote
    rpc.disconnect(servers[0])
    assert ggml.devices() == [*before[:-1], other, ggml.device("CPU")]


def test_a_remote_device_is_found_by_all_its_names(servers):
    plain = servers[0].removeprefix("rpc://")
    port = plain.split(":")[1]
    one = ggml.device(servers[0])
    for name in (plain, servers[0].upper(), f"{servers[0]}/0", f"localhost:{port}"):
        assert ggml.device(name) == one
    assert rpc.connect(plain) == [one]
    assert find(plain, [one]) == one
    assert find(servers[1], [one]) is None
    with pytest.raises(ValueError, match=f"there is no device '{servers[0]}/1'; the server has {servers[0]}"):
        ggml.device(f"{servers[0]}/1")


def test_a_session_over_two_servers(servers, rng):
    W, X = weight_and_input(rng)
    with ggml.Session(servers) as s:
        w, v = s.weight(W, on=servers[0]), s.weight(W, on=servers[1].removeprefix("rpc://"))
        f = s.compile(lambda x: ggml.relu(ggml.linear(ggml.linear(x, w), v)))
        for _ in range(3):
            np.testing.assert_allclose(f(X), np.maximum(X @ W.T @ W.T, 0), rtol=1e-4, atol=1e-5)
        scheduler = f.trace(X).scheduler
        assert [split.backend.name for split in scheduler.splits] == list(servers)
        assert [b.name for _, b in scheduler.assignment()] == [servers[0], servers[1], servers[1]]
        assert servers[1] in str(scheduler.report())
        assert {row.backend for row in scheduler.profile(runs=1).nodes} == set(servers)


def test_a_local_gpu_beside_a_remote_device(servers, rng):
    (gpu,) = need(("Vulkan0",))
    W, X = weight_and_input(rng)
    with ggml.Session([gpu, servers[0]]) as s:
        w, v = s.weight(W), s.weight(W, on=servers[0])
        f = s.compile(lambda x: ggml.linear(ggml.linear(x, w), v))
        np.testing.assert_allclose(f(X[:1]), X[:1] @ W.T @ W.T, rtol=1e-2, atol=1e-2)
        assert [split.backend.name for split in f.trace(X[:1]).scheduler.splits] == [gpu, servers[0]]
        t = s.zeros(X.shape)
        ggml.transfer(s.weight(X, on=servers[0]), t)
        assert (t.numpy() == X).all()


def test_a_server_that_offers_two_gpus(rng, two_gpus):
    W, X = weight_and_input(rng)
    with rpc.Server(two_gpus) as server:
        first, second = rpc.connect(server.endpoint)
        assert second.name == f"{first.name}/1"
        assert ggml.device(f"{server.endpoint}/1") == second
        with ggml.Session([first, second]) as s:
            w, v = s.weight(W, on=first), s.weight(W, on=second.name)
            f = s.compile(lambda x: ggml.linear(ggml.linear(x, w), v))
            np.testing.assert_allclose(f(X[:1]), X[:1] @ W.T @ W.T, rtol=1e-2, atol=1e-2)
            assert [split.backend.device for split in f.trace(X[:1]).scheduler.splits] == [first, second]


def test_nodes_can_be_placed_on_remote_devices(servers, rng):
    _, X = weight_and_input(rng)
    with ggml.Context() as ctx, ggml.Scheduler(servers) as scheduler:
        x = ctx.new_tensor(ggml.F32, X.shape)
        doubled = ggml.scale(x, 2)
        y = ggml.scale(doubled, 3)
        with ggml.Graph(y) as graph:
            scheduler.place(doubled, servers[1])
            scheduler.place(y, servers[0].removeprefix("rpc://"))
            assert set(scheduler.reserve(graph)) == set(scheduler.backends)
            scheduler.alloc(graph)
            x.set(X)
            seen = []
            scheduler.compute(graph, observe=lambda t: seen.append(t.numpy()))
            np.testing.assert_allclose(y.numpy(), 6 * X, rtol=1e-6)
            np.testing.assert_allclose(seen[0], 2 * X, rtol=1e-6)
            assert scheduler.backend_of(doubled).name == servers[1]
            scheduler.compute_async(graph)
            scheduler.synchronize()
            np.testing.assert_allclose(y.numpy(), 6 * X, rtol=1e-6)


@pytest.mark.parametrize("dtype", [ggml.F32, ggml.F16, ggml.Q4_0, ggml.Q8_0])
def test_a_remote_cpu_gives_the_same_values_as_the_local_one(servers, rng, dtype):
    # ggml requests the size of quantized rows from the server if they are not a multiple of 512 elements.
    W, X = rng.standard_normal((48, 96), dtype=np.float32), rng.standard_normal((5, 96), dtype=np.float32)
    results = []
    for name in (servers[0], "CPU"):
        with ggml.Session([name]) as s:
            w = s.weight(W, dtype=dtype)
            results.append(s.compile(lambda x: ggml.linear(x, w))(X))  # noqa: B023 - called at once
    assert (results[0] == results[1]).all()


def test_transfers_between_servers_and_to_this_machine(servers, rng):
    values = rng.standard_normal((700, 1000), dtype=np.float32)
    with ggml.Context() as ctx, ggml.Backend(servers[0]) as backend:
        a, b, here = (ctx.new_tensor(ggml.F32, values.shape) for _ in range(3))
        for t, where in ((a, servers[0]), (b, servers[1]), (here, "CPU")):
            ctx.alloc(where, [t])
        a.set(values)
        ggml.transfer(a, b, chunk=1 << 20)
        assert (b.numpy() == values).all()
        ggml.transfer(b, here)
        assert (here.numpy() == values).all()
        out = ggml.pinned(values.shape, device=servers[0])
        a.set_async(values + 1, backend)
        a.get_async(out, backend)
        backend.synchronize()
        assert (out == values + 1).all()
        with pytest.raises(ValueError, match="only host memory can be viewed"):
            a.numpy(copy=False)
        assert ggml.Buffer.imported(servers[0], bytearray(64)) is None


def test_a_model_runs_over_two_servers(servers, rng, tmp_path):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng)
    prompt = [1, 7, 3, 9, 2, 30, 4, 11, 6, 12]
    with models.load(path, ["CPU"], n_ctx=64, n_threads=1) as local:
        want = list(local.generate_tokens(prompt, 12, stop_at_end=False))
        logits = local.forward(prompt)
    with models.load(path, servers, n_ctx=64, n_threads=1) as remote:
        assert list(remote.generate_tokens(prompt, 12, stop_at_end=False)) == want
        # The servers compute flash attention, the local CPU two matrix products.
        assert relative_error(remote.forward(prompt), logits) < 1e-2
        layers = [remote.layer_backend(i).name for i in range(3)]
        assert set(layers) == set(servers)
        assert {share.device for share in remote.placement if share.layers} == set(servers)
        used = {b.name for _, b in remote.scheduler.assignment()}
        assert used == set(servers)


def test_operations_written_in_python_run_on_this_machine(servers):
    def double(out, a):
        out[...] = 2 * a

    with ggml.Session([servers[0]]) as s:
        w = s.weight(np.eye(4))
        f = s.compile(lambda x: ggml.linear(ggml.map_custom1(ggml.linear(x, w), double), w))
        x = np.ones((2, 4), np.float32)
        assert f(x).tolist() == (2 * x).tolist()
        assert [b.name for _, b in f.trace(x).scheduler.assignment()] == [servers[0], "CPU", servers[0]]


def test_an_operation_written_in_python_cannot_be_placed_on_a_server(servers):
    with ggml.Context() as ctx, ggml.Scheduler([servers[0]]) as scheduler:
        y = ggml.map_custom1(ctx.new_tensor(ggml.F32, (4,)), lambda out, a: None)
        with ggml.Graph(y) as graph:
            scheduler.place(y, servers[0])
            with pytest.raises(ggml.UnsupportedOpError, match="is computed by this process"):
                scheduler.alloc(graph)


def test_tensors_beyond_the_protocols_32_bits_are_refused(servers):
    with ggml.Context() as ctx:
        large = ctx.new_tensor(ggml.F32, (2, 1 << 30))
        with pytest.raises(ValueError, match="cannot be on a remote device"):
            ctx.alloc(servers[0], [large])
        assert fits_in_32_bits(ctx.new_tensor(ggml.F32, (1, 1 << 30)).ptr)
        assert not fits_in_32_bits(ctx.new_tensor(ggml.F32, (1 << 32,)).ptr)


def test_a_server_without_free_memory_raises():
    with Pretender(ALLOC_BUFFER=struct.pack("<QQQ", 16, 0, 0)) as peer:
        with pytest.raises(ggml.OutOfMemoryError, match="no room"):
            ggml.Buffer(peer.endpoint, 64)
        assert ggml.device(peer.endpoint).memory()
        rpc.disconnect(peer.endpoint)


def test_objects_of_a_disconnected_server_raise_and_can_be_closed(servers, rng):
    d = ggml.device(servers[0])
    with ggml.Context() as ctx, ggml.Backend(d) as backend:
        t = ctx.new_tensor(ggml.F32, (4,))
        ctx.alloc(d)
        rpc.disconnect(servers[0])
        for use in (t.numpy, d.memory, backend.synchronize, lambda: ggml.Buffer(d, 64)):
            with pytest.raises(ggml.ClosedError, match=f"{servers[0]} was disconnected"):
                use()
        assert rpc.health(servers[0]).memory  # the server is free for other clients
        with pytest.raises(ValueError, match=f"{servers[0]} is not connected"):
            rpc.disconnect(servers[0])
    assert ggml.device(servers[0]) != d


def test_disconnecting_interrupts_a_server_that_hangs():
    with Pretender(ALLOC_BUFFER=None) as peer:
        rpc.connect(peer.endpoint)
        raised = []

        def use():
            try:
                ggml.Buffer(peer.endpoint, 64)
            except ggml.ClosedError as error:
                raised.append(error)

        thread = threading.Thread(target=use)
        thread.start()
        while Command.ALLOC_BUFFER not in peer.asked:
            time.sleep(0.001)
        rpc.disconnect(peer.endpoint)
        thread.join()
        assert len(raised) == 1


def test_a_graph_is_computed_again_after_memory_on_its_server_was_freed(servers, rng):
    """A server of ggml 0.25 forgets computed graphs when a buffer is freed, and refuses to repeat them."""
    W, X = weight_and_input(rng)
    with ggml.Context() as ctx, ggml.Scheduler([servers[0]]) as scheduler:
        w, x = ctx.new_tensor("f32", W.shape), ctx.new_tensor("f32", X.shape)
        y = ggml.mul_mat(w, x)
        with ggml.Graph(y) as graph:
            scheduler.alloc(graph)
            w.set(W)
            for _ in range(3):
                x.set(X)
                scheduler.compute()
                assert relative_error(y.numpy(), X @ W.T) < 5e-3
                ggml.Buffer(servers[0], 1 << 10).close()
                X = X + 1


def test_graphs_in_turns_are_right_after_memory_on_their_server_was_freed(servers, rng):
    """A server of ggml 0.27 keeps many graphs, and forgets them all when a buffer is freed."""
    W, X = weight_and_input(rng)
    with ggml.Session([servers[0]]) as session:
        w = session.weight(W)
        functions = [session.compile(lambda x, n=n: ggml.scale(ggml.linear(x, w), float(n))) for n in range(1, 4)]
        for _ in range(3):
            for n, function in enumerate(functions, 1):
                assert relative_error(function(X), n * (X @ W.T)) < 5e-3
                X = X + 1
            ggml.Buffer(servers[0], 1 << 10).close()


def test_parts_of_rows_are_copied_to_a_server_and_back(servers):
    """ggml 0.27 has commands of their own for them; older versions copy each part alone."""
    with ggml.Context() as ctx:
        t = ctx.new_tensor(ggml.F32, (6, 32))
        ctx.alloc(servers[0])
        values = np.arange(6 * 32, dtype=np.float32).reshape(6, 32)
        t.set(values)
        part, read = np.full((3, 8), -1, np.float32), np.zeros((2, 8), np.float32)
        c.ggml_backend_tensor_set_2d(t.ptr, c.ffi.from_buffer(part), 0, 32, 3, 128, 32)
        c.ggml_backend_tensor_get_2d(t.ptr, c.ffi.from_buffer(read), 2 * 128, 32, 2, 128, 32)
        values[:3, :8] = -1
        assert (read == values[2:4, :8]).all()
        assert (t.numpy() == values).all()


def test_timeout_and_patience_must_be_positive():
    for changes in ({"timeout": 0}, {"patience": -1}):
        with pytest.raises(ValueError, match="must be seconds above 0"):
            rpc.connect("127.0.0.1:1", **changes)
