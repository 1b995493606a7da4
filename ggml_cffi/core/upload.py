"""Weights from a file to devices, as fast as the file can be read.

A device that imports host memory is fed by several threads. Each copies a piece of the file into its own part of such
memory, from where the device reads it: while one piece is on its way, the next are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

import numpy as np
import numpy.typing as npt

from ggml_cffi.core.backend import Backend
from ggml_cffi.core.device import Device
from ggml_cffi.core.dtypes import INTEGERS
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.core.threads import default_threads
from ggml_cffi.core.transfer import DeviceBytes, HostBlock, copy_bytes

_PIECE = 8 << 20
_MANY = 32 * _PIECE  # bytes from which threads and imported memory, which take about 30 ms to set up, pay
_THREADS = 8  # for each device, where there are processors enough: one copies about 3 GB/s out of a mapping

#: Called with bytes done and bytes in all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """What a tensor is to hold."""

    tensor: Tensor
    """Contiguous, with memory."""
    data: npt.NDArray[np.uint8]
    """Its bytes: one axis, contiguous; or two, rows of which each is contiguous."""

    def pieces(self) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        """Where each piece begins in the tensor, in bytes, and its bytes."""
        data = self.data
        each = data.shape[1] if data.ndim == 2 else 1
        step = max(_PIECE // max(each, 1), 1)
        for start in range(0, len(data), step):
            yield start * each, data[start : start + step]


def upload(jobs: Sequence[Job], backends: Sequence[Backend], progress: Progress | None = None) -> None:
    """Set tensors, each device's by itself, all devices at the same time.

    Parameters
    ----------
    jobs
        In the order in which they lie in their file.
    backends
        Of the tensors' devices, to copy with. A device without one is set piece by piece from this thread.
    progress
        Called from this thread. What it raises ends the upload.
    """
    total, done = sum(job.data.size for job in jobs), 0
    by_device: dict[Device | None, list[Job]] = {}
    for job in jobs:
        kind = job.tensor.buffer_type
        by_device.setdefault(None if kind is None else kind.device, []).append(job)
    found = {backend.device: backend for backend in backends}
    with ExitStack() as stack:
        feeds: list[_Feed] = []
        for device, own in by_device.items():
            backend = found.get(device) if device is not None else None
            feed = None if backend is None else _Feed.to(backend, own, len(by_device))
            if feed is not None:
                feeds.append(stack.enter_context(feed))
        fed = {feed.backend.device for feed in feeds}
        for feed in feeds:
            feed.start()
        for device, own in by_device.items():
            if device not in fed:
                for job in own:
                    job.tensor.set_bytes(np.ascontiguousarray(job.data).reshape(-1))
                    done += job.data.size
                    if progress:
                        progress(done, total)
        for feed in feeds:
            for n in feed.reports():
                done += n
                if progress:
                    progress(done, total)


class _Feed:
    """The threads that feed one device. A context: leaving it ends them."""

    def __init__(self, backend: Backend, block: HostBlock, jobs: Sequence[Job], n_threads: int) -> None:
        self.backend, self._block = backend, block
        self._keep = [owner for job in jobs for owner in job.tensor.check_writable()]
        self._lock, self._stopped = Lock(), Event()
        self._pieces = ((job.tensor, start, data) for job in jobs for start, data in job.pieces())
        self._found: SimpleQueue[int | BaseException | None] = SimpleQueue()
        names = f"ggml_cffi upload to {backend.name}"
        self._threads = [Thread(target=self._work, args=(i,), name=names) for i in range(n_threads)]
        self._started: list[Thread] = []

    @classmethod
    def to(cls, backend: Backend, jobs: Sequence[Job], n_devices: int) -> _Feed | None:
        """For one device of so many that are fed; None where it is not worth it, or cannot be done."""
        plain = any(job.tensor.dtype in INTEGERS for job in jobs)  # they may be row numbers, which are checked
        wide = any(job.data.ndim == 2 and job.data.shape[1] > _PIECE for job in jobs)
        if plain or wide or backend.device.is_cpu or sum(job.data.size for job in jobs) < _MANY:
            return None
        n_threads = max(min(default_threads() // n_devices, _THREADS), 1)
        block = HostBlock(n_threads * _PIECE, [backend.device])
        if backend.device not in block.buffers:
            block.close()
            return None
        return cls(backend, block, jobs, n_threads)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()
            self._started.append(thread)

    def _work(self, i: int) -> None:
        end: BaseException | None = None
        try:
            memory = np.frombuffer(self._block.memory, np.uint8, _PIECE, i * _PIECE)
            buffer = self._block.buffers[self.backend.device]
            while not self._stopped.is_set():
                with self._lock:
                    tensor, start, data = next(self._pieces, (None, 0, None))
                if tensor is None or data is None:
                    break
                np.copyto(memory[: data.size].reshape(data.shape), data)
                with self.backend.lock:
                    source, target = DeviceBytes.of_buffer(buffer), DeviceBytes.of_tensor(tensor)
                    copy_bytes(self.backend, source.part(i * _PIECE, data.size), target.part(start, data.size))
                self._found.put(data.size)
        except BaseException as error:
            end = error
        self._found.put(end)

    def reports(self) -> Iterator[int]:
        """Bytes that were moved, as they are, until all were."""
        going = len(self._started)
        while going:
            item = self._found.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                going -= 1
            else:
                yield item

    def __enter__(self) -> _Feed:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stopped.set()
        for thread in self._started:
            thread.join()
        self._block.close()
