"""Time of a call in a worker process, beside the same call in this process and in a pool of one process.

python -m benchmarks.isolate [--device CPU] [--rounds 5]
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

import ggml_cffi as ggml
from benchmarks import save
from ggml_cffi.isolate.worker import Worker

SIZES = (16, 4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20)  # bytes, there and back


def make(device: str) -> ggml.CompiledFunction:
    session = ggml.Session([device], n_threads=1)
    return session.compile(lambda x: ggml.scale(x, 2.0))


def start(device: str) -> None:
    """Prepare the function in the pool's process."""
    global _function
    _function = make(device)


def call(x: np.ndarray) -> Any:
    return _function(x)


def seconds(run: Callable[[], Any], n: int) -> float:
    began = time.perf_counter()
    for _ in range(n):
        run()
    return (time.perf_counter() - began) / n


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="CPU")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    began = time.perf_counter()
    worker = Worker(make, args.device)
    started = time.perf_counter() - began
    here, found = make(args.device), []
    context = multiprocessing.get_context("spawn")
    with worker, here.session, ProcessPoolExecutor(1, context, start, (args.device,)) as pool:
        print(f"{'bytes':>10}{'here':>12}{'worker':>12}{'pool':>12}   us   worker/here   worker-here")
        for size in SIZES:
            x = np.ones(size // 4, np.float32)
            ways = {
                "here": lambda x=x: here(x),
                "worker": lambda x=x: worker(x),
                "pool": lambda x=x: pool.submit(call, x).result(),
            }
            n = max(3, min(300, (16 << 20) // size))
            for run in ways.values():
                assert (run() == 2).all()
            # In turns, so that other work on the machine affects all alike.
            best = {name: 1e6 * min(seconds(run, n) for _ in range(args.rounds)) for name, run in ways.items()}
            ratio, above = best["worker"] / best["here"], best["worker"] - best["here"]
            print(f"{size:>10}" + "".join(f"{best[name]:>12.1f}" for name in ways) + f"{ratio:>17.2f}{above:>14.1f}")
            found.append({"bytes": size, "microseconds": best, "worker/here": ratio})
        began = time.perf_counter()
        worker.restart()
        restarted = time.perf_counter() - began
    print(f"start {started:.2f} s, restart {restarted:.2f} s")
    print(save("isolate", {"device": args.device, "calls": found, "start": started, "restart": restarted}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
