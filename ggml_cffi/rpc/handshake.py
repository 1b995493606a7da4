"""The handshake with an RPC server, made by Python before ggml's client uses that server.

ggml's client ends the process when a server is unreachable or gives impossible answers. The handshake sends the same
requests as ggml's client, and raises :class:`RemoteError` instead.
"""

from __future__ import annotations

import re
import socket
import struct
import time
from dataclasses import dataclass

from ggml_cffi import c
from ggml_cffi.core.device import Memory
from ggml_cffi.errors import RemoteError
from ggml_cffi.rpc.protocol import ANSWER_HEAD, REQUEST_HEAD, Command, Version, answers, version_text

_MAX_DEVICES = 256

Address = tuple[str, int]
"""An IPv4 address and a port."""


@dataclass(frozen=True)
class Health:
    """The state that a server reports."""

    version: Version
    """Version of the protocol."""
    seconds: float
    """Round-trip time of one request."""
    memory: list[Memory]
    """Memory of each of the server's devices."""


def parse_endpoint(endpoint: str) -> tuple[str, int, int]:
    """Return host, port and number of the device of ``rpc://host:port/index``.

    Raises
    ------
    TypeError, ValueError
        If ``endpoint`` is not of this form. The scheme and the index may be left out.
    """
    if not isinstance(endpoint, str):
        raise TypeError(f"an endpoint is a string such as 'rpc://host:50052', not {endpoint!r}")
    found = re.fullmatch(r"(?:rpc://)?([\w.-]+):(\d{1,5})(?:/(\d{1,4}))?", endpoint.strip(), re.IGNORECASE)
    if found is None or not 0 < int(found[2]) < 65536:
        raise ValueError(f"{endpoint!r} is not an endpoint: use rpc://host:port or host:port, port 1 to 65535")
    return found[1].lower(), int(found[2]), int(found[3] or 0)


def resolve(name: str, host: str, port: int) -> Address:
    """Return the IPv4 address of ``host``, and the port.

    Raises
    ------
    RemoteError
        If there is no such host; the message begins with ``name``.
    """
    try:
        found = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise RemoteError(f"{name}: there is no host {host!r} ({error})") from None
    return found[0][4]  # type: ignore[return-value]


def open_server(name: str, address: Address, timeout: float) -> tuple[socket.socket, Health]:
    """Connect to a server and check that ggml's client can use it.

    Parameters
    ----------
    name
        The server in messages.
    address
        The address of the server.
    timeout
        Seconds for the whole handshake.

    Returns
    -------
    tuple
        The connected socket, and the server's state.

    Raises
    ------
    RemoteError
        If nothing listens there, the server does not answer in time, or it is not a ggml RPC server of this version.
    """
    server = socket.socket()
    try:
        return server, _Handshake(name, server, time.monotonic() + timeout).run(address)
    except BaseException as error:
        server.close()
        if isinstance(error, RemoteError) or not isinstance(error, OSError):
            raise
        if isinstance(error, TimeoutError):
            reason = f"no answer within {timeout:g} s; a server that serves another client does not answer either"
        elif isinstance(error, ConnectionRefusedError):
            reason = "nothing listens there; start the server with: ggml-cffi rpc-server"
        elif isinstance(error, ConnectionError):
            reason = f"it closed the connection: it is not a ggml RPC server of protocol {version_text(protocol())}"
        else:
            reason = error.strerror or str(error)
        raise RemoteError(f"{name}: {reason}") from None


def probe(name: str, address: Address, timeout: float) -> Health:
    """Connect to a server, return its state, and disconnect. See :func:`open_server` for the errors."""
    server, found = open_server(name, address, timeout)
    server.close()
    return found


def protocol() -> Version:
    """Return the version of the protocol that the loaded ggml speaks."""
    return c.RPC_PROTO_MAJOR_VERSION, c.RPC_PROTO_MINOR_VERSION, c.RPC_PROTO_PATCH_VERSION


class _Handshake:
    """The first requests to a server, until ``deadline`` in seconds of ``time.monotonic``."""

    def __init__(self, name: str, server: socket.socket, deadline: float) -> None:
        self.name, self.server, self.deadline = name, server, deadline
        self.protocol = protocol()
        self.answers = answers(self.protocol)

    def run(self, address: Address) -> Health:
        """Connect, and request the version and the memory of each device."""
        self._set_timeout()
        self.server.connect(address)
        self.server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A machine that is switched off does not close its connections: keep-alive packets detect it.
        self.server.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                self.server.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        major, minor, patch = self.request(Command.HELLO, bytes(24))[:3]
        if major != self.protocol[0] or minor > self.protocol[1]:
            raise RemoteError(
                f"{self.name} speaks version {major}.{minor}.{patch} of the protocol, and this client speaks "
                f"{version_text(protocol())}: run the server with ggml {c.GGML_VERSION}"
            )
        (n,) = struct.unpack("<I", self.request(Command.DEVICE_COUNT))
        if not 0 < n <= _MAX_DEVICES:
            raise RemoteError(f"{self.name}: the server has {n} devices; 1 to {_MAX_DEVICES} can be used")
        memory = []
        for i in range(n):
            index = struct.pack("<I", i)
            start = time.perf_counter()
            (alignment,) = struct.unpack("<Q", self.request(Command.GET_ALIGNMENT, index))
            seconds = time.perf_counter() - start
            (max_size,) = struct.unpack("<Q", self.request(Command.GET_MAX_SIZE, index))
            if not alignment or alignment & (alignment - 1) or not max_size:
                raise RemoteError(
                    f"{self.name}: the server gave impossible sizes of memory: alignment {alignment}, "
                    f"largest buffer {max_size}"
                )
            memory.append(Memory(*struct.unpack("<QQ", self.request(Command.GET_DEVICE_MEMORY, index))))
        return Health((major, minor, patch), seconds, memory)

    def request(self, command: Command, body: bytes = b"") -> bytes:
        """Send a request and return its answer."""
        self._set_timeout()
        self.server.sendall(REQUEST_HEAD.pack(command, len(body)) + body)
        head = self._receive(ANSWER_HEAD.size)
        if head != ANSWER_HEAD.pack(self.answers[command]):
            raise RemoteError(
                f"{self.name} is not a ggml RPC server of protocol {version_text(protocol())}: "
                f"it answered {head!r} to {command.name}"
            )
        return self._receive(self.answers[command])

    def _receive(self, n: int) -> bytes:
        data = b""
        while len(data) < n:
            self._set_timeout()
            part = self.server.recv(n - len(data))
            if not part:
                raise ConnectionResetError
            data += part
        return data

    def _set_timeout(self) -> None:
        self.server.settimeout(max(self.deadline - time.monotonic(), 1e-3))
