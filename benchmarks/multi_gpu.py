"""Two GPUs: overlap of branches, concurrent sessions, transfers, and the time of a replay above raw C calls.

python -m benchmarks.multi_gpu [--size 4096] [--mib 256] [DEVICE DEVICE]

Use ``--size 64 --mib 4`` for software devices. Their figures mean nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import ggml_cffi as ggml
from benchmarks import save
from ggml_cffi import c


def best(run: Callable[[], Any], rounds: int = 7) -> float:
    """Return the seconds of the fastest round, after one that does not count."""
    run()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def weights(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((n, n), dtype=np.float32) / np.sqrt(n)).astype(np.float16)
    return w, rng.standard_normal((n, n), dtype=np.float32)


def overlap(gpus: list[str], n: int) -> dict[str, float]:
    """Measure two branches of eight ``n**3`` F16 products, each reduced to a vector before the sum, in milliseconds."""
    w, x = weights(n)

    def measure(where: list[str], *, overlap: bool = True) -> float:
        with ggml.Context() as ctx, ggml.Scheduler(gpus, overlap=overlap) as scheduler:
            ends = []
            for device in where:
                y = ctx.new_tensor("f32", x.shape)
                made = [ctx.new_tensor("f16", w.shape) for _ in range(8)]
                ctx.alloc(device, [y, *made], usage=ggml.Usage.WEIGHTS)
                y.set(x)
                for t in made:
                    t.set(w)
                    y = ggml.linear(y, t)
                ends.append(ggml.sum_rows(y))
            with ggml.Graph(ends[0] if len(ends) == 1 else ggml.add(*ends)) as graph:
                scheduler.alloc(graph)
                return 1e3 * best(scheduler.compute)

    one, other = gpus
    found = {
        "one branch on the first": measure([one]),
        "one branch on the second": measure([other]),
        "both on one": measure([one, one]),
        "one each, in the order built": measure([one, other], overlap=False),
        "one each": measure([one, other]),
    }
    return found | {"of one GPU's time": found["one each"] / found["both on one"]}


def sessions(gpus: list[str], n: int) -> dict[str, float]:
    """Measure calls per second (32 products of 512 rows) by ``submit`` to one session per GPU, alone and together."""
    w, x = weights(n)
    x = np.ascontiguousarray(x[:512])
    opened = [ggml.Session([device]) for device in gpus]
    functions = []
    for session in opened:
        made = [session.weight(w) for _ in range(4)]

        def f(x: ggml.Tensor, made: list[ggml.Tensor] = made) -> ggml.Tensor:
            for _ in range(8):
                for t in made:
                    x = ggml.linear(x, t)
            return ggml.sum_rows(x)

        functions.append(session.compile(f))

    def run(which: list[ggml.CompiledFunction]) -> None:
        for future in [f.submit(x) for _ in range(50) for f in which]:
            future.result()

    alone = [50 / best(lambda f=f: run([f])) for f in functions]
    both = 100 / best(lambda: run(functions))
    for session in opened:
        session.close()
    return {"first alone": alone[0], "second alone": alone[1], "both": both, "of twice one": both / sum(alone)}


def transfers(gpus: list[str], mib: int) -> dict[str, float]:
    """Measure GB/s from the first GPU to the second, and back."""
    n = mib << 20
    found = {}
    with ggml.Context() as ctx, ggml.HostBlock(64 << 20, gpus) as block:
        values = np.random.default_rng(0).standard_normal(n // 4, dtype=np.float32)
        x, y = ctx.new_tensor("f32", values.shape), ctx.new_tensor("f32", values.shape)
        ctx.alloc(gpus[0], [x])
        ctx.alloc(gpus[1], [y])
        x.set(values)
        with ggml.Backend(gpus[0]) as a, ggml.Backend(gpus[1]) as b:
            for name, src, dst in (("there", x, y), ("back", y, x)):
                found[f"ggml's copy, {name}"] = (
                    n / best(lambda s=src, d=dst: c.ggml_backend_tensor_copy(s.ptr, d.ptr)) / 1e9
                )
                for chunk in (4, 8, 16, 32):
                    move = lambda s=src, d=dst, k=chunk: ggml.transfer(s, d, (a, b), block=block, chunk=k << 20)  # noqa: E731
                    found[f"transfer, {name}, chunks of {chunk} MiB"] = n / best(move) / 1e9
        assert (y.numpy() == values).all()
        assert (x.numpy() == values).all()
        found["transfer, nothing prepared"] = n / best(lambda: ggml.transfer(x, y)) / 1e9
        with ggml.Backend(gpus[0]) as a:
            array = ggml.pinned(values.shape, device=gpus[0])
            found["set_async from pinned"] = n / best(lambda: (x.set_async(array, a), a.synchronize())) / 1e9
            found["get_async to pinned"] = n / best(lambda: (x.get_async(array, a), a.synchronize())) / 1e9
        found["set"], found["get"] = n / best(lambda: x.set(values)) / 1e9, n / best(x.numpy) / 1e9
    return found


def replays(device: str) -> dict[str, float]:
    """Measure set, compute and get of one node through raw C calls, and through a session, in microseconds."""
    with ggml.Session([device], n_threads=1) as session:
        f = session.compile(lambda x: ggml.scale(x, 2.0))
        x, out = np.ones((4, 4), np.float32), np.empty((4, 4), np.float32)
        program = f.trace(x)
        assert program.scheduler is not None
        assert program.graph is not None
        scheduler, graph = program.scheduler.ptr, program.graph.ptr
        source, target = program.inputs[0].ptr, program.outputs[0].ptr
        given, taken = c.ffi.from_buffer(x), c.ffi.from_buffer(out)

        def raw() -> None:
            c.ggml_backend_tensor_set(source, given, 0, 64)
            c.ggml_backend_sched_graph_compute(scheduler, graph)
            c.ggml_backend_tensor_get(target, taken, 0, 64)

        def many(run: Callable[[], Any]) -> Callable[[], None]:
            return lambda: [run() for _ in range(1000)] and None

        found = {"raw C": 1e3 * best(many(raw)), "session": 1e3 * best(many(lambda: f(x)))}
    return found | {"above raw": found["session"] - found["raw C"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("devices", nargs="*", help="two GPUs (default: the first two)")
    parser.add_argument("--size", type=int, default=4096, help="rows of the weights")
    parser.add_argument("--mib", type=int, default=256, help="size of a transfer")
    args = parser.parse_args()
    gpus = args.devices or [d.name for d in ggml.devices() if not d.is_cpu][:2]
    if len(gpus) != 2:
        parser.error(f"two GPUs are needed, there are {len(gpus)}: GGML_VK_VISIBLE_DEVICES=0,0 makes two of one")
    result: dict[str, Any] = {"devices": [f"{d}: {ggml.device(d).description}" for d in gpus]}
    for name, unit, measured in (
        ("overlap", "ms", overlap(gpus, args.size)),
        ("sessions", "calls/s", sessions(gpus, args.size)),
        ("transfers", "GB/s", transfers(gpus, args.mib)),
        ("replay on the CPU", "us", replays("CPU")),
        (f"replay on {gpus[0]}", "us", replays(gpus[0])),
    ):
        print(f"{name} ({unit})")
        for label, value in measured.items():
            print(f"    {label:40}{value:10.3f}")
        result[name] = measured
    print(save("multi_gpu", result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
