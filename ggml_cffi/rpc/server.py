"""The server's side of :mod:`ggml_cffi.rpc`: what the command runs, and a process that runs the command."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence

from ggml_cffi import c
from ggml_cffi.c import library
from ggml_cffi.core.backend import check_threads, default_threads
from ggml_cffi.core.device import Device, gpus
from ggml_cffi.core.device import device as find_device
from ggml_cffi.core.handle import Closing
from ggml_cffi.errors import GgmlError, RemoteError

_logger = logging.getLogger("ggml_cffi.rpc")
_READY = "listening on "


def serve(
    devices: Sequence[Device | str] | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 50052,
    n_threads: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    stop_with_stdin: bool = False,
    announce: Callable[[str], object] | None = None,
) -> None:
    """Offer devices of this machine to one client at a time, until SIGTERM or SIGINT.

    For a process of its own, in its main thread: ggml's server cannot be stopped. It goes on in another thread when
    this returns, so that the caller has to end the process, with ``os._exit``.

    Parameters
    ----------
    devices
        Devices or names; default every GPU, or the CPU where there is none.
    host
        Address to listen on, four numbers. Other than the default, a loopback address, whoever reaches it can use
        the devices, and more: the protocol has no authentication, and a malformed message ends the server.
    port
        0 for one that is free.
    n_threads
        Threads of the CPU; default all that this process may use.
    cache
        Folder in which tensors of more than 10 MiB are kept, so that they need not be sent again. It grows.
    stop_with_stdin
        Return also when standard input ends: with the process that holds the other end.
    announce
        Called with the endpoint before it is listened on.

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
    chosen = _to_offer(devices)
    threads = check_threads(n_threads) if n_threads is not None else default_threads()
    if cache is not None:
        os.makedirs(cache, exist_ok=True)
    endpoint = f"{host}:{_free_port(host, port)}"
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    failed = False

    def run() -> None:
        nonlocal failed
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})  # they would end its connection
        pointers = c.ffi.new("ggml_backend_dev_t[]", [d.ptr for d in chosen])
        folder = os.fsencode(cache) if cache is not None else c.NULL
        c.ggml_backend_rpc_start_server(endpoint.encode(), folder, threads, len(chosen), pointers)
        failed = True
        over.set()

    def read() -> None:
        while os.read(0, 4096):
            pass
        over.set()

    if announce is not None:
        announce(endpoint)
    for target in (run, read) if stop_with_stdin else (run,):
        threading.Thread(target=target, daemon=True).start()
    over.wait()
    if failed:
        raise GgmlError(f"the RPC server could not listen on {endpoint}")


def warn_if_open(host: str) -> None:
    """Warn of an address that others can reach.

    Raises
    ------
    ValueError
        If ``host`` is no IPv4 address in numbers: ggml's server takes no other.
    """
    try:
        address = ipaddress.IPv4Address(host)
    except ValueError:
        raise ValueError(f"{host!r} is no address to listen on: four numbers are, such as 127.0.0.1") from None
    if not address.is_loopback:
        warnings.warn(
            f"the RPC server on {host} HAS NO AUTHENTICATION: whoever can reach it may read what it holds, use its "
            "devices, and try to take over its process. Only for networks that are trusted as a whole.",
            stacklevel=3,
        )


def _to_offer(chosen: Sequence[Device | str] | None) -> list[Device]:
    if isinstance(chosen, str | Device):
        raise TypeError("devices is a sequence: put the one device in a list")
    if chosen is None:
        return [d for d in gpus() if not d.is_remote] or [find_device("CPU")]
    # By name first: a server that connects to others would hide that they are lost.
    named = [d for d in chosen if isinstance(d, str) and ":" in d]
    found = [] if named else [find_device(d) for d in chosen]
    named += [d.name for d in found if d.is_remote]
    if named:
        raise ValueError(f"{named[0]} is remote: a server offers devices of its own machine")
    if not found:
        raise ValueError("a server needs at least one device")
    return found


def _free_port(host: str, port: int) -> int:
    """``port``, or one that nobody listens on; raises where it cannot be had."""
    if not 0 <= port < 65536:
        raise ValueError(f"port must be 0 to 65535, not {port}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as ggml does
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as error:
            raise GgmlError(f"the RPC server cannot listen on {host}:{port}: {error.strerror}") from None
        return int(probe.getsockname()[1])


class Server(Closing):
    """``ggml-cffi rpc-server`` as a process, for as long as the ``with`` lasts; it ends with this process too.

    What it prints goes to the logger ``ggml_cffi.rpc``.

    Parameters
    ----------
    devices, host, port, n_threads, cache
        As for :func:`serve`; the port by default one that is free.
    timeout
        Seconds that it may take until it answers.

    Raises
    ------
    GgmlError
        If it ended, with its last words, or did not answer in time.
    ValueError
        If ``host`` is no IPv4 address in numbers.
    """

    def __init__(
        self,
        devices: Sequence[Device | str] | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        n_threads: int | None = None,
        cache: str | os.PathLike[str] | None = None,
        timeout: float = 60.0,
    ) -> None:
        warn_if_open(host)
        if isinstance(devices, str | Device):
            raise TypeError("devices is a sequence: put the one device in a list")
        command = [sys.executable, "-m", "ggml_cffi", "rpc-server", "--stop-with-stdin"]
        command += ["--host", host, "--port", str(port)]
        if devices is not None:
            command += ["--devices", ",".join(d if isinstance(d, str) else d.name for d in devices)]
        if n_threads is not None:
            command += ["--threads", str(n_threads)]
        if cache is not None:
            command += ["--cache", os.fspath(cache)]
        # The package from where this one came from; the group of its own keeps Ctrl-C in a terminal away.
        home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
        self.endpoint = ""
        """``host:port``."""
        self._last: deque[str] = deque(maxlen=20)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONPATH": path},
            process_group=0,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self._await(timeout)
        except BaseException:
            self.stop()
            raise

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            text = line.rstrip()
            self._last.append(text)
            _logger.info("%s", text)
            if text.startswith(_READY):
                self.endpoint = text.removeprefix(_READY)

    def _await(self, timeout: float) -> None:
        from ggml_cffi.rpc.client import health

        end = time.monotonic() + timeout
        while True:
            if self._process.poll() is not None:
                self._reader.join(1)
                said = "; ".join(self._last) or "nothing"
                raise GgmlError(f"the RPC server ended with code {self._process.returncode}; it said: {said}")
            if self.endpoint:
                try:
                    health(self.endpoint, timeout=max(end - time.monotonic(), 0.1))
                    return
                except RemoteError:
                    pass
            if time.monotonic() > end:
                raise GgmlError(f"the RPC server did not answer within {timeout:g} s")
            time.sleep(0.01)

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def stop(self, timeout: float = 5.0) -> None:
        """End the process: by asking, and after ``timeout`` seconds by force. Stopping twice is allowed."""
        process = self._process
        assert process.stdin
        assert process.stdout
        process.stdin.close()
        process.terminate()
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._reader.join()
        process.stdout.close()

    close = stop

    def __repr__(self) -> str:
        return f"<Server {self.endpoint or '-'}{'' if self.alive else ' stopped'}>"
