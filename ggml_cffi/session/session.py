"""Sessions: devices opened once, with weights on them, and functions that run there."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

from ggml_cffi.core import dtypes
from ggml_cffi.core.backend import Backend, open_backends
from ggml_cffi.core.buffer import Buffer
from ggml_cffi.core.context import Context
from ggml_cffi.core.device import Device, DevicesLike
from ggml_cffi.core.device_choice import find
from ggml_cffi.core.dtypes import as_type
from ggml_cffi.core.handle import Closing
from ggml_cffi.core.precision import as_prec
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import BackendBufferUsage as Usage
from ggml_cffi.enums import Type
from ggml_cffi.errors import ClosedError
from ggml_cffi.files.sources import StoredTensor, as_source, default_dtype
from ggml_cffi.scheduler.scheduler import Scheduler
from ggml_cffi.session.compiled import CompiledFunction

if TYPE_CHECKING:
    # Importing futures takes longer than importing this package.
    from concurrent.futures import Future, ThreadPoolExecutor

_Array = npt.NDArray[Any]
_K = TypeVar("_K")

_ALIGNMENT = 32  # bytes: the alignment of memory that a buffer can wrap


class Session(Closing):
    """Devices, opened once, with weights on them and functions that run there.

    Parameters
    ----------
    devices
        Devices or their names, the preferred first; or one device. Default all GPUs in order. The CPU is added last: it
        computes the operations that no GPU supports.
    n_threads
        Threads of the CPU; default all that this process may use.
    max_programs
        Number of traced programs that each compiled function keeps, one for each signature. Beyond it the function
        closes the least recently used one.
    precision
        ``"f32"`` gives all products of the session's functions the accuracy of F32, as ``prec=Prec.F32`` does in
        :func:`~ggml_cffi.mul_mat`, which names the cost. **By default GPUs round F32 operands** of products of more
        than 8 rows, to F16 (Vulkan) or TF32 (CUDA).

    Raises
    ------
    ValueError
        If a device or the precision is unknown.

    Examples
    --------
    >>> with Session(["CPU"]) as s:
    ...     w = s.weight(np.eye(3))
    ...     f = s.compile(lambda x: x @ w.T)
    ...     f(np.ones((2, 3))).tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """

    def __init__(
        self,
        devices: DevicesLike | None = None,
        *,
        n_threads: int | None = None,
        max_programs: int = 16,
        precision: str = "default",
    ) -> None:
        if max_programs < 1:
            raise ValueError(f"max_programs must be at least 1, not {max_programs}")
        as_prec(precision)  # raises if there is no such precision
        self.max_programs = max_programs
        self.precision = precision
        self._lock = threading.RLock()
        self._compiled: weakref.WeakSet[CompiledFunction[Any]] = weakref.WeakSet()
        self._pool: ThreadPoolExecutor | None = None
        self._contexts: weakref.WeakSet[Context] = weakref.WeakSet()  # one for each weight that is still in use
        self._closed = False
        self._backends: list[Backend] = []
        try:
            self._backends += open_backends(devices, n_threads)
            Scheduler(self._backends).close()  # raises if the backends cannot be used together
        except BaseException:
            self.close()
            raise

    @property
    def backends(self) -> tuple[Backend, ...]:
        """The backends in order of preference, the CPU last.

        Raises
        ------
        ClosedError
            If the session is closed.
        """
        if self._closed:
            raise ClosedError("this Session is closed")
        return tuple(self._backends)

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices in order of preference, the CPU last."""
        return tuple(b.device for b in self.backends)

    # ------------------------------------------------------------------ data on devices

    def weight(
        self,
        values: npt.ArrayLike | StoredTensor,
        *,
        on: Device | str | None = None,
        dtype: Type | str | npt.DTypeLike | None = None,
        name: str = "",
        copy: bool = True,
    ) -> Tensor:
        """Return a new tensor of the session with these values. Operations on the tensor run on its device.

        Its memory is freed when nothing refers to the tensor any more, no compiled function and no other tensor
        included, or by :meth:`free`.

        Parameters
        ----------
        values
            An array, any object that numpy or DLPack can read, or a tensor of a file (``GGUFFile(path)["name"]``,
            ``from_safetensors(path)["name"]``).
        on
            One of the session's devices; default the first.
        dtype
            Type in which the device stores the values: they are cast or quantized. Default the type of the values; F32
            for ``float64``.
        copy
            False to use the memory of the values instead of a copy. This works if the device is the CPU, the type
            stays the same, and the memory begins at a multiple of 32 bytes, as it does in GGUF files and in arrays of
            ``numpy.load(path, mmap_mode="r")``. Several sessions can share such memory. The array must not change. If
            it is read-only, the tensor is read-only as well. Where sharing does not work, the values are copied.

        Raises
        ------
        TypeError, ValueError
            If the values cannot be stored as ``dtype``, or the device is not one of the session's.
        OutOfMemoryError
            If the device has too little free memory.
        """
        source = as_source(values)
        tensor_type = as_type(dtype) if dtype is not None else default_dtype(source)
        memory = None if copy else _memory_in_place(source, tensor_type)
        if memory is not None and self._backend(on).device.is_cpu:
            return self._wrap(memory, tensor_type, source.shape, name)
        t = self._allocate(tensor_type, source.shape, on, name, Usage.WEIGHTS)
        if t.size:
            self._upload(t, source)
        return t

    def zeros(
        self,
        shape: Sequence[int],
        dtype: Type | str | npt.DTypeLike = Type.F32,
        *,
        on: Device | str | None = None,
        name: str = "",
    ) -> Tensor:
        """Return a new tensor of zeros in the session, such as a cache or a state that operations change in place.

        Its memory is freed as that of :meth:`weight`.
        """
        return self._allocate(as_type(dtype), shape, on, name, Usage.ANY)

    def free(self, tensor: Tensor) -> None:
        """Free the memory of a tensor made by :meth:`weight` or :meth:`zeros` now, or when a run in progress ends.

        The tensor, and compiled functions that use it, then raise :class:`ClosedError`. Freeing twice is allowed.

        Raises
        ------
        ValueError
            If the tensor is not one of this session's, or is computed.
        """
        context = tensor.context if isinstance(tensor, Tensor) else None
        if context is None or context not in self._contexts or not (context.closed or tensor.is_leaf):
            raise ValueError(f"{tensor!r} is not a tensor that weight() or zeros() of this session returned")
        for function in list(self._compiled):
            function.discard(context)
        context.close()

    def _upload(self, t: Tensor, source: StoredTensor | npt.NDArray[Any]) -> None:
        if isinstance(source, StoredTensor) and source.dtype is t.dtype:
            t.set_bytes(source.raw())
        else:
            t.set(np.asarray(source))

    def _allocate(
        self, tensor_type: Type, shape: Sequence[int], on: Device | str | None, name: str, usage: Usage
    ) -> Tensor:
        backend = self._backend(on)
        context = self._new_context()
        t = context.new_tensor(tensor_type, shape, name=name)
        if t.size:
            context.alloc(backend.buffer_type, [t], usage=usage)
        return t

    def _new_context(self) -> Context:
        """Return a context for one tensor."""
        context = _TensorContext(1, precision=self.precision, devices=[b.device for b in self.backends])
        with self._lock:
            self.backends  # noqa: B018 - raises when closed
            self._contexts.add(context)
        return context

    def _wrap(self, memory: npt.NDArray[np.uint8], tensor_type: Type, shape: Sequence[int], name: str) -> Tensor:
        """Return a tensor in memory that Python owns."""
        context = self._new_context()
        t = context.new_tensor(tensor_type, shape, name=name)
        buffer = Buffer.over(memory, usage=Usage.WEIGHTS)
        context.put(t, buffer, buffer.base)
        return t

    def _backend(self, on: Device | str | None) -> Backend:
        backends = self.backends
        if on is None:
            return backends[0]
        found = find(on, [b.device for b in backends]) if isinstance(on, str) else on
        for b in backends:
            if found == b.device:
                return b
        raise ValueError(f"{on!r} is not one of this session's devices: {', '.join(b.name for b in backends)}")

    # ------------------------------------------------------------------ functions

    @overload
    def compile(self, function: Callable[..., Tensor]) -> CompiledFunction[_Array]: ...
    @overload
    def compile(self, function: Callable[..., tuple[Tensor, Tensor]]) -> CompiledFunction[tuple[_Array, _Array]]: ...
    @overload
    def compile(
        self, function: Callable[..., tuple[Tensor, Tensor, Tensor]]
    ) -> CompiledFunction[tuple[_Array, _Array, _Array]]: ...
    @overload
    def compile(self, function: Callable[..., tuple[Tensor, ...]]) -> CompiledFunction[tuple[_Array, ...]]: ...
    @overload
    def compile(self, function: Callable[..., list[Tensor]]) -> CompiledFunction[list[_Array]]: ...
    @overload
    def compile(self, function: Callable[..., dict[_K, Tensor]]) -> CompiledFunction[dict[_K, _Array]]: ...
    @overload
    def compile(self, function: Callable[..., Any]) -> CompiledFunction[Any]: ...
    def compile(self, function: Callable[..., Any]) -> CompiledFunction[Any]:
        """Return a function of arrays that runs ``function``, a function of tensors.

        The first call with each signature traces ``function``: it is called with tensors in place of arrays. Later
        calls replay the traced program. The signature consists of the shapes and types of the arrays and the values of
        the other arguments. See :class:`CompiledFunction`. Works as a decorator, too.

        Raises
        ------
        ClosedError
            If the session is closed.
        TypeError
            If ``function`` cannot be called.
        """
        self.backends  # noqa: B018 - raises when closed
        if not callable(function):
            raise TypeError(f"compile takes a function, not {type(function).__name__}")
        compiled: CompiledFunction[Any] = CompiledFunction(self, function)
        with self._lock:
            self._compiled.add(compiled)
        return compiled

    def cancel(self) -> None:
        """Stop the current run, whose future raises :class:`AbortedError`, and cancel the calls that wait.

        Only the CPU can stop in the middle of a run; a GPU finishes it.
        """
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
        self.backends[-1].abort()

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Run ``call`` in the session's own thread, after all calls that were submitted earlier."""
        from concurrent.futures import ThreadPoolExecutor

        with self._lock:
            self.backends  # noqa: B018 - raises when closed
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, thread_name_prefix="ggml_cffi session")
            return self._pool.submit(call)

    def close(self) -> None:
        """Cancel submitted runs, finish the current one, and free programs, weights and devices."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._closed = True  # from now on no function can trace a new program
            functions, contexts = list(self._compiled), list(self._contexts)
        for context in contexts:
            context.close()
        for function in functions:
            function.clear()
        for backend in self._backends:
            backend.close()

    def __repr__(self) -> str:
        names = "closed" if self._closed else ", ".join(b.name for b in self._backends)
        return f"<Session {names}>"


class _TensorContext(Context):
    """The context of one tensor of a session, freed with the last reference to it."""

    __slots__ = ()
    must_be_closed = False


def _memory_in_place(source: StoredTensor | npt.NDArray[Any], tensor_type: Type) -> npt.NDArray[np.uint8] | None:
    """Return the memory of ``source`` as bytes, None if ggml cannot use it without a copy as ``tensor_type``."""
    if default_dtype(source) is not tensor_type:
        return None
    if isinstance(source, StoredTensor):
        raw = source.raw()
    elif source.dtype == dtypes.numpy_dtype(tensor_type) and source.flags.c_contiguous:
        raw = source.reshape(-1).view(np.uint8)
    else:
        return None
    return raw if raw.size and raw.ctypes.data % _ALIGNMENT == 0 else None
