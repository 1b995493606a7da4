"""Servers: start, answers and end; wrong arguments; the command; no process that outlives its parent."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import rpc
from ggml_cffi.rpc.handshake import protocol
from ggml_cffi.rpc.server import warn_if_open
from tests.support import run_python
from tests.support.fake_rpc import Peer
from tests.support.processes import has_ended


def test_a_server_starts_answers_and_stops():
    with rpc.Server(["CPU"], n_threads=1) as server:
        assert server.alive
        assert server.endpoint.startswith("127.0.0.1:")
        found = rpc.health(server.endpoint)
        assert found.version == protocol()
        assert found.seconds > 0
        assert len(found.memory) == 1
        assert 0 < found.memory[0].free <= found.memory[0].total
        assert server.endpoint in repr(server)
    assert not server.alive
    assert "stopped" in repr(server)
    server.stop()
    with pytest.raises(ggml.RemoteError, match="nothing listens there; start the server with: ggml-cffi rpc-server"):
        rpc.health(server.endpoint)


def test_a_servers_output_is_logged(caplog):
    caplog.set_level("INFO", "ggml_cffi.rpc")
    with rpc.Server(["CPU"]) as server:
        pass
    assert f"listening on {server.endpoint}" in caplog.messages


def test_a_server_that_cannot_start_raises_with_its_output():
    with Peer() as taken, pytest.raises(ggml.GgmlError, match=r"exited with status 2.*cannot listen on 127.0.0.1"):
        rpc.Server("CPU", port=int(taken.endpoint.split(":")[1]))
    for wrong, message in ((["Vulkan99"], "there is no device 'Vulkan99'"), ([], "there is no device ''")):
        with pytest.raises(ggml.GgmlError, match=message):
            rpc.Server(wrong)


@pytest.mark.parametrize("host", ["localhost", "::1", "", "127.0.0.1.5"])
def test_a_host_that_is_no_ipv4_address_is_refused(host):
    with pytest.raises(ValueError, match="is not an address to listen on"):
        rpc.Server(host=host)
    with pytest.raises(ValueError, match="is not an address to listen on"):
        rpc.serve(host=host)


def test_an_address_that_others_can_reach_is_warned_of():
    for host in ("0.0.0.0", "192.168.0.7"):
        with pytest.warns(UserWarning, match="HAS NO AUTHENTICATION"):
            warn_if_open(host)
    warn_if_open("127.8.0.1")


def test_serve_refuses_wrong_arguments(servers):
    for changes, message in (
        ({"port": 65536}, "port must be"),
        ({"devices": [servers[0]]}, "is remote"),
        ({"devices": [ggml.device(servers[0])]}, "is remote"),
        ({"devices": servers[0]}, "is remote"),
        ({"devices": "cuda:0"}, "there is no device 'cuda:0'"),
        ({"devices": []}, "at least one device"),
        ({"n_threads": 0}, "n_threads must be"),
    ):
        with pytest.raises(ValueError, match=message):
            rpc.serve(**changes)


def test_large_tensors_are_cached_in_the_folder(tmp_path):
    values = np.arange(3 << 20, dtype=np.float32)
    with rpc.Server(["CPU"], cache=tmp_path / "cache") as server:
        for _ in range(2):
            with ggml.Context() as ctx:
                t = ctx.new_tensor(ggml.F32, values.shape)
                ctx.alloc(server.endpoint, usage=ggml.Usage.WEIGHTS)
                t.set(values)
                assert (t.numpy() == values).all()
                assert [file.stat().st_size for file in (tmp_path / "cache").iterdir()] == [values.nbytes]
        rpc.disconnect(server.endpoint)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_stops_at_sigterm_and_sigint(number):
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
    # ggml 0.27 logs the end of each connection as an error.
    assert (process.returncode, err.replace("recv returned 0 (peer closed?)\n", "")) == (0, "")


def test_the_command_refuses_a_wrong_host():
    done = subprocess.run(
        [sys.executable, "-m", "ggml_cffi", "rpc-server", "--host", "localhost"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("ggml-cffi: 'localhost' is not an address")


def test_server_and_proxy_die_with_a_process_that_is_killed():
    code = (
        "import os, signal\nfrom ggml_cffi import rpc\n"
        "server = rpc.Server(['CPU'])\nrpc.connect(server.endpoint)\n"
        "print(server.pid, rpc.connections()[0].proxy.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = run_python(code, check=False)
    assert done.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    while not all(has_ended(pid) for pid in pids):
        time.sleep(0.01)


def test_a_process_may_end_without_closing_anything():
    code = (
        "import numpy as np\nimport ggml_cffi as ggml\nfrom ggml_cffi import rpc\n"
        "server = rpc.Server(['CPU'])\n"
        "s = ggml.Session([server.endpoint])\nw = s.weight([[1.0, 2.0]])\n"
        "print(s.compile(lambda x: ggml.linear(x, w))(np.ones((1, 2))))\n"
    )
    done = run_python(code)
    assert done.stdout == "[[3.]]\n"
