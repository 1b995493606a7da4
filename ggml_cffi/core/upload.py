"""Upload of weights from a file to devices, as fast as the file can be read.

Several threads upload to a device that imports host memory. Each thread copies a chunk of the file into its own part
of such memory, and the device reads the chunk from there. During the transfer, other threads read the next chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from ggml_cffi.core.progress import Progress
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.core.threads import default_threads
from ggml_cffi.core.transfer import DeviceBytes, HostBlock, copy_bytes

CHUNK = 8 << 20  # bytes that a thread uploads at a time
THREADS_PAY = 32 * CHUNK  # bytes from which threads and imported memory save more than the 30 ms of their setup
_THREADS = 8  # for each device, if there are enough processors: each copies about 3 GB/s out of a file mapping


@dataclass(frozen=True)
class Job:
    """A tensor and the bytes to write to it."""

    tensor: Tensor
    """A contiguous tensor with memory."""
    data: npt.NDArray[np.uint8]
    """The bytes: one contiguous axis, or two axes of which each row is contiguous."""

    def chunks(self) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        """Yield the offset of each chunk in the tensor, in bytes, and its bytes."""
        data = self.data
        each = data.shape[1] if data.ndim == 2 else 1
        step = max(CHUNK // max(each, 1), 1)
        for start in range(0, len(data), step):
            yield start * each, data[start : start + step]


def upload(jobs: Sequence[Job], backends: Sequence[Backend], progress: Progress | None = None) -> None:
    """Write tensors to their devices, to all devices at the same time.

    Parameters
    ----------
    jobs
        Tensors and bytes, in the order of the file.
    backends
        Backends of the tensors' devices. Tensors of a device without one are written from this thread.
    progress
        Called from this thread. An exception ends the upload.
    """
    total, done = sum(job.data.size for job in jobs), 0
    by_device: dict[Device | None, list[Job]] = {}
    for job in jobs:
        kind = job.tensor.buffer_type
        by_device.setdefault(None if kind is None else kind.device, []).append(job)
    found = {backend.device: backend for backend in backends}
    with ExitStack() as stack:
        uploaders: list[_Uploader] = []
        for device, own in by_device.items():
            backend = found.get(device) if device is not None else None
            uploader = None if backend is None else _Uploader.to(backend, own, len(by_device))
            if uploader is not None:
                uploaders.append(stack.enter_context(uploader))
        threaded = {uploader.backend.device for uploader in uploaders}
        for uploader in uploaders:
            uploader.start()
        for device, own in by_device.items():
            if device not in threaded:
                for job in own:
                    job.tensor.set_bytes(np.ascontiguousarray(job.data).reshape(-1))
                    done += job.data.size
                    if progress:
                        progress(done, total)
        for uploader in uploaders:
            for n in uploader.reports():
                done += n
                if progress:
                    progress(done, total)


class _Uploader:
    """The threads that upload to one device. Leaving the context ends them."""

    def __init__(self, backend: Backend, block: HostBlock, jobs: Sequence[Job], n_threads: int) -> None:
        self.backend, self._block = backend, block
        self._keep = [owner for job in jobs for owner in job.tensor.check_writable()]
        self._lock, self._stopped = Lock(), Event()
        self._chunks = ((job.tensor, start, data) for job in jobs for start, data in job.chunks())
        self._found: SimpleQueue[int | BaseException | None] = SimpleQueue()
        names = f"ggml_cffi upload to {backend.name}"
        self._threads = [Thread(target=self._work, args=(i,), name=names) for i in range(n_threads)]
        self._started: list[Thread] = []

    @classmethod
    def to(cls, backend: Backend, jobs: Sequence[Job], n_devices: int) -> _Uploader | None:
        """Return the uploader of one device of ``n_devices``; None where threads save no time or are not possible."""
        has_integers = any(job.tensor.dtype in INTEGERS for job in jobs)  # may be row numbers, which set_bytes checks
        wide = any(job.data.ndim == 2 and job.data.shape[1] > CHUNK for job in jobs)
        if has_integers or wide or backend.device.is_cpu or sum(job.data.size for job in jobs) < THREADS_PAY:
            return None
        n_threads = max(min(default_threads() // n_devices, _THREADS), 1)
        block = HostBlock(n_threads * CHUNK, [backend.device])
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
            memory = np.frombuffer(self._block.memory, np.uint8, CHUNK, i * CHUNK)
            buffer = self._block.buffers[self.backend.device]
            while not self._stopped.is_set():
                with self._lock:
                    tensor, start, data = next(self._chunks, (None, 0, None))
                if tensor is None or data is None:
                    break
                np.copyto(memory[: data.size].reshape(data.shape), data)
                with self.backend.lock:
                    source, target = DeviceBytes.of_buffer(buffer), DeviceBytes.of_tensor(tensor)
                    copy_bytes(self.backend, source.part(i * CHUNK, data.size), target.part(start, data.size))
                self._found.put(data.size)
        except BaseException as error:
            end = error
        self._found.put(end)

    def reports(self) -> Iterator[int]:
        """Yield the number of bytes of each uploaded chunk, until all are uploaded."""
        running = len(self._started)
        while running:
            item = self._found.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item

    def __enter__(self) -> _Uploader:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stopped.set()
        for thread in self._started:
            thread.join()
        self._block.close()
