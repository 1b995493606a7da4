"""Tensors.

Shapes are numpy's everywhere above :mod:`ggml_cffi.c`: row-major, ``tensor.shape == array.shape``, the contiguous axis
last. ggml itself counts from the contiguous axis: :attr:`Tensor.ne` and :attr:`Tensor.nb` give that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from struct import Struct
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ggml_cffi import c
from ggml_cffi.core import dtypes
from ggml_cffi.core.buffer import BufferType, read_only
from ggml_cffi.core.device import device_lock
from ggml_cffi.enums import BackendBufferUsage as Usage
from ggml_cffi.enums import Op, TensorFlag, Type

if TYPE_CHECKING:
    from ggml_cffi.core.backend import Backend
    from ggml_cffi.core.context import Context

_TYPES = {int(t): t for t in Type}
_HEAD = Struct("=i12x4q4Q")  # struct ggml_tensor from its type to its strides


class Head(NamedTuple):
    """What never changes about a tensor."""

    dtype: Type
    ne: tuple[int, ...]
    nb: tuple[int, ...]
    dense: bool
    """Whether the strides are those of a new tensor of these sizes."""

    @classmethod
    def unique(cls, dtype: Type, ne: tuple[int, ...], nb: tuple[int, ...], *, dense: bool) -> Head:
        """Always the same object for the same head, so that comparing heads is quick."""
        if len(_heads) > _MOST_HEADS:
            _heads.clear()
        found = cls(dtype, ne, nb, dense)
        return _heads.setdefault(found, found)


_heads: dict[Head, Head] = {}
_OP_NONE = int(Op.NONE)
_MOST_HEADS = 4096


class Tensor:
    """A tensor of a :class:`Context`: made by :meth:`Context.new_tensor` or by an operation.

    It owns nothing: it dies with its context. Two objects for one tensor are equal.
    """

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
        """Element type, sizes and strides: read from C once, in one piece."""
        head = self._head
        if head is None:
            kind, *sizes = _HEAD.unpack_from(c.ffi.buffer(self.ptr, _HEAD.size))
            ne, nb = tuple(sizes[:4]), tuple(sizes[4:])
            head = self._head = Head.unique(_TYPES[kind], ne, nb, dense=_dense(_TYPES[kind], ne, nb))
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
            raise ValueError("a name cannot contain the character 0")
        c.ggml_set_name(self.ptr, name.encode())

    @property
    def op(self) -> Op:
        """The operation that computes it, ``Op.NONE`` for a leaf."""
        return Op(self.ptr.op)

    @property
    def is_leaf(self) -> bool:
        """Whether nothing computes it: an input, a weight or a cache."""
        return bool(self.ptr.op == _OP_NONE)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie one after another in order. C: ``ggml_is_contiguous``."""
        return self.head.dense or bool(c.ggml_is_contiguous(self.ptr))

    @property
    def is_allocated(self) -> bool:
        """Whether it has memory."""
        root = self._root()
        return bool(root.buffer) and not any(root in ctx.released for ctx in self.context.reachable())

    @property
    def buffer_type(self) -> BufferType | None:
        """The kind of memory it is in, None without memory."""
        return BufferType(c.ggml_backend_buffer_get_type(self._root().buffer)) if self.is_allocated else None

    def set(self, values: npt.ArrayLike) -> None:
        """Write values, cast or quantized to the tensor's type.

        Parameters
        ----------
        values
            Anything numpy takes as an array, of the tensor's shape.

        Raises
        ------
        ValueError
            If the shape differs, the tensor has no memory or is not contiguous, integers do not fit, or row numbers
            are out of range for an operation that uses them.
        TypeError
            If the values cannot be stored in the tensor's type.

        C: ``ggml_backend_tensor_set``.
        """
        array = dtypes.as_array(values)
        if array.shape != self.shape:
            raise ValueError(f"{self!r} takes an array of shape {self.shape}, not {array.shape}")
        self.set_bytes(dtypes.to_bytes(array, self.dtype))

    def set_bytes(self, data: Any, offset: int | None = None) -> None:
        """Write raw bytes, as they lie in memory.

        Parameters
        ----------
        data
            Any buffer object: ``nbytes`` of them, or with ``offset`` fewer.
        offset
            Where they go, in bytes from the start of the data. Default: they are all.

        Raises
        ------
        ValueError
            If they are too many or too few, or as :meth:`set`.
        """
        view = c.ffi.from_buffer(data)
        keep = self.check_writable()
        root = self._root()
        if not self.is_contiguous:
            raise ValueError(f"{self!r} is not contiguous: write to the tensor that it is a view of")
        start = offset or 0
        if start < 0 or (len(view) != self.nbytes if offset is None else start + len(view) > self.nbytes):
            raise ValueError(f"{self!r} takes {self.nbytes} bytes, not {len(view)} from byte {start}")
        if self.dtype in dtypes.INTEGERS:
            self.check_limit(np.frombuffer(data, np.uint8))
        if len(view):
            # Through the tensor that owns the memory: a view made before it had any has no address of its own.
            with self._transfer(root):
                c.ggml_backend_tensor_set(root, view, self._offset() + start, len(view))
        del keep

    def get_bytes(self, offset: int = 0, size: int | None = None) -> npt.NDArray[np.uint8]:
        """Raw bytes, as they lie in memory: ``size`` of them from ``offset``, default all.

        Raises
        ------
        ValueError
            If there are not so many, or as :meth:`numpy`.

        C: ``ggml_backend_tensor_get``.
        """
        keep = self.check_readable()
        n = self.nbytes - offset if size is None else size
        if offset < 0 or n < 0 or offset + n > self.nbytes:
            raise ValueError(f"{self!r} has {self.nbytes} bytes, not {n} from byte {offset}")
        out = np.empty(n, np.uint8)
        root = self._root()
        if n:
            with self._transfer(root):
                c.ggml_backend_tensor_get(root, c.ffi.from_buffer(out), self._offset() + offset, n)
        del keep
        return out

    def numpy(self, *, copy: bool = True) -> npt.NDArray[Any]:
        """The values, of the tensor's shape; ``float32`` where numpy has no such type.

        Parameters
        ----------
        copy
            False for a view of host memory instead, which lives as long as the array does. Writing to it writes the
            tensor; integers, which may be row numbers, are read-only.

        Raises
        ------
        ValueError
            If the tensor has no memory; if it is a temporary of a graph, whose memory may hold other values by now; or
            for a view, if it is not in host memory, or a graph's result, or of a type that numpy has not.

        C: ``ggml_backend_tensor_get``.
        """
        keep = self.check_readable()
        dtype = self.dtype
        if not copy:
            return self._host_view()
        raw = np.empty(self.nbytes, np.uint8)
        root = self._root()
        if raw.size:
            with self._transfer(root):
                c.ggml_backend_tensor_get(root, c.ffi.from_buffer(raw), self._offset(), raw.size)
        del keep
        if dtypes.has_numpy(dtype):
            values = self._strided(raw)
            return values if values.flags.c_contiguous else np.ascontiguousarray(values)
        if not self.is_contiguous:
            raise ValueError(f"{self!r} is a view of {dtype.name} blocks that are not contiguous: make it contiguous")
        return dtypes.from_bytes(raw, dtype, self.size).reshape(self.shape)

    def set_async(self, values: npt.NDArray[Any], backend: Backend) -> None:
        """Have ``backend`` write ``values`` after what it was given before; ``backend.synchronize()`` waits for it.

        The array must not change until then. The copy runs by itself only from memory of :func:`ggml_cffi.pinned`, and
        is done before this returns otherwise.

        Parameters
        ----------
        values
            C-ordered, of the tensor's shape and of its very type: nothing is converted.
        backend
            One of the device that the tensor is on.

        Raises
        ------
        ValueError, TypeError
            As :meth:`set`, and if type or device are others. Integers, which may be row numbers, are for :meth:`set`.

        C: ``ggml_backend_tensor_set_async``.
        """
        keep = [*self.check_writable(), values]
        if self.dtype in dtypes.INTEGERS:
            raise TypeError(f"{self!r} holds integers, which may be row numbers: use set(), which checks them")
        self._check_async(values, backend)
        with backend.lock:
            backend.keep(keep)
            c.ggml_backend_tensor_set_async(backend.ptr, self.ptr, c.ffi.from_buffer(values), 0, self.nbytes)

    def get_async(self, out: npt.NDArray[Any], backend: Backend) -> None:
        """Have ``backend`` write the values to ``out`` after what it was given before; see :meth:`set_async`.

        C: ``ggml_backend_tensor_get_async``.
        """
        keep = [*self.check_readable(), out]
        self._check_async(out, backend)
        memory = c.ffi.from_buffer(out, require_writable=True)
        with backend.lock:
            backend.keep(keep)
            c.ggml_backend_tensor_get_async(backend.ptr, self.ptr, memory, 0, self.nbytes)

    def _check_async(self, array: npt.NDArray[Any], backend: Backend) -> None:
        dtype = dtypes.numpy_dtype(self.dtype)
        fits = isinstance(array, np.ndarray) and array.dtype == dtype and array.flags.c_contiguous
        if not (fits and dtypes.has_numpy(self.dtype) and array.shape == self.shape and self.is_contiguous):
            raise ValueError(f"{self!r} takes a C-ordered {dtype} array of its shape")
        if self.ptr.view_src:
            raise ValueError(f"{self!r} is a view: only tensors with memory of their own are copied asynchronously")
        kind = self.buffer_type
        if kind is None or kind.device != backend.device or not array.size:
            raise ValueError(f"{self!r} is on {kind}, not on {backend.name}")

    # ------------------------------------------------------------------ DLPack

    def __dlpack__(self, **options: Any) -> Any:
        """The values for other libraries, without a copy: host memory only, see :meth:`numpy`."""
        self.__dlpack_device__()
        return self.numpy(copy=False).__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        """``(1, 0)``, the CPU.

        Raises
        ------
        BufferError
            If the tensor is not in host memory: take a copy with :meth:`numpy`.
        """
        kind = self.buffer_type
        if kind is None or not kind.is_host:
            raise BufferError(f"{self!r} is not in host memory: DLPack needs it there; take a copy with numpy()")
        return 1, 0

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """The values, as :meth:`numpy` gives them."""
        values = self.numpy()
        return values if dtype is None else values.astype(dtype, copy=False)

    def _strided(self, raw: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        strides = self.nb[: self.ndim][::-1]
        return np.ndarray(self.shape, dtypes.numpy_dtype(self.dtype), raw, 0, strides)

    def _host_view(self) -> npt.NDArray[Any]:
        dtype = self.dtype
        root = self._root()
        if c.ggml_backend_buffer_get_usage(root.buffer) == Usage.COMPUTE:
            raise ValueError(f"{self!r} is in a scheduler's memory, which it reuses: take a copy")
        if not c.ggml_backend_buffer_is_host(root.buffer):
            raise ValueError(f"{self!r} is in {self.buffer_type}: only host memory can be viewed; take a copy")
        if not dtypes.has_numpy(dtype):
            raise ValueError(f"numpy has no {dtype.name}: take a copy, which decodes it")
        memory = c.ffi.buffer(c.ffi.cast("char *", root.data) + self._offset(), self.nbytes)
        keep = HostMemory(memory, [b.owner for ctx in self.context.reachable() for b in ctx.buffers])
        view = self._strided(np.asarray(keep))
        # Integers may be row numbers, now or later: those are checked by set().
        if dtype in dtypes.INTEGERS or root.buffer in read_only:
            view.flags.writeable = False
        return view

    # ------------------------------------------------------------------ numpy's operators
    # What they do is in ops/operators.py, above this module: it is imported when an operator is first used.

    __array_ufunc__ = None  # numpy leaves array + tensor to us

    def __add__(self, other: Any) -> Any:
        """``a + b`` by numpy's rules; ``b`` may be a number or an array."""
        return _operators().add(self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        """``a - b``"""
        return _operators().sub(self, other)

    def __rsub__(self, other: Any) -> Any:
        return _operators().sub(other, self)

    def __mul__(self, other: Any) -> Any:
        """``a * b``, element by element."""
        return _operators().mul(self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        """``a / b``, element by element."""
        return _operators().div(self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return _operators().div(other, self)

    def __matmul__(self, other: Any) -> Any:
        """``a @ b`` of vectors, matrices and stacks of matrices; ``x @ w.T`` makes no copy."""
        return _operators().matmul(self, other)

    def __rmatmul__(self, other: Any) -> Any:
        return _operators().matmul(other, self)

    def __neg__(self) -> Tensor:
        """``-a``"""
        out: Tensor = _operators().neg(self)
        return out

    def __getitem__(self, key: Any) -> Tensor:
        """A part of the tensor, by integers, slices and ``...``: a view.

        Raises
        ------
        IndexError
            If it reaches outside, or a step is negative, or not 1 on the last axis.
        TypeError
            For other kinds of indices.
        """
        out: Tensor = _operators().item(self, key)
        return out

    def __len__(self) -> int:
        if not self.ndim:
            raise TypeError("a tensor of no axes has no length")
        return self.shape[0]

    __iter__ = None  # a loop over a graph's rows is almost always a mistake

    def __bool__(self) -> bool:
        raise TypeError("a tensor has no truth value before it is computed: use numpy()")

    @property
    def T(self) -> Tensor:  # noqa: N802 - numpy's name
        """All axes in reverse order, as ``numpy.ndarray.T``. A view."""
        from ggml_cffi.ops import shape as shapes

        out: Tensor = shapes.transpose(self) if self.ndim == 2 else _operators().permuted(self, ())
        return out

    def reshape(self, *shape: int | Sequence[int]) -> Tensor:
        """Another shape, in the same order of elements; see :func:`ggml_cffi.ops.reshape`."""
        from ggml_cffi.ops import shape as shapes

        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return shapes.reshape(self, sizes)  # type: ignore[arg-type]

    def permute(self, *axes: int) -> Tensor:
        """The axes in another order; see :func:`ggml_cffi.ops.permute`."""
        out: Tensor = _operators().permuted(self, axes)
        return out

    def sum(self, axis: int | None = None, *, keepdims: bool = False) -> Tensor:
        """Sum over all elements or along one axis. F32."""
        out: Tensor = _operators().total("sum", self, axis, keepdims)
        return out

    def mean(self, axis: int | None = None, *, keepdims: bool = False) -> Tensor:
        """Mean over all elements or along one axis. F32."""
        out: Tensor = _operators().total("mean", self, axis, keepdims)
        return out

    # ------------------------------------------------------------------ inside

    def _root(self) -> Any:
        pointer = self.ptr
        return pointer.view_src or pointer

    def _offset(self) -> int:
        """Bytes from the start of the tensor that owns the memory."""
        pointer = self.ptr
        return int(pointer.view_offs) if pointer.view_src else 0

    def _hold(self) -> list[Any]:
        """What keeps the memory alive while it is read or written, though another thread may close it.

        Raises
        ------
        ClosedError
            If it is closed, or belongs to a GPU of before a fork.
        """
        contexts = self.context.reachable()
        return [*(ctx.owner for ctx in contexts), *(b.owner for ctx in contexts for b in ctx.buffers)]

    def _transfer(self, root: Any) -> AbstractContextManager[Any]:
        """The lock of the device that ``root`` is on; host memory needs none."""
        if c.ggml_backend_buffer_is_host(root.buffer):
            return nullcontext()
        return device_lock(c.ggml_backend_buft_get_device(c.ggml_backend_buffer_get_type(root.buffer)))

    def check_readable(self) -> list[Any]:
        """What keeps the memory alive while it is read; errors as :meth:`numpy`."""
        keep = self._hold()
        self._check_data()
        self._check_output()
        return keep

    def check_writable(self) -> list[Any]:
        """What keeps the memory alive while it is written; errors as :meth:`set`."""
        keep = self._hold()
        self._check_data()
        if self._root().buffer in read_only:
            raise ValueError(f"{self!r} is in memory that is read-only")
        return keep

    def place(self) -> tuple[Any, int]:
        """The C pointer of the tensor that owns the memory, and the bytes from its start."""
        return self._root(), self._offset()

    def _check_data(self) -> None:
        if not self.is_allocated:
            raise ValueError(f"{self!r} has no memory: use Context.alloc, or Scheduler.alloc for a whole graph")

    def _check_output(self) -> None:
        root = self._root()
        if (
            root.op != _OP_NONE
            and not root.flags & TensorFlag.OUTPUT
            and c.ggml_backend_buffer_get_usage(root.buffer) == Usage.COMPUTE
        ):
            raise ValueError(f"{self!r} is a temporary: name it as an output of its Graph to read it")

    def _limit(self) -> int | None:
        root = self._root()
        found = [ctx.limits[root] for ctx in self.context.reachable() if root in ctx.limits]
        return min(found) if found else None

    def check_limit(self, raw: npt.NDArray[np.uint8]) -> None:
        """Raise ``ValueError`` if ``raw`` holds row numbers that an operation on this tensor could not look up."""
        limit = self._limit()
        if limit is None or not raw.size:
            return
        rows = raw.view(dtypes.numpy_dtype(self.dtype))
        if rows.min() < 0 or rows.max() >= limit:
            raise ValueError(
                f"{self!r} holds row numbers of a tensor with {limit} rows, but got values from {rows.min()} to "
                f"{rows.max()}"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tensor) and bool(self._pointer == other._pointer)

    def __hash__(self) -> int:
        return hash(self._pointer)

    def __repr__(self) -> str:
        if self.context.closed:
            return "<Tensor of a closed context>"
        made = "" if self.is_leaf else f" = {self.op.name.lower()}"
        return f"<Tensor {self.name!r} {self.dtype.name} {self.shape}{made}>"


def _dense(dtype: Type, ne: tuple[int, ...], nb: tuple[int, ...]) -> bool:
    stride = dtypes.type_size(dtype)
    if nb[0] != stride:
        return False
    stride *= ne[0] // dtypes.block_size(dtype)
    return nb[1] == stride and nb[2] == stride * ne[1] and nb[3] == stride * ne[1] * ne[2]


def _operators() -> ModuleType:
    from ggml_cffi.ops import operators

    return operators


class HostMemory:
    """Host memory with what keeps it alive, as numpy's array interface wants it."""

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
