"""The RPC proxy: a process on the loopback between ggml's RPC client and one server.

ggml's client ends its process when the server is lost or gives an unexpected answer. The client therefore never
connects to a server. It connects to this proxy, which forwards all data. When the server is lost, the proxy writes the
reason to shared memory, which :mod:`ggml_cffi.rpc.connection` checks after each call. From then on the proxy answers in
the server's place, so that C continues: allocations succeed, and tensors read as zeros.

The proxy is a process and not a thread, because a thread needs the GIL. The thread that holds the GIL may itself wait
for an answer of the proxy. For example, the garbage collector runs in any thread and may free remote memory there.

The process imports only this module, :mod:`ggml_cffi.rpc.protocol` and the standard library. It ends when its standard
input closes, which also happens when the parent process dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import signal
import socket
import struct
import sys
import zlib
from collections import defaultdict
from typing import TypeVar

from ggml_cffi.rpc.protocol import (
    ANSWER_HEAD,
    DISCONNECT,
    REQUEST_HEAD,
    STATE_SIZE,
    Command,
    Version,
    answers,
    bytes_to_read,
    graph_key_size,
    parse_version,
)

_HEAD_SIZE = 64 << 10  # bytes of a message that are read into memory; only messages with tensor data are longer
_CHUNK = 1 << 20  # bytes of the rest that the kernel moves at a time
_DUMMY_ADDRESS = 1 << 32  # the address of memory that is granted in the server's place
_CLOSED = "closed the connection"
KEPT_GRAPHS = 1024
"""Graphs of a device that ggml 0.27's client and server keep at most. C: ``rpc_server::graph_compute``."""
_NO_NUMBER = bytes(8)  # client and server do not keep a graph without a number
_Value = TypeVar("_Value")


class ServerLostError(Exception):
    """The loss of the server; the message is the reason."""


class Proxy:
    """One server, and the client that is connected now.

    Parameters
    ----------
    listener
        The socket to which clients connect.
    server
        The connected socket after the handshake.
    state
        The memory that is shared with the client's process.
    protocol
        The version of the protocol.
    patience
        Seconds that the server may take to answer, or to accept more data.
    """

    def __init__(
        self, listener: socket.socket, server: socket.socket, state: mmap.mmap, protocol: Version, patience: float
    ) -> None:
        self.listener, self.server, self.state, self.patience = listener, server, state, patience
        self.protocol, self.answers = protocol, answers(protocol)
        key_size = graph_key_size(protocol)
        self.graphs = Graphs(key_size) if key_size else None
        self.disconnected = False
        self.pipe = os.pipe()
        with contextlib.suppress(OSError):  # the size may exceed the user's limit
            fcntl.fcntl(self.pipe[1], fcntl.F_SETPIPE_SZ, _CHUNK)
        server.setblocking(False)
        self.readable, self.writable = select.poll(), select.poll()
        for poll, event in ((self.readable, select.POLLIN), (self.writable, select.POLLOUT)):
            poll.register(server, event)
            poll.register(0, select.POLLIN)

    @property
    def lost(self) -> bool:
        """True if the server is lost: the proxy answers in its place."""
        return bool(self.state[0])

    def lose_server(self, error: Exception) -> None:
        """Close the connection to the server. The reason is in shared memory before any answer is sent."""
        if not self.lost:
            text = _reason(error).encode()[: STATE_SIZE - 2]
            self.state[1 : 1 + len(text)] = text
            self.state[0] = 1
            self.server.close()

    def run(self) -> None:
        """Serve one client after the other, until the server is disconnected and no client is left."""
        while self._wait_for_input(self.listener):
            client, _ = self.listener.accept()
            with client, contextlib.suppress(ConnectionError):
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._serve(client)

    def _serve(self, client: socket.socket) -> None:
        size_of_head = REQUEST_HEAD.size
        while (
            self._wait_for_input(client) and len(head := client.recv(size_of_head, socket.MSG_WAITALL)) == size_of_head
        ):
            command, size = REQUEST_HEAD.unpack(head)
            first = size if self.graphs and command == Command.GRAPH_COMPUTE else min(size, _HEAD_SIZE)
            body = client.recv(first, socket.MSG_WAITALL) if first else b""
            if len(body) < first:
                return
            if command == Command.HELLO:  # the handshake was before this process started; it cannot be repeated
                n = self.answers[command]
                client.sendall(ANSWER_HEAD.pack(n) + bytes(self.protocol).ljust(n, b"\0"))
                continue
            self._send_request(self.graphs.renew(command, head, body) if self.graphs else head + body)
            for left in range(size - first, 0, -_CHUNK):
                self._forward_request(client, min(left, _CHUNK))
            answer = bytes_to_read(command, body)
            answer = self.answers.get(command) if answer is None else answer
            if answer is not None:
                self._answer(client, command, body, answer)

    # ------------------------------------------------------------------ waiting

    def _wait_for_input(self, source: socket.socket) -> bool:
        """Wait until ``source`` has data. Return False if none will come."""
        while not (self.disconnected and source is self.listener):
            poll = select.poll()
            for fd in (source, 0) if self.lost else (source, 0, self.server):
                poll.register(fd, select.POLLIN)
            ready = [fd for fd, _ in poll.poll()]
            if 0 in ready:
                self._read_command()
            elif ready == [source.fileno()]:
                return True
            else:
                try:
                    unasked = self.server.recv(1)
                    self.lose_server(ServerLostError("sent data without a request" if unasked else _CLOSED))
                except OSError as error:
                    self.lose_server(error)
        return False

    def _wait_for_server(self, poll: select.poll) -> None:
        """Wait until the server has data (:attr:`readable`) or accepts data (:attr:`writable`)."""
        ready = poll.poll(self.patience * 1000)
        if not ready:
            raise ServerLostError(f"has been silent for {self.patience:g} s")
        if any(fd == 0 for fd, _ in ready):
            self._read_command()
            raise ServerLostError("was disconnected")

    def _read_command(self) -> None:
        """Disconnect if the parent sent that command. End this process if the parent has ended."""
        if os.read(0, 1) != DISCONNECT:
            os._exit(0)
        self.disconnected = True
        self.lose_server(ServerLostError("was disconnected"))

    # ------------------------------------------------------------------ requests, from the client to the server

    def _send_request(self, request: bytes) -> None:
        if self.lost:
            return
        view = memoryview(request)
        try:
            while view:
                try:
                    view = view[self.server.send(view) :]
                except BlockingIOError:
                    self._wait_for_server(self.writable)
        except (ServerLostError, OSError) as error:
            self.lose_server(error)

    def _forward_request(self, client: socket.socket, n: int) -> None:
        """Forward the next ``n`` bytes from the client to the server."""
        while n and not self.lost:
            left = os.splice(client.fileno(), self.pipe[1], n)
            if not left:
                raise ConnectionResetError
            n -= left
            try:
                while left:
                    self._wait_for_server(self.writable)
                    left -= os.splice(self.pipe[0], self.server.fileno(), left)
            except (ServerLostError, OSError) as error:
                self.lose_server(error)
                while left:
                    left -= len(os.read(self.pipe[0], left))
        while n:
            n -= len(client.recv(min(n, _HEAD_SIZE), socket.MSG_WAITALL)) or n

    # ------------------------------------------------------------------ answers, from the server to the client

    def _answer(self, client: socket.socket, command: int, body: bytes, size: int) -> None:
        """Forward the server's answer of ``size`` bytes, or send a substitute."""
        head = ANSWER_HEAD.pack(size)
        first = min(size, _HEAD_SIZE)
        try:
            if self.lost:
                raise ServerLostError
            answer = self._receive(command, head, first)
            _check_answer(command, body, answer)
        except (ServerLostError, OSError) as error:
            self.lose_server(error)
            answer = substitute_answer(command, body, first)
        client.sendall(head + answer)
        for left in range(size - first, 0, -_CHUNK):
            self._forward_answer(client, min(left, _CHUNK))

    def _receive(self, command: int, head: bytes, n: int) -> bytes:
        """Return the next ``n`` bytes from the server, after checking that ``head`` comes first."""
        data = b""
        while len(data) < len(head) + n:
            self._wait_for_server(self.readable)
            part = self.server.recv(len(head) + n - len(data))
            if not part:
                raise ServerLostError(_CLOSED)
            data += part
            if len(data) >= len(head) and not data.startswith(head):
                (size,) = ANSWER_HEAD.unpack_from(data)
                raise ServerLostError(
                    f"answered {Command(command).name} with {size} bytes instead of {ANSWER_HEAD.unpack(head)[0]}"
                )
        return data[len(head) :]

    def _forward_answer(self, client: socket.socket, n: int) -> None:
        """Forward the next ``n`` bytes from the server to the client, zeros once the server is lost."""
        while n and not self.lost:
            try:
                self._wait_for_server(self.readable)
                left = os.splice(self.server.fileno(), self.pipe[1], n)
                if not left:
                    raise ServerLostError(_CLOSED)
            except (ServerLostError, OSError) as error:
                self.lose_server(error)
                break
            n -= left
            while left:
                left -= os.splice(self.pipe[0], client.fileno(), left)
        client.sendall(bytes(n))


class Graphs:
    """The graphs that the client may ask the server to repeat, and those that the server can repeat.

    When a buffer is freed, a server forgets its graphs, and closes the connection when it is asked for one. ggml's
    client does not take this into account, so the proxy sends such a graph again. Before version 8, a server keeps the
    last graph of each device. From then on, client and server keep 1024 graphs of each device, and before a further one
    they drop all.

    Parameters
    ----------
    key_size
        Bytes that name a graph; see :func:`ggml_cffi.rpc.protocol.graph_key_size`.
    """

    def __init__(self, key_size: int) -> None:
        self.key_size = key_size
        self.sent: defaultdict[bytes, dict[bytes, bytes]] = defaultdict(dict)
        """The compressed requests of each device, as the client counts them."""
        self.kept: defaultdict[bytes, dict[bytes, bool]] = defaultdict(dict)
        """The graphs of each device, as the server counts them: false if it forgot what the graph was."""

    def renew(self, command: int, head: bytes, body: bytes) -> bytes:
        """Return a request as the server can serve it: a forgotten graph is sent again."""
        device, key, request = body[:4], body[: self.key_size], head + body
        if command == Command.FREE_BUFFER:
            for graphs in self.kept.values():
                graphs.update(dict.fromkeys(graphs, False))
        elif command == Command.GRAPH_COMPUTE and not key.endswith(_NO_NUMBER):
            _keep(self.sent[device], key, zlib.compress(request, 1))
            _keep(self.kept[device], key, True)
        elif command == Command.GRAPH_RECOMPUTE and not self.kept[device].get(key):
            _keep(self.kept[device], key, True)
            return zlib.decompress(self.sent[device][key])
        return request


def _keep(graphs: dict[bytes, _Value], key: bytes, value: _Value) -> None:
    """Add a graph to those of a device, as ggml does."""
    if len(graphs) >= KEPT_GRAPHS:
        graphs.clear()
    graphs[key] = value


def _reason(error: Exception) -> str:
    if isinstance(error, ServerLostError):
        return str(error)
    if isinstance(error, ConnectionError):
        return _CLOSED
    return f"cannot be reached any more ({getattr(error, 'strerror', None) or error})"


def _check_answer(command: int, body: bytes, answer: bytes) -> None:
    """Raise :class:`ServerLostError` for an answer that would make C end its process."""
    if command == Command.BUFFER_GET_BASE and not any(answer):
        raise ServerLostError("gave memory without an address")
    if command == Command.ALLOC_BUFFER:
        pointer, size = struct.unpack("<QQ", answer)
        if pointer and size < struct.unpack_from("<Q", body, 4)[0]:
            raise ServerLostError("gave less memory than was asked for")


def substitute_answer(command: int, body: bytes, size: int) -> bytes:
    """Return an answer of ``size`` bytes that lets C continue.

    Parameters
    ----------
    command, body
        The request.
    size
        Bytes of the answer.
    """
    if command == Command.ALLOC_BUFFER:
        return struct.pack("<QQ", _DUMMY_ADDRESS, struct.unpack_from("<Q", body, 4)[0])
    if command == Command.GET_ALLOC_SIZE:
        sizes = struct.unpack_from("<4I4I", body, 4 + 20)  # ne and nb of the tensor
        return ANSWER_HEAD.pack(max(n * stride for n, stride in zip(sizes[:4], sizes[4:], strict=True)))
    if command == Command.GET_MAX_SIZE:
        return b"\xff" * size
    values: dict[int, int] = {
        Command.BUFFER_GET_BASE: _DUMMY_ADDRESS,
        Command.GET_ALIGNMENT: 64,
        Command.DEVICE_COUNT: 1,
        Command.COPY_TENSOR: 1,
        Command.SET_TENSOR_HASH: 1,  # the server has these bytes already: the client sends nothing
    }
    return values.get(command, 0).to_bytes(size, "little")


def main() -> None:
    """Run the proxy.

    The arguments are the file descriptors of the listener, the server and the shared memory, the version of the
    protocol, and the patience.
    """
    # The parent handles these signals, and may need the proxy to disconnect properly.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    listener, server = (socket.socket(fileno=int(fd)) for fd in sys.argv[1:3])
    state, protocol, patience = mmap.mmap(int(sys.argv[3]), STATE_SIZE), parse_version(sys.argv[4]), float(sys.argv[5])
    Proxy(listener, server, state, protocol, patience).run()
