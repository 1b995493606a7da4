"""Constants of the protocol of ggml's RPC backend, and of the state that an RPC proxy shares with its parent.

The proxy imports this module and nothing else of the package, so it needs the standard library only.
"""

from __future__ import annotations

import struct
from enum import IntEnum

Version = tuple[int, int, int]
"""A version of the protocol: major, minor, patch. The major versions of a client and its server are equal."""
REQUEST_HEAD = struct.Struct("<BQ")
"""The head of a request: the command, and the number of bytes that follow."""
ANSWER_HEAD = struct.Struct("<Q")
"""The head of an answer: the number of bytes that follow."""

STATE_SIZE = 4096
"""Bytes of the shared memory. The first is 1 once the server is lost, the others are the reason as UTF-8 text."""
DISCONNECT = b"d"
"""The command on the proxy's standard input that disconnects it from the server."""


class Command(IntEnum):
    """The first byte of a request. C: ``enum rpc_cmd``."""

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
    # From version 8 (ggml 0.27) on:
    SET_TENSOR_2D = 18
    GET_TENSOR_2D = 19
    COMM_INIT = 20
    COMM_ALLREDUCE = 21
    COMM_FREE = 22


_ANSWERS = {
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
    Command.COMM_INIT: 1,
}
# From version 7 (ggml 0.25) on, these have no answer any more.
_UNANSWERED = {Command.FREE_BUFFER, Command.BUFFER_CLEAR, Command.INIT_TENSOR, Command.MEMSET_TENSOR}


def answers(version: Version) -> dict[int, int]:
    """Return the bytes of the answer to each command that has an answer of a fixed size."""
    return {int(k): n for k, n in _ANSWERS.items() if version < (7, 0, 0) or k not in _UNANSWERED}


def bytes_to_read(command: int, body: bytes) -> int | None:
    """Return the bytes that a request reads from a tensor, None if it does not read one."""
    if command == Command.GET_TENSOR:
        return int.from_bytes(body[-8:], "little")
    if command == Command.GET_TENSOR_2D:
        size, n_copies, _stride = struct.unpack("<3Q", body[-24:])
        return int(size * n_copies)
    return None


def graph_key_size(version: Version) -> int:
    """Return the bytes that name a graph, at the beginning of the body of ``GRAPH_COMPUTE`` and ``GRAPH_RECOMPUTE``.

    They are the device (4 bytes), and from version 8 on the number of the graph (8 bytes). 0: the server never forgets
    a graph that its client asks for.
    """
    if version < (7, 0, 0):
        return 0
    return 4 if version < (8, 0, 0) else 12


def version_text(version: Version) -> str:
    """Return a version such as ``"7.0.0"``."""
    return ".".join(map(str, version))


def parse_version(text: str) -> Version:
    """Return the version that :func:`version_text` gave as text."""
    major, minor, patch = map(int, text.split("."))
    return major, minor, patch
