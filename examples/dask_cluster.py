"""Data parallelism on a Dask cluster, here one of two local processes.

On a real one, give ``Client`` the scheduler's address, and start one worker for each GPU.
"""

import os

import numpy as np
from dask.distributed import Client

import ggml_cffi as ggml
from ggml_cffi.parallel import DataParallel, release


def make(device):
    """Make a replica on the worker's first device, with weights that the worker makes itself."""
    session = ggml.Session([device], n_threads=1)
    w = session.weight(np.eye(64, dtype=np.float32))
    f = session.compile(lambda x: ggml.linear(x, w))
    return lambda x: (os.getpid(), f(x))


def main() -> None:
    """Send each of twenty arrays to a free process."""
    arrays = [np.full((2, 64), i, np.float32) for i in range(20)]
    with Client(n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        with DataParallel(make, ["CPU"], executor=client.get_executor()) as dp:
            results = list(dp.map(arrays))
        client.run(release)  # frees the replicas, which would stay until the workers end
    for x, (_, y) in zip(arrays, results, strict=True):
        np.testing.assert_allclose(y, x)
    processes = {pid for pid, _ in results}
    assert os.getpid() not in processes
    print(f"{len(results)} results from {len(processes)} processes")


if __name__ == "__main__":
    main()
