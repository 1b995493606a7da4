"""The cost of the RPC proxy: the RPC client of ggml by itself, and through the proxy, in turns.

python -m benchmarks.rpc [--rounds 3] [--calls 1000] [--threads 1]

The servers run on the loopback and on the CPU. This is the worst case, since a network adds the same to both. Times are
those of the fastest call, since other work on the machine affects the rest.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import ggml_cffi as ggml
from benchmarks import save
from ggml_cffi import c, rpc
from ggml_cffi.c import library


def raw(endpoint: str) -> ggml.Device:
    """Return the first device through ggml's client alone: the process ends with the server."""
    library.load("rpc")
    registry = c.ggml_backend_rpc_add_server(endpoint.encode())
    return ggml.Device(c.ggml_backend_reg_dev_get(registry, 0))


def quickest(run: Callable[[], Any], n: int) -> float:
    """Return the microseconds of the fastest of ``n`` calls."""
    found = []
    for _ in range(n):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return 1e6 * min(found)


def measure(way: Callable[[str], ggml.Device], n: int, threads: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(1 << 18, dtype=np.float32)
    w, x = rng.standard_normal((256, 256), dtype=np.float32) / 16, np.ones((1, 256), np.float32)
    with rpc.Server(["CPU"], n_threads=threads) as server:
        device = way(server.endpoint)
        with ggml.Context() as ctx, ggml.Session([device]) as session:
            small, large = ctx.new_tensor("f32", (1 << 10,)), ctx.new_tensor("f32", values.shape)
            ctx.alloc(device)
            weights = [session.weight(w) for _ in range(30)]

            @session.compile
            def chain(x: ggml.Tensor) -> ggml.Tensor:
                for weight in weights:
                    x = ggml.relu(ggml.linear(x, weight))
                return x

            def put() -> None:
                large.set(values)
                device.memory()  # waits for the write

            return {
                "a request": quickest(device.memory, n),
                "reading 4 KiB": quickest(small.numpy, n),
                "reading 1 MiB": quickest(large.numpy, n // 4),
                "writing 1 MiB, and a request": quickest(put, n // 4),
                "a run of 60 nodes": quickest(lambda: chain(x), n // 4),
            }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    for _ in range(args.rounds):
        for name, way in (("ggml's client", raw), ("with the proxy", ggml.device)):
            times = measure(way, args.calls, args.threads)
            best = found.setdefault(name, times)
            found[name] = {key: min(best[key], value) for key, value in times.items()}
            for connection in rpc.connections():
                rpc.disconnect(connection.name)
    print(f"{'µs':30}" + "".join(f"{name:>16}" for name in found))
    for key in next(iter(found.values())):
        print(f"{key:30}" + "".join(f"{times[key]:16.1f}" for times in found.values()))
    print(save("rpc", {"microseconds": found}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
