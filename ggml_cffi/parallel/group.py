"""A tensor-parallel group: backends that compute programs together, and the memory that the programs share."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ggml_cffi.core.backend import Backend
from ggml_cffi.core.buffer import Buffer
from ggml_cffi.core.device import Device
from ggml_cffi.core.handle import Closing
from ggml_cffi.core.precision import as_prec
from ggml_cffi.core.transfer import HostBlock
from ggml_cffi.errors import ClosedError
from ggml_cffi.parallel.executors import Executor, choose_executor


class Group(Closing):
    """Backends that compute programs together, one for each rank. The caller opens and closes the backends.

    Parameters
    ----------
    backends
        Backends of different devices.
    half_above, threads, precision
        As for :class:`~ggml_cffi.parallel.TensorParallel`.

    Raises
    ------
    ValueError
        If one of several devices cannot read and write memory of the host, or there is no such precision.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        *,
        half_above: int | None = None,
        threads: bool | None = None,
        precision: str = "default",
    ) -> None:
        as_prec(precision)  # raises if there is no such precision
        self.half_above = half_above
        self.precision = precision
        self.lock = threading.RLock()
        """The lock that every run of a compiled function holds, and the making of a program."""
        self._backends = tuple(backends)
        self._arenas: list[Buffer | None] = [None] * len(self._backends)
        self._blocks: dict[int, HostBlock] = {}  # by slot
        self._executor: Executor | None = None
        self.mirrors = False
        """True if the only device reads no host memory: each program copies inputs and results."""
        self.host_block(1)
        self._executor = choose_executor(self._backends, threads=threads)

    @property
    def backends(self) -> tuple[Backend, ...]:
        """One backend for each rank.

        Raises
        ------
        ClosedError
            If the group is closed.
        """
        self.executor  # noqa: B018 - raises when closed
        return self._backends

    @property
    def closed(self) -> bool:
        """True once the group is closed."""
        return self._executor is None

    @property
    def devices(self) -> tuple[Device, ...]:
        """The device of each rank."""
        return tuple(b.device for b in self.backends)

    @property
    def executor(self) -> Executor:
        """The executor, which submits the steps of all programs."""
        if self._executor is None:
            raise ClosedError(f"this {type(self).__name__} is closed")
        return self._executor

    # ------------------------------------------------------------------ memory that programs share

    def host_block(self, size: int, slot: int = 0) -> HostBlock:
        """Return host memory of at least ``size`` bytes that all devices read and write.

        If there is one device, and it cannot, its buffer of the block is as many bytes of its own memory.

        Parameters
        ----------
        slot
            Number of the block: the caller writes one block for the next run while devices use another.

        Raises
        ------
        ValueError
            If one of several devices cannot use host memory.
        """
        old = self._blocks.get(slot)
        if old is None or len(old.memory) < size:
            size = max(size, *(len(block.memory) for block in self._blocks.values()), 1)
            made = HostBlock(size, dict.fromkeys(b.device for b in self._backends))
            unable = [b.name for b in self._backends if b.device not in made.buffers]
            if unable and len(self._backends) == 1:
                (backend,), self.mirrors = self._backends, True
                made.buffers[backend.device] = Buffer(backend.buffer_type, len(made.memory))
            elif unable:
                made.close()
                raise ValueError(
                    f"{', '.join(unable)} cannot read and write memory of the host, through which devices exchange "
                    "data: use split='layer'"
                )
            self._blocks[slot] = made
            if old is not None:
                old.close()  # programs that use it keep its memory
            return made
        return old

    def arena(self, rank: int, size: int) -> Buffer:
        """Return memory of a device for intermediate tensors, of at least ``size`` bytes.

        Raises
        ------
        OutOfMemoryError
            If the device has too little memory.
        """
        found = self._arenas[rank]
        if found is None or found.size < size:
            self._arenas[rank] = None
            if found is not None:
                found.close()  # programs that use it keep its memory
            self._arenas[rank] = found = Buffer(self._backends[rank].buffer_type, size)
        return found

    def device_bytes(self) -> list[int]:
        """Return the bytes that programs share on each device: its arena, and its copies of host blocks."""
        mirrored = sum(len(block.memory) for block in self._blocks.values()) if self.mirrors else 0
        return [(0 if arena is None else arena.size) + mirrored for arena in self._arenas]

    def close(self) -> None:
        """Free the memory, and close the executor."""
        with self.lock:
            executor, self._executor = self._executor, None
            if executor is not None:
                executor.close()
            for arena in self._arenas:
                if arena is not None:
                    arena.close()
            self._arenas = [None] * len(self._backends)
            blocks, self._blocks = self._blocks, {}
            for block in blocks.values():
                block.close()
