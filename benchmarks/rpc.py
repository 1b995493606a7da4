"""What the relay of a remote device costs: ggml's RPC client by itself, and through the relay, in turns.

python -m benchmarks.rpc [--mib 64] [--rounds 5] [--threads 1]

Servers on the loopback, on the CPU: the worst case, since no network is slower than the relay.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

import ggml_cffi as ggml
from benchmarks import save
from ggml_cffi import _lib, c, rpc

Way = Callable[[str], ggml.Device]


def raw(endpoint: str) -> ggml.Device:
    """The first device as ggml's client has it: the process ends with the server."""
    registry = c.ggml_backend_rpc_add_server(endpoint.encode())
    return ggml.Device(c.ggml_backend_reg_dev_get(registry, 0))


def fastest(run: Callable[[], Any], n: int) -> float:
    """Seconds of one of ``n`` calls in a row, the quickest of three such rows, after one that does not count."""
    run()
    found = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(n):
            run()
        found.append((time.perf_counter() - start) / n)
    return min(found)


@contextmanager
def connected(way: Way, threads: int) -> Iterator[ggml.Device]:
    """A device of a server of its own."""
    with rpc.Server(["CPU"], n_threads=threads) as server:
        yield way(server.endpoint)
        if way is not raw:
            rpc.disconnect(server.endpoint)


def measure(way: Way, mib: int, threads: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((mib, 1 << 18), dtype=np.float32)
    w, x = rng.standard_normal((256, 256), dtype=np.float32) / 16, np.ones((1, 256), np.float32)
    with connected(way, threads) as device, ggml.Context() as ctx, ggml.Session([device]) as session:
        parts = [ctx.new_tensor("f32", (1 << 18,)) for _ in range(mib)]  # of 1 MiB: larger ones are hashed first
        ctx.alloc(device)
        weights = [session.weight(w) for _ in range(30)]

        @session.compile
        def chain(x: ggml.Tensor) -> ggml.Tensor:
            for weight in weights:
                x = ggml.relu(ggml.linear(x, weight))
            return x

        def put() -> None:
            for part, value in zip(parts, values, strict=True):
                part.set(value)
            device.memory()  # which waits

        def get() -> None:
            for part in parts:
                part.numpy()

        return {
            "a question, µs": 1e6 * fastest(device.memory, 1000),
            "a run of 60 small nodes, µs": 1e6 * fastest(lambda: chain(x), 200),
            "writing, GB/s": mib / 1024 * 1.074 / fastest(put, 3),
            "reading, GB/s": mib / 1024 * 1.074 / fastest(get, 3),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    _lib.load("rpc")
    found: dict[str, list[dict[str, float]]] = {"ggml's client": [], "with the relay": []}
    for _ in range(args.rounds):
        for name, way in (("ggml's client", raw), ("with the relay", ggml.device)):
            found[name].append(measure(way, args.mib, args.threads))
    medians = {
        name: {key: float(np.median([run[key] for run in runs])) for key in runs[0]} for name, runs in found.items()
    }
    for key in next(iter(medians.values())):
        print(f"{key:30}" + "".join(f"{name}: {row[key]:8.2f}   " for name, row in medians.items()))
    print(save("rpc", {"median": medians}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
