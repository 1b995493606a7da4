"""Peers that look like RPC servers to a client, and compute nothing."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

from ggml_cffi.rpc.handshake import protocol
from ggml_cffi.rpc.protocol import Command, answers, bytes_to_read
from ggml_cffi.rpc.proxy import substitute_answer


class Peer:
    """A listener on the loopback that serves one client after the other, in a thread, until the ``with`` ends."""

    def __enter__(self):
        self.clients = []
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen()
        self.endpoint = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        return self

    def run(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.clients.append(client)
            with client, contextlib.suppress(OSError, struct.error):  # the client is gone
                self.serve(client)

    def serve(self, client):
        """Read all requests, and answer none."""
        client.recv(1 << 20)
        while client.recv(1 << 20):
            pass

    def __exit__(self, *_):
        for s in (self.listener, *self.clients):
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()


class Talker(Peer):
    """A peer that sends the same bytes to every client, and closes the connection."""

    def __init__(self, text):
        self.text = text

    def serve(self, client):
        client.recv(1 << 10)
        client.sendall(self.text)


class Pretender(Peer):
    """A peer that speaks the protocol: it grants memory, and tensors read as zeros.

    Parameters
    ----------
    answers
        The bytes to send for a command, by its name, their length included; None to send nothing.
    """

    def __init__(self, **answers):
        self.answers = {Command[name]: answer for name, answer in answers.items()}
        self.asked = []

    def serve(self, client):
        while head := client.recv(9, socket.MSG_WAITALL):
            command, size = struct.unpack("<BQ", head)
            command = Command(command)
            body = client.recv(size, socket.MSG_WAITALL) if size else b""
            self.asked.append(command)
            if command in self.answers:
                if self.answers[command] is not None:
                    client.sendall(self.answers[command])
                continue
            n = bytes_to_read(command, body)
            n = answers(protocol()).get(command) if n is None else n
            if n is not None:
                client.sendall(struct.pack("<Q", n) + self.answer(command, body, n))

    def answer(self, command, body, n):
        if command is Command.HELLO:
            return bytes(protocol()).ljust(n, b"\0")
        return substitute_answer(command, body, n)
