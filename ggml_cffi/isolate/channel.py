"""Objects to another process and back: small ones through a socket, arrays through memory that both have mapped.

The sender copies what is large in a message into a block of shared memory. The receiver's arrays are views of it, and
the block is used again only after the last of them is gone, which the receiver tells with the next message that it
sends. So an array may be kept for as long as anybody likes, on both sides.

Blocks have no names (``memfd``): the kernel frees them with the last process that has them mapped, however that ends,
and no limit of ``/dev/shm`` applies to them.
"""

from __future__ import annotations

import array
import copyreg
import io
import marshal
import mmap
import os
import pickle
import socket
import sys
import time
import weakref
from collections import ChainMap
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

_SMALL = 16 << 10  # bytes from which on memory is quicker than the socket
_MOST_BUFFERS = 1000  # of one message; the rest goes into its pickle, so that what the socket gets stays small
_PACKET = 64 << 10
_ALIGNMENT = 64  # of arrays in a block: as ggml wants its memory
_VIEWS = 8  # blocks that a receiver may look at; it takes copies from then on, so that file descriptors do not run out
_IDLE = 16  # messages after which a block that was not used is given up
_FD_SPACE = socket.CMSG_SPACE(array.array("i", [0]).itemsize)

Bytes = npt.NDArray[np.uint8]


class Packet(NamedTuple):
    """A message that has arrived."""

    tag: int
    """What the sender gave it."""
    data: Any
    buffers: Sequence[Any]

    def load(self) -> Any:
        """The message. Raises what its classes raise when they are imported or made."""
        return pickle.loads(self.data, buffers=self.buffers)


class Channel:
    """One end of a connection to another process. One thread at a time may send, and one receive.

    Parameters
    ----------
    sock
        A connected Unix socket that keeps messages apart (``SOCK_SEQPACKET``).
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._blocks: dict[int, Bytes] = {}  # ours, for what we send
        self._free: dict[int, int] = {}  # those that nobody looks at, with the message that last used each
        self._made = self._sent = 0
        self._dropped: list[int] = []
        self._mapped: dict[int, mmap.mmap] = {}  # the other side's
        self._viewed: set[int] = set()
        self._released: list[int] = []

    def send(self, tag: int, message: Any) -> None:
        """Send an object. What cannot be pickled raises before anything is sent.

        Raises
        ------
        ConnectionError
            If the other process is gone.
        """
        data, buffers = pack(message)
        if len(data) > _SMALL:
            buffers.append(np.frombuffer(data, np.uint8))
            data = b""
        self._sent += 1
        number, fd = self._fill(buffers) if buffers else (-1, None)
        self._drop_idle()
        released, dropped = self._released[:], self._dropped[:]
        packet = marshal.dumps((tag, data, number, [b.size for b in buffers], released, dropped))
        try:
            if fd is None:
                self._socket.send(packet)
            else:
                socket.send_fds(self._socket, [packet], [fd])
        finally:
            if fd is not None:
                os.close(fd)
        del self._released[: len(released)], self._dropped[: len(dropped)]

    def recv(self, deadline: float | None = None) -> Packet:
        """Wait for the next message, until ``time.monotonic()`` reaches ``deadline``.

        Raises
        ------
        EOFError
            If the other process is gone.
        TimeoutError
            If no message came.
        """
        if deadline is not None or self._socket.gettimeout() is not None:
            self._socket.settimeout(None if deadline is None else max(deadline - time.monotonic(), 1e-3))
        try:
            packet, extra, _, _ = self._socket.recvmsg(_PACKET, _FD_SPACE, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            packet = b""
        if not packet:
            raise EOFError("the other process is gone")
        tag, data, number, sizes, released, dropped = marshal.loads(packet)
        for _, _, fd in extra:
            self._map(number, int.from_bytes(fd[:4], sys.byteorder))
        for block in dropped:
            del self._mapped[block]
        for block in released:
            self._free[block] = self._sent
        buffers = self._views(number, sizes) if sizes else []
        return Packet(tag, data or buffers.pop(), buffers)

    def trim(self) -> None:
        """Give up the blocks that nobody looks at."""
        for number in list(self._free):
            del self._free[number], self._blocks[number]
            self._dropped.append(number)

    def close(self) -> None:
        """Close this end. Arrays that were received stay."""
        self._socket.close()
        self._blocks.clear()
        self._free.clear()
        self._mapped.clear()

    # ------------------------------------------------------------------ what is sent

    def _fill(self, buffers: list[Bytes]) -> tuple[int, int | None]:
        """Copy buffers into a block: its number, and its file descriptor if the other side does not have it yet."""
        sizes = [b.size for b in buffers]
        number, fd = self._block(sum(_padded(size) for size in sizes))
        for source, (start, end) in zip(buffers, _spans(sizes), strict=True):
            self._blocks[number][start:end] = source  # numpy copies without Python's global lock
        return number, fd

    def _block(self, size: int) -> tuple[int, int | None]:
        fitting = [number for number in self._free if self._blocks[number].size >= size]
        if fitting:
            number = min(fitting, key=lambda n: self._blocks[n].size)
            del self._free[number]
            return number, None
        # A power of two, so that it serves messages that are a little larger. What is not written takes no memory.
        size = 1 << max(size - 1, 4095).bit_length()
        fd = os.memfd_create("ggml_cffi")
        try:
            os.ftruncate(fd, size)
            memory = np.frombuffer(mmap.mmap(fd, size), np.uint8)
        except BaseException:
            os.close(fd)
            raise
        self._made += 1
        self._blocks[self._made] = memory
        return self._made, fd

    def _drop_idle(self) -> None:
        for number, used in list(self._free.items()):
            if self._sent - used > _IDLE:
                del self._free[number], self._blocks[number]
                self._dropped.append(number)

    # ------------------------------------------------------------------ what is received

    def _map(self, number: int, fd: int) -> None:
        try:
            self._mapped[number] = mmap.mmap(fd, 0)
        finally:
            os.close(fd)

    def _views(self, number: int, sizes: list[int]) -> list[Any]:
        block = np.frombuffer(self._mapped[number], np.uint8)
        views = [memoryview(block.data)[start:end] for start, end in _spans(sizes)]
        if len(self._viewed) >= _VIEWS:
            self._released.append(number)
            return [bytearray(view) for view in views]
        # Every view holds ``block``, and so does what is made from a view: with the last of them it goes.
        self._viewed.add(number)
        weakref.finalize(block, _release, number, self._viewed, self._released).atexit = False
        return views


def pack(message: Any) -> tuple[bytes, list[Bytes]]:
    """``message`` as a pickle, and the memory of its large arrays apart from it.

    Functions and classes that the other process cannot import, since they are local or this program's own, are sent
    with their code, by cloudpickle.
    """
    buffers: list[Bytes] = []

    def inside(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < _SMALL or len(buffers) >= _MOST_BUFFERS:
            return True
        buffers.append(np.frombuffer(raw, np.uint8))
        return False

    stream = io.BytesIO()
    try:
        _Pickler(stream, 5, buffer_callback=inside).dump(message)
        data = stream.getvalue()
        if b"__main__" not in data:
            return data, buffers
    except (pickle.PicklingError, AttributeError, TypeError):
        pass
    import cloudpickle

    buffers.clear()
    return cloudpickle.dumps(message, 5, buffer_callback=inside), buffers


def _reduced(values: npt.NDArray[Any]) -> tuple[Any, ...]:
    """How to make an array again: half the time of numpy's own way."""
    if values.dtype.kind not in "biufc":
        reduced: tuple[Any, ...] = values.__reduce_ex__(5)  # type: ignore[assignment]
        return reduced
    if not values.flags.c_contiguous:
        values = np.ascontiguousarray(values)
    return np.ndarray, (values.shape, values.dtype.str, pickle.PickleBuffer(values.data))


class _Pickler(pickle.Pickler):
    dispatch_table: ClassVar[Any] = ChainMap({np.ndarray: _reduced}, copyreg.dispatch_table)  # type: ignore[misc]


def _release(number: int, viewed: set[int], released: list[int]) -> None:
    viewed.discard(number)
    released.append(number)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _spans(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Where buffers of these sizes are in a block."""
    start = 0
    for size in sizes:
        yield start, start + size
        start += _padded(size)
