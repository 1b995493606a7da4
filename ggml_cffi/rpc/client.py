"""Devices of other machines, through ggml's own RPC backend.

A server (``ggml-cffi rpc-server`` there, or :class:`Server`) offers its devices; :func:`connect`, or simply their name
wherever a device is named, makes them devices here, beside the local ones:

>>> import ggml_cffi as ggml
>>> with ggml.Session(["Vulkan0", "rpc://192.168.0.7:50052"]) as s:  # doctest: +SKIP
...     w = s.weight(W, on="rpc://192.168.0.7:50052")

The protocol has no authentication and no encryption, and a server trusts what it is sent: only for networks that are
trusted as a whole. A server serves one client at a time.

ggml's client ends the process when a server is lost, or is none. Here that is an exception: before C hears of a server
it was greeted from Python, and C never talks to it but through a relay that stays (``proxy.py``). A worker process for
everything remote would have been the other way; then remote devices could not share a scheduler with local ones. The
relay costs a small process for each server and some 60 microseconds for each question; data is moved by the kernel
(``splice``).
"""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from dataclasses import dataclass

from ggml_cffi import c
from ggml_cffi.c import library
from ggml_cffi.core.device import Device, Memory, add_remote, devices_of
from ggml_cffi.errors import RemoteError
from ggml_cffi.rpc.connection import Link
from ggml_cffi.rpc.proxy import ANSWERS, PROTOCOL, Command
from ggml_cffi.rpc.server import Server, serve

__all__ = ["Health", "Server", "connect", "device", "disconnect", "health", "serve"]

_MOST_DEVICES = 256
_lock = threading.RLock()
_links: dict[tuple[str, int], Link] = {}  # by address


@dataclass(frozen=True)
class Health:
    """What a server answers."""

    version: tuple[int, int, int]
    """Of the protocol."""
    seconds: float
    """A question's way there and back."""
    memory: list[Memory]
    """Of each of its devices."""


def connect(endpoint: str, *, timeout: float = 10.0, patience: float = 300.0) -> list[Device]:
    """The devices of a server. From now on :func:`ggml_cffi.devices` lists them, until the server is lost.

    They are called ``rpc://host:port``, ``rpc://host:port/1`` and so on. Connecting twice gives the same devices; once
    the server was lost, others.

    Parameters
    ----------
    endpoint
        ``host:port`` or ``rpc://host:port``.
    timeout
        Seconds to wait for the server's greeting.
    patience
        Seconds that the server may be silent while an answer is due: it counts as lost after that. A server that
        computes is silent.

    Raises
    ------
    RemoteError
        If nothing listens there, or it does not answer, or is no ggml RPC server of this version.
    LibraryNotFoundError
        If there is no RPC plug-in.
    ValueError
        If ``endpoint`` is not of this form.

    C: ``ggml_backend_rpc_add_server``.
    """
    host, port, _ = _parse(endpoint)
    name = f"rpc://{host}:{port}"
    if not (timeout > 0 and patience > 0):
        raise ValueError(f"timeout and patience are seconds above 0, not {timeout} and {patience}")
    library.load("rpc")
    with _lock:
        address = _address(name, host, port)
        known = _known(address)
        if known is None:
            server, _ = _greet(name, address, timeout)
            known = Link(name, server, patience)
            try:
                _add_devices(known)
            except BaseException:
                known.close()
                raise
            _links[address] = known
        return devices_of(known)


def _known(address: tuple[str, int]) -> Link | None:
    """The connection to that address, if there is one that is not lost."""
    link = _links.get(address)
    if link is not None and not link.usable:
        del _links[address]
        link.close()
        return None
    return link


def _add_devices(link: Link) -> None:
    free, total = c.ffi.new("size_t *"), c.ffi.new("size_t *")
    with link:
        registry = c.ggml_backend_rpc_add_server(link.local.encode())
        pointers = [c.ggml_backend_reg_dev_get(registry, i) for i in range(c.ggml_backend_reg_dev_count(registry))]
        for pointer in pointers:
            c.ggml_backend_dev_buffer_type(pointer)  # asks for sizes that it keeps
    link.ask = lambda: c.ggml_backend_dev_memory(pointers[0], free, total)
    # Not in ggml's registry, which never lets go of a device.
    for i, pointer in enumerate(pointers):
        version = ".".join(map(str, PROTOCOL))
        text = f"device {i + 1} of {len(pointers)} of an RPC server (protocol {version})"
        add_remote(pointer, f"{link.name}/{i}" if i else link.name, text, link)


def disconnect(endpoint: str) -> None:
    """Let go of a server, so that it can serve another client. Its devices are no longer listed.

    What still uses them raises :class:`ClosedError`, a run in progress included, and can be closed.

    Raises
    ------
    ValueError
        If it is not connected.
    """
    host, port, _ = _parse(endpoint)
    with _lock:
        link = _links.pop(_address(endpoint, host, port), None)
    if link is None:
        raise ValueError(f"{endpoint} is not connected; connected are {', '.join(k.name for k in _links.values())}")
    link.close()


def device(name: str) -> Device:
    """The device of a name ``rpc://host:port/index``; without the index the first. Errors as :func:`connect`.

    Raises
    ------
    ValueError
        If the server has no such device.
    """
    _, _, index = _parse(name)
    found = connect(name)
    if index >= len(found):
        raise ValueError(f"there is no device {name!r}; the server has {', '.join(d.name for d in found)}")
    return found[index]


def health(endpoint: str, *, timeout: float = 5.0) -> Health:
    """Ask a server how it is.

    One that serves another client does not answer, and that looks as if it hung. One that this process is connected to
    is asked through that connection, and answers when it has done what it was given.

    Raises
    ------
    RemoteError, ValueError
        As :func:`connect`.
    """
    host, port, _ = _parse(endpoint)
    address = _address(endpoint, host, port)
    with _lock:
        link = _known(address)
    if link is None:
        server, found = _greet(f"rpc://{host}:{port}", address, timeout)
        server.close()
        return found
    with link:
        start = time.perf_counter()
        link.wait()
        seconds = time.perf_counter() - start
    return Health(PROTOCOL, seconds, [d.memory() for d in devices_of(link)])


# ---------------------------------------------------------------------- greeting


def _parse(endpoint: str) -> tuple[str, int, int]:
    """Host, port and number of the device."""
    if not isinstance(endpoint, str):
        raise TypeError(f"an endpoint is a text such as 'rpc://host:50052', not {endpoint!r}")
    found = re.fullmatch(r"(?:rpc://)?([\w.-]+):(\d{1,5})(?:/(\d{1,4}))?", endpoint.strip(), re.IGNORECASE)
    if found is None or not 0 < int(found[2]) < 65536:
        raise ValueError(f"{endpoint!r} is no endpoint: rpc://host:port or host:port is, with a port of 1 to 65535")
    return found[1].lower(), int(found[2]), int(found[3] or 0)


def _address(name: str, host: str, port: int) -> tuple[str, int]:
    try:
        found = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise RemoteError(f"{name}: there is no host {host!r} ({error})") from None
    return found[0][4]  # type: ignore[return-value]


def _greet(name: str, address: tuple[str, int], timeout: float) -> tuple[socket.socket, Health]:
    """A connection to the server, and what it says of itself."""
    server = socket.socket()
    try:
        return server, _Greeting(name, server, time.monotonic() + timeout).exchange(address)
    except BaseException as error:
        server.close()
        if isinstance(error, RemoteError) or not isinstance(error, OSError):
            raise
        if isinstance(error, TimeoutError):
            reason = f"nothing came within {timeout:g} s; a server that serves another client does not answer either"
        elif isinstance(error, ConnectionRefusedError):
            reason = "nothing listens there; start it with: ggml-cffi rpc-server"
        elif isinstance(error, ConnectionError):
            reason = f"it closed the connection: no ggml RPC server, or not one of protocol {_text(PROTOCOL)}"
        else:
            reason = error.strerror or str(error)
        raise RemoteError(f"{name}: {reason}") from None


class _Greeting:
    """The first words with a server, until ``end``."""

    def __init__(self, name: str, server: socket.socket, end: float) -> None:
        self.name, self.server, self.end = name, server, end

    def exchange(self, address: tuple[str, int]) -> Health:
        """Connect, and learn all that ggml's client would ask, and end the process if it is nonsense."""
        self._hurry()
        self.server.connect(address)
        self.server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A machine that is switched off sends no word of it.
        self.server.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                self.server.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        major, minor, patch = self.ask(Command.HELLO, bytes(24))[:3]
        if major != PROTOCOL[0] or minor > PROTOCOL[1]:
            raise RemoteError(
                f"{self.name} speaks version {major}.{minor}.{patch} of the protocol, and this is "
                f"{_text(PROTOCOL)}: run the server with ggml {c.GGML_VERSION}"
            )
        (n,) = struct.unpack("<I", self.ask(Command.DEVICE_COUNT))
        if not 0 < n <= _MOST_DEVICES:
            raise RemoteError(f"{self.name}: the server has {n} devices")
        memory = []
        for i in range(n):
            which = struct.pack("<I", i)
            start = time.perf_counter()
            (alignment,) = struct.unpack("<Q", self.ask(Command.GET_ALIGNMENT, which))
            seconds = time.perf_counter() - start
            (most,) = struct.unpack("<Q", self.ask(Command.GET_MAX_SIZE, which))
            if not alignment or alignment & (alignment - 1) or not most:
                raise RemoteError(f"{self.name}: impossible sizes of memory, {alignment} and {most}")
            memory.append(Memory(*struct.unpack("<QQ", self.ask(Command.GET_DEVICE_MEMORY, which))))
        return Health((major, minor, patch), seconds, memory)

    def ask(self, command: Command, body: bytes = b"") -> bytes:
        """One question and its answer."""
        self._hurry()
        self.server.sendall(struct.pack("<BQ", command, len(body)) + body)
        head = self._receive(8)
        if head != struct.pack("<Q", ANSWERS[command]):
            raise RemoteError(
                f"{self.name} is no ggml RPC server, or not one of protocol {_text(PROTOCOL)}: "
                f"it answered {head!r} to {command.name}"
            )
        return self._receive(ANSWERS[command])

    def _receive(self, n: int) -> bytes:
        data = b""
        while len(data) < n:
            self._hurry()
            part = self.server.recv(n - len(data))
            if not part:
                raise ConnectionResetError
            data += part
        return data

    def _hurry(self) -> None:
        self.server.settimeout(max(self.end - time.monotonic(), 1e-3))


def _text(version: tuple[int, int, int]) -> str:
    return ".".join(map(str, version))
