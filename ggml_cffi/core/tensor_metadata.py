"""Metadata of tensors: shape, element type, strides, name, and the memory that a tensor is in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from math import prod
from struct import Struct
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ggml_cffi import c
from ggml_cffi.core import dtypes
from ggml_cffi.core.buffer import BufferType
from ggml_cffi.core.device import device_lock
from ggml_cffi.core.operators import refuse_comparison
from ggml_cffi.enums import Op, Type

if TYPE_CHECKING:
    from ggml_cffi.core.context import Context

_TYPES = {int(t): t for t in Type}
_HEAD = Struct("=i12x4q4Q")  # struct ggml_tensor from its type to its strides


class Head(NamedTuple):
    """Element type, sizes and strides of a tensor, which never change."""

    dtype: Type
    ne: tuple[int, ...]
    nb: tuple[int, ...]
    dense: bool
    """True if the strides are those of a new tensor of these sizes."""

    @classmethod
    def unique(cls, dtype: Type, ne: tuple[int, ...], nb: tuple[int, ...], *, dense: bool) -> Head:
        """Return the one object for these values, so that two heads can be compared by identity."""
        if len(_heads) > _MAX_HEADS:
            _heads.clear()
        head = cls(dtype, ne, nb, dense)
        return _heads.setdefault(head, head)


_heads: dict[Head, Head] = {}
_MAX_HEADS = 4096
_OP_NONE = int(Op.NONE)


class TensorMetadata:
    """Everything about a tensor except its values; base of :class:`Tensor <ggml_cffi.Tensor>`."""

    __slots__ = ("_head", "_pointer", "context", "ndim")

    def __init__(self, context: Context, pointer: Any, ndim: int, head: Head | None = None) -> None:
        self.context = context
        """The context that holds the tensor."""
        self.ndim = ndim
        """Number of axes, 0 to 4."""
        self._pointer = pointer
        self._head = head

    @property
    def ptr(self) -> Any:
        """The C pointer (``struct ggml_tensor *``).

        Raises
        ------
        ClosedError
            If the context is closed.
        """
        if self.context._cell[0] is None:
            raise self.context._closed_error()
        return self._pointer

    @property
    def head(self) -> Head:
        """Element type, sizes and strides."""
        head = self._head
        if head is None:
            # One read of the C struct: nine attribute reads through cffi take several times as long.
            number, *sizes = _HEAD.unpack_from(c.ffi.buffer(self.ptr, _HEAD.size))
            ne, nb = tuple(sizes[:4]), tuple(sizes[4:])
            head = self._head = Head.unique(_TYPES[number], ne, nb, dense=_is_dense(_TYPES[number], ne, nb))
        return head

    @property
    def ne(self) -> tuple[int, ...]:
        """The four sizes in ggml's order, contiguous axis first."""
        return self.head.ne

    @property
    def nb(self) -> tuple[int, ...]:
        """The four strides in bytes, in ggml's order."""
        return self.head.nb

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes in numpy's order."""
        return self.head.ne[: self.ndim][::-1]

    @property
    def dtype(self) -> Type:
        """Element type."""
        return self.head.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.ne)

    @property
    def nbytes(self) -> int:
        """Bytes from the first to the last element. C: ``ggml_nbytes``."""
        return c.ggml_nbytes(self.ptr)

    @property
    def name(self) -> str:
        """The tensor's name, at most 63 bytes of UTF-8."""
        text: bytes = c.ffi.string(self.ptr.name)
        return text.decode("utf-8", "replace")

    @name.setter
    def name(self, name: str) -> None:
        if "\0" in name:
            raise ValueError(f"a tensor's name cannot contain a null character, but {name!r} does")
        c.ggml_set_name(self.ptr, name.encode())

    @property
    def op(self) -> Op:
        """The operation that computes the tensor, ``Op.NONE`` for a leaf."""
        return Op(self.ptr.op)

    @property
    def is_leaf(self) -> bool:
        """True for a leaf: an input, a weight or a cache."""
        return bool(self.ptr.op == _OP_NONE)

    @property
    def is_contiguous(self) -> bool:
        """True if the elements lie one after another in order. C: ``ggml_is_contiguous``."""
        return self.head.dense or bool(c.ggml_is_contiguous(self.ptr))

    @property
    def is_allocated(self) -> bool:
        """True if the tensor has memory."""
        root = self.memory_root()
        return bool(root.buffer) and not any(root in ctx.released for ctx in self.context.reachable())

    @property
    def buffer_type(self) -> BufferType | None:
        """The buffer type of the tensor's memory, None without memory."""
        return BufferType(c.ggml_backend_buffer_get_type(self.memory_root().buffer)) if self.is_allocated else None

    def memory_root(self) -> Any:
        """Return the C pointer of the tensor that owns the memory: for a view, the tensor that it is a view of."""
        pointer = self.ptr
        return pointer.view_src or pointer

    def memory_offset(self) -> int:
        """Return the bytes from the start of the tensor that owns the memory to the start of this one."""
        pointer = self.ptr
        return int(pointer.view_offs) if pointer.view_src else 0

    def memory_lock(self, root: Any) -> AbstractContextManager[Any]:
        """Return the lock of the device that ``root`` (see :meth:`memory_root`) is on; host memory needs none."""
        if c.ggml_backend_buffer_is_host(root.buffer):
            return nullcontext()
        return device_lock(c.ggml_backend_buft_get_device(c.ggml_backend_buffer_get_type(root.buffer)))

    def memory_owners(self) -> list[Any]:
        """Return objects that keep the memory alive, so that another thread cannot free it during a transfer.

        Raises
        ------
        ClosedError
            If the memory is closed, or belongs to a GPU that was opened before a fork.
        """
        contexts = self.context.reachable()
        return [*(ctx.owner for ctx in contexts), *(b.owner for ctx in contexts for b in ctx.buffers)]

    def __len__(self) -> int:
        if not self.ndim:
            raise TypeError("a tensor without axes has no length")
        return self.shape[0]

    def __eq__(self, other: object) -> bool:
        """Return whether both are the same tensor, as containers need it.

        Raises
        ------
        TypeError
            For a number or an array, and in a traced function for another tensor: they stand for a comparison of the
            elements, which are not known yet.
        """
        if isinstance(other, TensorMetadata):
            if self._pointer == other._pointer:
                return True
            if self.context.traced or other.context.traced:
                refuse_comparison()
        elif isinstance(other, int | float | complex | np.ndarray | np.generic | list):
            refuse_comparison()
        return False

    def __hash__(self) -> int:
        return hash(self._pointer)

    def __repr__(self) -> str:
        if self.context.closed:
            return "<Tensor of a closed context>"
        operation = "" if self.is_leaf else f" = {self.op.name.lower()}"
        return f"<Tensor {self.name!r} {self.dtype.name} {self.shape}{operation}>"


def _is_dense(dtype: Type, ne: tuple[int, ...], nb: tuple[int, ...]) -> bool:
    stride = dtypes.type_size(dtype)
    if nb[0] != stride:
        return False
    stride *= ne[0] // dtypes.block_size(dtype)
    return nb[1] == stride and nb[2] == stride * ne[1] and nb[3] == stride * ne[1] * ne[2]
