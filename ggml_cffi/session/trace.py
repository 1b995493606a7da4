"""Traces of a user's function: the signature of a call, the function's graph, and runs of that graph with arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ggml_cffi import c
from ggml_cffi.core import dtypes
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.context import Context
from ggml_cffi.core.dtypes import as_array
from ggml_cffi.core.handle import Closing
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.scheduler import Scheduler, Transfer

from_buffer = c.ffi.from_buffer

Signature = tuple[Any, Any]
"""The positional and the keyword arguments of a call as :func:`flatten` returns them: the key of a traced program."""


class Trace(Closing):
    """The graph that a function builds for arrays of one signature.

    Parameters
    ----------
    function
        The user's function. It is called with tensors in place of arrays.
    signature
        The shapes and types of the arrays, and the values of the other arguments.
    context
        The context that holds the tensors of the trace.
    """

    def __init__(self, function: Callable[..., Any], signature: Signature, context: Context) -> None:
        self.context = context
        """The context that holds the tensors of the trace."""
        self.inputs: list[Tensor] = []
        """The tensors that stand for the arrays, in order."""
        self.outputs: list[Tensor] = []
        """The tensors of the result."""
        self.graph: Graph | None = None
        """The graph of the outputs; None if the function computes nothing."""
        try:
            args, kwargs = (self._unflatten(part) for part in signature)
            context.traced = True
            self.result = function(*args, **(kwargs or {}))
            context.traced = False
            map_tensors(self.result, lambda t: self.outputs.append(t))
            computed = [t for t in self.outputs if not t.is_leaf]
            if computed:
                self.graph = Graph(*dict.fromkeys(computed))
        except BaseException:
            self.close()
            raise

    def _unflatten(self, spec: Any) -> Any:
        """Return the arguments of a signature, with a new input tensor in place of each array."""
        if not isinstance(spec, tuple):
            return spec
        container, *parts = spec
        if container is np.ndarray:
            shape, dtype = parts
            t = self.context.new_tensor(_input_type(np.dtype(dtype)), shape, name=f"input {len(self.inputs)}")
            self.inputs.append(t)
            return t
        if container is dict:
            return {name: self._unflatten(part) for name, part in parts}
        if container in (tuple, list):
            return container(self._unflatten(part) for part in parts)
        return parts[-1]

    def close(self) -> None:
        """Free the graph and its tensors."""
        if self.graph is not None:
            self.graph.close()
        self.context.close()


class TracedProgram(Trace):
    """A trace that holds its graph in a scheduler and replays it.

    Parameters
    ----------
    backends
        The backends in order of preference, the CPU last.
    function, signature
        As for :class:`Trace`.
    precision
        As for :class:`~ggml_cffi.Session`.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        function: Callable[..., Any],
        signature: Signature,
        precision: str = "default",
    ) -> None:
        self.scheduler: Scheduler | None = None
        """The scheduler that holds the graph; None if the function computes nothing."""
        super().__init__(function, signature, Context(precision=precision, devices=[b.device for b in backends]))
        try:
            if self.graph is not None:
                self.scheduler = Scheduler(backends)
                self.scheduler.alloc(self.graph)
            self._inputs = [_InputTransfer(t) for t in self.inputs if self.scheduler is not None]
            self._outputs = [_OutputTransfer(t) for t in self.outputs]
            self.replay: Callable[[tuple[Any, ...]], Any] = _no_replay
            """A function that runs arrays of exactly the program's types and shapes, and returns None for others."""
            if self.scheduler is not None and self._is_plain(signature):
                self.replay = _fast_replay(self.scheduler, self._inputs, self._outputs[0])
            # An input or a constant may be part of the result without being part of the graph.
            own = dict.fromkeys((*self.inputs, *(t for t in self.outputs if t.is_leaf and t.context is self.context)))
            unused = [t for t in own if not t.is_allocated and t.size]
            if unused:
                self.context.alloc("CPU", unused)
        except BaseException:
            self.close()
            raise

    def _is_plain(self, signature: Signature) -> bool:
        """Return whether all arguments are plain arrays, and the result is one plain tensor."""
        positional, keywords = signature
        return (
            not keywords
            and all(part[0] is np.ndarray for part in positional[1:])
            and isinstance(self.result, Tensor)
            and self._outputs[0].plain
            and all(transfer.plain for transfer in self._inputs)
        )

    def run(self, arrays: Sequence[npt.NDArray[Any]]) -> Any:
        """Set the inputs, compute, and read the outputs."""
        scheduler = self.scheduler
        if scheduler is None:
            for t, array in zip(self.inputs, arrays, strict=True):
                t.set(array)
            return map_tensors(self.result, lambda t: t.numpy())
        with scheduler.lock:
            writes, reads, values = [], [], []
            for source, array in zip(self._inputs, arrays, strict=True):
                if source.plain:
                    writes.append(source.transfer(array))
                else:
                    source.tensor.set(array)
            for target in self._outputs:
                if target.plain:
                    out = np.empty(target.shape, target.dtype)
                    reads.append((target.pointer, from_buffer(out), 0, target.nbytes))
                    values.append(out)
            scheduler.replay(writes, reads)
            plain = iter(values)
            outputs = [next(plain) if target.plain else target.tensor.numpy() for target in self._outputs]
        each = iter(outputs)
        return map_tensors(self.result, lambda _: next(each))

    def close(self) -> None:
        """Free the scheduler, the graph and its tensors."""
        if self.scheduler is not None:
            self.scheduler.close()
        super().close()

    def __repr__(self) -> str:
        shapes = ", ".join(f"{t.dtype.name} {t.shape}" for t in self.inputs)
        return f"<TracedProgram of {shapes}: {self.graph!r}>"


class _InputTransfer:
    """The copy of an array into an input of a program."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.pointer = tensor.ptr
        self.dtype = dtypes.numpy_dtype(tensor.dtype)
        self.nbytes = tensor.nbytes
        # Integers may be row numbers, which Tensor.set checks against their range.
        self.plain = self.dtype.kind == "f" and tensor.is_allocated and tensor.size > 0

    def transfer(self, array: npt.NDArray[Any]) -> Transfer:
        """Return the arguments of the write for the scheduler."""
        return self.pointer, from_buffer(np.ascontiguousarray(array, self.dtype)), 0, self.nbytes


class _OutputTransfer:
    """The copy of an output of a program into an array: one read if it is plain, else through ``Tensor.numpy``."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.pointer = tensor.ptr
        self.nbytes = tensor.nbytes
        self.shape = tensor.shape
        self.dtype = dtypes.numpy_dtype(tensor.dtype)
        computed = not tensor.is_leaf and not tensor.ptr.view_src
        self.plain = computed and tensor.is_contiguous and dtypes.has_numpy(tensor.dtype) and tensor.size > 0


def _no_replay(_args: tuple[Any, ...]) -> None:
    return None


def _fast_replay(
    scheduler: Scheduler, inputs: Sequence[_InputTransfer], output: _OutputTransfer
) -> Callable[[tuple[Any, ...]], Any]:
    """Return :attr:`TracedProgram.replay` for plain inputs and one plain output, as most functions have.

    The replay holds all values in local variables of this closure, because a run of one small node takes only two
    microseconds in C.
    """
    lock, devices, compute = scheduler.lock, scheduler.exclusive(), scheduler.compute_held
    write, read, empty, ndarray = c.ggml_backend_tensor_set, c.ggml_backend_tensor_get, np.empty, np.ndarray
    source, nbytes, shape, dtype = output.pointer, output.nbytes, output.shape, output.dtype
    targets = [(transfer.pointer, transfer.nbytes, transfer.dtype, transfer.tensor.shape) for transfer in inputs]
    n = len(targets)

    def replay(args: tuple[Any, ...]) -> npt.NDArray[Any] | None:
        if len(args) != n:
            return None
        writes = []
        for array, (target, size, kind, sizes) in zip(args, targets):  # noqa: B905 - strict= costs time
            if array.__class__ is not ndarray or array.dtype is not kind or array.shape != sizes:
                return None
            writes.append((target, from_buffer(array if array.flags.c_contiguous else array.copy("C")), 0, size))
        out = empty(shape, dtype)
        memory = from_buffer(out)
        with lock, devices:
            for call in writes:
                write(*call)
            compute()
            read(source, memory, 0, nbytes)
        return out

    return replay


def flatten(value: Any, arrays: list[npt.NDArray[Any]]) -> Any:
    """Return ``value`` as a hashable key, with shape and type in place of each array.

    Parameters
    ----------
    value
        An argument of a compiled function, or all of them in a tuple or dict.
    arrays
        The arrays of ``value`` are appended to this list, in order.

    Raises
    ------
    TypeError
        If ``value`` contains a tensor, or an object that numpy cannot read as numbers.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind != "V":
        arrays.append(value)
        return np.ndarray, value.shape, value.dtype.char
    if isinstance(value, tuple):
        return tuple, *[flatten(v, arrays) for v in value]
    if isinstance(value, float):
        # 0.0 and -0.0 are equal, and NaN equals nothing but the same object.
        return "constant", type(value), math.copysign(1.0, value), math.nan if math.isnan(value) else value
    if value is None or isinstance(value, bool | int | str):
        # The type is part of the key because 1, 1.0 and True are equal.
        return "constant", type(value), value
    if isinstance(value, list):
        return list, *(flatten(v, arrays) for v in value)
    if isinstance(value, Mapping):
        return dict, *((name, flatten(v, arrays)) for name, v in value.items())
    if isinstance(value, Tensor):
        raise TypeError(f"{value!r} is a tensor: compiled functions take arrays; use tensors inside the function")
    return flatten(as_array(value), arrays)


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return ``value`` with ``function(tensor)`` in place of each tensor, also inside tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        parts = [map_tensors(v, function) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [map_tensors(v, function) for v in value]
    if isinstance(value, Mapping):
        return {name: map_tensors(v, function) for name, v in value.items()}
    return value


def _input_type(dtype: np.dtype[Any]) -> Type:
    """Return the type of an input tensor: F16 for ``float16``, F32 for other floats, I32 for integers."""
    if dtype.kind == "f":
        return Type.F16 if dtype.itemsize == 2 else Type.F32
    return Type.I32
