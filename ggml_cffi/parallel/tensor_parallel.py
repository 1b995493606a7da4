"""Tensor parallelism: several devices share every layer.

Each device has a shard of the weights, and computes its part of each layer. For an all-reduce, each device writes its
partial sum to host memory and reads the sums of the others there. CUDA devices that reach one another leave it in their
own memory. No data goes through Python or the processor. A program has one step more than it has all-reduces. Between
two steps, the devices wait for one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from ggml_cffi.c.library import ADVICE
from ggml_cffi.core import dtypes
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.context import Context
from ggml_cffi.core.device import Device, DeviceLike, gpus
from ggml_cffi.core.dtypes import as_array, as_type
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.core.upload import Job, upload
from ggml_cffi.enums import BackendBufferUsage as Usage
from ggml_cffi.enums import Type
from ggml_cffi.files.gguf.reader import GGUFTensor
from ggml_cffi.parallel.function import ParallelFunction
from ggml_cffi.parallel.group import Group
from ggml_cffi.parallel.rank import AllGather
from ggml_cffi.parallel.shard import MIRROR, ShardSpec, shard_bytes, spec_for


class TensorParallel(Group):
    """Devices that share every layer of a network.

    Parameters
    ----------
    devices
        GPUs, their names, or backends, which the caller closes; or the CPU alone. Default every GPU.
    half_above
        Bytes beyond which partial sums are exchanged as F16, in half the time. By default they never are, because an
        element beyond 65504 would be infinite.
    threads
        True for a thread for each device, which submits its work; False for one thread that serves the devices in
        turns. By default, one thread records short steps ahead while the devices compute. Other steps use a thread for
        each device if the processor has enough cores. CUDA devices wait for one another without the host.
    n_threads
        Threads of the CPU, if it computes; default all that this process may use.
    precision
        ``"f32"`` for products with the accuracy of F32; see :class:`ggml_cffi.Session`.

    Raises
    ------
    ValueError
        If there are no devices, one is listed twice, the CPU is among several, a GPU cannot use host memory, or there
        is no such precision.

    Examples
    --------
    >>> with TensorParallel(["CPU"]) as group:
    ...     up, down = group.weight(np.eye(3), ROWS), group.weight(np.eye(3), COLUMNS)
    ...
    ...     def block(rank, x):
    ...         return x + rank.all_reduce(ops.linear(ops.relu(ops.linear(x, up[rank])), down[rank]))
    ...
    ...     group.compile(block)(np.ones((1, 3)))
    array([[2., 2., 2.]], dtype=float32)
    """

    def __init__(
        self,
        devices: DeviceLike | Iterable[Backend | DeviceLike] | None = None,
        *,
        half_above: int | None = None,
        threads: bool | None = None,
        n_threads: int | None = None,
        precision: str = "default",
    ) -> None:
        self._opened: list[Backend] = []
        self._contexts: list[Context] = []
        self._compiled: list[ParallelFunction[Any]] = []
        try:
            chosen: list[Backend] = []
            for which in gpus() if devices is None else [devices] if isinstance(devices, DeviceLike) else devices:
                if not isinstance(which, Backend):
                    which = Backend(which, n_threads=n_threads)
                    self._opened.append(which)
                chosen.append(which)
            check_devices([b.device for b in chosen])
            super().__init__(chosen, half_above=half_above, threads=threads, precision=precision)
            self._contexts = [Context() for _ in chosen]
        except BaseException:
            for backend in self._opened:
                backend.close()
            raise

    # ------------------------------------------------------------------ data on devices

    def weight(
        self,
        values: npt.ArrayLike | GGUFTensor,
        spec: ShardSpec = MIRROR,
        *,
        dtype: Type | str | npt.DTypeLike | None = None,
        name: str = "",
    ) -> list[Tensor]:
        """Store a weight on the devices. Return the shards in order of ranks.

        Parameters
        ----------
        values
            An array, any object that numpy or DLPack can read, or a tensor of a GGUF file.
        spec
            Division of the weight among the devices.
        dtype
            Type of the stored weight. Default the type of the values; F32 for ``float64``.

        Raises
        ------
        TypeError, ValueError
            If the values cannot be stored as ``dtype``, or cannot be sharded by ``spec``.
        OutOfMemoryError
            If a device has too little memory.
        """
        found = self.weights({name: values}, {"*": spec}, dtype=dtype)
        return found[name]

    def weights(
        self,
        values: Mapping[str, npt.ArrayLike | GGUFTensor],
        rules: Mapping[str, ShardSpec],
        *,
        dtype: Type | str | npt.DTypeLike | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, list[Tensor]]:
        """Store weights by name, each divided by the first rule whose pattern matches the name, or mirrored.

        >>> rules = {"*.up": ROWS, "*.down": COLUMNS}

        Parameters
        ----------
        values, rules, dtype
            As for :meth:`weight`. The errors are the same, and name the weight.
        progress
            Called with bytes done and bytes in all.
        """
        n = len(self.backends)
        sources = [_Source(name, value, spec_for(name, rules), dtype) for name, value in values.items()]
        made = {
            s.name: [
                context.new_tensor(s.dtype, shape, name=s.name)
                for context, shape in zip(self._contexts, s.shapes(n), strict=True)
            ]
            for s in sources
        }
        for context, backend, parts in zip(
            self._contexts, self.backends, zip(*made.values(), strict=True), strict=False
        ):
            context.alloc(backend.buffer_type, [t for t in parts if t.size], usage=Usage.WEIGHTS)
        stored = [s for s in sources if s.is_stored]
        total, done = sum(t.nbytes for parts in made.values() for t in parts), 0

        def report(part: int, _: int) -> None:
            if progress:
                progress(done + part, total)

        # A conversion takes host memory, so weights are converted one at a time.
        for together in [stored, *([s] for s in sources if not s.is_stored)]:
            jobs = [Job(t, data) for s in together for t, data in zip(made[s.name], s.pieces(n), strict=True)]
            upload([job for job in jobs if job.data.size], self.backends, report)
            done += sum(job.data.size for job in jobs)
        return made

    def zeros(
        self, shapes: Sequence[Sequence[int]], dtype: Type | str | npt.DTypeLike = Type.F32, *, name: str = ""
    ) -> list[Tensor]:
        """Return a tensor of zeros for each device, each of its own shape, such as a cache that is changed in place."""
        if len(shapes) != len(self.backends):
            raise ValueError(f"{len(shapes)} shapes for {len(self.backends)} devices: there must be one for each")
        made = []
        for context, backend, shape in zip(self._contexts, self._backends, shapes, strict=True):
            t = context.new_tensor(as_type(dtype), shape, name=name)
            if t.size:
                context.alloc(backend.buffer_type, [t])
            made.append(t)
        return made

    @overload
    def compile(self, function: Callable[..., Tensor | AllGather]) -> ParallelFunction[npt.NDArray[Any]]: ...
    @overload
    def compile(
        self, function: Callable[..., tuple[Tensor | AllGather, ...]]
    ) -> ParallelFunction[tuple[npt.NDArray[Any], ...]]: ...
    @overload
    def compile(self, function: Callable[..., Any]) -> ParallelFunction[Any]: ...
    def compile(self, function: Callable[..., Any]) -> ParallelFunction[Any]:
        """Return ``function(rank, *tensors)`` as a function of arrays.

        ``function`` is traced for each device, once for each signature (shapes and types of the arrays), with a
        :class:`Rank` and the device's copies of the inputs. It gets the device's weights with ``w[rank]``, and adds up
        partial sums with :meth:`Rank.all_reduce`. It returns a tensor, the result of :meth:`Rank.all_gather`, or a
        tuple of these. All ranks must do the same.
        """
        self.backends  # noqa: B018 - raises when closed
        if not callable(function):
            raise TypeError(f"compile takes a function, not {type(function).__name__}")
        made: ParallelFunction[Any] = ParallelFunction(self, function)
        with self.lock:
            self._compiled.append(made)
        return made

    def close(self) -> None:
        """Free functions and weights, and close the backends that were opened here."""
        with self.lock:
            compiled, self._compiled = self._compiled, []
            for made in compiled:
                made.clear()
            super().close()
            for context in self._contexts:
                context.close()
            for backend in self._opened:
                backend.close()

    def __repr__(self) -> str:
        names = "closed" if self.closed else ", ".join(b.name for b in self._backends)
        return f"<TensorParallel {names}>"


def check_devices(devices: Sequence[Device]) -> None:
    """Raise ValueError if these devices cannot share layers."""
    if not devices:
        raise ValueError(f"tensor parallelism needs a device, and there is no GPU: use ['CPU'], alone; {ADVICE}")
    if len(set(devices)) < len(devices):
        raise ValueError(f"a device is listed twice: {', '.join(d.name for d in devices)}")
    if len(devices) > 1 and not all(d.is_gpu for d in devices):
        raise ValueError(
            "the CPU cannot share layers with others, because GPUs would wait for it: name GPUs only, or the CPU alone"
        )
    if len(backends := list(dict.fromkeys(d.backend_name for d in devices))) > 1:
        raise ValueError(
            f"{', '.join(d.name for d in devices)} are of several backends ({', '.join(backends)}), whose memory and "
            "events are not shared, so every sum would go through the host: name devices of one backend, or use "
            "split='layer'"
        )


class _Source:
    """The values of a weight, and their division among devices."""

    def __init__(
        self, name: str, values: npt.ArrayLike | GGUFTensor, spec: ShardSpec, dtype: Type | str | npt.DTypeLike | None
    ) -> None:
        self.name, self._spec = name, spec
        self._values = values if isinstance(values, GGUFTensor) else as_array(values)
        self.shape = self._values.shape
        self._stored = self._values.dtype if isinstance(self._values, GGUFTensor) else as_type(self._values.dtype)
        self.dtype = as_type(dtype) if dtype is not None else Type.F32 if self._stored is Type.F64 else self._stored
        self.is_stored = isinstance(self._values, GGUFTensor) and self._stored is self.dtype
        """True if the bytes of a file can be stored unchanged."""

    def shapes(self, n: int) -> list[tuple[int, ...]]:
        """Return the shape of the shard of each of ``n`` devices."""
        try:
            return self._spec.shapes(self.dtype, self.shape, n)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}" if self.name else str(error)) from None

    def pieces(self, n: int) -> list[npt.NDArray[np.uint8]]:
        """Return the bytes of the shard of each of ``n`` devices."""
        if isinstance(self._values, GGUFTensor) and self.is_stored:
            raw = self._values.raw()
        else:
            raw = dtypes.to_bytes(np.asarray(self._values), self.dtype).reshape(-1).view(np.uint8)
        return shard_bytes(self.dtype, self.shape, raw, self._spec, n)
