"""Backends: opened devices, each with its own stream of work."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.buffer import BufferType
from ggml_cffi.core.device import DeviceLike, DevicesLike, check_process, device_list, device_lock, gpus
from ggml_cffi.core.device import device as find_device
from ggml_cffi.core.handle import Handle
from ggml_cffi.core.locks import DeviceLock
from ggml_cffi.core.threads import LoadFollower, check_threads, default_threads
from ggml_cffi.errors import GgmlError


class Backend(Handle):
    """An opened device.

    Parameters
    ----------
    device
        A :class:`Device`, its name, or its position in :func:`devices`.
    n_threads
        CPU only: largest number of threads, 1 to 512, kept from run to run; default one for each processor that this
        process may use. Fewer compute while other processes use these processors, see :attr:`follows_load`.

    Raises
    ------
    ValueError
        If there is no such device, or the number of threads is out of range.
    GgmlError
        If the device cannot be opened.

    C: ``ggml_backend_dev_init``.
    """

    __slots__ = ("_abort_flag", "_kept", "_pool", "aborting", "device", "follows_load", "load", "lock")

    def __init__(self, device: DeviceLike, *, n_threads: int | None = None) -> None:
        self.device = find_device(device)
        """The device that was opened."""
        # Backends of one GPU share its staging buffer; backends of the CPU share nothing.
        self.lock = DeviceLock() if self.device.is_cpu else device_lock(self.device.ptr)
        """Lock to hold while work is queued: ggml allows one thread at a time per backend."""
        if n_threads is not None and not self.device.is_cpu:
            raise ValueError(f"n_threads is for the CPU: {self.device.name} takes no number of threads")
        if n_threads is not None:
            check_threads(n_threads)
        check_process(self.device)
        with self.device.guard():
            pointer = c.ggml_backend_dev_init(self.device.ptr, c.NULL)
        if not pointer:
            raise GgmlError(f"the driver refused to open {self.device.name} ({self.device.description})")
        self._kept: list[Any] = []
        self._pool: list[Any] = []  # the thread pool, shared with the finalizer
        self._abort_flag = c.ffi.new("struct ggml_tensor *", {"ne": [1, 1, 1, 1]})
        self.aborting = False
        """True if :meth:`abort` was called since the last run started."""
        self.follows_load = True
        """True to compute with fewer CPU threads while other processes use the processors.

        Some operations round in another way with another number of threads."""
        self.load = LoadFollower(1)
        """The number of CPU threads for the load of the machine."""
        super().__init__(pointer, partial(_free, self._pool, self._abort_flag), fork_safe=False)
        if self.device.is_cpu:
            self.n_threads = n_threads or default_threads()
            # ggml's CPU backend calls a C function after each node, and stops if it returns true. Here this is
            # ggml_is_empty: abort() makes the tensor empty. A Python function would cost microseconds per node.
            is_empty = c.ffi.cast("ggml_abort_callback", c.ggml_is_empty)
            c.ggml_backend_cpu_set_abort_callback(pointer, is_empty, self._abort_flag)

    @property
    def name(self) -> str:
        """The device's name."""
        return self.device.name

    @property
    def n_threads(self) -> int:
        """Largest number of threads of the CPU backend, 1 for others."""
        self.ptr  # noqa: B018 - raises when closed
        return int(self._pool[1]) if self._pool else 1

    @n_threads.setter
    def n_threads(self, n: int) -> None:
        if not self.device.is_cpu:
            raise ValueError(f"n_threads is for the CPU: {self.device.name} takes no number of threads")
        check_threads(n)
        params = c.ffi.new("struct ggml_threadpool_params *")
        c.ggml_threadpool_params_init(params, n)
        with self.lock:
            pool = c.ggml_threadpool_new(params)
            if not pool:
                raise GgmlError(f"{n} threads could not be started")
            c.ggml_backend_cpu_set_threadpool(self.ptr, pool)
            c.ggml_backend_cpu_set_n_threads(self.ptr, n)
            self.load = LoadFollower(n)
            old, self._pool[:] = list(self._pool), [pool, n]
            if old:
                c.ggml_threadpool_free(old[0])

    @property
    def n_active_threads(self) -> int:
        """Threads of the CPU backend in the last run."""
        self.ptr  # noqa: B018 - raises when closed
        return self.load.n_active

    def follow_load(self, now: float) -> None:
        """Set the number of threads of the next run. ``now``, the time of ``perf_counter``, is past ``load.next_look``.

        The caller holds :attr:`lock`, or is the only one that computes here.
        """
        load = self.load
        before = load.n_active
        if self.follows_load:
            load.look()
        else:
            load.n_active, load.next_look = load.n_threads, now + 1
        if load.n_active != before:
            # Alone, the calling thread needs no pool: waking the others for each graph would cost a tenth.
            c.ggml_backend_cpu_set_threadpool(self.ptr, self._pool[0] if load.n_active > 1 else c.NULL)
            c.ggml_backend_cpu_set_n_threads(self.ptr, load.n_active)

    @property
    def buffer_type(self) -> BufferType:
        """The default buffer type of the backend."""
        return BufferType(c.ggml_backend_get_default_buffer_type(self.ptr))

    def supports_buffer_type(self, buffer_type: BufferType) -> bool:
        """Return whether the backend can read and write memory of a buffer type without a copy."""
        return bool(c.ggml_backend_supports_buft(self.ptr, buffer_type.ptr))

    def abort(self) -> None:
        """Stop the run in progress after its current node, from any thread: it raises :class:`AbortedError`.

        Only the CPU can stop a run. The call has no effect if no run is in progress.

        C: ``ggml_backend_cpu_set_abort_callback``.
        """
        if not self.device.is_cpu:
            raise ValueError(f"only the CPU can stop a run, not {self.name}")
        self.ptr  # noqa: B018 - raises when closed
        # The flag is set before ``aborting``: a run that starts in between stops, and the next run clears both.
        self._abort_flag.ne[0] = 0
        self.aborting = True

    def clear_abort(self) -> None:
        """Clear an earlier :meth:`abort`. Each run begins with this call."""
        self.aborting = False
        self._abort_flag.ne[0] = 1

    def synchronize(self) -> None:
        """Wait for all work queued on this backend. C: ``ggml_backend_synchronize``."""
        keep = self.owner  # another thread may close the backend meanwhile
        with self.lock:
            c.ggml_backend_synchronize(keep.cell[0])
            self.lock.wait()
            self._kept.clear()

    def keep(self, objects: list[Any]) -> None:
        """Keep objects that asynchronous work uses alive until :meth:`synchronize`."""
        self._kept += objects

    def close(self) -> None:
        """Wait for the queued work, and close the backend."""
        # The garbage collector calls this on any thread: it must not wait for a lock without need.
        if not self.closed and self._kept:
            with suppress(GgmlError):  # nothing is left to wait for
                self.synchronize()
        super().close()

    def __repr__(self) -> str:
        return f"<Backend {self.name}{' closed' if self.closed else ''}>"


def _free(pool: list[Any], _abort_flag: Any, pointer: Any) -> None:
    c.ggml_backend_free(pointer)
    if pool:
        c.ggml_threadpool_free(pool[0])


def open_backends(chosen: DevicesLike | None = None, n_threads: int | None = None) -> list[Backend]:
    """Open devices in order, by default every GPU. A missing CPU is added last, for the work that no GPU can do.

    Parameters
    ----------
    chosen
        Devices or their names, the preferred first; or one device.
    n_threads
        Largest number of threads of the CPU; default one for each processor that this process may use.

    Raises
    ------
    TypeError
        If an item is no device.
    ValueError
        If there is no such device, or the CPU is not last.
    """
    opened: list[Backend] = []
    try:
        for which in gpus() if chosen is None else device_list(chosen):
            opened.append(Backend(which))
        if any(b.device.is_cpu for b in opened[:-1]):
            raise ValueError("the CPU comes last: it does the work that the devices before it cannot compute or hold")
        if not opened or not opened[-1].device.is_cpu:
            opened.append(Backend("CPU"))
        if n_threads is not None:
            opened[-1].n_threads = n_threads
    except BaseException:
        for backend in opened:
            backend.close()
        raise
    return opened


def open_backend(which: Backend | DeviceLike) -> tuple[Backend, bool]:
    """Return a backend of ``which``, and True if this call opened it and the caller must therefore close it."""
    if isinstance(which, Backend):
        return which, False
    return Backend(which), True
