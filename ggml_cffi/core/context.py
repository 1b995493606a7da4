"""Contexts: pools of tensor metadata, and the allocation of the tensors' data in buffers."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ggml_cffi import c
from ggml_cffi.core import dtypes
from ggml_cffi.core.buffer import Buffer, BufferType
from ggml_cffi.core.device import Device, DeviceLike, device_lock, devices
from ggml_cffi.core.dtypes import as_type
from ggml_cffi.core.handle import Handle, Owner
from ggml_cffi.core.precision import as_prec, keeps_f32
from ggml_cffi.core.shapes import check_bytes, check_shape, fits_in_32_bits, ne_of
from ggml_cffi.core.tensor import Head, Tensor
from ggml_cffi.enums import BackendBufferUsage as Usage
from ggml_cffi.enums import Type

_FIRST_CHUNK, _LARGEST_CHUNK = 64, 4096


class Context(Handle):
    """A pool of tensors: their shapes, types and operations. The data is in buffers.

    ggml's pools have a fixed size and end the process when they are full; a Context grows.

    Parameters
    ----------
    capacity
        Number of tensors for which there is room at first.
    precision
        ``"f32"`` makes ``prec=Prec.F32`` the default of all products here; see :func:`ggml_cffi.mul_mat`.
    devices
        The devices that will compute these tensors, if they are known: products of full precision need fewer nodes if
        these keep F32. Default all devices.

    Raises
    ------
    ValueError
        If there is no such precision.

    C: ``ggml_init``, ``ggml_free``.
    """

    __slots__ = (
        "_buffers",
        "_capacity",
        "_chunks",
        "_constants",
        "_devices",
        "_lock",
        "_released",
        "_room",
        "calls",
        "held",
        "prec",
        "products",
        "row_limits",
        "serial",
        "traced",
        "uses",
    )

    _serial = 0
    readable: ClassVar[bool] = True
    """True if tensors with a buffer have values; False in a dry run, which reserves no memory."""

    def __init__(
        self,
        capacity: int = _FIRST_CHUNK,
        *,
        precision: str = "default",
        devices: Iterable[Device] | None = None,
    ) -> None:
        self.prec = as_prec(precision)
        """Precision of the products made here, if they name none."""
        self._devices = None if devices is None else tuple(devices)
        self._chunks = [_chunk(capacity)]
        self._room = capacity
        self._lock = threading.RLock()
        self._buffers: list[Buffer] = []
        self._released: set[Any] = set()
        self._constants: dict[Any, npt.NDArray[Any]] = {}
        self._capacity = capacity
        self.calls: dict[Any, Any] = {}
        """Operations written in Python, by C pointer of the result."""
        self.uses: dict[Context, Owner] = {}
        """Other contexts whose tensors are operands here."""
        self.held: dict[Any, frozenset[Any]] = {}
        """Graphs that schedulers hold (``HeldGraph``) with tensors of this context, and C pointers of their nodes."""
        self.products: dict[Any, tuple[Any, Any]] = {}
        """C pointers of the operands of each product that consists of several nodes, by C pointer of the result."""
        self.row_limits: dict[Any, int] = {}
        """Number of rows that each integer tensor of row numbers may refer to, by C pointer."""
        self.traced = False
        """True while a traced function builds tensors here: ``==`` of two tensors is refused."""
        Context._serial += 1
        self.serial = Context._serial
        """Serial number: a context that was made later has a larger one."""
        super().__init__(self._chunks[0], partial(_free_chunks, self._chunks))

    def new_tensor(self, dtype: Type | str | int | npt.DTypeLike, shape: Sequence[int], *, name: str = "") -> Tensor:
        """Make a tensor without data: an input, a weight or a cache.

        Parameters
        ----------
        dtype
            Element type.
        shape
            Up to 4 sizes in numpy's order, the contiguous axis last. The last size must be whole blocks of ``dtype``.
        name
            At most 63 bytes are kept.

        Raises
        ------
        TypeError
            If ggml has no such type for tensors.
        ValueError
            If the shape is not possible.

        C: ``ggml_new_tensor``.
        """
        dtype = as_type(dtype)
        shape = check_shape(shape)
        ne = ne_of(shape)
        if dtype in dtypes.INTERNAL:
            raise TypeError(f"{dtype.name} is an internal format of ggml's matrix products: no tensor can have it")
        check_bytes(dtype, ne)
        tensor = self.build(c.ggml_new_tensor, len(shape), dtype, 4, c.ffi.new("int64_t[4]", ne))
        if name:
            tensor.name = name
        return tensor

    def constant(self, values: npt.ArrayLike, dtype: Type | str | int | npt.DTypeLike = Type.F32) -> Tensor:
        """Make a tensor with values, which are written when the tensor gets memory.

        Raises
        ------
        TypeError, ValueError
            If the values cannot be stored as ``dtype``.
        """
        array = dtypes.as_array(values)
        data = dtypes.to_bytes(array, as_type(dtype)).copy()
        tensor = self.new_tensor(dtype, array.shape)
        self.set_on_alloc(tensor, data)
        return tensor

    def set_on_alloc(self, tensor: Tensor, data: npt.NDArray[Any]) -> None:
        """Write ``data``, the bytes of a tensor without memory, as soon as the tensor gets memory.

        Raises
        ------
        ValueError
            If the tensor belongs to another context, is computed, or has memory already, or the size differs.
        """
        self._check_allocatable(tensor)
        if data.nbytes != tensor.nbytes:
            raise ValueError(f"{tensor!r} takes {tensor.nbytes} bytes, not {data.nbytes}")
        self._constants[tensor.ptr] = data

    def pending_data(self, tensor: Tensor) -> npt.NDArray[Any] | None:
        """Return the bytes that will be written to a tensor when it gets memory, None without any."""
        return self._constants.get(tensor.ptr)

    def build(
        self, function: Callable[..., Any], ndim: int, *args: Any, n: int = 1, head: Head | None = None
    ) -> Tensor:
        """Call a C builder that makes at most ``n`` tensors here, and wrap the last one. Arguments are not checked.

        ``function`` gets the C context before ``args``. ``head`` is the result's, if known; it is then not read from C.
        """
        with self._lock:
            if self._room < n:
                self._grow(n)
            self._room -= n
            pointer = function(self.ptr, *args)
        return Tensor(self, pointer, ndim, head if head is not None and head.dense else None)

    def emit(self, function: Callable[..., Any], ndim: int, head: Head, *args: Any) -> Tensor:
        """Call a C builder of one tensor with a dense head, as most nodes are: quicker than :meth:`build`."""
        with self._lock:
            if not self._room:
                self._grow(1)
            self._room -= 1
            return Tensor(self, function(self._cell[0] or self.ptr, *args), ndim, head)

    def _grow(self, n: int) -> None:
        self.ptr  # noqa: B018 - raises when closed
        size = max(n, min(2 * self.n_tensors, _LARGEST_CHUNK))
        chunk = _chunk(size)
        self._chunks.append(chunk)
        self._cell[0] = chunk
        self._capacity += size
        self._room = size

    @property
    def n_tensors(self) -> int:
        """Number of tensors made so far; it may be a few too high."""
        return self._capacity - self._room

    def keeps_f32(self, rows: int, matrices: int) -> bool:
        """Return whether all devices of this context multiply F32 operands of these sizes without rounding them."""
        if self._devices is None:
            self._devices = tuple(devices(all=True))
        return all(keeps_f32(device, rows, matrices) for device in self._devices)

    def use(self, other: Context) -> None:
        """Keep ``other`` alive for as long as this context: its tensors are operands here."""
        if other is not self and other not in self.uses:
            self.uses[other] = other.owner

    def holds(self, pointer: Any) -> bool:
        """Return whether the tensor at ``pointer`` belongs to this context."""
        address = int(c.ffi.cast("uintptr_t", pointer))
        for chunk in self._chunks:
            start = int(c.ffi.cast("uintptr_t", c.ggml_get_mem_buffer(chunk)))
            if start <= address < start + c.ggml_get_mem_size(chunk):
                return True
        return False

    def reachable(self) -> list[Context]:
        """Return the context and all contexts whose tensors are operands here, directly or not.

        Raises
        ------
        ClosedError
            If one of them is closed.
        """
        found = {self: None}
        waiting = [self]
        while waiting:
            context = waiting.pop()
            context.ptr  # noqa: B018 - raises when closed
            new = [other for other in context.uses if other not in found]
            found.update(dict.fromkeys(new))
            waiting += new
        return list(found)

    def alloc(
        self,
        on: BufferType | DeviceLike,
        tensors: Iterable[Tensor] | None = None,
        *,
        usage: Usage = Usage.ANY,
    ) -> list[Buffer]:
        """Allocate tensors in zeroed memory of a device.

        Parameters
        ----------
        on
            Device, its name, or a buffer type.
        tensors
            Tensors of this context; default all leaves without memory that are not views.
        usage
            ``Usage.WEIGHTS`` for weights: the scheduler runs nodes where their weights are.

        Returns
        -------
        list of Buffer
            The new buffers, more than one only where the device limits their size. The context owns them.

        Raises
        ------
        ValueError
            If a tensor belongs to another context, is computed, or has memory already.
        OutOfMemoryError
            If the device does not have enough memory.
        """
        with self._lock:
            self.ptr  # noqa: B018 - raises when closed
            return self._alloc(BufferType.of(on), tensors, usage)

    def _alloc(self, kind: BufferType, tensors: Iterable[Tensor] | None, usage: Usage) -> list[Buffer]:
        chosen = self._unallocated() if tensors is None else list(tensors)
        for t in chosen:
            self._check_allocatable(t)
        if not kind.is_host and kind.device.is_remote:
            _check_fits(chosen)
        if len(set(chosen)) < len(chosen):
            raise ValueError("a tensor is listed twice")
        made: list[Buffer] = []
        try:
            with nullcontext() if kind.is_host else device_lock(kind.device.ptr):
                groups = pack(chosen, kind)
            for group, size in groups:
                buffer = Buffer(kind, size, usage=usage)
                made.append(buffer)
                address = c.ggml_backend_buffer_get_base(buffer.ptr)
                for t, offset in group:
                    self.put(t, buffer, address + offset)
                    if t.ptr in self._constants:
                        t.set_bytes(self._constants[t.ptr])
                self.adopt(buffer)
        except BaseException:
            for t in chosen:  # undo
                t.ptr.buffer = t.ptr.data = c.NULL
            for buffer in made:
                if buffer in self._buffers:
                    self._buffers.remove(buffer)
                buffer._on_close = None
                buffer.close()
            raise
        for t in chosen if self._constants else ():
            self._constants.pop(t.ptr, None)
        return made

    def put(self, tensor: Tensor, buffer: Buffer, address: Any, *, owner: Context | None = None) -> None:
        """Allocate one tensor at ``address`` (``char *`` or ``void *``) in ``buffer``.

        Parameters
        ----------
        owner
            Context that owns the buffer. Default this one, which takes ownership.

        C: ``ggml_backend_tensor_alloc``.
        """
        self._check_allocatable(tensor)
        if not buffer.is_host and buffer.buffer_type.device.is_remote:
            _check_fits([tensor])
        start = int(c.ffi.cast("uintptr_t", address))
        with buffer.guard:
            size = c.ggml_backend_buffer_get_alloc_size(buffer.ptr, tensor.ptr)
            alignment = c.ggml_backend_buffer_get_alignment(buffer.ptr)
            if start < buffer.base or start + size > buffer.base + buffer.size:
                raise ValueError(f"{tensor!r} does not fit the buffer at that address")
            if start % alignment:
                raise ValueError(f"{tensor!r} would start at {start:#x}, not at a multiple of {alignment} bytes")
            c.ggml_backend_tensor_alloc(buffer.ptr, tensor.ptr, c.ffi.cast("void *", start))
        if owner is None:
            self.adopt(buffer)
        else:
            self.use(owner)
        if tensor.ptr in self.row_limits:
            try:
                tensor.check_row_numbers(tensor.numpy().reshape(-1).view(np.uint8))
            except ValueError:
                tensor.ptr.buffer = tensor.ptr.data = c.NULL
                raise

    def adopt(self, buffer: Buffer) -> None:
        """Take ownership of ``buffer``, which closes with this context. After that, its tensors cannot be used."""
        with self._lock:
            self.ptr  # noqa: B018 - raises when closed
            if buffer not in self._buffers:
                self._buffers.append(buffer)
                buffer._on_close = partial(_forget, weakref.ref(self))  # a buffer does not keep its context alive

    def _forget(self, buffer: Buffer) -> None:
        if buffer not in self._buffers:  # another thread closes the context
            return
        pointer = buffer.ptr
        for t in self.tensors():
            # A scheduler takes tensors without memory for inputs. Released tensors are recorded here, to be refused.
            if t.ptr.buffer == pointer:
                self._released.add(t.ptr)
        # Now, so that a thread that reads a tensor either finds the buffer, and keeps it, or finds the tensor released.
        self._buffers.remove(buffer)

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """Buffers that this context owns."""
        return tuple(self._buffers)

    @property
    def released(self) -> set[Any]:
        """C pointers of the tensors whose buffer was closed."""
        return self._released

    def tensors(self) -> list[Tensor]:
        """Return all tensors of this context, in the order in which they were made."""
        self.ptr  # noqa: B018 - raises when closed
        found = []
        for chunk in self._chunks:
            pointer = c.ggml_get_first_tensor(chunk)
            while pointer:
                found.append(Tensor(self, pointer, c.ggml_n_dims(pointer)))
                pointer = c.ggml_get_next_tensor(chunk, pointer)
        return found

    def _unallocated(self) -> list[Tensor]:
        return [t for t in self.tensors() if t.is_leaf and not t.ptr.buffer and not t.ptr.view_src]

    def _check_allocatable(self, t: Tensor) -> None:
        if not isinstance(t, Tensor):
            raise TypeError(f"a Tensor is needed, not {type(t).__name__}")
        if t.context is not self:
            raise ValueError(f"{t!r} belongs to another context")
        if not t.is_leaf or t.ptr.view_src:
            raise ValueError(f"{t!r} is computed or a view: a scheduler gives it memory")
        if t.ptr.buffer:
            raise ValueError(f"{t!r} has memory already")

    def close(self) -> None:
        """Close the context and its buffers. Its tensors can no longer be used."""
        with getattr(self, "_lock", nullcontext()):  # not while another thread is making a tensor here
            for buffer in tuple(getattr(self, "_buffers", ())):
                buffer._on_close = None
                buffer.close()
            was_open = not self.closed
            super().close()  # before the buffers are forgotten: a thread that finds none must find the context closed
            if was_open:
                self._buffers.clear()
                self.uses.clear()

    def __repr__(self) -> str:
        return f"<Context {'closed' if self.closed else f'{self.n_tensors} tensors'}>"


def _forget(context: weakref.ref[Context], buffer: Buffer) -> None:
    found = context()
    if found is not None:
        found._forget(buffer)


def _chunk(n: int) -> Any:
    size = n * c.ggml_tensor_overhead()
    return c.ggml_init({"mem_size": size, "mem_buffer": c.NULL, "no_alloc": True})  # type: ignore[arg-type]


def _free_chunks(chunks: list[Any], _current: Any) -> None:
    for chunk in chunks:
        c.ggml_free(chunk)


def _check_fits(tensors: Iterable[Tensor]) -> None:
    for t in tensors:
        if not fits_in_32_bits(t.ptr):
            raise ValueError(f"{t!r} cannot be on a remote device: its sizes do not fit the protocol's 32 bits")


def pack(tensors: Iterable[Tensor], kind: BufferType) -> list[tuple[list[tuple[Tensor, int]], int]]:
    """Return the tensors' offsets in as few buffers as the largest allowed size permits, and the buffers' sizes."""
    groups: list[tuple[list[tuple[Tensor, int]], int]] = []
    group: list[tuple[Tensor, int]] = []
    used, limit, alignment = 0, kind.max_size, kind.alignment
    for t in tensors:
        size = -(-kind.alloc_size(t) // alignment) * alignment
        if group and used + size > limit:
            groups.append((group, used))
            group, used = [], 0
        group.append((t, used))
        used += size
    if group:
        groups.append((group, max(used, alignment)))
    return groups
