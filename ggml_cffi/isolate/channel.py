"""IPC channels: connections that carry objects by a socket, and large arrays by shared memory.

The sender copies the large arrays of a message into a block of shared memory. The receiver's arrays are views of that
block. Once the last view is gone, the receiver's next message reports that the block is free. Only then does the sender
reuse the block, so both sides may keep arrays for any time.

Blocks have no names (``memfd``). The kernel frees a block when the last process that has mapped it ends, even in a
crash. The size limit of ``/dev/shm`` does not apply.
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

_SHARED_SIZE = 16 << 10  # bytes: from this size on, shared memory is faster than the socket
_MAX_BUFFERS = 1000  # buffers of one message; more go into the pickle, because the list of sizes must fit into a packet
_PACKET = 64 << 10
_ALIGNMENT = 64  # bytes: the alignment of arrays in a block, as ggml needs it
_MAX_VIEWS = 8  # blocks that a receiver may view at a time; it copies beyond that, to limit open file descriptors
_IDLE = 16  # messages after which an unused block is freed
_FD_SPACE = socket.CMSG_SPACE(array.array("i", [0]).itemsize)

Bytes = npt.NDArray[np.uint8]


class Packet(NamedTuple):
    """A message that has arrived."""

    tag: int
    """The number that the sender passed to :meth:`Channel.send`."""
    data: Any
    buffers: Sequence[Any]

    def load(self) -> Any:
        """Return the message. Raise any exception of importing or creating its objects."""
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
        # Blocks that this side created and writes to:
        self._blocks: dict[int, Bytes] = {}
        self._free: dict[int, int] = {}  # blocks without views, with the number of the last message in each
        self._n_blocks = self._n_sent = 0
        self._freed: list[int] = []  # blocks that the other side must unmap
        # Blocks that the other side created and this side reads:
        self._mapped: dict[int, mmap.mmap] = {}
        self._viewed: set[int] = set()
        self._released: list[int] = []  # blocks without views left, to be reported to the other side

    def send(self, tag: int, message: Any) -> None:
        """Send an object, with a number that the receiver finds in :attr:`Packet.tag`.

        Raises
        ------
        ConnectionError
            If the other process has ended.
        Exception
            Any exception of pickling the object. Nothing has been sent then.
        """
        data, buffers = pack(message)
        if len(data) > _SHARED_SIZE:
            buffers.append(np.frombuffer(data, np.uint8))
            data = b""
        self._n_sent += 1
        number, fd = self._fill(buffers) if buffers else (-1, None)
        self._free_idle()
        released, freed = self._released[:], self._freed[:]
        packet = marshal.dumps((tag, data, number, [b.size for b in buffers], released, freed))
        try:
            if fd is None:
                self._socket.send(packet)
            else:
                socket.send_fds(self._socket, [packet], [fd])
        finally:
            if fd is not None:
                os.close(fd)
        del self._released[: len(released)], self._freed[: len(freed)]

    def recv(self, deadline: float | None = None) -> Packet:
        """Wait for the next message, until ``time.monotonic()`` reaches ``deadline``.

        Raises
        ------
        EOFError
            If the other process has ended.
        TimeoutError
            If no message arrived in time.
        """
        if deadline is not None or self._socket.gettimeout() is not None:
            self._socket.settimeout(None if deadline is None else max(deadline - time.monotonic(), 1e-3))
        try:
            packet, extra, _, _ = self._socket.recvmsg(_PACKET, _FD_SPACE, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            packet = b""
        if not packet:
            raise EOFError("the other process has ended")
        tag, data, number, sizes, released, freed = marshal.loads(packet)
        for _, _, fd in extra:
            self._map(number, int.from_bytes(fd[:4], sys.byteorder))
        for block in freed:
            del self._mapped[block]
        for block in released:
            self._free[block] = self._n_sent
        buffers = self._views(number, sizes) if sizes else []
        return Packet(tag, data or buffers.pop(), buffers)

    def trim(self) -> None:
        """Free the blocks that have no views."""
        for number in list(self._free):
            del self._free[number], self._blocks[number]
            self._freed.append(number)

    def close(self) -> None:
        """Close this end. Received arrays stay valid."""
        self._socket.close()
        self._blocks.clear()
        self._free.clear()
        self._mapped.clear()

    # ------------------------------------------------------------------ sending

    def _fill(self, buffers: list[Bytes]) -> tuple[int, int | None]:
        """Copy buffers into a block; return its number, and its file descriptor if the other side has not mapped it."""
        sizes = [b.size for b in buffers]
        number, fd = self._block(sum(_padded(size) for size in sizes))
        for source, (start, end) in zip(buffers, _spans(sizes), strict=True):
            self._blocks[number][start:end] = source  # numpy copies without the GIL
        return number, fd

    def _block(self, size: int) -> tuple[int, int | None]:
        """Return the number of a free block of at least ``size`` bytes, and the file descriptor of a new one."""
        fitting = [number for number in self._free if self._blocks[number].size >= size]
        if fitting:
            number = min(fitting, key=lambda n: self._blocks[n].size)
            del self._free[number]
            return number, None
        # A power of two also fits later messages that are a little larger. Pages that are never written take no memory.
        size = 1 << max(size - 1, 4095).bit_length()
        fd = os.memfd_create("ggml_cffi")
        try:
            os.ftruncate(fd, size)
            memory = np.frombuffer(mmap.mmap(fd, size), np.uint8)
        except BaseException:
            os.close(fd)
            raise
        self._n_blocks += 1
        self._blocks[self._n_blocks] = memory
        return self._n_blocks, fd

    def _free_idle(self) -> None:
        for number, used in list(self._free.items()):
            if self._n_sent - used > _IDLE:
                del self._free[number], self._blocks[number]
                self._freed.append(number)

    # ------------------------------------------------------------------ receiving

    def _map(self, number: int, fd: int) -> None:
        try:
            self._mapped[number] = mmap.mmap(fd, 0)
        finally:
            os.close(fd)

    def _views(self, number: int, sizes: list[int]) -> list[Any]:
        block = np.frombuffer(self._mapped[number], np.uint8)
        views = [memoryview(block.data)[start:end] for start, end in _spans(sizes)]
        if len(self._viewed) >= _MAX_VIEWS:
            self._released.append(number)
            return [bytearray(view) for view in views]
        # Each view, and each array on top of a view, holds ``block``: its finalizer runs after the last of them.
        self._viewed.add(number)
        weakref.finalize(block, _release, number, self._viewed, self._released).atexit = False
        return views


def pack(message: Any) -> tuple[bytes, list[Bytes]]:
    """Return ``message`` as a pickle, and the memory of its large arrays separately.

    Functions and classes that the other process cannot import, because they are local or defined in ``__main__``, are
    sent with their code, by cloudpickle.
    """
    buffers: list[Bytes] = []

    def in_band(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < _SHARED_SIZE or len(buffers) >= _MAX_BUFFERS:
            return True
        buffers.append(np.frombuffer(raw, np.uint8))
        return False

    stream = io.BytesIO()
    try:
        _Pickler(stream, 5, buffer_callback=in_band).dump(message)
        data = stream.getvalue()
        if b"__main__" not in data:
            return data, buffers
    except (pickle.PicklingError, AttributeError, TypeError):
        pass
    import cloudpickle

    buffers.clear()
    return cloudpickle.dumps(message, 5, buffer_callback=in_band), buffers


def _reduce_array(values: npt.NDArray[Any]) -> tuple[Any, ...]:
    """Return a reduction of an array that unpickles in half the time of numpy's own."""
    if values.dtype.kind not in "biufc":
        reduced: tuple[Any, ...] = values.__reduce_ex__(5)  # type: ignore[assignment]
        return reduced
    if not values.flags.c_contiguous:
        values = np.ascontiguousarray(values)
    return np.ndarray, (values.shape, values.dtype.str, pickle.PickleBuffer(values.data))


class _Pickler(pickle.Pickler):
    dispatch_table: ClassVar[Any] = ChainMap({np.ndarray: _reduce_array}, copyreg.dispatch_table)  # type: ignore[misc]


def _release(number: int, viewed: set[int], released: list[int]) -> None:
    viewed.discard(number)
    released.append(number)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _spans(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Yield the start and end of each buffer in a block, for buffers of these sizes."""
    start = 0
    for size in sizes:
        yield start, start + size
        start += _padded(size)
