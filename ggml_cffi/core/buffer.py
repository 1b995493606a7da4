"""Buffers: memory of a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.device import Device, DeviceLike, check_process, device, device_lock
from ggml_cffi.core.handle import Handle
from ggml_cffi.core.locks import RemoteLock, free_when_unlocked
from ggml_cffi.enums import BackendBufferUsage as Usage
from ggml_cffi.enums import BackendDevType
from ggml_cffi.errors import OutOfMemoryError


class BufferType:
    """A kind of memory, such as a device's own or pinned host memory. Two objects for one buffer type are equal."""

    __slots__ = ("ptr",)

    def __init__(self, pointer: Any) -> None:
        self.ptr = pointer
        """The C pointer (``ggml_backend_buffer_type_t``)."""

    @classmethod
    def of(cls, which: BufferType | DeviceLike) -> BufferType:
        """Return ``which`` if it is a buffer type, else the default buffer type of that device."""
        if isinstance(which, cls):
            return which
        found = device(which)  # type: ignore[arg-type]
        with found.guard():  # the first use of a GPU opens it
            return cls(c.ggml_backend_dev_buffer_type(found.ptr))

    @property
    def device(self) -> Device:
        """The device of the memory; the CPU for host memory."""
        pointer = c.ggml_backend_buft_get_device(self.ptr)
        return Device(pointer) if pointer else device("CPU")

    @property
    def name(self) -> str:
        """ggml's name of the buffer type."""
        text: bytes = c.ffi.string(c.ggml_backend_buft_name(self.ptr))
        return text.decode()

    @property
    def alignment(self) -> int:
        """Alignment of tensors in bytes: each starts at a multiple of it."""
        return c.ggml_backend_buft_get_alignment(self.ptr)

    @property
    def max_size(self) -> int:
        """Largest size in bytes of a buffer for several tensors; one larger tensor may still fit."""
        return c.ggml_backend_buft_get_max_size(self.ptr)

    @property
    def is_host(self) -> bool:
        """True if the processor can read the memory in place."""
        return bool(c.ggml_backend_buft_is_host(self.ptr))

    def alloc_size(self, tensor: Any) -> int:
        """Return the bytes that a tensor takes in this memory, which may be more than its elements take.

        C: ``ggml_backend_buft_get_alloc_size``.
        """
        return c.ggml_backend_buft_get_alloc_size(self.ptr, tensor.ptr)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BufferType) and bool(self.ptr == other.ptr)

    def __hash__(self) -> int:
        return hash(self.ptr)

    def __repr__(self) -> str:
        return f"<BufferType {self.name}>"


#: C pointers of buffers over memory that must not be written.
read_only: set[Any] = set()


class Buffer(Handle):
    """A piece of device memory, usually made by :meth:`Context.alloc`, which places tensors in it.

    Parameters
    ----------
    buffer_type
        A buffer type, or a device, whose default buffer type is used.
    size
        Bytes.
    usage
        With ``Usage.WEIGHTS``, the scheduler runs nodes where their weights are.

    Raises
    ------
    OutOfMemoryError
        If the device does not have enough memory left.

    C: ``ggml_backend_buft_alloc_buffer``.
    """

    __slots__ = ("_on_close",)

    def __init__(
        self, buffer_type: BufferType | DeviceLike, size: int, *, usage: Usage = Usage.ANY, zero: bool = True
    ) -> None:
        kind = BufferType.of(buffer_type)
        usage = Usage(usage)
        if not 0 < size < 2**63:
            raise ValueError(f"a buffer has at least 1 byte and less than 2**63, not {size}")
        check_process(kind.device)
        lock = device_lock(kind.device.ptr)
        free: Callable[[Any], None] = c.ggml_backend_buffer_free
        if isinstance(lock, RemoteLock):
            free = partial(free_when_unlocked, [lock], free, ())
        self._on_close: Callable[[Buffer], None] | None = None
        try:
            with kind.device.guard(), lock:
                pointer = c.ggml_backend_buft_alloc_buffer(kind.ptr, size)
                if not pointer:
                    raise OutOfMemoryError(f"{kind.name} has no room for a buffer of {size:,} bytes")
                self._adopt(pointer, free, (), usage)
                c.ggml_backend_buffer_get_base(pointer)  # one request to a server, while the lock is held
            if zero:
                with lock:
                    c.ggml_backend_buffer_clear(pointer, 0)
        except BaseException:
            self.close()
            raise

    def _adopt(self, pointer: Any, free: Callable[[Any], None], parents: Iterable[Handle], usage: Usage) -> None:
        super().__init__(pointer, free, parents, fork_safe=_is_ordinary_memory(pointer))
        self._on_close = None
        c.ggml_backend_buffer_set_usage(pointer, usage)

    @classmethod
    def over(cls, memory: Any, *, usage: Usage = Usage.ANY) -> Buffer:
        """Return a buffer over memory that Python owns (``mmap``, ``bytearray``, array), without a copy.

        The memory must start at a multiple of 32 bytes. The buffer keeps it alive. Tensors in read-only memory cannot
        be written.

        C: ``ggml_backend_cpu_buffer_from_ptr``.
        """
        view = c.ffi.from_buffer(memory)
        start = int(c.ffi.cast("uintptr_t", view))
        if start % 32 or not len(view):
            raise ValueError(f"{len(view)} bytes at {start:#x}: the memory must start at a multiple of 32 bytes")
        pointer = c.ggml_backend_cpu_buffer_from_ptr(view, len(view))
        if memoryview(memory).readonly:
            read_only.add(pointer)

        def free(p: Any, _keep: Any = view) -> None:
            read_only.discard(p)
            c.ggml_backend_buffer_free(p)

        self = cls.__new__(cls)
        self._adopt(pointer, free, (), usage)
        return self

    @classmethod
    def empty(cls, which: BufferType | DeviceLike, *, usage: Usage = Usage.ANY) -> Buffer:
        """Return a buffer of no bytes, which stands for a device's memory in a dry run.

        C: ``ggml_backend_buft_alloc_buffer``.
        """
        kind = BufferType.of(which)
        check_process(kind.device)
        with kind.device.guard():
            pointer = c.ggml_backend_buft_alloc_buffer(kind.ptr, 0)
        self = cls.__new__(cls)
        self._adopt(pointer, c.ggml_backend_buffer_free, (), usage)
        return self

    @classmethod
    def imported(cls, which: DeviceLike, memory: Any) -> Buffer | None:
        """Return a device's buffer over host memory that the device reads and writes itself; None if it cannot.

        Parameters
        ----------
        memory
            Writable memory of whole pages (``mmap.mmap(-1, size)``). The buffer keeps it alive.

        C: ``ggml_backend_dev_buffer_from_host_ptr``.
        """
        found = device(which)
        view = c.ffi.from_buffer(memory, require_writable=True)
        # ggml's Vulkan backend can import memory, but does not report it. Others might call a null pointer.
        if not (found.capabilities.buffer_from_host_ptr or found.name.startswith("Vulkan")):
            return None
        check_process(found)
        with found.guard(), device_lock(found.ptr):
            pointer = c.ggml_backend_dev_buffer_from_host_ptr(found.ptr, view, len(view), len(view))
        if not pointer:
            return None
        self = cls.__new__(cls)
        self._adopt(pointer, lambda p, _keep=view: c.ggml_backend_buffer_free(p), (), Usage.ANY)  # type: ignore[misc]
        return self

    @property
    def guard(self) -> AbstractContextManager[Any]:
        """The device's lock, to hold while the memory is used; host memory needs none."""
        return nullcontext() if self.is_host else device_lock(self.buffer_type.device.ptr)

    @property
    def size(self) -> int:
        """Bytes."""
        return c.ggml_backend_buffer_get_size(self.ptr)

    @property
    def buffer_type(self) -> BufferType:
        """The buffer type."""
        return BufferType(c.ggml_backend_buffer_get_type(self.ptr))

    @property
    def usage(self) -> Usage:
        """The buffer's usage: weights, compute or any."""
        return Usage(c.ggml_backend_buffer_get_usage(self.ptr))

    @property
    def is_host(self) -> bool:
        """True if the processor can read the memory in place."""
        return bool(c.ggml_backend_buffer_is_host(self.ptr))

    @property
    def base(self) -> int:
        """Address of the first byte; only host memory can be read there."""
        return int(c.ffi.cast("uintptr_t", c.ggml_backend_buffer_get_base(self.ptr)))

    def close(self) -> None:
        """Release the memory. Tensors in it can no longer be used. C frees it once no scheduler computes with it."""
        if self._on_close and not self.closed:
            self._on_close(self)
        super().close()

    def __repr__(self) -> str:
        return "<Buffer closed>" if self.closed else f"<Buffer {self.buffer_type.name}, {self.size:,} bytes>"


def _is_ordinary_memory(pointer: Any) -> bool:
    """Return whether a buffer (a C pointer) is in host memory that no driver of a GPU has pinned."""
    if not c.ggml_backend_buffer_is_host(pointer):
        return False
    device = c.ggml_backend_buft_get_device(c.ggml_backend_buffer_get_type(pointer))
    return not device or c.ggml_backend_dev_type(device) == BackendDevType.CPU


class HostMemory:
    """Host memory with the owners that keep it alive, in numpy's array interface."""

    def __init__(self, memory: Any, owners: list[Any]) -> None:
        self.owners = owners
        self.memory = memory
        address = int(c.ffi.cast("uintptr_t", c.ffi.from_buffer(memory)))
        self.__array_interface__ = {
            "shape": (len(memory),),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
