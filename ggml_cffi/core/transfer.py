"""Transfers between devices.

Devices that can import host memory (Vulkan: ``VK_EXT_external_memory_host``), or address pinned memory (CUDA), read and
write it themselves, at the speed of their link and without the processor. Several devices share one :class:`HostBlock`.
Data goes from one GPU to another through the block in chunks: one device fills one half while the other device empties
the other half. Between devices with unified addresses it takes the direct way.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import ExitStack
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ggml_cffi import c
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.buffer import Buffer, BufferType, HostMemory
from ggml_cffi.core.device import Device, DeviceLike, DevicesLike, device_list, device_lock, registry_lock
from ggml_cffi.core.device import device as find_device
from ggml_cffi.core.dtypes import INTEGERS
from ggml_cffi.core.handle import Closing
from ggml_cffi.core.shapes import check_shape
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.core.unified import has_unified_addresses
from ggml_cffi.enums import Type

_CHUNK = 16 << 20
_PAGE = 64 << 10  # at least the granularity of every known device


class HostBlock(Closing):
    """Host memory that devices read and write themselves.

    Parameters
    ----------
    size
        Bytes; rounded up to whole pages of 64 KiB.
    devices
        Devices to use the block, or one device. A device that cannot is left out of :attr:`buffers`. The block is
        pinned memory if all devices have unified addresses, else memory that devices import.

    Raises
    ------
    ValueError
        If ``size`` is not above 0.

    C: ``ggml_backend_dev_buffer_from_host_ptr``, ``ggml_backend_dev_host_buffer_type``.
    """

    def __init__(self, size: int, devices: DevicesLike) -> None:
        if size <= 0:
            raise ValueError(f"size must be at least 1 byte, not {size}")
        size = whole_pages(size)
        chosen = [find_device(which) for which in device_list(devices)]
        self.memory: Any
        """The block as host memory, an object with the buffer protocol."""
        self.buffers: dict[Device, Buffer] = {}
        """The block as a buffer of each device."""
        shared = _pinned_buffer(size, chosen[0]) if chosen and all(map(has_unified_addresses, chosen)) else None
        if shared is not None:
            self.memory = _memory_of(shared, size)
            self.buffers = dict.fromkeys(chosen, shared)
            return
        self.memory = mmap.mmap(-1, size)
        for device in chosen:
            if (buffer := Buffer.imported(device, self.memory)) is not None:
                self.buffers[device] = buffer
        if chosen and not self.buffers and not chosen[0].is_remote:  # copies are quicker from the device's own kind
            self.memory = pinned((size,), np.uint8, device=chosen[0])

    def close(self) -> None:
        """Release the memory once nothing uses it."""
        for buffer in self.buffers.values():
            buffer.close()
        self.buffers.clear()


def whole_pages(size: int) -> int:
    """Return the size of a :class:`HostBlock` of at least ``size`` bytes."""
    return -(-size // _PAGE) * _PAGE


@lru_cache(64)  # not all: each hypothetical device of a plan is another one
def shares_host_memory(device: Device) -> bool:
    """Return whether a device reads and writes the memory of a :class:`HostBlock`."""
    with HostBlock(1, [device]) as block:
        return device in block.buffers


def pinned(shape: Sequence[int], dtype: npt.DTypeLike = np.float32, *, device: DeviceLike) -> npt.NDArray[Any]:
    """Return an array in host memory that a device reads and writes itself, quicker than other memory.

    ``Tensor.set_async`` and ``get_async`` need such memory to be asynchronous. ggml's Vulkan backend takes it from the
    first device, whatever device is given. The array is an ordinary one if the device has no such memory.

    Raises
    ------
    OutOfMemoryError
        If there is not enough memory.

    C: ``ggml_backend_dev_host_buffer_type``.
    """
    sizes, kind = check_shape(shape), np.dtype(dtype)
    n = prod(sizes) * kind.itemsize
    buffer = _host_buffer(n, find_device(device)) if n else None
    if buffer is None:
        return np.zeros(sizes, kind)
    with buffer:
        return _memory_of(buffer, n).view(kind).reshape(sizes)


def _host_buffer(size: int, device: Device) -> Buffer | None:
    """Return a buffer in the host memory that a device prefers; None if it prefers none."""
    with registry_lock:
        pointer = c.ggml_backend_dev_host_buffer_type(device.ptr)
    return Buffer(BufferType(pointer), size) if pointer else None


def _pinned_buffer(size: int, device: Device) -> Buffer | None:
    """Return a buffer in pinned memory, for a device with unified addresses; None if the driver has no more of it.

    ggml then takes ordinary memory, which kernels cannot read.
    """
    buffer = _host_buffer(size, device)
    if buffer is not None and buffer.buffer_type == BufferType.of("CPU"):
        buffer.close()
        return None
    return buffer


def _memory_of(buffer: Buffer, size: int) -> npt.NDArray[np.uint8]:
    """Return the first ``size`` bytes of a buffer in host memory, as an array that keeps the buffer alive."""
    memory = c.ffi.buffer(c.ggml_backend_buffer_get_base(buffer.ptr), size)
    return np.asarray(HostMemory(memory, [buffer.owner]))


def transfer(
    src: Tensor, dst: Tensor, backends: Sequence[Backend] = (), *, block: HostBlock | None = None, chunk: int = _CHUNK
) -> None:
    """Copy the values of ``src`` to ``dst``, on the same device or another, and wait.

    Parameters
    ----------
    src, dst
        Contiguous tensors of one type and shape, with memory.
    backends
        Backends of the two devices, to copy in order with their other work; default opened for this call.
    block
        Host memory of two chunks to copy through. Default: allocated for this call, which takes about as long as
        the copy.
    chunk
        Bytes per chunk.

    Raises
    ------
    ValueError
        If the tensors differ in type or shape, are not contiguous, or have no memory.

    C: ``ggml_backend_tensor_copy_async``, ``ggml_backend_tensor_copy``.
    """
    for t in (src, dst):
        if not isinstance(t, Tensor):
            raise TypeError(f"transfer takes tensors, not {type(t).__name__}")
    if src.dtype is not dst.dtype or src.ne != dst.ne:
        raise ValueError(f"{src!r} and {dst!r} differ in type or shape")
    if src.dtype in INTEGERS:  # they may be row numbers, which are checked when they are set
        dst.set(src.numpy())
        return
    keep = src.check_readable(), dst.check_writable()
    if not (src.is_contiguous and dst.is_contiguous):
        raise ValueError(f"transfer: {src!r} and {dst!r} must be contiguous")
    here, there = (t.buffer_type.device for t in (src, dst) if t.buffer_type)
    direct = here.is_cpu or there.is_cpu or (has_unified_addresses(here) and has_unified_addresses(there))
    with ExitStack() as stack:
        through_block = here != there and not direct and src.nbytes >= 2 * chunk
        if through_block and block is None:
            block = stack.enter_context(HostBlock(2 * chunk, (here, there)))
        if through_block and block is not None and {here, there} <= block.buffers.keys():
            found = {b.device: b for b in backends}
            for d in {here, there} - found.keys():
                found[d] = stack.enter_context(Backend(d))
            for lock in sorted({found[here].lock, found[there].lock}, key=id):
                stack.enter_context(lock)
            _copy_through_block(src, dst, found[here], found[there], block, chunk)
        elif src.nbytes:
            for lock in sorted({device_lock(d.ptr) for d in (here, there)}, key=id):
                stack.enter_context(lock)
            for backend in backends:
                if backend.device in (here, there):
                    c.ggml_backend_synchronize(backend.ptr)
            source, target = DeviceBytes.of_tensor(src), DeviceBytes.of_tensor(dst)  # a view's C tensor has no buffer
            c.ggml_backend_tensor_copy(source.part(0, src.nbytes), target.part(0, src.nbytes))
    del keep


def _copy_through_block(
    src: Tensor, dst: Tensor, reader: Backend, writer: Backend, block: HostBlock, chunk: int
) -> None:
    """Copy chunk ``k`` out of one half of ``block`` while chunk ``k + 1`` comes into the other.

    Two threads are needed, since ggml submits a copy only when the backend is synchronized.
    """
    from concurrent.futures import ThreadPoolExecutor  # slow to import

    chunk = min(chunk, len(block.memory) // 2)
    total = src.nbytes
    into, out_of = (DeviceBytes.of_buffer(block.buffers[b.device]) for b in (reader, writer))
    source, target = DeviceBytes.of_tensor(src), DeviceBytes.of_tensor(dst)

    def read(start: int) -> None:
        n, half = min(chunk, total - start), start // chunk % 2 * chunk
        copy_bytes(reader, source.part(start, n), into.part(half, n))

    def write(start: int) -> None:
        n, half = min(chunk, total - start), start // chunk % 2 * chunk
        copy_bytes(writer, out_of.part(half, n), target.part(start, n))

    with ThreadPoolExecutor(1) as other:
        read(0)
        for start in range(0, total, chunk):
            writing = other.submit(write, start)
            if start + chunk < total:
                read(start + chunk)
            writing.result()


def copy_bytes(backend: Backend, a: Any, b: Any) -> None:
    """Copy a part ``a`` of some :class:`DeviceBytes` to a part ``b`` of the same size, and wait."""
    c.ggml_backend_tensor_copy_async(backend.ptr, backend.ptr, a, b)
    c.ggml_backend_synchronize(backend.ptr)


class DeviceBytes:
    """A range of a device's memory, parts of which can be copied."""

    def __init__(self, buffer: Any, start: Any) -> None:
        self.buffer = buffer
        self.start = c.ffi.cast("char *", start)
        self.kept: list[Any] = []

    @classmethod
    def of_buffer(cls, buffer: Buffer) -> DeviceBytes:
        """Return the range of a whole buffer."""
        return cls(buffer.ptr, c.ggml_backend_buffer_get_base(buffer.ptr))

    @classmethod
    def of_tensor(cls, t: Tensor) -> DeviceBytes:
        """Return the range of a tensor with memory."""
        root, offset = t.memory_root(), t.memory_offset()
        return cls(root.buffer, c.ffi.cast("char *", root.data) + offset)

    def part(self, offset: int, n: int) -> Any:
        """Return ``n`` bytes from ``offset`` on as a C tensor of bytes, which lives as long as this object."""
        made = c.ffi.new("struct ggml_tensor *", {"type": Type.I8, "ne": [n, 1, 1, 1], "nb": [1, n, n, n]})
        made.buffer, made.data = self.buffer, self.start + offset
        self.kept.append(made)
        return made
