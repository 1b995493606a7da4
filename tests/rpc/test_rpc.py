"""Remote devices: servers on the loopback, servers that die, and peers that are none."""

import gc
import os
import signal
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import c, models, rpc
from ggml_cffi.core.shapes import fits_in_32_bits
from ggml_cffi.rpc.proxy import Command
from tests.support import llama_float64, need, relative_error, run_python
from tests.support.fake_rpc import Peer, Pretender, Talker


@pytest.fixture(scope="module")
def servers():
    """Names of two servers' devices."""
    with rpc.Server(["CPU"], n_threads=1) as one, rpc.Server(["CPU"], n_threads=1) as other:
        yield f"rpc://{one.endpoint}", f"rpc://{other.endpoint}"


@pytest.fixture(autouse=True)
def disconnected():
    """No test leaves a connection, or a relay."""
    yield
    links = list(rpc._links.values())
    for link in links:
        rpc.disconnect(link.name)
    gc.collect()
    for link in links:
        link._relay.wait(10)


@pytest.fixture
def victim():
    """A server to be killed."""
    with rpc.Server(["CPU"], n_threads=1) as server:
        yield server


def kill(server):
    os.kill(server.pid, signal.SIGKILL)


def forever(*calls):
    while True:
        for call in calls:
            call()


def w_and_x(rng):
    return rng.standard_normal((64, 64), dtype=np.float32) / 8, rng.standard_normal((3, 64), dtype=np.float32)


# ---------------------------------------------------------------------- servers


def test_a_server_starts_answers_and_stops():
    with rpc.Server(["CPU"], n_threads=1) as server:
        assert server.alive
        assert server.endpoint.startswith("127.0.0.1:")
        found = rpc.health(server.endpoint)
        assert found.version == (5, 0, 0)
        assert found.seconds > 0
        assert len(found.memory) == 1
        assert 0 < found.memory[0].free <= found.memory[0].total
        assert server.endpoint in repr(server)
    assert not server.alive
    assert "stopped" in repr(server)
    server.stop()
    with pytest.raises(ggml.RemoteError, match="nothing listens there; start it with: ggml-cffi rpc-server"):
        rpc.health(server.endpoint)


def test_what_a_server_says_is_logged(caplog):
    caplog.set_level("INFO", "ggml_cffi.rpc")
    with rpc.Server(["CPU"]) as server:
        pass
    assert f"listening on {server.endpoint}" in caplog.messages


def test_a_server_that_cannot_start():
    with Peer() as taken, pytest.raises(ggml.GgmlError, match=r"ended with code 2.*cannot listen on 127.0.0.1"):
        rpc.Server(["CPU"], port=int(taken.endpoint.split(":")[1]))
    for wrong, message in ((["Vulkan99"], "there is no device 'Vulkan99'"), ([], "there is no device ''")):
        with pytest.raises(ggml.GgmlError, match=message):
            rpc.Server(wrong)
    with pytest.raises(TypeError, match="devices is a sequence"):
        rpc.Server("CPU")


@pytest.mark.parametrize("host", ["localhost", "::1", "", "127.0.0.1.5"])
def test_a_server_listens_on_an_address_in_numbers(host):
    with pytest.raises(ValueError, match="is no address to listen on"):
        rpc.Server(host=host)
    with pytest.raises(ValueError, match="is no address to listen on"):
        rpc.serve(host=host)


def test_an_address_that_others_can_reach_is_warned_of():
    from ggml_cffi.rpc.server import warn_if_open

    for host in ("0.0.0.0", "192.168.0.7"):
        with pytest.warns(UserWarning, match="HAS NO AUTHENTICATION"):
            warn_if_open(host)
    warn_if_open("127.8.0.1")


def test_wrong_arguments_of_serve(servers):
    for changes, message in (
        ({"port": 65536}, "port must be"),
        ({"devices": [servers[0]]}, "is remote"),
        ({"devices": [ggml.device(servers[0])]}, "is remote"),
        ({"devices": []}, "at least one device"),
        ({"n_threads": 0}, "n_threads must be"),
    ):
        with pytest.raises(ValueError, match=message):
            rpc.serve(**changes)
    with pytest.raises(TypeError, match="devices is a sequence"):
        rpc.serve("CPU")


def test_large_tensors_are_cached(tmp_path):
    values = np.arange(3 << 20, dtype=np.float32)
    with rpc.Server(["CPU"], cache=tmp_path / "cache") as server:
        for _ in range(2):
            with ggml.Context() as ctx:
                t = ctx.new_tensor(ggml.F32, values.shape)
                ctx.alloc(server.endpoint)
                t.set(values)
                assert (t.numpy() == values).all()
                assert [file.stat().st_size for file in (tmp_path / "cache").iterdir()] == [values.nbytes]
        rpc.disconnect(server.endpoint)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_stops_when_it_is_told_to(number):
    command = [sys.executable, "-m", "ggml_cffi", "rpc-server", "--port", "0", "--devices", "CPU", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        endpoint = process.stdout.readline().removeprefix("listening on ").strip()
        while True:
            try:
                assert len(rpc.health(endpoint).memory) == 1
                break
            except ggml.RemoteError:
                assert process.poll() is None
        ggml.device(endpoint)
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")


def test_the_command_refuses_what_is_wrong():
    done = subprocess.run(
        [sys.executable, "-m", "ggml_cffi", "rpc-server", "--host", "localhost"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("ggml-cffi: 'localhost' is no address")


def gone(pid):
    """Whether a process has ended; one that nobody waits for may be left as a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_nothing_outlives_a_process_that_is_killed():
    code = (
        "import os, signal\nfrom ggml_cffi import rpc\n"
        "server = rpc.Server(['CPU'])\nrpc.connect(server.endpoint)\n"
        "print(server.pid, next(iter(rpc._links.values()))._relay.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = run_python(code, check=False)
    assert done.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    while not all(gone(pid) for pid in pids):
        time.sleep(0.01)


def test_a_process_that_ends_closes_everything():
    code = (
        "import numpy as np\nimport ggml_cffi as ggml\nfrom ggml_cffi import rpc\n"
        "server = rpc.Server(['CPU'])\n"
        "s = ggml.Session([server.endpoint])\nw = s.weight([[1.0, 2.0]])\n"
        "print(s.compile(lambda x: ggml.linear(x, w))(np.ones((1, 2))))\n"
    )
    done = run_python(code)
    assert done.stdout == "[[3.]]\n"


# ---------------------------------------------------------------------- devices


def test_remote_devices_are_listed_beside_local_ones(servers):
    before = ggml.devices()
    one, other = (ggml.device(name) for name in servers)
    assert ggml.devices() == [*before[:-1], one, other, ggml.device("CPU")]
    assert one.name == servers[0]
    assert one.is_remote
    assert not one.is_cpu
    assert one.type is ggml.DeviceType.GPU
    assert "RPC server (protocol 5.0.0)" in one.description
    assert 0 < one.memory().free <= one.memory().total
    assert not one.capabilities.asynchronous
    assert one.pci_id is None
    assert not ggml.device("CPU").is_remote
    rpc.disconnect(servers[0])
    assert ggml.devices() == [*before[:-1], other, ggml.device("CPU")]


def test_names_of_a_remote_device(servers):
    plain = servers[0].removeprefix("rpc://")
    port = plain.split(":")[1]
    one = ggml.device(servers[0])
    for name in (plain, servers[0].upper(), f"{servers[0]}/0", f"localhost:{port}"):
        assert ggml.device(name) == one
    assert rpc.connect(plain) == [one]
    assert one.is_called(plain)
    assert not one.is_called(servers[1])
    with pytest.raises(ValueError, match=f"there is no device '{servers[0]}/1'; the server has {servers[0]}"):
        ggml.device(f"{servers[0]}/1")


@pytest.mark.parametrize(
    "endpoint", ["host:", ":50052", "rpc://", "rpc://host", "a b:1", "host:0", "host:65536", "h:1/x"]
)
def test_what_is_no_endpoint(endpoint):
    for function in (rpc.connect, rpc.disconnect, rpc.health, rpc.device):
        with pytest.raises(ValueError, match="is no endpoint"):
            function(endpoint)


def test_a_session_over_two_servers(servers, rng):
    W, X = w_and_x(rng)
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
    need(("Vulkan0",))
    W, X = w_and_x(rng)
    with ggml.Session(["Vulkan0", servers[0]]) as s:
        w, v = s.weight(W), s.weight(W, on=servers[0])
        f = s.compile(lambda x: ggml.linear(ggml.linear(x, w), v))
        np.testing.assert_allclose(f(X[:1]), X[:1] @ W.T @ W.T, rtol=1e-2, atol=1e-2)
        assert [split.backend.name for split in f.trace(X[:1]).scheduler.splits] == ["Vulkan0", servers[0]]
        t = s.zeros(X.shape)
        ggml.transfer(s.weight(X, on=servers[0]), t)
        assert (t.numpy() == X).all()


def test_a_server_that_offers_two_gpus(rng, two_gpus):
    W, X = w_and_x(rng)
    with rpc.Server(two_gpus) as server:
        first, second = rpc.connect(server.endpoint)
        assert second.name == f"{first.name}/1"
        assert ggml.device(f"{server.endpoint}/1") == second
        with ggml.Session([first, second]) as s:
            w, v = s.weight(W, on=first), s.weight(W, on=second.name)
            f = s.compile(lambda x: ggml.linear(ggml.linear(x, w), v))
            np.testing.assert_allclose(f(X[:1]), X[:1] @ W.T @ W.T, rtol=1e-2, atol=1e-2)
            assert [split.backend.device for split in f.trace(X[:1]).scheduler.splits] == [first, second]


def test_placing_by_hand(servers, rng):
    _, X = w_and_x(rng)
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
def test_the_same_as_here(servers, rng, dtype):
    # Rows of other than 512 elements: of these, quantized, ggml asks the server for the size.
    W, X = rng.standard_normal((48, 96), dtype=np.float32), rng.standard_normal((5, 96), dtype=np.float32)
    results = []
    for name in (servers[0], "CPU"):
        with ggml.Session([name]) as s:
            w = s.weight(W, dtype=dtype)
            results.append(s.compile(lambda x: ggml.linear(x, w))(X))  # noqa: B023 - called at once
    assert (results[0] == results[1]).all()


def test_transfers(servers, rng):
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


def test_a_model_over_two_servers(servers, rng, tmp_path):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng)
    prompt = [1, 7, 3, 9, 2, 30, 4, 11, 6, 12]
    with models.load(path, ["CPU"], n_ctx=64, n_threads=1) as local:
        want = list(local.generate_tokens(prompt, 12, stop_at_end=False))
        logits = local.forward(prompt)
    with models.load(path, servers, n_ctx=64, n_threads=1) as remote:
        assert list(remote.generate_tokens(prompt, 12, stop_at_end=False)) == want
        # Servers compute flash attention, the CPU here two products.
        assert relative_error(remote.forward(prompt), logits) < 1e-2
        layers = [remote.layer_backend(i).name for i in range(3)]
        assert set(layers) == set(servers)
        assert {share.backend.name for share in remote.placement if share.layers} == set(servers)
        used = {b.name for _, b in remote.scheduler.assignment()}  # the scheduler's own word
        assert used == set(servers)


def test_what_is_written_in_python_runs_here(servers):
    def double(out, a):
        out[...] = 2 * a

    with ggml.Session([servers[0]]) as s:
        w = s.weight(np.eye(4))
        f = s.compile(lambda x: ggml.linear(ggml.map_custom1(ggml.linear(x, w), double), w))
        x = np.ones((2, 4), np.float32)
        assert f(x).tolist() == (2 * x).tolist()
        assert [b.name for _, b in f.trace(x).scheduler.assignment()] == [servers[0], "CPU", servers[0]]


def test_a_node_that_must_run_here_cannot_be_placed_there(servers):
    with ggml.Context() as ctx, ggml.Scheduler([servers[0]]) as scheduler:
        y = ggml.map_custom1(ctx.new_tensor(ggml.F32, (4,)), lambda out, a: None)
        with ggml.Graph(y) as graph:
            scheduler.place(y, servers[0])
            with pytest.raises(ggml.UnsupportedOpError, match="is computed by this process"):
                scheduler.alloc(graph)


def test_sizes_that_the_protocol_has_no_room_for(servers):
    with ggml.Context() as ctx:
        large = ctx.new_tensor(ggml.F32, (2, 1 << 30))
        with pytest.raises(ValueError, match="cannot be on a remote device"):
            ctx.alloc(servers[0], [large])
        assert fits_in_32_bits(ctx.new_tensor(ggml.F32, (1, 1 << 30)).ptr)
        assert not fits_in_32_bits(ctx.new_tensor(ggml.F32, (1 << 32,)).ptr)


def test_threads_share_a_server(servers, rng):
    W, X = w_and_x(rng)
    with ggml.Session([servers[0]]) as one, ggml.Session([servers[0]]) as other:
        functions = []
        for s in (one, other):
            w = s.weight(W)
            functions.append(s.compile(lambda x, w=w: ggml.linear(x, w)))
        futures = [f.submit(X) for _ in range(50) for f in functions]
        for future in futures:
            np.testing.assert_allclose(future.result(), X @ W.T, rtol=1e-4, atol=1e-5)


def test_what_is_given_up_while_others_talk_is_freed_later(servers):
    link = next(iter(rpc._links.values())) if rpc.connect(servers[0]) else None
    inside, over = threading.Event(), threading.Event()

    def talk():
        with link:
            inside.set()
            over.wait()

    ctx = ggml.Context()
    ctx.new_tensor(ggml.F32, (4,))
    ctx.alloc(servers[0])
    thread = threading.Thread(target=talk)
    thread.start()
    inside.wait()
    ctx.close()  # does not wait
    assert len(link._waiting) == 1
    over.set()
    thread.join()
    assert not link._waiting


def test_signals_wait_for_the_server(servers):
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


def test_a_fork_leaves_the_connection_alone(victim):
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


# ---------------------------------------------------------------------- peers that are no servers


def refused(endpoint, message, timeout=30.0):
    for function in (rpc.connect, rpc.health):
        with pytest.raises(ggml.RemoteError, match=message):
            function(endpoint, timeout=timeout)
    assert not any(d.is_remote for d in ggml.devices())


def test_a_silent_peer():
    with Peer() as peer:
        refused(peer.endpoint, r"nothing came within 0.2 s", timeout=0.2)


def test_a_server_that_serves_another_client(victim):
    with rpc._greet("", rpc._address("", *rpc._parse(victim.endpoint)[:2]), 30)[0]:
        refused(victim.endpoint, "a server that serves another client does not answer either", timeout=0.2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "it closed the connection: no ggml RPC server"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is no ggml RPC server.*HTTP/1.1"),
        (
            struct.pack("<Q", 28) + bytes([4, 0, 1]).ljust(28, b"\0"),
            r"speaks version 4.0.1 of the protocol, and this is 5",
        ),
        (struct.pack("<Q", 28) + bytes([5, 1, 0]).ljust(28, b"\0"), r"speaks version 5.1.0"),
        (struct.pack("<Q", 28) + bytes(10), "it closed the connection"),
    ],
)
def test_a_peer_that_talks_nonsense(text, message):
    with Talker(text) as peer:
        refused(peer.endpoint, message)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"DEVICE_COUNT": struct.pack("<QI", 4, 0)}, "has 0 devices"),
        ({"DEVICE_COUNT": struct.pack("<QI", 4, 1 << 31)}, "devices"),
        ({"GET_ALIGNMENT": struct.pack("<QQ", 8, 48)}, "impossible sizes"),
        ({"GET_MAX_SIZE": struct.pack("<QQ", 8, 0)}, "impossible sizes"),
        ({"GET_DEVICE_MEMORY": struct.pack("<Q", 8)}, "is no ggml RPC server"),
    ],
)
def test_a_server_that_answers_nonsense(answers, message):
    with Pretender(**answers) as peer:
        refused(peer.endpoint, message)


def test_a_host_that_does_not_exist():
    refused("no-such-host.invalid:50052", "there is no host 'no-such-host.invalid'")


def test_wrong_times():
    for changes in ({"timeout": 0}, {"patience": -1}):
        with pytest.raises(ValueError, match="seconds above 0"):
            rpc.connect("127.0.0.1:1", **changes)


def test_an_endpoint_is_text():
    with pytest.raises(TypeError, match="an endpoint is a text"):
        rpc.connect(50052)


# ---------------------------------------------------------------------- servers that are lost


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"ALLOC_BUFFER": struct.pack("<Q", 3)}, "answered ALLOC_BUFFER with 3 bytes instead of 16"),
        ({"ALLOC_BUFFER": struct.pack("<QQQ", 16, 1, 8)}, "gave less memory than was asked for"),
        ({"BUFFER_GET_BASE": struct.pack("<QQ", 8, 0)}, "gave memory without an address"),
        ({"BUFFER_CLEAR": None}, r"has been silent for 0.5 s"),
        ({"GET_TENSOR": None}, "has been silent for 0.5 s"),
        (
            {"SET_TENSOR": bytes(8), "SET_TENSOR_HASH": struct.pack("<QB", 1, 0)},
            "answered GET_TENSOR with 0 bytes|sent what nobody had asked for",
        ),
    ],
)
def test_a_server_that_fails_later(answers, message):
    with Pretender(**answers) as peer, ggml.Context() as ctx:
        rpc.connect(peer.endpoint, patience=0.5 if None in answers.values() else 30)
        t = ctx.new_tensor(ggml.F32, (10, 1 << 20))
        message = f"{peer.endpoint}: the server ({message})"
        with pytest.raises(ggml.BackendCrashedError, match=message):
            forever(lambda: t.is_allocated or ctx.alloc(peer.endpoint), lambda: t.set_bytes(bytes(t.nbytes)), t.numpy)
        assert not any(d.is_remote for d in ggml.devices())


def test_no_room_on_the_server():
    with Pretender(ALLOC_BUFFER=struct.pack("<QQQ", 16, 0, 0)) as peer:
        with pytest.raises(ggml.OutOfMemoryError, match="no room"):
            ggml.Buffer(peer.endpoint, 64)
        assert ggml.device(peer.endpoint).memory()
        rpc.disconnect(peer.endpoint)


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


def test_a_server_killed_between_runs_and_started_again(victim, servers, rng):
    W, X = w_and_x(rng)
    lost = ggml.device(victim.endpoint)
    with ggml.Session([servers[0], lost]) as s, ggml.Session([servers[0]]) as other:
        w, v = s.weight(W, on=servers[0]), s.weight(W, on=lost)
        f = s.compile(lambda x: ggml.linear(ggml.linear(x, w), v))
        f(X)
        kill(victim)
        victim.stop()
        message = f"{victim.endpoint}: the server closed the connection.*close what used it, start it again"
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


def test_a_server_killed_in_a_run(victim, servers, rng):
    W, X = w_and_x(rng)
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
            forever(lambda: f(X))
    with ggml.Session([servers[0]]) as s:
        assert (s.compile(lambda x: ggml.scale(x, 2))(X) == 2 * X).all()


def test_a_server_killed_in_a_transfer(victim, servers):
    values = np.ones((8, 1 << 20), np.float32)
    with ggml.Context() as ctx:
        a, b = (ctx.new_tensor(ggml.F32, values.shape) for _ in range(2))
        ctx.alloc(victim.endpoint, [a])
        ctx.alloc(servers[0], [b])
        threading.Timer(0.1, kill, (victim,)).start()
        with pytest.raises(ggml.BackendCrashedError, match=victim.endpoint):
            forever(lambda: a.set(values), lambda: ggml.transfer(a, b))
        b.set(values)
        assert (b.numpy() == values).all()


def test_a_model_whose_server_is_killed(victim, servers, rng, tmp_path):
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


def test_a_server_that_dies_of_what_it_computes(victim):
    with ggml.Context() as ctx, ggml.Scheduler([victim.endpoint]) as scheduler:
        rows, table = ctx.new_tensor(ggml.I32, (1,)), ctx.new_tensor(ggml.F32, (4, 8))
        y = ggml.get_rows(table, rows)
        with ggml.Graph(y) as graph:
            scheduler.alloc(graph)
            with pytest.raises(ValueError, match="holds row numbers"):
                rows.set([99])
            with rows._transfer(rows.ptr):  # past the check
                c.ggml_backend_tensor_set(rows.ptr, c.ffi.new("int32_t *", 99), 0, 4)
            with pytest.raises(ggml.BackendCrashedError, match="closed the connection"):
                scheduler.compute(graph)
    while victim.alive:
        time.sleep(0.001)


def test_a_relay_that_is_ended(servers, rng):
    W, X = w_and_x(rng)
    with ggml.Session(servers) as s:
        w = s.weight(W, on=servers[0])
        f = s.compile(lambda x: ggml.linear(x, w))
        f(X)
        relay = next(iter(rpc._links.values()))._relay
        relay.kill()
        relay.wait()
        with pytest.raises(ggml.BackendCrashedError, match="the server lost its relay, which was ended"):
            f(X)
    gc.collect()
    assert ggml.device(servers[0]).memory().total


def test_disconnecting(servers, rng):
    d = ggml.device(servers[0])
    with ggml.Context() as ctx, ggml.Backend(d) as backend:
        t = ctx.new_tensor(ggml.F32, (4,))
        ctx.alloc(d)
        rpc.disconnect(servers[0])
        for use in (t.numpy, d.memory, backend.synchronize, lambda: ggml.Buffer(d, 64)):
            with pytest.raises(ggml.ClosedError, match=f"{servers[0]} was disconnected"):
                use()
        assert rpc.health(servers[0]).memory  # it is free for others
        with pytest.raises(ValueError, match=f"{servers[0]} is not connected"):
            rpc.disconnect(servers[0])
    assert ggml.device(servers[0]) != d


def test_disconnecting_from_a_server_that_hangs():
    with Pretender(BUFFER_CLEAR=None) as peer:
        rpc.connect(peer.endpoint)
        raised = []

        def use():
            try:
                ggml.Buffer(peer.endpoint, 64)
            except ggml.ClosedError as error:
                raised.append(error)

        thread = threading.Thread(target=use)
        thread.start()
        while Command.BUFFER_CLEAR not in peer.asked:
            time.sleep(0.001)
        rpc.disconnect(peer.endpoint)
        thread.join()
        assert len(raised) == 1
