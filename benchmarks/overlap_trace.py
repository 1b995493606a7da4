"""A trace of two branches on two GPUs: the end of each node of a run, in the order built and in ours.

python -m benchmarks.overlap_trace [--size 4096] [--out FILE.json] [DEVICE DEVICE]

Measuring does not disturb the run: for each node a graph that ends there is run anew, asynchronously, while a thread
for each device waits for it. The file opens in Perfetto or chrome://tracing.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ggml_cffi as ggml
from benchmarks.multi_gpu import weights

_STEPS = 8
_ROUNDS = 7


def times(scheduler: ggml.Scheduler, backends: Sequence[ggml.Backend], graph: ggml.Graph) -> list[float]:
    """Return the milliseconds from the start of a run to the end of each backend's work, the least of some rounds."""
    scheduler.alloc(graph)
    scheduler.compute()
    found = []
    for _ in range(_ROUNDS):
        ends = [0.0] * len(backends)
        begun = threading.Barrier(len(backends) + 1)

        def wait(i: int, begun: threading.Barrier = begun, ends: list[float] = ends) -> None:
            begun.wait()
            ggml.c.ggml_backend_synchronize(backends[i].ptr)
            ends[i] = time.perf_counter()

        threads = [threading.Thread(target=wait, args=(i,)) for i in range(len(backends))]
        for thread in threads:
            thread.start()
        start = time.perf_counter()
        scheduler.compute_async()
        begun.wait()
        for thread in threads:
            thread.join()
        scheduler.synchronize()
        found.append([1e3 * (end - start) for end in ends])
    return [min(column) for column in zip(*found, strict=True)]


def trace(gpus: Sequence[str], n: int, *, overlap: bool) -> list[dict[str, Any]]:
    """Return an event for each product of each branch, from the end of the product before on that device to its own."""
    w, x = weights(n)
    events = []
    with ggml.Context() as ctx, ggml.Backend(gpus[0]) as a, ggml.Backend(gpus[1]) as b, ggml.Backend("CPU") as cpu:
        scheduler = ggml.Scheduler([a, b, cpu], overlap=overlap)
        branches = []
        for device in gpus:
            y = ctx.new_tensor("f32", x.shape)
            made = [ctx.new_tensor("f16", w.shape) for _ in range(_STEPS)]
            ctx.alloc(device, [y, *made], usage=ggml.Usage.WEIGHTS)
            y.set(x)
            ends = []
            for t in made:
                t.set(w)
                y = ggml.linear(y, t)
                ends.append(y)
            branches.append(ends)
        last = [0.0, 0.0]
        for k in range(_STEPS):
            # Both branches reduced and added, as in benchmarks.multi_gpu, but only k + 1 products long.
            with ggml.Graph(ggml.add(*(ggml.sum_rows(ends[k]) for ends in branches))) as graph:
                now = times(scheduler, (a, b), graph)
                scheduler.reset()
            for i, end in enumerate(now):
                events.append(
                    {"name": f"product {k + 1}", "ph": "X", "pid": int(not overlap), "tid": i, "ts": 1e3 * last[i]}
                    | {"dur": max(1e3 * (end - last[i]), 0.0)}
                )
                last[i] = max(last[i], end)
        scheduler.close()
    return events


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("devices", nargs="*", help="two GPUs (default: the first two)")
    parser.add_argument("--size", type=int, default=4096, help="rows of the weights")
    parser.add_argument("--out", type=Path, default=Path("overlap.json"))
    args = parser.parse_args()
    gpus = args.devices or [d.name for d in ggml.devices() if not d.is_cpu][:2]
    if len(gpus) != 2:
        parser.error(f"two GPUs are needed, there are {len(gpus)}: GGML_VK_VISIBLE_DEVICES=0,0 makes two of one")
    events: list[dict[str, Any]] = []
    for pid, (overlap, name) in enumerate(((True, "ours"), (False, "the order built"))):
        events.append({"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}})
        for i, gpu in enumerate(gpus):
            text = f"{gpu}: {ggml.device(gpu).description}"
            events.append({"name": "thread_name", "ph": "M", "pid": pid, "tid": i, "args": {"name": text}})
        found = trace(gpus, args.size, overlap=overlap)
        events += found
        print(name)
        for i, gpu in enumerate(gpus):
            ends = [(e["ts"] + e["dur"]) / 1e3 for e in found if e["tid"] == i]
            print(f"    {gpu}: products done after " + " ".join(f"{end:.2f}" for end in ends) + " ms")
    args.out.write_text(json.dumps({"traceEvents": events}, indent=1))
    print(args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
