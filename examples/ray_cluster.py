"""Data parallelism on a Ray cluster, here one of two local processes.

Ray has no executor like those of ``concurrent.futures``: the class below builds one from actors. On a real cluster,
call ``ray.init("auto")`` and give each actor a GPU with ``ray.remote(num_gpus=1)``.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

import numpy as np
import ray

import ggml_cffi as ggml
from ggml_cffi.parallel import DataParallel


class Actors(ThreadPoolExecutor):
    """An executor that calls functions in free actors. One local thread waits for each actor."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self._free = SimpleQueue()
        for _ in range(n):
            self._free.put(ray.remote(num_cpus=1)(Caller).remote())

    def submit(self, function, /, *args) -> Future:
        """Call ``function(*args)`` in an actor."""
        return super().submit(self._call, function, args)

    def _call(self, function, args):
        actor = self._free.get()
        try:
            return ray.get(actor.call.remote(function, args))
        finally:
            self._free.put(actor)


class Caller:
    """An actor that calls functions in its own process."""

    def call(self, function, args):
        """Call ``function``."""
        return function(*args)


def make(device):
    """Make a replica on the actor's own device, with weights that the actor makes itself."""
    session = ggml.Session([device], n_threads=1)
    w = session.weight(np.eye(64, dtype=np.float32))
    f = session.compile(lambda x: ggml.linear(x, w))
    return lambda x: (os.getpid(), f(x))


def main() -> None:
    """Send each of twenty arrays to a free process."""
    arrays = [np.full((2, 64), i, np.float32) for i in range(20)]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    with Actors(2) as actors, DataParallel(make, ["CPU"], executor=actors) as dp:
        results = list(dp.map(arrays))
    ray.shutdown()
    for x, (_, y) in zip(arrays, results, strict=True):
        np.testing.assert_allclose(y, x)
    processes = {pid for pid, _ in results}
    assert os.getpid() not in processes
    print(f"{len(results)} results from {len(processes)} processes")


if __name__ == "__main__":
    main()
