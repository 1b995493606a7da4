"""Backends that compute in step, and the memory that all their programs use in turns."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from ggml_cffi.core.backend import Backend
from ggml_cffi.core.buffer import Buffer
from ggml_cffi.core.device import Device
from ggml_cffi.core.handle import Closing
from ggml_cffi.core.transfer import HostBlock
from ggml_cffi.errors import ClosedError
from ggml_cffi.parallel.executors.executor import Executor
from ggml_cffi.parallel.function import ParallelFunction


class Group(Closing):
    """One backend for each rank. Whoever opened the backends closes them.

    Parameters
    ----------
    backends
        Of as many devices.
    half_above, threads
        As for :class:`~ggml_cffi.parallel.TensorParallel`.

    Raises
    ------
    ValueError
        If a device cannot read and write memory of the host.
    """

    def __init__(
        self, backends: Sequence[Backend], *, half_above: int | None = None, threads: bool | None = None
    ) -> None:
        self.half_above = half_above
        self.lock = threading.RLock()
        """Held by every run."""
        self._backends = tuple(backends)
        self._compiled: list[ParallelFunction] = []
        self._arenas: list[Buffer | None] = [None] * len(self._backends)
        self._blocks: list[HostBlock | None] = [None, None]
        self._executor: Executor | None = None
        self.block(1)
        self._executor = Executor(self._backends, threads=threads)

    @property
    def backends(self) -> tuple[Backend, ...]:
        """One for each rank.

        Raises
        ------
        ClosedError
            If this is closed.
        """
        self.executor  # noqa: B018 - raises when closed
        return self._backends

    @property
    def closed(self) -> bool:
        """Whether this is closed."""
        return self._executor is None

    @property
    def devices(self) -> tuple[Device, ...]:
        """The device of each rank."""
        return tuple(b.device for b in self.backends)

    @property
    def executor(self) -> Executor:
        """Runs the devices in step."""
        if self._executor is None:
            raise ClosedError(f"this {type(self).__name__} is closed")
        return self._executor

    # ------------------------------------------------------------------ memory that programs use in turns

    def block(self, size: int, slot: int = 0) -> HostBlock:
        """Host memory of at least ``size`` bytes that all devices read and write.

        Parameters
        ----------
        slot
            Which of two such: one is written for the next run while devices use the other.

        Raises
        ------
        ValueError
            If a device cannot.
        """
        old = self._blocks[slot]
        if old is None or len(old.memory) < size:
            size = max(size, *(len(block.memory) for block in self._blocks if block is not None), 1)
            made = HostBlock(size, dict.fromkeys(b.device for b in self._backends))
            unable = [b.name for b in self._backends if b.device not in made.buffers]
            if unable:
                made.close()
                raise ValueError(
                    f"{', '.join(unable)} cannot read and write memory of the host, through which devices pass data on"
                )
            self._blocks[slot] = made
            if old is not None:
                old.close()  # programs that use it keep it
            return made
        return old

    def arena(self, rank: int, size: int) -> Buffer:
        """Memory of a device for intermediate results, of at least ``size`` bytes.

        Raises
        ------
        OutOfMemoryError
            If the device has not enough.
        """
        found = self._arenas[rank]
        if found is None or found.size < size:
            self._arenas[rank] = None
            if found is not None:
                found.close()  # programs that use it keep it
            self._arenas[rank] = found = Buffer(self._backends[rank].buffer_type, size)
        return found

    def arena_sizes(self) -> list[int]:
        """Bytes of intermediate results that each device has room for."""
        return [0 if arena is None else arena.size for arena in self._arenas]

    # ------------------------------------------------------------------ functions

    def compile(self, function: Callable[..., Any]) -> ParallelFunction:
        """``function(rank, *tensors)`` as a function of arrays.

        It is traced for each device, once for each signature (shapes and types of the arrays), with a :class:`Rank`
        and the device's copies of the inputs. It takes the device's weights with ``w[rank]``, and adds up with
        :meth:`Rank.all_reduce` what the devices have computed in parts. It returns a tensor,
        :meth:`Rank.all_gather`, or a tuple of such; all ranks must do the same.
        """
        self.backends  # noqa: B018 - raises when closed
        if not callable(function):
            raise TypeError(f"compile takes a function, not {type(function).__name__}")
        made = ParallelFunction(self, function)
        with self.lock:
            self._compiled.append(made)
        return made

    def close(self) -> None:
        """Give up functions and memory."""
        with self.lock:
            compiled, self._compiled = self._compiled, []
            for made in compiled:
                made.clear()
            driver, self._executor = self._executor, None
            if driver is not None:
                driver.close()
            for arena in self._arenas:
                if arena is not None:
                    arena.close()
            self._arenas = [None] * len(self._backends)
            blocks, self._blocks = self._blocks, [None, None]
            for block in blocks:
                if block is not None:
                    block.close()
