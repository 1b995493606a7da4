"""ggml's own tensor parallelism: several GPUs as one meta device.

:class:`~ggml_cffi.parallel.TensorParallel` is faster, and supports every operation. The meta device is for comparison,
and for later versions of ggml. ggml calls a function that returns the shards of each weight, derives the shards of
every result, and all-reduces partial sums. If it cannot, it ends the process. This module therefore allows only
operations that are known to work, those of feed-forward networks, and refuses others before ggml gets them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ggml_cffi import c, ops
from ggml_cffi.core import dtypes
from ggml_cffi.core.context import Context
from ggml_cffi.core.device import Device, DevicesLike, check_process, device_list, device_lock, registry_lock
from ggml_cffi.core.device import device as find_device
from ggml_cffi.core.dtypes import as_array, as_type
from ggml_cffi.core.handle import Closing, Handle
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import BackendBufferUsage as Usage
from ggml_cffi.enums import BackendMetaSplitAxis as Axis
from ggml_cffi.enums import Op, Status, Type
from ggml_cffi.errors import ClosedError, GgmlError, OutOfMemoryError, UnsupportedOpError
from ggml_cffi.parallel.shard import ShardSpec, spec_for
from ggml_cffi.scheduler.graph import Graph

_SAME = frozenset({Op.UNARY, Op.SCALE, Op.SQR, Op.SQRT, Op.SIN, Op.COS, Op.LOG, Op.CLAMP})
_TWO = frozenset({Op.ADD, Op.SUB, Op.MUL, Op.DIV})
_ROWS = frozenset({Op.RMS_NORM, Op.NORM})


class State(NamedTuple):
    """Distribution of a tensor over the devices: the sharded axis, in ggml's order, and the size of each shard."""

    axis: int
    sizes: tuple[int, ...] = ()


MIRRORED, PARTIAL = State(Axis.MIRRORED), State(Axis.PARTIAL)

#: Shards of weights by C pointer, for ggml's callback. ggml calls it once for each weight, during its allocation.
_answers: dict[Any, Any] = {}
_whole = c.ffi.new("struct ggml_backend_meta_split_state *", {"axis": int(Axis.MIRRORED), "nr": [1], "n_segments": 1})
_callback: list[Any] = []


def _device(devices: list[Device]) -> Any:
    """Return the meta device of these devices. ggml has one for each list, and never frees it."""
    if not _callback:
        answer = lambda tensor, _data: _answers.get(tensor, _whole)[0]  # noqa: E731
        _callback.append(c.ffi.callback("ggml_backend_meta_get_split_state_t", answer))
    pointers = c.ffi.new("ggml_backend_dev_t[]", [d.ptr for d in devices])
    with registry_lock:
        return c.ggml_backend_meta_device(pointers, len(devices), _callback[0], c.NULL)


class MetaDevice(Closing):
    """Several GPUs as one.

    Parameters
    ----------
    devices
        GPUs or their names, at most 16. Do not use them for anything else while this object is open.

    Raises
    ------
    ValueError
        If there are no devices, one is listed twice, or the CPU is among them: ggml would end the process.

    C: ``ggml_backend_meta_device``.
    """

    def __init__(self, devices: DevicesLike) -> None:
        self.devices = [find_device(d) for d in device_list(devices)]
        """The devices."""
        if not 1 <= len(self.devices) <= c.GGML_BACKEND_META_MAX_DEVICES:
            raise ValueError(f"{len(self.devices)} devices; a meta device has 1 to {c.GGML_BACKEND_META_MAX_DEVICES}")
        if len(set(self.devices)) < len(self.devices):
            raise ValueError(f"a device is listed twice: {', '.join(d.name for d in self.devices)}")
        if not all(d.is_gpu for d in self.devices):
            raise ValueError("ggml's meta device ends the process with the CPU as one of its devices: name GPUs only")
        for found in self.devices:
            check_process(found)
        self._locks = sorted({device_lock(d.ptr) for d in self.devices}, key=id)
        self._lock = threading.RLock()
        self._held: list[tuple[Context, list[_Owned]]] = []  # weights with their buffers
        self._states: dict[Any, State] = {}
        self._compiled: list[MetaFunction] = []
        with ExitStack() as stack:
            self.lock_devices(stack)
            pointer = c.ggml_backend_dev_init(_device(self.devices), c.NULL)
        self._backend = _Owned(pointer, c.ggml_backend_free)

    def lock_devices(self, stack: ExitStack) -> None:
        """Lock all devices until ``stack`` ends."""
        stack.enter_context(registry_lock)
        for lock in self._locks:
            stack.enter_context(lock)

    @property
    def ptr(self) -> Any:
        """The C pointer (``ggml_backend_t``).

        Raises
        ------
        ClosedError
            If this is closed.
        """
        if self._backend.closed:
            raise ClosedError("this MetaDevice is closed")
        return self._backend.ptr

    def weight(
        self, values: npt.ArrayLike, spec: ShardSpec, *, dtype: Type | str | None = None, name: str = ""
    ) -> Tensor:
        """Store a weight as one tensor, which has a shard on each device.

        Raises
        ------
        TypeError, ValueError
            If the values cannot be stored or sharded in this way, or a shard exceeds the largest buffer of a device.
        OutOfMemoryError
            If a device has too little memory.
        """
        array = as_array(values)
        kind = as_type(dtype) if dtype is not None else Type.F32 if array.dtype == np.float64 else as_type(array.dtype)
        data = dtypes.to_bytes(array, kind)
        backend = self.ptr
        n = len(self.devices)
        spans = spec.spans(kind, array.shape, n)
        if not data.size:
            raise ValueError(f"{name or 'a weight'} has no elements: a shard needs some")
        largest = max(stop - start for start, stop in spans)
        self._check_room(data.nbytes if spec.axis is None else data.nbytes * largest // array.shape[spec.axis])
        context = Context()
        buffers: list[_Owned] = []
        try:
            t = context.new_tensor(kind, array.shape, name=name)
            state = MIRRORED
            if spec.axis is not None:
                # The axis in ggml's order, which counts from the other end.
                axis = t.ndim - 1 if spec.axis == 0 else 0
                state = State(axis, tuple(stop - start for start, stop in spans))
                told = {"axis": axis, "ne": list(state.sizes), "nr": [1], "n_segments": 1}
                _answers[t.ptr] = c.ffi.new("struct ggml_backend_meta_split_state *", told)
            with ExitStack() as stack:
                self.lock_devices(stack)
                # ggml keeps weights from run to run only if all tensors of their context are allocated at once.
                buffer = c.ggml_backend_alloc_ctx_tensors_from_buft(
                    context.ptr, c.ggml_backend_get_default_buffer_type(backend)
                )
                buffers.append(_Owned(buffer, c.ggml_backend_buffer_free, [self._backend]))
                c.ggml_backend_buffer_set_usage(buffer, Usage.WEIGHTS)
                c.ggml_backend_tensor_set(t.ptr, c.ffi.from_buffer(data), 0, data.nbytes)
        except BaseException:
            self._drop(context, buffers)
            raise
        self._held.append((context, buffers))
        self._states[t.ptr] = state
        return t

    def weights(self, values: Mapping[str, npt.ArrayLike], rules: Mapping[str, ShardSpec]) -> dict[str, Tensor]:
        """Store weights by name, each divided by the first rule whose pattern matches the name, or mirrored."""
        return {name: self.weight(array, spec_for(name, rules), name=name) for name, array in values.items()}

    def _check_room(self, nbytes: int) -> None:
        for found in self.devices:
            with registry_lock:
                largest = c.ggml_backend_buft_get_max_size(c.ggml_backend_dev_buffer_type(found.ptr))
            if nbytes > largest:
                raise ValueError(
                    f"a shard of {nbytes:,} bytes is larger than the largest buffer of {found.name}, {largest:,}: "
                    "divide the weight in two"
                )
            if nbytes + (64 << 20) > found.memory().free:
                raise OutOfMemoryError(f"{found.name} has {found.memory().free:,} bytes free, too few for {nbytes:,}")

    def compile(self, function: Callable[..., Any]) -> MetaFunction:
        """Return a function of arrays for ``function``, which takes and returns tensors; trace it once per signature.

        ``function`` may use products with weights, sums, differences, element-wise products and quotients, scaling,
        norms of rows, and functions of elements, gated units included.
        """
        self.ptr  # noqa: B018 - raises when closed
        made = MetaFunction(self, function)
        self._compiled.append(made)
        return made

    def state(self, weight: Any) -> State:
        """Return the distribution of a weight, by its C pointer."""
        return self._states.get(weight, MIRRORED)

    def _drop(self, context: Context, buffers: list[_Owned]) -> None:
        for t in context.tensors():
            _answers.pop(t.ptr, None)
            self._states.pop(t.ptr, None)
            t.ptr.buffer = c.NULL
        for buffer in buffers:
            buffer.close()
        context.close()

    def close(self) -> None:
        """Free functions and weights, and close the devices."""
        with self._lock:
            for made in self._compiled:
                made.clear()
            self._compiled.clear()
            while self._held:
                self._drop(*self._held.pop())
            self._backend.close()


class _Owned(Handle):
    """A C object that is freed when it is closed."""


def spread(graph: Graph, state: Callable[[Any], State]) -> dict[Any, State]:
    """Return the distribution of each node of ``graph`` over the devices, as ggml derives it.

    Raises
    ------
    UnsupportedOpError
        If ggml would end the process, or a node is not known to work.
    """
    found: dict[Any, State] = {}

    def of(p: Any) -> State:
        known = found[p] if p in found else state(p)
        return MIRRORED if known is PARTIAL else known  # ggml all-reduces partial sums before a node uses them

    for t in graph.nodes:
        sources = [of(p) for p in t.ptr.src if p]
        result = _spread(t, sources)
        if result is None:
            shown = ", ".join("whole" if s is MIRRORED else f"cut along axis {s.axis} of ggml's" for s in sources)
            raise UnsupportedOpError(f"{t!r} of operands that are {shown} is not known to work on a meta device")
        found[t.ptr] = result
    return found


def _spread(t: Tensor, sources: list[State]) -> State | None:
    first = sources[0]
    op = t.op
    if op is Op.MUL_MAT:
        w, x = sources
        if w is MIRRORED and x is MIRRORED:
            return MIRRORED
        if w.axis == 1 and x is MIRRORED and t.ptr.src[0].ne[2] == 1:
            return State(0, w.sizes)
        return PARTIAL if w.axis == 0 and w == x else None
    if op in _SAME:
        return first
    if op in _TWO or (op is Op.GLU and len(sources) == 2):
        return first if sources[0] == sources[1] else None
    if op in _ROWS or op is Op.GLU:
        return first if first is MIRRORED else None
    return None


class MetaFunction:
    """A function of arrays that a meta device computes, made by :meth:`MetaDevice.compile`."""

    def __init__(self, device: MetaDevice, function: Callable[..., Any]) -> None:
        self.device, self.function = device, function
        self._programs: dict[Any, _Program] = {}

    def __call__(self, *arrays: npt.ArrayLike) -> npt.NDArray[Any]:
        """Run in F32, and wait for the result.

        Raises
        ------
        UnsupportedOpError
            If an operation of the function is not known to work; see :meth:`MetaDevice.compile`.
        ClosedError
            If the device is closed.
        """
        given = [np.ascontiguousarray(as_array(a), np.float32) for a in arrays]
        with self.device._lock:
            self.device.ptr  # noqa: B018 - raises when closed
            key = tuple(a.shape for a in given)
            if key not in self._programs:
                self._programs[key] = _Program(self.device, self.function, key)
            return self._programs[key].run(given)

    def spread(self, *arrays: npt.ArrayLike) -> list[State]:
        """Return the distribution of each node over the devices, in order."""
        self(*arrays)
        return list(self._programs[tuple(as_array(a).shape for a in arrays)].states.values())

    def clear(self) -> None:
        """Free all traced graphs."""
        for program in self._programs.values():
            program.close()
        self._programs.clear()


class _Program(Closing):
    """One traced signature."""

    def __init__(self, device: MetaDevice, function: Callable[..., Any], shapes: tuple[tuple[int, ...], ...]) -> None:
        self.device = device
        self.context = Context()
        self.graph: Graph | None = None
        self._memory: _Owned | None = None
        try:
            self.inputs = [self.context.new_tensor(Type.F32, shape) for shape in shapes]
            result = function(*self.inputs)
            if not isinstance(result, Tensor) or self.context not in result.context.reachable():
                raise TypeError(f"the function returned {result!r}: a tensor that it computed is needed")
            # ggml all-reduces a partial sum when a node uses it. This node makes it all-reduce the last one.
            self.result = ops.scale(result, 1.0)
            for t in self.inputs:
                c.ggml_set_input(t.ptr)
                c.ggml_set_output(t.ptr)  # otherwise ggml would reuse its memory
            self.graph = Graph(self.result)
            self.states = spread(self.graph, device.state)
            self._alloc()
        except BaseException:
            self.close()
            raise

    def _alloc(self) -> None:
        assert self.graph is not None
        backend = self.device.ptr
        for t in self.graph.nodes:
            if not all(c.ggml_backend_dev_supports_op(d.ptr, t.ptr) for d in self.device.devices):
                raise UnsupportedOpError(
                    f"{t!r} cannot be computed on {', '.join(d.name for d in self.device.devices)}"
                )
        self.device._check_room(sum(t.nbytes for t in (*self.graph.nodes, *self.inputs)))
        with ExitStack() as stack:
            self.device.lock_devices(stack)
            pointer = c.ggml_gallocr_new(c.ggml_backend_get_default_buffer_type(backend))
            self._memory = _Owned(pointer, c.ggml_gallocr_free, [self.device._backend])
            if not c.ggml_gallocr_alloc_graph(pointer, self.graph.ptr):
                raise OutOfMemoryError(f"a device has too little memory for the intermediate tensors of {self.graph!r}")

    def run(self, arrays: list[npt.NDArray[np.float32]]) -> npt.NDArray[Any]:
        """Write the inputs, compute, and return the result."""
        assert self.graph is not None
        out = np.empty(self.result.shape, np.float32)
        with ExitStack() as stack:
            self.device.lock_devices(stack)
            for t, array in zip(self.inputs, arrays, strict=True):
                if t.ptr.buffer:
                    c.ggml_backend_tensor_set(t.ptr, c.ffi.from_buffer(array), 0, array.nbytes)
            status = c.ggml_backend_graph_compute(self.device.ptr, self.graph.ptr)
            if status:
                raise GgmlError(f"the computation failed: {Status(status).name.lower()}")
            c.ggml_backend_tensor_get(self.result.ptr, c.ffi.from_buffer(out), 0, out.nbytes)
        return out

    def close(self) -> None:
        """Free the program."""
        if self.graph is not None:
            self.graph.close()
        if self._memory is not None:
            self._memory.close()
        self.context.close()
