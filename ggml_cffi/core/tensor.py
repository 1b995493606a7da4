"""Tensors.

Shapes are numpy's everywhere above :mod:`ggml_cffi.c`: row-major, ``tensor.shape == array.shape``, the contiguous axis
last. ggml itself counts from the contiguous axis: :attr:`Tensor.ne` and :attr:`Tensor.nb` have that order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ggml_cffi import c
from ggml_cffi.core import dtypes
from ggml_cffi.core.buffer import HostMemory, read_only
from ggml_cffi.core.operators import TensorOperators
from ggml_cffi.core.repack import is_repacked
from ggml_cffi.core.tensor_metadata import Head, TensorMetadata
from ggml_cffi.enums import BackendBufferUsage as Usage
from ggml_cffi.enums import Op, TensorFlag

if TYPE_CHECKING:
    from ggml_cffi.core.backend import Backend

__all__ = ["Head", "Tensor"]

_OP_NONE = int(Op.NONE)


class Tensor(TensorMetadata, TensorOperators):
    """A tensor of a :class:`Context`, made by :meth:`Context.new_tensor` or by an operation.

    A tensor owns nothing: it is valid until its context is closed. Two objects for one tensor are equal. A comparison
    with a number or an array raises ``TypeError``, and so does one with another tensor in a traced function.
    """

    __slots__ = ()

    # ------------------------------------------------------------------ writing

    def set(self, values: npt.ArrayLike) -> None:
        """Write values, cast or quantized to the tensor's type.

        Parameters
        ----------
        values
            Anything that numpy takes as an array, of the tensor's shape.

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
        """Write raw bytes in the layout of the tensor's memory.

        Parameters
        ----------
        data
            Any buffer object of ``nbytes`` bytes, or with ``offset`` of fewer.
        offset
            Bytes from the start of the tensor to the first byte to write. Default: ``data`` is the whole tensor.

        Raises
        ------
        ValueError
            If the number of bytes does not fit, or as :meth:`set`.
        """
        view = c.ffi.from_buffer(data)
        keep = self.check_writable(whole=len(view) == self.nbytes)
        root = self.memory_root()
        if not self.is_contiguous:
            raise ValueError(f"{self!r} is not contiguous: write to the tensor that it is a view of")
        start = offset or 0
        if start < 0 or (len(view) != self.nbytes if offset is None else start + len(view) > self.nbytes):
            raise ValueError(f"{self!r} takes {self.nbytes} bytes, not {len(view)} from byte {start}")
        if self.dtype in dtypes.INTEGERS:
            self.check_row_numbers(np.frombuffer(data, np.uint8))
        if len(view):
            # Through the tensor that owns the memory: a view made before the allocation has no address of its own.
            with self.memory_lock(root):
                c.ggml_backend_tensor_set(root, view, self.memory_offset() + start, len(view))
        del keep

    def set_async(self, values: npt.NDArray[Any], backend: Backend) -> None:
        """Queue a write of ``values`` on ``backend``; ``backend.synchronize()`` waits for it.

        The array must not change until then. The copy is asynchronous only from memory of :func:`ggml_cffi.pinned`;
        otherwise it is done before this method returns.

        Parameters
        ----------
        values
            C-ordered array of the tensor's shape and element type: nothing is converted.
        backend
            A backend of the device that the tensor is on.

        Raises
        ------
        ValueError, TypeError
            As :meth:`set`, and if the element type or the device differs. Integers, which may be row numbers, must be
            written with :meth:`set`.

        C: ``ggml_backend_tensor_set_async``.
        """
        keep = [*self.check_writable(), values]
        if self.dtype in dtypes.INTEGERS:
            raise TypeError(f"{self!r} holds integers, which may be row numbers: use set(), which checks them")
        self._check_async(values, backend)
        with backend.lock:
            backend.keep(keep)
            c.ggml_backend_tensor_set_async(backend.ptr, self.ptr, c.ffi.from_buffer(values), 0, self.nbytes)

    # ------------------------------------------------------------------ reading

    def get_bytes(self, offset: int = 0, size: int | None = None) -> npt.NDArray[np.uint8]:
        """Return ``size`` raw bytes (default all) from byte ``offset`` of the tensor's memory.

        Raises
        ------
        ValueError
            If the tensor has fewer bytes, or as :meth:`numpy`.

        C: ``ggml_backend_tensor_get``.
        """
        keep = self.check_readable()
        n = self.nbytes - offset if size is None else size
        if offset < 0 or n < 0 or offset + n > self.nbytes:
            raise ValueError(f"{self!r} has {self.nbytes} bytes, not {n} from byte {offset}")
        out = np.empty(n, np.uint8)
        root = self.memory_root()
        if n:
            with self.memory_lock(root):
                c.ggml_backend_tensor_get(root, c.ffi.from_buffer(out), self.memory_offset() + offset, n)
        del keep
        return out

    def numpy(self, *, copy: bool = True) -> npt.NDArray[Any]:
        """Return the values as an array of the tensor's shape; ``float32`` where numpy has no such type.

        Parameters
        ----------
        copy
            False for a view of host memory, which the array keeps alive. Writing to the view writes the tensor. A view
            of integers, which may be row numbers, is read-only.

        Raises
        ------
        ValueError
            If the tensor has no memory, or is an intermediate of a graph, whose memory may hold other values by now.
            For a view also if the tensor is not in host memory, is the result of a graph, or has a type that numpy
            does not have.

        C: ``ggml_backend_tensor_get``.
        """
        keep = self.check_readable()
        dtype = self.dtype
        if not copy:
            return self._host_view()
        raw = np.empty(self.nbytes, np.uint8)
        root = self.memory_root()
        if raw.size:
            with self.memory_lock(root):
                c.ggml_backend_tensor_get(root, c.ffi.from_buffer(raw), self.memory_offset(), raw.size)
        del keep
        if dtypes.has_numpy(dtype):
            values = self._strided(raw)
            return values if values.flags.c_contiguous else np.ascontiguousarray(values)
        if not self.is_contiguous:
            raise ValueError(f"{self!r} is a view of {dtype.name} blocks that are not contiguous: make it contiguous")
        return dtypes.from_bytes(raw, dtype, self.size).reshape(self.shape)

    def get_async(self, out: npt.NDArray[Any], backend: Backend) -> None:
        """Queue a read of the values into ``out`` on ``backend``; see :meth:`set_async`.

        C: ``ggml_backend_tensor_get_async``.
        """
        keep = [*self.check_readable(), out]
        self._check_async(out, backend)
        memory = c.ffi.from_buffer(out, require_writable=True)
        with backend.lock:
            backend.keep(keep)
            c.ggml_backend_tensor_get_async(backend.ptr, self.ptr, memory, 0, self.nbytes)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """Return a copy of the values, with ``copy=False`` a view of host memory; see :meth:`numpy`.

        Raises
        ------
        ValueError
            If ``copy`` is false and the values cannot be viewed as ``dtype``.
        """
        if copy is False:
            return dtypes.as_viewed(self.numpy(copy=False), dtype)
        values = self.numpy()
        return values if dtype is None else values.astype(dtype, copy=False)

    def __dlpack__(self, **options: Any) -> Any:
        """Return the values for other libraries, without a copy. Host memory only; see :meth:`numpy`."""
        self.__dlpack_device__()
        return self.numpy(copy=False).__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return ``(1, 0)``, the CPU.

        Raises
        ------
        BufferError
            If the tensor is not in host memory: take a copy with :meth:`numpy`.
        """
        memory = self.buffer_type
        if self.size and (memory is None or not memory.is_host):
            raise BufferError(f"{self!r} is not in host memory: DLPack needs it there; take a copy with numpy()")
        return 1, 0

    def _strided(self, raw: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        strides = self.nb[: self.ndim][::-1]
        return np.ndarray(self.shape, dtypes.numpy_dtype(self.dtype), raw, 0, strides)

    def _host_view(self) -> npt.NDArray[Any]:
        dtype = self.dtype
        if not self.size:
            return np.empty(self.shape, dtypes.numpy_dtype(dtype))
        root = self.memory_root()
        if c.ggml_backend_buffer_get_usage(root.buffer) == Usage.COMPUTE:
            raise ValueError(f"{self!r} is in a scheduler's memory, which the next run reuses: take a copy")
        if not c.ggml_backend_buffer_is_host(root.buffer):
            raise ValueError(f"{self!r} is in {self.buffer_type}: only host memory can be viewed; take a copy")
        if not dtypes.has_numpy(dtype):
            raise ValueError(f"numpy has no {dtype.name}: take a copy, which decodes it")
        memory = c.ffi.buffer(c.ffi.cast("char *", root.data) + self.memory_offset(), self.nbytes)
        keep = HostMemory(memory, [b.owner for ctx in self.context.reachable() for b in ctx.buffers])
        view = self._strided(np.asarray(keep))
        # Integers may be row numbers, now or later: only set() checks them.
        if dtype in dtypes.INTEGERS or root.buffer in read_only:
            view.flags.writeable = False
        return view

    # ------------------------------------------------------------------ checks

    def check_readable(self) -> list[Any]:
        """Return objects that keep the memory alive while it is read. Errors as :meth:`numpy`."""
        keep = self.memory_owners()
        if self.size:
            self._check_allocated()
            self._check_output()
            if is_repacked(self.memory_root().buffer):
                raise ValueError(f"{self!r} is repacked for matrix products: nothing else can read it")
        return keep

    def check_writable(self, *, whole: bool = False) -> list[Any]:
        """Return objects that keep the memory alive while it is written, as a whole or not; errors as :meth:`set`."""
        keep = self.memory_owners()
        self._check_allocated()
        root = self.memory_root()
        if root.buffer in read_only:
            raise ValueError(f"{self!r} is in memory that is read-only")
        if self.size and is_repacked(root.buffer) and not (whole and root == self.ptr and root.extra):
            raise ValueError(f"{self!r} is repacked for matrix products: only set and set_bytes write it, as a whole")
        return keep

    def _check_allocated(self) -> None:
        if self.size and not self.is_allocated:
            raise ValueError(f"{self!r} has no memory: use Context.alloc, or Scheduler.alloc for a whole graph")

    def _check_output(self) -> None:
        root = self.memory_root()
        if (
            root.op != _OP_NONE
            and not root.flags & TensorFlag.OUTPUT
            and c.ggml_backend_buffer_get_usage(root.buffer) == Usage.COMPUTE
        ):
            raise ValueError(f"{self!r} is an intermediate of a graph: name it as an output of its Graph to read it")

    def _check_async(self, array: npt.NDArray[Any], backend: Backend) -> None:
        dtype = dtypes.numpy_dtype(self.dtype)
        fits = isinstance(array, np.ndarray) and array.dtype == dtype and array.flags.c_contiguous
        if not (fits and dtypes.has_numpy(self.dtype) and array.shape == self.shape and self.is_contiguous):
            raise ValueError(f"{self!r} takes a C-ordered {dtype} array of its shape")
        if self.ptr.view_src:
            raise ValueError(f"{self!r} is a view: only tensors with memory of their own are copied asynchronously")
        memory = self.buffer_type
        if memory is None or memory.device != backend.device or not array.size:
            raise ValueError(f"{self!r} is on {memory}, not on {backend.name}")

    def _row_limit(self) -> int | None:
        root = self.memory_root()
        found = [ctx.row_limits[root] for ctx in self.context.reachable() if root in ctx.row_limits]
        return min(found) if found else None

    def check_row_numbers(self, raw: npt.NDArray[np.uint8]) -> None:
        """Raise ``ValueError`` if ``raw`` holds row numbers that are out of range for an operation on this tensor."""
        limit = self._row_limit()
        if limit is None or not raw.size:
            return
        rows = raw.view(dtypes.numpy_dtype(self.dtype))
        if rows.min() < 0 or rows.max() >= limit:
            raise ValueError(
                f"{self!r} holds row numbers of a tensor with {limit} rows, but got values from {rows.min()} to "
                f"{rows.max()}"
            )
