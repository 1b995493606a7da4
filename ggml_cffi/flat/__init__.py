"""The flat API: functions by the names and in the order of arguments that C and its R binding have.

A script ports line by line, on the safe objects of this package: nothing ends the process, errors are exceptions, and
objects may be freed in any order, twice, or not at all.

>>> from ggml_cffi.flat import *
>>> ctx = ggml_init(16 * 1024 * 1024)
>>> a = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 3, 2)  # ne0 = 3 is contiguous: numpy's (2, 3)
>>> ggml_set_f32(a, [1, 2, 3, 4, 5, 6])
>>> graph = ggml_build_forward_expand(ctx, ggml_sum_rows(ctx, a))
>>> sched = ggml_backend_sched_new([ggml_backend_cpu_init()])
>>> ggml_backend_sched_graph_compute(sched, graph)
<Status.SUCCESS: 0>
>>> ggml_get_f32(graph.outputs[0])
array([ 6., 15.], dtype=float32)

* Sizes and axes are ggml's here, the contiguous first. The objects' own attributes stay numpy's: ``a.shape``.
* Devices and backends are counted from 0.
* Operations: every builder of ``ggml.h`` but ``ggml_flash_attn_back``, which always ends the process.
* Values are set at any time: before a tensor has memory they are kept, and written when the scheduler gives it some.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from operator import index
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ggml_cffi import c
from ggml_cffi.c import library
from ggml_cffi.core import dtypes
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.buffer import Buffer
from ggml_cffi.core.context import Context
from ggml_cffi.core.device import Device, Memory, device, devices
from ggml_cffi.core.handle import Handle
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import BackendBufferUsage as Usage
from ggml_cffi.enums import Status, Type
from ggml_cffi.flat._objects import FlatBackend, FlatContext, FlatScheduler, GraphBuilder, new_graph
from ggml_cffi.flat._ops import *  # noqa: F403
from ggml_cffi.flat._ops import __all__ as _operations
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.scheduler import Scheduler

__all__ = [
    "ggml_backend_alloc_ctx_tensors",
    "ggml_backend_buffer_free",
    "ggml_backend_buffer_set_usage",
    "ggml_backend_cpu_init",
    "ggml_backend_cpu_set_n_threads",
    "ggml_backend_free",
    "ggml_backend_name",
    "ggml_backend_sched_alloc_graph",
    "ggml_backend_sched_free",
    "ggml_backend_sched_get_backend",
    "ggml_backend_sched_get_buffer_size",
    "ggml_backend_sched_get_n_backends",
    "ggml_backend_sched_get_n_copies",
    "ggml_backend_sched_get_n_splits",
    "ggml_backend_sched_get_tensor_backend",
    "ggml_backend_sched_graph_compute",
    "ggml_backend_sched_graph_compute_async",
    "ggml_backend_sched_new",
    "ggml_backend_sched_reserve",
    "ggml_backend_sched_reset",
    "ggml_backend_sched_set_tensor_backend",
    "ggml_backend_sched_synchronize",
    "ggml_build_forward_expand",
    "ggml_dup_tensor",
    "ggml_free",
    "ggml_get_f32",
    "ggml_get_i32",
    "ggml_get_name",
    "ggml_graph_n_nodes",
    "ggml_init",
    "ggml_n_dims",
    "ggml_nbytes",
    "ggml_nelements",
    "ggml_new_f32",
    "ggml_new_graph",
    "ggml_new_i32",
    "ggml_new_tensor",
    "ggml_new_tensor_1d",
    "ggml_new_tensor_2d",
    "ggml_new_tensor_3d",
    "ggml_new_tensor_4d",
    "ggml_set_f32",
    "ggml_set_i32",
    "ggml_set_input",
    "ggml_set_name",
    "ggml_set_output",
    "ggml_tensor_shape",
    "ggml_vulkan_available",
    "ggml_vulkan_backend_name",
    "ggml_vulkan_device_count",
    "ggml_vulkan_device_description",
    "ggml_vulkan_device_memory",
    "ggml_vulkan_free",
    "ggml_vulkan_init",
    "ggml_vulkan_status",
    *_operations,
]

_T = TypeVar("_T")


def _graph(graph: Graph | GraphBuilder) -> Graph:
    return graph.graph() if isinstance(graph, GraphBuilder) else _need(graph, Graph)


def _need(value: Any, kind: type[_T]) -> _T:
    if not isinstance(value, kind):
        raise TypeError(f"a {kind.__name__} is needed, not {type(value).__name__}")
    return value


def _free(value: Handle | None, kind: type[Handle]) -> None:
    if value is not None:
        _need(value, kind).close()


# ---------------------------------------------------------------------- devices and backends


def ggml_vulkan_available() -> bool:
    """Whether the Vulkan plug-in can be loaded; there may be no device all the same."""
    return library.available("vulkan")


def ggml_vulkan_device_count() -> int:
    """Vulkan devices; 0 where there is no Vulkan."""
    return sum(d.name.startswith("Vulkan") for d in devices())


def _vulkan(i: int) -> Device:
    n = ggml_vulkan_device_count()
    if not 0 <= index(i) < n:
        raise IndexError(f"there is no Vulkan device {i}: this machine has {n}, counted from 0")
    return device(f"Vulkan{index(i)}")


def ggml_vulkan_device_description(device: int = 0) -> str:
    """The hardware's name; devices are counted from 0. ``IndexError`` if there is no such device."""
    return _vulkan(device).description


def ggml_vulkan_device_memory(device: int = 0) -> Memory:
    """Bytes ``free`` and ``total``."""
    return _vulkan(device).memory()


def ggml_vulkan_status() -> None:
    """Print what there is."""
    lines = [f"{_vulkan(i).name}: {_vulkan(i).description}" for i in range(ggml_vulkan_device_count())]
    sys.stdout.write("\n".join(lines or ["no Vulkan device"]) + "\n")


def ggml_vulkan_init(device: int = 0) -> Backend:
    """Open a Vulkan device, counted from 0. ``IndexError`` if there is no such device."""
    return FlatBackend(_vulkan(device))


def ggml_backend_cpu_init() -> Backend:
    """Open the CPU, with as many threads as this process may use."""
    return FlatBackend("CPU")


def ggml_backend_cpu_set_n_threads(backend_cpu: Backend, n_threads: int) -> None:
    """Threads of the CPU, 1 to 512. ``ValueError`` for another backend."""
    _need(backend_cpu, Backend).n_threads = n_threads


def ggml_backend_name(backend: Backend) -> str:
    """Such as ``"Vulkan0"`` or ``"CPU"``."""
    return _need(backend, Backend).name


def ggml_vulkan_backend_name(backend: Backend) -> str:
    """As :func:`ggml_backend_name`."""
    return ggml_backend_name(backend)


def ggml_backend_free(backend: Backend | None) -> None:
    """Close a backend. A scheduler that has it goes on living, and is freed when it likes."""
    _free(backend, Backend)


def ggml_vulkan_free(backend: Backend | None) -> None:
    """As :func:`ggml_backend_free`."""
    _free(backend, Backend)


# ---------------------------------------------------------------------- contexts, tensors, graphs


def ggml_init(mem_size: int = 16 * 1024 * 1024, no_alloc: bool = False) -> Context:  # noqa: ARG001
    """A context. It grows by itself and data is in buffers: a size of at least 0 is asked for, and not needed."""
    if isinstance(mem_size, bool) or index(mem_size) < 0:
        raise ValueError(f"mem_size must be a number of bytes, not {mem_size!r}")
    return FlatContext()


def ggml_free(ctx: Context | None) -> None:
    """Close a context, with its tensors, their memory and its graphs."""
    _free(ctx, Context)


def ggml_new_tensor(ctx: Context, type: Type, n_dims: int, ne: Sequence[int]) -> Tensor:  # noqa: A002
    """A tensor of ``n_dims`` sizes, the contiguous first. Its values are 0 until they are set."""
    sizes = tuple(ne)[: index(n_dims)]
    if not 1 <= n_dims <= 4 or len(sizes) < n_dims:
        raise ValueError(f"ggml_new_tensor: n_dims must be 1 to 4, and ne as long, not {n_dims} and {tuple(ne)}")
    return _need(ctx, Context).new_tensor(type, sizes[::-1])


def ggml_new_tensor_1d(ctx: Context, type: Type, ne0: int) -> Tensor:  # noqa: A002
    """A vector; see :func:`ggml_new_tensor`."""
    return _need(ctx, Context).new_tensor(type, (ne0,))


def ggml_new_tensor_2d(ctx: Context, type: Type, ne0: int, ne1: int) -> Tensor:  # noqa: A002
    """A matrix of ``ne1`` rows of ``ne0`` elements; see :func:`ggml_new_tensor`."""
    return _need(ctx, Context).new_tensor(type, (ne1, ne0))


def ggml_new_tensor_3d(ctx: Context, type: Type, ne0: int, ne1: int, ne2: int) -> Tensor:  # noqa: A002
    """Three axes; see :func:`ggml_new_tensor`."""
    return _need(ctx, Context).new_tensor(type, (ne2, ne1, ne0))


def ggml_new_tensor_4d(ctx: Context, type: Type, ne0: int, ne1: int, ne2: int, ne3: int) -> Tensor:  # noqa: A002
    """Four axes; see :func:`ggml_new_tensor`."""
    return _need(ctx, Context).new_tensor(type, (ne3, ne2, ne1, ne0))


def ggml_dup_tensor(ctx: Context, src: Tensor) -> Tensor:
    """A new tensor of the type and sizes of ``src``."""
    return _need(ctx, Context).new_tensor(_need(src, Tensor).dtype, src.shape)


def ggml_new_f32(ctx: Context, value: float) -> Tensor:
    """A tensor of one F32."""
    return _need(ctx, Context).constant([value], Type.F32)


def ggml_new_i32(ctx: Context, value: int) -> Tensor:
    """A tensor of one I32."""
    return _need(ctx, Context).constant([value], Type.I32)


def ggml_set_name(tensor: Tensor, name: str) -> Tensor:
    """Name a tensor, and return it; at most 63 bytes are kept."""
    _need(tensor, Tensor).name = name
    return tensor


def ggml_get_name(tensor: Tensor) -> str:
    """The name of a tensor."""
    return _need(tensor, Tensor).name


def ggml_set_input(tensor: Tensor) -> None:
    """Nothing: inputs stay valid without the mark, which would keep their nodes off the GPUs."""
    _need(tensor, Tensor)


def ggml_set_output(tensor: Tensor) -> None:
    """Have a tensor keep its memory during a run, so that it can be read; before it is allocated."""
    for ctx in _need(tensor, Tensor).context.reachable():
        if any(tensor.ptr in nodes for nodes in ctx.held.copy().values()):
            raise ValueError(f"{tensor!r} is allocated already: mark outputs before, or reset the scheduler first")
    c.ggml_set_output(tensor.ptr)


def ggml_tensor_shape(tensor: Tensor) -> tuple[int, ...]:
    """The four sizes in ggml's order, ``(ne0, ne1, ne2, ne3)``."""
    return _need(tensor, Tensor).ne


def ggml_n_dims(tensor: Tensor) -> int:
    """Axes, without those of size 1 at the end of :func:`ggml_tensor_shape`; at least 1."""
    return c.ggml_n_dims(_need(tensor, Tensor).ptr)


def ggml_nelements(tensor: Tensor) -> int:
    """Number of elements."""
    return _need(tensor, Tensor).size


def ggml_nbytes(tensor: Tensor) -> int:
    """Bytes from the first to the last element."""
    return _need(tensor, Tensor).nbytes


def ggml_new_graph(ctx: Context) -> GraphBuilder:
    """A graph to which :func:`ggml_build_forward_expand` adds outputs, as scripts for C do."""
    return GraphBuilder(_need(ctx, Context))


def ggml_build_forward_expand(ctx: Context | GraphBuilder, tensor: Tensor) -> Graph | GraphBuilder:
    """The graph that computes ``tensor``, as R's binding returns it; or one more output of a graph, as in C."""
    if isinstance(ctx, GraphBuilder):
        ctx.expand(_need(tensor, Tensor))
        return ctx
    return new_graph(_need(ctx, Context), [_need(tensor, Tensor)])


def ggml_graph_n_nodes(graph: Graph | GraphBuilder) -> int:
    """Tensors that are computed."""
    return len(_graph(graph))


def ggml_backend_alloc_ctx_tensors(ctx: Context, backend: Backend) -> list[Buffer]:
    """Give all inputs of a context memory on a backend, where they stay: weights, caches, what is trained.

    Without it, the scheduler gives inputs memory. A list of buffers, for the two functions below: a device may limit
    their size.
    """
    return _need(ctx, Context).alloc(_need(backend, Backend).buffer_type)


def ggml_backend_buffer_set_usage(buffer: Sequence[Buffer], usage: Usage) -> None:
    """``GGML_BACKEND_BUFFER_USAGE_WEIGHTS`` has nodes run where these weights are; or ``_ANY``."""
    if usage not in (Usage.ANY, Usage.WEIGHTS):
        raise ValueError(f"usage must be ANY or WEIGHTS, not {usage!r}")
    for one in buffer:
        c.ggml_backend_buffer_set_usage(_need(one, Buffer).ptr, usage)


def ggml_backend_buffer_free(buffer: Sequence[Buffer] | None) -> None:
    """Free memory; its tensors can no longer be used. The context would do it, too."""
    for one in buffer or ():
        _free(one, Buffer)


# ---------------------------------------------------------------------- values


def ggml_set_f32(tensor: Tensor, values: npt.ArrayLike) -> None:
    """Set all values of a tensor, converted to its type, whether it has memory or not.

    Parameters
    ----------
    tensor
        An input, or a contiguous view of one.
    values
        As many as the tensor has elements, flat with the axis of ``ne0`` fastest; or an array of the tensor's numpy
        shape; or one number for all.

    Raises
    ------
    ValueError
        If the number of values differs, the tensor is computed, or row numbers are out of range for an operation.
    TypeError
        If the values cannot be stored in the tensor's type.
    """
    t, array = _need(tensor, Tensor), np.asarray(values)
    if array.ndim and array.shape != t.shape:
        if array.ndim > 1 or array.size != t.size:
            raise ValueError(f"{t!r} takes {t.size} values, flat or of shape {t.shape}, not {array.shape}")
        array = array.reshape(t.shape)
    data = dtypes.to_bytes(array if array.shape == t.shape else np.full(t.shape, array), t.dtype)
    _wait(t)
    root = t if not t.ptr.view_src else _root(t)
    if t.is_allocated or not root.is_leaf or not t.is_contiguous:
        t.set_bytes(data)
        return
    raw = data.reshape(-1).view(np.uint8)
    if t.dtype in dtypes.INTEGERS:
        t.check_limit(raw)
    whole = root.context.later(root)
    kept = np.zeros(root.nbytes, np.uint8) if whole is None else whole.reshape(-1).view(np.uint8).copy()
    kept[t._offset() : t._offset() + raw.size] = raw
    root.context.set_later(root, kept)


def ggml_set_i32(tensor: Tensor, values: npt.ArrayLike) -> None:
    """As :func:`ggml_set_f32`; the tensor's type decides."""
    ggml_set_f32(tensor, values)


def ggml_get_f32(tensor: Tensor) -> npt.NDArray[np.float32]:
    """All values as a flat array with the axis of ``ne0`` fastest, as R's binding gives them.

    ``.reshape(tensor.shape)`` is the numpy array. Waits for a run that was started and not waited for.

    Raises
    ------
    ValueError
        If there are no values yet, or the tensor is a temporary of a graph (see :func:`ggml_set_output`).
    """
    return _values(tensor).astype(np.float32).reshape(-1)


def ggml_get_i32(tensor: Tensor) -> npt.NDArray[np.int32]:
    """As :func:`ggml_get_f32`, of an integer tensor."""
    t = _need(tensor, Tensor)
    if t.dtype not in dtypes.INTEGERS:
        raise ValueError(f"{t!r} is not of integers")
    return _values(t).astype(np.int32).reshape(-1)


def _values(tensor: Tensor) -> npt.NDArray[Any]:
    t = _need(tensor, Tensor)
    _wait(t)
    if not t.is_allocated and t.is_contiguous:
        root = t if not t.ptr.view_src else _root(t)
        kept = root.context.later(root)
        if kept is not None:
            raw = kept.reshape(-1).view(np.uint8)[t._offset() : t._offset() + t.nbytes]
            if dtypes.has_numpy(t.dtype):
                return raw.view(dtypes.numpy_dtype(t.dtype))
            return dtypes.from_bytes(raw, t.dtype, t.size)
    return t.numpy()


def _root(t: Tensor) -> Tensor:
    """The tensor that ``t`` is a view of, in the context that holds it."""
    pointer = t.ptr.view_src
    for ctx in t.context.reachable():
        for found in ctx.tensors():
            if found.ptr == pointer:
                return found
    raise ValueError(f"{t!r} is a view of a tensor that is not there")


def _wait(t: Tensor) -> None:
    """Wait for what was started on the tensors of these contexts: C would read, or write, in the middle of it."""
    for ctx in t.context.reachable():
        if isinstance(ctx, FlatContext):
            for scheduler in list(ctx.running):
                if not scheduler.closed:
                    scheduler.synchronize()
                ctx.running.discard(scheduler)


# ---------------------------------------------------------------------- scheduler


def ggml_backend_sched_new(backends: Sequence[Backend], parallel: bool = True, graph_size: int = 2048) -> Scheduler:
    """A scheduler over backends, the preferred first; the CPU is added last if it is not there.

    Arguments are those of R's binding. ``parallel`` keeps four copies of inputs that go from one backend to another,
    where the backends can.
    """
    return FlatScheduler(list(backends), parallel=bool(parallel), graph_size=graph_size)


def ggml_backend_sched_free(sched: Scheduler | None) -> None:
    """Close a scheduler. Its backends stay open."""
    _free(sched, Scheduler)


def ggml_backend_sched_get_n_backends(sched: Scheduler) -> int:
    """Backends, the CPU included."""
    return len(_need(sched, Scheduler).backends)


def ggml_backend_sched_get_backend(sched: Scheduler, i: int = 0) -> Backend:
    """A backend by its place, counted from 0."""
    backends = _need(sched, Scheduler).backends
    if not 0 <= index(i) < len(backends):
        raise IndexError(f"the scheduler has {len(backends)} backends, counted from 0: there is no {i}")
    return backends[index(i)]


def ggml_backend_sched_get_n_splits(sched: Scheduler) -> int:
    """Parts of the graph held, each on one backend; 0 if none is held."""
    return _need(sched, Scheduler).n_splits if sched.graph is not None else 0


def ggml_backend_sched_get_n_copies(sched: Scheduler) -> int:
    """Copies of inputs that are kept: 4, or 1 if not ``parallel`` or the backends cannot."""
    return _need(sched, Scheduler).n_copies


def ggml_backend_sched_get_buffer_size(sched: Scheduler, backend: Backend) -> int:
    """Bytes for intermediate results on a backend."""
    sizes = _need(sched, Scheduler).buffer_sizes()
    if backend not in sizes:
        raise ValueError(f"{backend!r} is not one of {sched!r}")
    return sizes[backend]


def ggml_backend_sched_reserve(sched: Scheduler, measure_graph: Graph | GraphBuilder) -> bool:
    """Make room for a graph, which can be allocated and computed after. True; raises ``OutOfMemoryError``."""
    _need(sched, Scheduler).reserve(_graph(measure_graph))
    return True


def ggml_backend_sched_alloc_graph(sched: Scheduler, graph: Graph | GraphBuilder) -> bool:
    """Give a graph memory. True; raises what :meth:`ggml_cffi.Scheduler.alloc` does."""
    _need(sched, Scheduler).alloc(_graph(graph))
    return True


def ggml_backend_sched_set_tensor_backend(sched: Scheduler, node: Tensor, backend: Backend) -> None:
    """Have a tensor computed, or an input kept, on a backend, from the next reservation or allocation on.

    It stays placed there over resets, which C forgets.
    """
    _need(sched, Scheduler).place(_need(node, Tensor), _need(backend, Backend))


def ggml_backend_sched_get_tensor_backend(sched: Scheduler, node: Tensor) -> Backend | None:
    """Where a tensor is computed, or was placed; None if the scheduler does not know it."""
    if not isinstance(sched, FlatScheduler):
        held = _need(sched, Scheduler).graph
        return sched.backend_of(node) if held is not None and node in held else None
    return sched.placed_on(_need(node, Tensor))


def ggml_backend_sched_graph_compute(sched: Scheduler, graph: Graph | GraphBuilder) -> Status:
    """Compute a graph, which is allocated first if none is held, and wait. ``GGML_STATUS_SUCCESS``; raises else.

    ``ValueError`` if the scheduler holds another graph: C would compute that one.
    """
    _need(sched, Scheduler).compute(_graph(graph))
    return Status.SUCCESS


def ggml_backend_sched_graph_compute_async(sched: Scheduler, graph: Graph | GraphBuilder) -> Status:
    """Start computing a graph. Setting or getting values waits for it, as :func:`ggml_backend_sched_synchronize`."""
    started = _graph(graph)
    _need(sched, Scheduler).compute_async(started)
    for ctx in started.contexts:
        if isinstance(ctx, FlatContext):
            ctx.running.add(sched)
    return Status.SUCCESS


def ggml_backend_sched_synchronize(sched: Scheduler) -> None:
    """Wait for what was started."""
    _need(sched, Scheduler).synchronize()


def ggml_backend_sched_reset(sched: Scheduler) -> None:
    """Release the graph held. Inputs keep their values, and placements stay."""
    _need(sched, Scheduler).reset()
