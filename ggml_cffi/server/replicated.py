"""The engine of a model whose replicas are in processes of their own, each with an interpreter lock of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ggml_cffi.c import library
from ggml_cffi.core.device import Device, DevicesLike, device, device_list, gpus
from ggml_cffi.isolate import Worker
from ggml_cffi.models.load import check_one_kind
from ggml_cffi.server.engine import Deliver, EmbedJob, Engine, Event, Facts, Job, Vectors
from ggml_cffi.server.errors import QueueFullError, StoppingError
from ggml_cffi.server.isolated import IsolatedEngine
from ggml_cffi.server.local_engine import LocalEngine

#: Names of devices, and descriptions of their hardware.
Named = list[tuple[str, str]]


class ReplicatedEngine(Engine):
    """Engines of the replicas of one model. Each job goes to the one with the fewest jobs.

    If the process of one ends, its jobs fail. Later jobs go to the others until it has loaded the model again.

    Parameters
    ----------
    engines
        The engines, which this one closes.
    max_jobs
        Largest number of jobs that wait or are in generation.
    """

    def __init__(self, engines: Sequence[IsolatedEngine], max_jobs: int) -> None:
        self.engines = [*engines]
        """The engines."""
        self.facts = _facts_of_all([engine.facts for engine in engines])
        self._max_jobs = max_jobs
        self._choosing = threading.Lock()
        self._stopped = False

    def submit(self, job: Job | EmbedJob, deliver: Deliver) -> Callable[[], None]:
        with self._choosing:
            if self._stopped:
                raise StoppingError("the server is stopping")
            n_jobs = sum(engine.n_jobs for engine in self.engines)
            if n_jobs >= self._max_jobs:
                raise QueueFullError(f"{n_jobs} requests are waiting for this model already: try again later")
            engines = sorted(self.engines, key=lambda engine: (not engine.is_ready, engine.n_jobs))
            if isinstance(job, EmbedJob) and len(job.texts) > 1:
                return _SharedTexts(job, deliver).submit([e for e in engines if e.is_ready] or engines)
            return engines[0].submit(job, deliver)

    @property
    def n_waiting(self) -> int:
        return sum(engine.n_waiting for engine in self.engines)

    @property
    def n_running(self) -> int:
        return sum(engine.n_running for engine in self.engines)

    @property
    def n_generated(self) -> int:
        return sum(engine.n_generated for engine in self.engines)

    def stop(self) -> None:
        self._stopped = True
        for engine in self.engines:
            engine.stop()

    def close(self) -> None:
        """Stop, and end the processes."""
        self.stop()
        with ThreadPoolExecutor(len(self.engines)) as pool:  # each may take seconds
            list(pool.map(IsolatedEngine.close, self.engines))


class _SharedTexts:
    """A list of texts to embed, of which each replica has a part."""

    def __init__(self, job: EmbedJob, deliver: Deliver) -> None:
        self._job, self._deliver = job, deliver
        self._vectors: dict[int, npt.NDArray[np.float32]] = {}
        self._cancels: list[Callable[[], None]] = []
        self._n_parts = 0
        self._ended = False
        self._lock = threading.Lock()  # guards all of these

    def submit(self, engines: Sequence[Engine]) -> Callable[[], None]:
        """Begin a part on each engine, and return a function that cancels all of them."""
        self._n_parts = min(len(engines), len(self._job.texts))
        try:
            for part in range(self._n_parts):
                job = replace(self._job, texts=self._job.texts[part :: self._n_parts])
                cancel = engines[part].submit(job, partial(self._collect, part))
                with self._lock:
                    self._cancels.append(cancel)
        except BaseException:
            self._end()
            raise
        if self._ended and len(self._vectors) < self._n_parts:  # the first parts failed before the others began
            self._cancel()
        return self._cancel

    def _cancel(self) -> None:
        with self._lock:
            cancels = [*self._cancels]
        for cancel in cancels:
            cancel()

    def _end(self) -> bool:
        """Cancel the parts. Return False if an end was delivered already."""
        with self._lock:
            ended, self._ended = self._ended, True
        self._cancel()
        return not ended

    def _collect(self, part: int, event: Event) -> None:
        """Deliver the vectors of all parts once they are there, or the first other end."""
        if not isinstance(event, Vectors):
            if self._end():
                self._deliver(event)
            return
        with self._lock:
            self._vectors[part] = event.values
            if self._ended or len(self._vectors) < self._n_parts:
                return
            self._ended = True
        whole = np.empty((len(self._job.texts), event.values.shape[1]), np.float32)
        for i, values in self._vectors.items():
            whole[i :: self._n_parts] = values
        self._deliver(Vectors(whole))


def can_isolate(options: Mapping[str, Any]) -> bool:
    """Return whether a model can have processes by default: on Linux, without a function to call in this one."""
    return hasattr(os, "memfd_create") and options.get("progress") is None


def with_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of ``load`` with names of devices instead of objects, which cannot go to another process."""
    chosen = options.get("devices")
    if chosen is None:
        return dict(options)
    names = [which.name if isinstance(which, Device) else which for which in device_list(chosen)]
    return {**options, "devices": names}


def gpus_of_replicas(options: Mapping[str, Any]) -> Named:
    """Return the GPUs that have a replica each with these options of ``load``, several ones or none.

    If this process has listed its devices, its GPUs are the default: some may be remote, and the plug-ins of others may
    be left out.
    """
    if options.get("split") != "data":
        return []
    chosen = with_names(options).get("devices")
    if chosen is None and library.are_plugins_loaded():
        chosen = [each.name for each in gpus()] or None
    with Worker(_open_names) as worker:  # drivers stay out of this process
        found: Named = worker.call("gpus", chosen)
    return found if len(found) > 1 else []


def open_isolated(
    load: Callable[..., LocalEngine], path: str, settings: Mapping[str, Any], replicas: Named, *, max_waiting: int = 256
) -> IsolatedEngine | ReplicatedEngine:
    """Return the engine of a model in a process of its own, or in one for each replica.

    Parameters
    ----------
    load, path, settings
        A function that returns the engine, and its arguments. It is called in the process, with the names of devices,
        and for a replica with its device and its part of ``parallel``.
    replicas
        The GPUs that have a replica each, from :func:`gpus_of_replicas`.
    max_waiting
        Largest number of jobs that wait, besides those in generation.
    """
    options = with_names(settings["load"])
    settings = {**settings, "load": options}
    if not replicas:
        return IsolatedEngine(load, path, settings, max_waiting=max_waiting)
    if options.get("deterministic"):
        check_one_kind({description for _, description in replicas})
    parallel = int(settings["parallel"])
    each = {**settings, "parallel": -(-parallel // len(replicas)), "max_waiting": max_waiting + parallel}

    def open_replica(name: str) -> IsolatedEngine:
        own = {**each, "load": {**options, "devices": [name]}}
        title = f"replica on {name}"
        return IsolatedEngine(load, path, own, max_waiting=each["max_waiting"], restarts_at_once=True, name=title)

    with ThreadPoolExecutor(len(replicas)) as pool:
        opening = [pool.submit(open_replica, name) for name, _ in replicas]
    try:
        return ReplicatedEngine([future.result() for future in opening], max_waiting + parallel)
    except BaseException:
        for future in opening:
            if future.exception() is None:
                future.result().close()
        raise


def _open_names() -> Mapping[str, Callable[..., Any]]:
    """Return the functions of a process that looks for devices."""
    return {"gpus": named_gpus}


def named_gpus(chosen: DevicesLike | None = None) -> Named:
    """Return the GPUs among some devices; default every GPU. None if the CPU is not the last one, which is refused."""
    found = gpus() if chosen is None else [device(which) for which in device_list(chosen)]
    if any(each.is_cpu for each in found[:-1]):
        return []
    return [(each.name, each.description) for each in found if not each.is_cpu]


def _facts_of_all(each: Sequence[Facts]) -> Facts:
    """Return the facts of a model from those of its replicas."""
    first = each[0]
    shared = [name for name in first.devices if all(name in facts.devices for facts in each)]  # the CPU
    own = [name for facts in each for name in facts.devices if name not in shared]
    return replace(first, devices=(*own, *shared), n_bytes=sum(facts.n_bytes for facts in each))
