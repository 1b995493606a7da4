"""Replicas of one process, and their transfer to other processes."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

from ggml_cffi.core.device import gpus
from ggml_cffi.core.handle import Closing
from ggml_cffi.errors import BackendCrashedError, ClosedError, GgmlError
from ggml_cffi.session.factory import open_product

_logger = logging.getLogger("ggml_cffi.parallel")


class Replica(Closing):
    """The function that ``make`` returned for one device, with its number of calls and its error."""

    def __init__(self, make: Callable[[str], Any], device: str) -> None:
        self.device = device
        """The device's name."""
        self.calls = 0
        """Number of calls so far."""
        self.error: BaseException | None = None
        """The exception that ended the replica; None while it takes calls."""
        self._make = make
        self._function: Callable[..., Any] | None = None
        self._stack = ExitStack()

    @property
    def made(self) -> bool:
        """True once ``make`` has been called."""
        return self._function is not None

    def open(self) -> None:
        """Call ``make``, once."""
        if self._function is not None:
            return
        function = open_product(self._make(self.device), self._stack)
        if not callable(function):
            kind = type(function).__name__
            raise TypeError(f"make returned a {kind}, which cannot be called: return a function that uses it")
        self._function = function

    def call(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Call the function that ``make`` returned."""
        assert self._function is not None
        self.calls += 1
        try:
            return self._function(*args, **kwargs)
        except BackendCrashedError as error:
            if not getattr(self._function, "alive", False):  # a worker that restarts takes further calls
                self.drop(error)
            raise

    def drop(self, error: BaseException) -> None:
        """End the replica: it takes no more calls."""
        self.error = error
        _logger.warning("the replica on %s is dropped: %s: %s", self.device, type(error).__name__, error)
        try:
            self.close()
        except Exception:
            _logger.exception("the replica on %s could not be closed", self.device)

    def close(self) -> None:
        """Close the function that ``make`` returned."""
        self._function = None
        self._stack.close()

    def __repr__(self) -> str:
        state = f"{self.calls} calls" if self.error is None else f"dropped: {type(self.error).__name__}"
        return f"<Replica on {self.device}, {state}>"


class Replicas(Closing):
    """Replicas for the calls of any number of threads. Each call goes to a free replica."""

    def __init__(self, make: Callable[[str], Any], devices: Iterable[str] | None) -> None:
        names = default_devices() if devices is None else list(devices)
        self.all = tuple(Replica(make, name) for name in names)
        self._free = deque(self.all)  # in the order in which they became free
        self._changed = threading.Condition()
        self._closed = False

    def __call__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Call a replica as soon as one is free, and create it first if necessary."""
        replica = self._take()
        try:
            return replica.call(args, kwargs)
        finally:
            self._give(replica)

    def prepare(self, replica: Replica) -> None:
        """Create a replica that is not in use yet, and drop it if that fails."""
        try:
            replica.open()
        except Exception as error:
            replica.drop(error)
            with self._changed:
                self._free.remove(replica)

    def _take(self) -> Replica:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._free or self._closed or self._none_left)
                if self._closed:
                    raise ClosedError("this DataParallel is closed")
                if not self._free:
                    reasons = "; ".join(f"{r.device}: {type(r.error).__name__}: {r.error}" for r in self.all)
                    raise GgmlError(f"no replica is left: {reasons}") from self.all[-1].error
                replica = next((r for r in self._free if r.made), self._free[0])
                self._free.remove(replica)
            try:
                replica.open()
                return replica
            except Exception as error:
                replica.drop(error)
                self._give(replica)
            except BaseException:
                self._give(replica)
                raise

    @property
    def _none_left(self) -> bool:
        return all(replica.error is not None for replica in self.all)

    def _give(self, replica: Replica) -> None:
        with self._changed:
            if replica.error is None:
                self._free.append(replica)
            self._changed.notify_all()

    def close(self) -> None:
        """Wait for calls that run, and close all replicas."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._free) == sum(r.error is None for r in self.all))
        with ExitStack() as stack:  # closes all, even if one of them raises
            for replica in self.all:
                stack.callback(replica.close)


def default_devices() -> list[str]:
    """Return the names of all GPUs, or of the CPU if there is no GPU."""
    return [device.name for device in gpus()] or ["CPU"]


# ---------------------------------------------------------------------- in other processes


class Task:
    """A function that calls the replicas of the process in which it runs. It can be pickled."""

    def __init__(self, make: Callable[[str], Any], devices: Sequence[str] | None, key: str | None = None) -> None:
        self.key = key or uuid.uuid4().hex
        self._make, self._devices, self._pid = make, devices, os.getpid()
        self._lock = threading.Lock()
        self._replicas: Replicas | None = None
        self._packed: bytes | None = None

    def __call__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Call a free replica."""
        return self.replicas(args, kwargs)

    @property
    def replicas(self) -> Replicas:
        """The replicas of this process, created on first use."""
        with self._lock:
            if self._replicas is None:
                self._replicas = Replicas(self._make, self._devices)
            return self._replicas

    def __reduce__(self) -> tuple[Any, ...]:
        import cloudpickle

        with self._lock:
            if self._packed is None:
                self._packed = cloudpickle.dumps((self._make, self._devices))
                _tasks[self.key] = self  # an executor of this process may unpickle it
        return _unpacked, (self.key, self._packed)

    def close(self) -> None:
        """Close the replicas of this process, if there are any."""
        _tasks.pop(self.key, None)
        with self._lock:
            replicas, self._replicas = self._replicas, None
        if replicas is not None and self._pid == os.getpid():
            replicas.close()


_tasks: dict[str, Task] = {}
_guard = threading.Lock()


def _unpacked(key: str, packed: bytes) -> Task:
    """Return the task of this process, the same object for each unpickling."""
    import cloudpickle

    with _guard:
        found = _tasks.get(key)
        if found is None or found._pid != os.getpid():
            make, devices = cloudpickle.loads(packed)
            found = _tasks[key] = Task(make, devices, key)
        return found


def release() -> None:
    """Close all replicas that executors have created in this process.

    The processes of an executor keep their replicas until they end. To free them earlier, run this function in each
    process; with Dask, ``client.run(release)``.
    """
    for task in list(_tasks.values()):
        task.close()
