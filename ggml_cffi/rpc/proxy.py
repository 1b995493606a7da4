"""What stands between ggml's RPC client and one server: a process of its own, on the loopback.

ggml's client ends its process when the server is lost, or answers what it does not expect. So it never talks to a
server: it talks to this relay, which passes everything on and cannot be lost. When the server is, the relay says so in
shared memory, where :mod:`ggml_cffi.rpc.connection` looks after each call, and goes on answering with what lets C carry
on: memory is granted, tensors read as zeros.

It is a process and not a thread, because a thread needs the interpreter: whoever holds that may be waiting for an
answer which only the relay can give. The garbage collector, for one, runs in any thread, and frees remote memory.

Run as a script, without the package: only the standard library is imported. It lives until its standard input ends,
with the process that started it.
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
from enum import IntEnum

PROTOCOL = (5, 0, 0)
STATE_SIZE = 4096  # bytes of shared memory: 1 once the server is lost, then why
DROP = b"d"  # on standard input: let go of the server; _remote says it

_FIRST = 64 << 10  # bytes of a message that are passed on in one piece; only weights and activations have more
_MOST = 1 << 20  # bytes that are moved at a time from there on
_BASE = 1 << 32  # where memory that nobody has pretends to be
_HEAD = struct.Struct("<BQ")  # command, bytes to come
_SIZE = struct.Struct("<Q")


class Command(IntEnum):
    """First byte of a request. C: ``enum rpc_cmd``."""

    ALLOC_BUFFER = 0
    GET_ALIGNMENT = 1
    GET_MAX_SIZE = 2
    BUFFER_GET_BASE = 3
    FREE_BUFFER = 4
    BUFFER_CLEAR = 5
    SET_TENSOR = 6
    SET_TENSOR_HASH = 7
    GET_TENSOR = 8
    COPY_TENSOR = 9
    GRAPH_COMPUTE = 10
    GET_DEVICE_MEMORY = 11
    INIT_TENSOR = 12
    GET_ALLOC_SIZE = 13
    HELLO = 14
    DEVICE_COUNT = 15
    GRAPH_RECOMPUTE = 16
    MEMSET_TENSOR = 17


#: Bytes of the answer. A tensor's are as many as were asked for; what is not here has no answer.
ANSWERS = {
    Command.ALLOC_BUFFER: 16,
    Command.GET_ALIGNMENT: 8,
    Command.GET_MAX_SIZE: 8,
    Command.BUFFER_GET_BASE: 8,
    Command.FREE_BUFFER: 0,
    Command.BUFFER_CLEAR: 0,
    Command.SET_TENSOR_HASH: 1,
    Command.COPY_TENSOR: 1,
    Command.GET_DEVICE_MEMORY: 16,
    Command.INIT_TENSOR: 0,
    Command.GET_ALLOC_SIZE: 8,
    Command.HELLO: 28,
    Command.DEVICE_COUNT: 4,
    Command.MEMSET_TENSOR: 0,
}


class LostError(Exception):
    """The server cannot be talked to any more; the message says why."""


class Relay:
    """One server, and the client that is connected at the moment.

    Parameters
    ----------
    listener
        Where the client connects.
    server
        Connected, and greeted.
    state
        Shared memory.
    patience
        Seconds that the server may take to answer, or to accept more.
    """

    def __init__(self, listener: socket.socket, server: socket.socket, state: mmap.mmap, patience: float) -> None:
        self.listener, self.server, self.state, self.patience = listener, server, state, patience
        self.dropped = False
        self.pipe = os.pipe()
        with contextlib.suppress(OSError):  # more than this user may have
            fcntl.fcntl(self.pipe[1], fcntl.F_SETPIPE_SZ, _MOST)
        server.setblocking(False)
        self.readable, self.writable = select.poll(), select.poll()
        for poll, event in ((self.readable, select.POLLIN), (self.writable, select.POLLOUT)):
            poll.register(server, event)
            poll.register(0, select.POLLIN)

    @property
    def lost(self) -> bool:
        """Whether answers are made up here."""
        return bool(self.state[0])

    def lose(self, error: Exception) -> None:
        """Let go of the server, and say so before anything is answered."""
        if not self.lost:
            text = _reason(error).encode()[: STATE_SIZE - 2]
            self.state[1 : 1 + len(text)] = text
            self.state[0] = 1
            self.server.close()

    def run(self) -> None:
        """Serve one client after the other, until the server was dropped and nobody is left."""
        while self._idle(self.listener):
            client, _ = self.listener.accept()
            with client, contextlib.suppress(ConnectionError):
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._serve(client)

    def _serve(self, client: socket.socket) -> None:
        while self._idle(client) and len(head := client.recv(_HEAD.size, socket.MSG_WAITALL)) == _HEAD.size:
            command, size = _HEAD.unpack(head)
            first = min(size, _FIRST)
            body = client.recv(first, socket.MSG_WAITALL) if first else b""
            if len(body) < first:
                return
            if command == Command.HELLO:  # the server was greeted when this process was started
                client.sendall(_SIZE.pack(ANSWERS[command]) + bytes(PROTOCOL).ljust(ANSWERS[command], b"\0"))
                continue
            self._ask(head + body)
            for left in range(size - first, 0, -_MOST):
                self._pass_up(client, min(left, _MOST))
            answer = _SIZE.unpack(body[-8:])[0] if command == Command.GET_TENSOR else ANSWERS.get(command)
            if answer is not None:
                self._answer(client, command, body, answer)

    # ------------------------------------------------------------------ waiting

    def _idle(self, source: socket.socket) -> bool:
        """Wait until ``source`` has something; False if nothing will come."""
        while not (self.dropped and source is self.listener):
            poll = select.poll()
            for fd in (source, 0) if self.lost else (source, 0, self.server):
                poll.register(fd, select.POLLIN)
            ready = [fd for fd, _ in poll.poll()]
            if 0 in ready:
                self._obey()
            elif ready == [source.fileno()]:
                return True
            else:
                try:
                    self.lose(LostError("sent what nobody had asked for" if self.server.recv(1) else _CLOSED))
                except OSError as error:
                    self.lose(error)
        return False

    def _wait(self, poll: select.poll) -> None:
        """Until the server has something (:attr:`readable`), or takes something (:attr:`writable`)."""
        ready = poll.poll(self.patience * 1000)
        if not ready:
            raise LostError(f"has been silent for {self.patience:g} s")
        if any(fd == 0 for fd, _ in ready):
            self._obey()
            raise LostError("was disconnected")

    def _obey(self) -> None:
        """Do what the process says that started this one. If that has ended, nobody is left."""
        if os.read(0, 1) != DROP:
            os._exit(0)
        self.dropped = True
        self.lose(LostError("was disconnected"))

    # ------------------------------------------------------------------ up: requests

    def _ask(self, request: bytes) -> None:
        if self.lost:
            return
        view = memoryview(request)
        try:
            while view:
                try:
                    view = view[self.server.send(view) :]
                except BlockingIOError:
                    self._wait(self.writable)
        except (LostError, OSError) as error:
            self.lose(error)

    def _pass_up(self, client: socket.socket, n: int) -> None:
        """The next ``n`` bytes from the client to the server."""
        while n and not self.lost:
            left = os.splice(client.fileno(), self.pipe[1], n)
            if not left:
                raise ConnectionResetError
            n -= left
            try:
                while left:
                    self._wait(self.writable)
                    left -= os.splice(self.pipe[0], self.server.fileno(), left)
            except (LostError, OSError) as error:
                self.lose(error)
                while left:
                    left -= len(os.read(self.pipe[0], left))
        while n:
            n -= len(client.recv(min(n, _FIRST), socket.MSG_WAITALL)) or n

    # ------------------------------------------------------------------ down: answers

    def _answer(self, client: socket.socket, command: int, body: bytes, size: int) -> None:
        """Pass on the answer, ``size`` bytes, or make one up."""
        head = _SIZE.pack(size)
        first = min(size, _FIRST)
        try:
            if self.lost:
                raise LostError
            answer = self._receive(command, head, first)
            _check(command, body, answer)
        except (LostError, OSError) as error:
            self.lose(error)
            answer = pretend(command, body, first)
        client.sendall(head + answer)
        for left in range(size - first, 0, -_MOST):
            self._pass_down(client, min(left, _MOST))

    def _receive(self, command: int, head: bytes, n: int) -> bytes:
        """The next ``n`` bytes from the server, which are to come after ``head``."""
        data = b""
        while len(data) < len(head) + n:
            self._wait(self.readable)
            part = self.server.recv(len(head) + n - len(data))
            if not part:
                raise LostError(_CLOSED)
            data += part
            if len(data) >= len(head) and not data.startswith(head):
                (size,) = _SIZE.unpack_from(data)
                raise LostError(
                    f"answered {Command(command).name} with {size} bytes instead of {_SIZE.unpack(head)[0]}"
                )
        return data[len(head) :]

    def _pass_down(self, client: socket.socket, n: int) -> None:
        """The next ``n`` bytes from the server to the client."""
        while n and not self.lost:
            try:
                self._wait(self.readable)
                left = os.splice(self.server.fileno(), self.pipe[1], n)
                if not left:
                    raise LostError(_CLOSED)
            except (LostError, OSError) as error:
                self.lose(error)
                break
            n -= left
            while left:
                left -= os.splice(self.pipe[0], client.fileno(), left)
        client.sendall(bytes(n))


_CLOSED = "closed the connection"


def _reason(error: Exception) -> str:
    if isinstance(error, LostError):
        return str(error)
    if isinstance(error, ConnectionError):
        return _CLOSED
    return f"cannot be reached any more ({getattr(error, 'strerror', None) or error})"


def _check(command: int, body: bytes, answer: bytes) -> None:
    """Raise :class:`LostError` for an answer that C cannot do with."""
    if command == Command.BUFFER_GET_BASE and not any(answer):
        raise LostError("gave memory without an address")
    if command == Command.ALLOC_BUFFER:
        pointer, size = struct.unpack("<QQ", answer)
        if pointer and size < struct.unpack_from("<Q", body, 4)[0]:
            raise LostError("gave less memory than was asked for")


def pretend(command: int, body: bytes, size: int) -> bytes:
    """An answer of ``size`` bytes with which C goes on."""
    if command == Command.ALLOC_BUFFER:
        return struct.pack("<QQ", _BASE, struct.unpack_from("<Q", body, 4)[0])
    if command == Command.GET_ALLOC_SIZE:
        sizes = struct.unpack_from("<4I4I", body, 4 + 20)  # of the tensor: ne, nb
        return _SIZE.pack(max(n * stride for n, stride in zip(sizes[:4], sizes[4:], strict=True)))
    if command == Command.GET_MAX_SIZE:
        return b"\xff" * size
    values: dict[int, int] = {
        Command.BUFFER_GET_BASE: _BASE,
        Command.GET_ALIGNMENT: 64,
        Command.DEVICE_COUNT: 1,
        Command.COPY_TENSOR: 1,
        Command.SET_TENSOR_HASH: 1,  # the server has these bytes already
    }
    return values.get(command, 0).to_bytes(size, "little")


def main() -> None:
    """Arguments: descriptors of the listener, the server and the shared memory; patience."""
    # Signals are for the process that started this one, which may want to close in good order.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    listener, server = (socket.socket(fileno=int(fd)) for fd in sys.argv[1:3])
    Relay(listener, server, mmap.mmap(int(sys.argv[3]), STATE_SIZE), float(sys.argv[4])).run()


if __name__ == "__main__":
    main()
