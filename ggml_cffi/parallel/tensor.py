"""Tensor parallelism: several devices share every layer.

Each device has a part of the weights, and computes its part of each layer. Where the parts are to be added, each writes
its own to host memory that all of them read and write by themselves, and reads the others' from there: no data goes
through Python or the processor. A run so has steps, one more than sums; the devices wait for one another in between.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ggml_cffi import dtypes
from ggml_cffi._handle import Closing
from ggml_cffi.backend import Backend
from ggml_cffi.context import Context
from ggml_cffi.cut import MIRROR, Cut, pieces, rule_for
from ggml_cffi.device import Device
from ggml_cffi.device import devices as all_devices
from ggml_cffi.dtypes import as_array, as_type
from ggml_cffi.enums import BackendBufferUsage as Usage
from ggml_cffi.enums import Type
from ggml_cffi.errors import ClosedError
from ggml_cffi.gguf import GGUFTensor
from ggml_cffi.parallel.driver import Driver
from ggml_cffi.parallel.program import Program
from ggml_cffi.parallel.rank import Rank
from ggml_cffi.tensor import Tensor
from ggml_cffi.transfer import HostBlock

_PROGRAMS = 16


class TensorParallel(Closing):
    """Devices that share every layer of a network.

    Parameters
    ----------
    devices
        GPUs or their names; default all. Or the CPU alone, which then has everything.
    half_above
        Bytes beyond which partial sums travel as F16, which takes half the time. Default never: a partial sum beyond
        65504 would be infinite.
    threads
        Whether each device has a thread that hands it its work. Default where there are processors enough.
    n_threads
        CPU only: threads; default all that this process may use.

    Raises
    ------
    ValueError
        Without devices, with one twice, with the CPU among several, or a GPU that cannot use host memory.

    Examples
    --------
    >>> with TensorParallel(["CPU"]) as group:
    ...     up, down = group.weight(np.eye(3), ROWS), group.weight(np.eye(3), COLUMNS)
    ...
    ...     def block(rank, x):
    ...         return x + rank.sum(ops.linear(ops.relu(ops.linear(x, up[rank])), down[rank]))
    ...
    ...     group.compile(block)(np.ones((1, 3)))
    array([[2., 2., 2.]], dtype=float32)
    """

    def __init__(
        self,
        devices: Iterable[Device | str] | None = None,
        *,
        half_above: int | None = None,
        threads: bool | None = None,
        n_threads: int | None = None,
    ) -> None:
        if isinstance(devices, str | Device):
            raise TypeError("devices is a sequence: put the one device in a list")
        self.half_above = half_above
        self.lock = threading.RLock()  # held by every run
        self._compiled: list[ParallelFunction] = []
        self._contexts: list[Context] = []
        self._backends: list[Backend] = []
        self._block: HostBlock | None = None
        self._driver: Driver | None = None
        try:
            given = [d for d in all_devices() if not d.is_cpu] if devices is None else devices
            for which in given:
                self._backends.append(Backend(which, n_threads=n_threads))
            self._check()
            self._contexts = [Context() for _ in self._backends]
            self._driver = Driver(self._backends, threads=threads)
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        devices = [b.device for b in self._backends]
        if not devices:
            raise ValueError("tensor parallelism needs a device: there is no GPU; ['CPU'] works too, alone")
        if len(set(devices)) < len(devices):
            raise ValueError(f"a device is listed twice: {', '.join(d.name for d in devices)}")
        if len(devices) > 1 and any(d.is_cpu for d in devices):
            raise ValueError(
                "the CPU cannot share layers with others: its parts would take as long as all of a GPU's; name GPUs "
                "only, or the CPU alone"
            )
        self.block(1)

    @property
    def backends(self) -> tuple[Backend, ...]:
        """One for each rank.

        Raises
        ------
        ClosedError
            If this is closed.
        """
        if self._driver is None:
            raise ClosedError("this TensorParallel is closed")
        return tuple(self._backends)

    @property
    def closed(self) -> bool:
        """Whether this is closed."""
        return self._driver is None

    @property
    def devices(self) -> tuple[Device, ...]:
        """The device of each rank."""
        return tuple(b.device for b in self.backends)

    @property
    def driver(self) -> Driver:
        """Runs the devices in step."""
        if self._driver is None:
            raise ClosedError("this TensorParallel is closed")
        return self._driver

    def block(self, size: int) -> HostBlock:
        """Host memory of at least ``size`` bytes that all devices read and write. Runs take turns in using it.

        Raises
        ------
        ValueError
            If a device cannot.
        """
        if self._block is None or len(self._block.memory) < size:
            made = HostBlock(size, dict.fromkeys(b.device for b in self._backends))
            unable = [b.name for b in self._backends if b.device not in made.buffers]
            if unable:
                made.close()
                raise ValueError(
                    f"{', '.join(unable)} cannot read and write memory of the host, through which partial sums go"
                )
            if self._block is not None:
                self._block.close()  # programs that use it keep it
            self._block = made
        return self._block

    # ------------------------------------------------------------------ data on devices

    def weight(
        self,
        values: npt.ArrayLike | GGUFTensor,
        cut: Cut = MIRROR,
        *,
        dtype: Type | str | npt.DTypeLike | None = None,
        name: str = "",
    ) -> list[Tensor]:
        """A weight, cut for the devices: each one's part, in order of ranks.

        Parameters
        ----------
        values
            An array, anything that numpy or DLPack can read, or a tensor of a GGUF file.
        cut
            How to cut it.
        dtype
            Type to store it in. Default the type it has; F32 for ``float64``.

        Raises
        ------
        TypeError, ValueError
            If the values cannot be stored as ``dtype``, or cannot be cut so.
        OutOfMemoryError
            If a device has no room.
        """
        found = self.weights({name: values}, {"*": cut}, dtype=dtype)
        return found[name]

    def weights(
        self,
        values: Mapping[str, npt.ArrayLike | GGUFTensor],
        rules: Mapping[str, Cut],
        *,
        dtype: Type | str | npt.DTypeLike | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, list[Tensor]]:
        """Weights by name, each cut by the first of ``rules`` (pattern to cut) that its name fits, else mirrored.

        >>> rules = {"*.up": ROWS, "*.down": COLUMNS}

        Parameters
        ----------
        values, rules, dtype
            As for :meth:`weight`, whose errors it raises; they name the weight.
        progress
            Called with bytes done and bytes in all.
        """
        n = len(self.backends)
        sources = [_Source(name, value, rule_for(name, rules), dtype) for name, value in values.items()]
        made = {
            s.name: [
                context.new_tensor(s.dtype, shape, name=s.name)
                for context, shape in zip(self._contexts, s.shapes(n), strict=True)
            ]
            for s in sources
        }
        for context, backend, parts in zip(
            self._contexts, self._backends, zip(*made.values(), strict=True), strict=False
        ):
            context.alloc(backend.buffer_type, [t for t in parts if t.size], usage=Usage.WEIGHTS)
        total, done = sum(s.nbytes for s in sources), 0
        for s in sources:
            for t, data in zip(made[s.name], s.pieces(n), strict=True):
                t.set_bytes(data)
            done += s.nbytes
            if progress:
                progress(done, total)
        return made

    def zeros(
        self, shapes: Sequence[Sequence[int]], dtype: Type | str | npt.DTypeLike = Type.F32, *, name: str = ""
    ) -> list[Tensor]:
        """For each device a tensor full of zeros, of its own shape, to be written in place: a cache, a state."""
        if len(shapes) != len(self.backends):
            raise ValueError(f"{len(shapes)} shapes for {len(self.backends)} devices")
        made = []
        for context, backend, shape in zip(self._contexts, self._backends, shapes, strict=True):
            t = context.new_tensor(as_type(dtype), shape, name=name)
            if t.size:
                context.alloc(backend.buffer_type, [t])
            made.append(t)
        return made

    # ------------------------------------------------------------------ functions

    def compile(self, function: Callable[..., Any]) -> ParallelFunction:
        """``function(rank, *tensors)`` as a function of arrays.

        It is traced for each device, once for each signature (shapes and types of the arrays), with a :class:`Rank`
        and the device's copies of the inputs. It takes the device's weights with ``w[rank]``, and adds up with
        :meth:`Rank.sum` what the devices have computed in parts. It returns a tensor, :meth:`Rank.gather`, or a tuple
        of such; all ranks must do the same.
        """
        self.backends  # noqa: B018 - raises when closed
        if not callable(function):
            raise TypeError(f"compile takes a function, not {type(function).__name__}")
        made = ParallelFunction(self, function)
        with self.lock:
            self._compiled.append(made)
        return made

    def close(self) -> None:
        """Give everything up: functions, weights, devices."""
        with self.lock:
            compiled, self._compiled = self._compiled, []
            for made in compiled:
                made.clear()
            if self._driver is not None:
                self._driver.close()
                self._driver = None
            for context in self._contexts:
                context.close()
            if self._block is not None:
                self._block.close()
                self._block = None
            for backend in self._backends:
                backend.close()

    def __repr__(self) -> str:
        names = "closed" if self._driver is None else ", ".join(b.name for b in self._backends)
        return f"<TensorParallel {names}>"


class _Source:
    """Where a weight comes from."""

    def __init__(
        self, name: str, values: npt.ArrayLike | GGUFTensor, cut: Cut, dtype: Type | str | npt.DTypeLike | None
    ) -> None:
        self.name, self._cut = name, cut
        self._values = values if isinstance(values, GGUFTensor) else as_array(values)
        self.shape = self._values.shape
        self._stored = self._values.dtype if isinstance(self._values, GGUFTensor) else as_type(self._values.dtype)
        self.dtype = as_type(dtype) if dtype is not None else Type.F32 if self._stored is Type.F64 else self._stored
        self.nbytes = prod(self.shape[:-1]) * dtypes.row_size(self.dtype, self.shape[-1] if self.shape else 1)

    def shapes(self, n: int) -> list[tuple[int, ...]]:
        """What each of ``n`` devices gets."""
        try:
            return self._cut.shapes(self.dtype, self.shape, n)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}" if self.name else str(error)) from None

    def pieces(self, n: int) -> list[npt.NDArray[np.uint8]]:
        """The bytes for each."""
        if isinstance(self._values, GGUFTensor) and self._stored is self.dtype:
            raw = self._values.raw()
        else:
            raw = dtypes.to_bytes(np.asarray(self._values), self.dtype).reshape(-1).view(np.uint8)
        return pieces(self.dtype, self.shape, raw, self._cut, n)


class ParallelFunction:
    """A function of arrays that several devices compute, made by :meth:`TensorParallel.compile`.

    ``float64`` arrays are computed in F32; others keep their type: F32, F16, I32 and I64.
    """

    def __init__(self, group: TensorParallel, function: Callable[..., Any]) -> None:
        self.group, self.function = group, function
        self._programs: OrderedDict[Any, Program] = OrderedDict()
        self._lock = group.lock

    def __call__(self, *arrays: npt.ArrayLike) -> Any:
        """Run, and wait for the result: an array for each tensor returned.

        Raises
        ------
        ClosedError
            If the group is closed.
        ValueError
            If the ranks' functions differ, or row numbers are out of range.
        UnsupportedOpError
            If a device cannot compute a node.
        GgmlError
            If a device reports failure.
        """
        given = [as_array(a) for a in arrays]
        with self._lock:
            return self._find(given).run(given)

    def trace(self, *arrays: npt.ArrayLike) -> Program:
        """The program for arrays of such shapes and types, traced but not run."""
        with self._lock:
            return self._find([as_array(a) for a in arrays])

    @property
    def programs(self) -> tuple[Program, ...]:
        """What was traced, the last used last."""
        return tuple(self._programs.values())

    def clear(self) -> None:
        """Give up all that was traced."""
        with self._lock:
            for program in self._programs.values():
                program.close()
            self._programs.clear()

    def _find(self, arrays: Sequence[npt.NDArray[Any]]) -> Program:
        backends = self.group.backends
        key = tuple((a.shape, Type.F32 if a.dtype == np.float64 else as_type(a.dtype)) for a in arrays)
        program = self._programs.get(key)
        if program is None:
            ranks = [Rank(r, len(backends), self.group.half_above) for r in range(len(backends))]
            program = Program(self.group.driver, self.group.block, ranks, self.function, key)
            self._programs[key] = program
            if len(self._programs) > _PROGRAMS:
                _, oldest = self._programs.popitem(last=False)
                oldest.close()
        else:
            self._programs.move_to_end(key)
        return program
