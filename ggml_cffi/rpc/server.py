"""The server's side: devices of this machine offered by this process or by a child process."""

from __future__ import annotations

import ipaddress
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable

from ggml_cffi import c
from ggml_cffi.c import library
from ggml_cffi.core.child_process import ChildProcess
from ggml_cffi.core.device import Device, DevicesLike, device_list, device_name, gpus, is_remote_name
from ggml_cffi.core.device import device as find_device
from ggml_cffi.core.handle import Closing
from ggml_cffi.core.threads import check_threads, default_threads
from ggml_cffi.errors import GgmlError, RemoteError
from ggml_cffi.rpc.handshake import parse_endpoint, probe, resolve

_logger = logging.getLogger("ggml_cffi.rpc")
_READY = "listening on "
_SHOWN_LINES = 20


def serve(
    devices: DevicesLike | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 50052,
    n_threads: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    stop_with_stdin: bool = False,
    announce: Callable[[str], object] | None = None,
) -> None:
    """Offer devices of this machine to one client at a time, until SIGTERM or SIGINT.

    Call this function in the main thread of a process of its own. ggml's server cannot be stopped: it continues in
    another thread after this function returns, so the caller must end the process with ``os._exit``.

    Parameters
    ----------
    devices
        Devices or names, or one of them; default every GPU, or the CPU if there is none.
    host
        Address to listen on, four numbers; default a loopback address. With any other address, everybody who can reach
        it can use the devices and may take over the process: the protocol has no authentication. A malformed message
        ends the server.
    port
        Port to listen on, 0 for a free one.
    n_threads
        Threads of the CPU; default all that this process may use.
    cache
        Folder in which the server keeps tensors of more than 10 MiB, so that clients need not send them again.
        Nothing is ever deleted from it.
    stop_with_stdin
        True to return also when standard input ends, as it does when the process at its other end ends.
    announce
        A function that is called with the endpoint before the server listens there.

    Raises
    ------
    GgmlError
        If the address cannot be listened on.
    LibraryNotFoundError
        If there is no RPC plug-in.
    ValueError
        If a device does not exist, or is itself remote, or a parameter is out of range.

    C: ``ggml_backend_rpc_start_server``.
    """
    warn_if_open(host)
    library.load("rpc")
    offered = _devices_to_offer(devices)
    threads = check_threads(n_threads) if n_threads is not None else default_threads()
    if cache is not None:
        os.makedirs(cache, exist_ok=True)
    endpoint = f"{host}:{_free_port(host, port)}"
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    failed = False

    def run_server() -> None:
        nonlocal failed
        # A signal in this thread would end the server's connection.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        pointers = c.ffi.new("ggml_backend_dev_t[]", [d.ptr for d in offered])
        folder = os.fsencode(cache) if cache is not None else c.NULL
        c.ggml_backend_rpc_start_server(endpoint.encode(), folder, threads, len(offered), pointers)
        failed = True
        stop.set()

    def read_stdin() -> None:
        while os.read(0, 4096):
            pass
        stop.set()

    if announce is not None:
        announce(endpoint)
    for target in (run_server, read_stdin) if stop_with_stdin else (run_server,):
        threading.Thread(target=target, daemon=True).start()
    stop.wait()
    if failed:
        raise GgmlError(f"the RPC server could not listen on {endpoint}")


def warn_if_open(host: str) -> None:
    """Warn about an address that other machines can reach.

    Raises
    ------
    ValueError
        If ``host`` is not an IPv4 address in numbers, the only form that ggml's server takes.
    """
    try:
        address = ipaddress.IPv4Address(host)
    except ValueError:
        raise ValueError(f"{host!r} is not an address to listen on: use four numbers, such as 127.0.0.1") from None
    if not address.is_loopback:
        warnings.warn(
            f"the RPC server on {host} HAS NO AUTHENTICATION: everybody who can reach it may read its data, use its "
            "devices, and try to take over its process. Use it only in networks that are trusted as a whole.",
            stacklevel=3,
        )


def _devices_to_offer(devices: DevicesLike | None) -> list[Device]:
    if devices is None:
        return [d for d in gpus() if not d.is_remote] or [find_device("CPU")]
    # Remote names are refused without connecting: in a chain of servers the loss of one would be hidden.
    chosen = device_list(devices)
    remote = [d for d in chosen if isinstance(d, str) and is_remote_name(d)]
    found = [] if remote else [find_device(d) for d in chosen]
    remote += [d.name for d in found if d.is_remote]
    if remote:
        raise ValueError(f"{remote[0]} is remote: a server offers devices of its own machine only")
    if not found:
        raise ValueError("a server needs at least one device")
    return found


def _free_port(host: str, port: int) -> int:
    """Return ``port``, or a free port for 0.

    Raises
    ------
    GgmlError
        If another process listens on the port, or the host has no such address.
    ValueError
        If the port is out of range.
    """
    if not 0 <= port < 65536:
        raise ValueError(f"port must be 0 to 65535, not {port}")
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ggml's server sets it too
        try:
            trial.bind((host, port))
            trial.listen()
        except OSError as error:
            raise GgmlError(f"the RPC server cannot listen on {host}:{port}: {error.strerror}") from None
        return int(trial.getsockname()[1])


class Server(Closing):
    """The command ``ggml-cffi rpc-server`` as a child process, which ends with the ``with`` block or this process.

    The lines that the server prints go to the logger ``ggml_cffi.rpc``.

    Parameters
    ----------
    devices, host, port, n_threads, cache
        As for :func:`serve`; the default port is a free one.
    timeout
        Seconds in which the server must answer.

    Raises
    ------
    GgmlError
        If the server ended, with the last lines that it printed, or did not answer in time.
    ValueError
        If ``host`` is not an IPv4 address in numbers.
    """

    def __init__(
        self,
        devices: DevicesLike | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        n_threads: int | None = None,
        cache: str | os.PathLike[str] | None = None,
        timeout: float = 60.0,
    ) -> None:
        warn_if_open(host)
        command = [sys.executable, "-m", "ggml_cffi", "rpc-server", "--stop-with-stdin"]
        command += ["--host", host, "--port", str(port)]
        if devices is not None:
            command += ["--devices", ",".join(device_name(d) for d in device_list(devices))]
        if n_threads is not None:
            command += ["--threads", str(n_threads)]
        if cache is not None:
            command += ["--cache", os.fspath(cache)]
        # The child must import this copy of the package, which need not be an installed one.
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self.endpoint = ""
        """``host:port``."""
        endpoints: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._child = ChildProcess(
            command,
            name="an RPC server",
            capture="output",
            lifeline=True,
            env={"PYTHONPATH": path},
            on_line=lambda line: _handle_line(line, endpoints),
        )
        try:
            self._wait_until_ready(endpoints, time.monotonic() + timeout)
        except BaseException:
            self.stop()
            raise
        if not self.endpoint:
            self.stop()
            raise GgmlError(f"the RPC server did not answer within {timeout:g} s")

    def _wait_until_ready(self, endpoints: queue.SimpleQueue[str], deadline: float) -> None:
        """Wait until the server answers, and set :attr:`endpoint`. At the deadline, return without setting it."""
        endpoint = ""
        while time.monotonic() < deadline:
            if not self._child.running:
                self._child.wait_or_kill(0)
                output = "; ".join(self._child.lines[-_SHOWN_LINES:]) or "nothing"
                raise GgmlError(f"the RPC server {self._child.end_reason}; it printed: {output}")
            try:
                endpoint = endpoint or endpoints.get(timeout=0.01)
                host, port, _ = parse_endpoint(endpoint)
                probe(endpoint, resolve(endpoint, host, port), max(deadline - time.monotonic(), 0.1))
            except queue.Empty:
                pass
            except RemoteError:
                time.sleep(0.01)
            else:
                self.endpoint = endpoint
                return

    @property
    def alive(self) -> bool:
        """True while the process runs."""
        return self._child.running

    @property
    def pid(self) -> int:
        """The process id."""
        return self._child.pid

    def stop(self, timeout: float = 5.0) -> None:
        """End the process with SIGTERM, and after ``timeout`` seconds with SIGKILL. Stopping twice is allowed."""
        self._child.close_lifeline()
        self._child.terminate()
        self._child.wait_or_kill(timeout)

    close = stop

    def __repr__(self) -> str:
        return f"<Server {self.endpoint or '-'}{'' if self.alive else ' stopped'}>"


def _handle_line(line: str, endpoints: queue.SimpleQueue[str]) -> None:
    _logger.info("%s", line)
    if line.startswith(_READY):
        endpoints.put(line.removeprefix(_READY))
