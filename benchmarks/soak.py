"""A long run of everything at once: sessions, threads, futures, tasks, cancellations, aborts, closes, transfers.

    python -m benchmarks.soak [--minutes 30] [--threads 4] [--seed 0] [--scenes closing,tasks]

Random scenes run in several threads of a child process, on two GPUs (software ones where there are none) and the CPU;
numpy checks every number. Prints the scenes and the resident memory over time, and writes JSON to ``results/``. Exits
with 1 after a wrong number, an unexpected exception, a thread without progress, the death of the process, or growth of
its memory by more than 2 % over the last two thirds of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import gc
import json
import os
import random
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

import ggml_cffi as ggml

_STANDSTILL = 120  # seconds without a finished scene
_GROWTH = 0.02
_EVERY = 2.0  # seconds between reports of the child
_ROWS = 1, 2, 16  # software devices compile for each number up to 8, some for minutes
_TYPES = "f32", "f16", "q8_0"
Array = npt.NDArray[Any]
_COUNT = "import ggml_cffi; print(sum(not d.is_cpu for d in ggml_cffi.devices()))"


class WrongNumberError(Exception):
    """A wrong result: the defect that this program looks for."""


class OurError(Exception):
    """An exception that an operation raises on purpose."""


# ---------------------------------------------------------------------- random functions, and their results by numpy

Step = tuple[str, float]
_STEPS = ("linear", "relu", "scale", "add", "soft_max", "custom", "norm")


def softsign(out: Array, a: Array) -> None:
    out[...] = a / (1 + np.abs(a))


def steps(rng: random.Random) -> tuple[Step, ...]:
    return tuple((rng.choice(_STEPS), rng.uniform(-2, 2)) for _ in range(rng.randint(1, 6)))


def build(x: Any, chosen: tuple[Step, ...], w: Any, y: Any) -> Any:
    """Apply the steps to a tensor."""
    for kind, number in chosen:
        if kind == "linear":
            x = ggml.linear(x, w)
        elif kind == "scale":
            x = ggml.scale(x, number)
        elif kind == "add":
            x = ggml.add(x, y)
        elif kind == "custom":
            x = ggml.map_custom1(x, softsign)
        elif kind == "norm":
            x = ggml.rms_norm(x, 1e-3)
        else:
            x = getattr(ggml, kind)(x)
    return x


def by_numpy(x: Array, chosen: tuple[Step, ...], w: Array, y: Array) -> Array:
    x, y = x.astype(np.float64), y.astype(np.float64)
    for kind, number in chosen:
        if kind == "linear":
            x = x @ w.T
        elif kind == "relu":
            x = np.maximum(x, 0)
        elif kind == "scale":
            x = x * number
        elif kind == "add":
            x = x + y
        elif kind == "soft_max":
            e = np.exp(x - x.max(-1, keepdims=True))
            x = e / e.sum(-1, keepdims=True)
        elif kind == "custom":
            x = x / (1 + np.abs(x))
        else:
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3)
    return x


def check(what: str, got: Array, want: Array) -> None:
    """Compare with a tolerance for F16 products on GPUs and 8-bit operands of quantized weights."""
    error = float(np.linalg.norm(got - want))
    if got.shape != want.shape or not error <= 0.05 * (float(np.linalg.norm(want)) + 0.02 * want.size**0.5):
        raise WrongNumberError(f"{what}: {error:.2e} off a norm of {float(np.linalg.norm(want)):.2e}")


class Work:
    """A compiled function of a session, with weights on one of its devices."""

    def __init__(self, rng: random.Random, session: Any) -> None:
        self.rng = np.random.default_rng(rng.getrandbits(32))
        self.n = rng.choice((32, 64, 96))
        values = self.rng.standard_normal((self.n, self.n)).astype(np.float32) / self.n**0.5
        weight = session.weight(values, on=rng.choice(session.devices), dtype=rng.choice(_TYPES))
        self.values = weight.numpy().astype(np.float64)
        self.function = session.compile(lambda x, y, chosen: build(x, chosen, weight, y))

    def arguments(self, rng: random.Random) -> tuple[Array, Array, tuple[Step, ...]]:
        """Return two arrays, and the steps to apply to them."""
        dtype = rng.choice((np.float32, np.float64))
        x, y = self.rng.standard_normal((2, rng.choice(_ROWS), self.n)).astype(dtype)
        return x, y if rng.random() < 0.8 else y[:1], steps(rng)

    def check(self, what: str, got: Array, arguments: tuple[Array, Array, tuple[Step, ...]]) -> None:
        """Compare with numpy."""
        x, y, chosen = arguments
        check(f"{what} {chosen}", got, by_numpy(x, chosen, self.values, y))

    def call(self, rng: random.Random, what: str) -> None:
        """Call, and compare with numpy."""
        arguments = self.arguments(rng)
        self.check(what, self.function(*arguments), arguments)


@contextmanager
def some_session(rng: random.Random, *, cpu: bool = False) -> Iterator[Any]:
    names = [] if cpu else rng.sample(GPUS, rng.randint(0, len(GPUS)))
    with ggml.Session(names or ["CPU"], n_threads=rng.randint(1, 2), max_programs=rng.randint(1, 8)) as session:
        yield session


# ---------------------------------------------------------------------- scenes

GPUS: list[str] = []
SHARED: list[tuple[Any, list[Work]]] = []


def calls(rng: random.Random) -> None:
    """Use a session from start to end."""
    with some_session(rng) as session:
        works = [Work(rng, session) for _ in range(rng.randint(1, 3))]
        for _ in range(rng.randint(1, 12)):
            rng.choice(works).call(rng, "calls")


def shared(rng: random.Random) -> None:
    """Use a session of all threads, which drops traced programs while other threads run them."""
    _, works = SHARED[0]
    for _ in range(rng.randint(1, 10)):
        rng.choice(works).call(rng, "shared")


def futures(rng: random.Random) -> None:
    """Use futures, and cancel some, perhaps all at once."""
    with some_session(rng) as session:
        work = Work(rng, session)
        waiting = [(work.function.submit(*a), a) for a in (work.arguments(rng) for _ in range(rng.randint(1, 8)))]
        for future, _ in waiting:
            if rng.random() < 0.3:
                future.cancel()
        stopped = rng.random() < 0.4
        if stopped:
            session.cancel()
        for future, arguments in waiting:
            try:
                work.check("futures", future.result(), arguments)
            except (CancelledError, ggml.AbortedError):
                if not stopped and not future.cancelled():
                    raise
        work.call(rng, "after the futures")


def tasks(rng: random.Random) -> None:
    """Use asyncio, and cancel some tasks."""

    async def main() -> None:
        with some_session(rng) as session:
            work = Work(rng, session)
            arguments = [work.arguments(rng) for _ in range(rng.randint(1, 6))]
            made = [asyncio.ensure_future(work.function.run_async(*a)) for a in arguments]
            await asyncio.sleep(rng.choice((0, 0.001, 0.01)))
            cancelled = {task for task in made if rng.random() < 0.3 and task.cancel()}
            # A stopped run does not affect the others.
            for task, a in zip(made, arguments, strict=True):
                try:
                    work.check("tasks", await task, a)
                except asyncio.CancelledError:
                    if task not in cancelled:
                        raise

    asyncio.run(main())


def raising(rng: random.Random) -> None:
    """Use an operation that raises at random."""
    wrong = [False]

    def step(out: Array, a: Array) -> None:
        if wrong[0]:
            raise OurError
        out[...] = 2 * a

    with some_session(rng) as session:
        f = session.compile(lambda x: ggml.relu(ggml.map_custom1(ggml.scale(x, 3.0), step)))
        x = np.random.default_rng(rng.getrandbits(32)).standard_normal((4, 32))
        for _ in range(rng.randint(2, 8)):
            wrong[0] = rng.random() < 0.5
            try:
                got = f(x) if rng.random() < 0.5 else f.submit(x).result()
            except OurError:
                if not wrong[0]:
                    raise
                continue
            if wrong[0]:
                raise WrongNumberError("raising: the exception was lost")
            check("raising", got, np.maximum(6 * x, 0))


def aborting(rng: random.Random) -> None:
    """Stop a long run on the CPU from another thread, and run it again to the end."""
    pause = [0.001]

    def step(out: Array, a: Array) -> None:
        time.sleep(pause[0])
        out[...] = a + 1

    def function(x: Any) -> Any:
        for _ in range(30):
            x = ggml.map_custom1(x, step)
        return x

    with some_session(rng, cpu=rng.random() < 0.5) as session:
        f = session.compile(function)
        x = np.full((2, 32), float(rng.randint(0, 99)))
        timer = threading.Timer(rng.uniform(0, 0.05), session.backends[-1].abort)
        timer.start()
        with suppress(ggml.AbortedError):
            check("aborting", f(x), x + 30)
        timer.join()
        pause[0] = 0
        check("aborted", f(x), x + 30)


def closing(rng: random.Random) -> None:
    """Close a session while threads call it, submit to it, and make weights."""
    failures: list[BaseException] = []
    with some_session(rng) as session:
        work = Work(rng, session)

        def use(seed: int) -> None:
            mine = random.Random(seed)
            try:
                while True:
                    arguments = work.arguments(mine)
                    future = work.function.submit(*arguments) if mine.random() < 0.5 else None
                    got = future.result() if future else work.function(*arguments)
                    work.check("closing", got, arguments)
                    session.weight(np.ones(32))
            except (ggml.ClosedError, CancelledError):
                pass
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=use, args=(rng.getrandbits(32),)) for _ in range(rng.randint(1, 3))]
        for thread in threads:
            thread.start()
        time.sleep(rng.uniform(0, 0.1))
        session.close()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def objects(rng: random.Random) -> None:
    """Place, reserve, allocate, release and close contexts, a scheduler and a graph in any order."""
    numbers = np.random.default_rng(rng.getrandbits(32))
    backends = rng.sample(GPUS, rng.randint(0, len(GPUS)))
    n = rng.choice((32, 64))
    w, x0, y0 = (numbers.standard_normal((k, n)).astype(np.float32) for k in (n, 2, 2))
    w /= n**0.5
    chosen = steps(rng)
    with ExitStack() as stack:
        weights, work = ggml.Context(), ggml.Context()
        s = ggml.Scheduler(backends or ["CPU"], parallel=rng.random() < 0.2, overlap=rng.random() < 0.5)
        made = [weights, work, s]
        stack.callback(lambda: [handle.close() for handle in made])
        weight = weights.new_tensor("f32", w.shape)
        weights.alloc(rng.choice(s.backends).device, [weight], usage=ggml.Usage.WEIGHTS)
        weight.set(w)
        x, y = work.new_tensor("f32", x0.shape), work.new_tensor("f32", y0.shape)
        out = build(x, chosen, weight, y)
        graph = ggml.Graph(ggml.add(out, y))
        made.append(graph)
        for _ in range(rng.randint(1, 4)):
            if rng.random() < 0.4:
                s.place(graph.outputs[0], rng.choice(s.backends))
            if rng.random() < 0.4:
                s.reserve(graph)
            s.alloc(graph)
            x.set(x0)
            if any(kind == "add" for kind, _ in chosen) or y.is_allocated:
                y.set(y0)
            for _ in range(rng.randint(1, 3)):
                if rng.random() < 0.5:
                    s.compute()
                else:
                    s.compute_async()
                    s.synchronize()
                check(f"objects {chosen}", graph.outputs[0].numpy(), by_numpy(x0, chosen, w, y0) + y0)
            if rng.random() < 0.5:
                s.reset()
        rng.shuffle(made)


def transfers(rng: random.Random) -> None:
    """Transfer bytes between devices in all ways."""
    shape = (rng.randint(1, 200), rng.choice((32, 100, 1024)))
    dtype = rng.choice(("f32", "f16", "i32"))
    values = np.random.default_rng(rng.getrandbits(32)).integers(0, 1000, shape)
    with ggml.Context() as ctx:
        tensors = []
        for _ in range(3):
            t = ctx.new_tensor(dtype, shape)
            ctx.alloc(rng.choice([*GPUS, "CPU"]), [t])
            tensors.append(t)
        tensors[0].set(values)
        for a, b in pairwise(tensors):
            ggml.transfer(a, b, chunk=rng.choice((4096, 65536, 16 << 20)))
        if not np.array_equal(tensors[-1].numpy(), values):
            raise WrongNumberError(f"transfers: {dtype} {shape} by {[t.buffer_type for t in tensors]}")


def forgotten(rng: random.Random) -> None:
    """Use a session without closing it."""
    names = rng.sample(GPUS, rng.randint(0, len(GPUS)))
    session = ggml.Session(names or ["CPU"], n_threads=1)
    Work(rng, session).call(rng, "forgotten")


SCENES: dict[str, Callable[[random.Random], None]] = {
    f.__name__: f for f in (calls, shared, futures, tasks, raising, aborting, closing, objects, transfers, forgotten)
}


# ---------------------------------------------------------------------- the child


class Player(threading.Thread):
    """A thread that plays random scenes until the time is over or a scene fails."""

    def __init__(self, seed: int, until: float, names: list[str]) -> None:
        super().__init__(daemon=True)
        self.seed, self.until, self.names = seed, until, names
        self.counts: Counter[str] = Counter()
        self.doing, self.since = "", time.monotonic()
        self.failure = ""

    def run(self) -> None:
        """Play scenes, in the thread."""
        rng = random.Random(self.seed)
        while time.monotonic() < self.until and not self.failure:
            self.doing, self.since = rng.choice(self.names), time.monotonic()
            seed = rng.getrandbits(32)
            try:
                SCENES[self.doing](random.Random(seed))
                self.counts[self.doing] += 1
            except BaseException:
                self.failure = f"{self.doing}, seed {seed}\n{traceback.format_exc()}"
        self.since = float("inf")


def warm_up() -> None:
    """Run the operations of all scenes once on each device, which may compile for minutes."""
    every = tuple((kind, 1.5) for kind in _STEPS)
    for name in GPUS:
        with ggml.Session([name]) as session:
            for dtype in _TYPES:
                for n in (32, 64):
                    w = session.weight(np.ones((n, n)) / n, dtype=dtype)
                    f = session.compile(lambda x, y, w=w: build(x, every, w, y))
                    for rows in _ROWS:
                        f(np.ones((rows, n)), np.ones((rows, n)))
                        f(np.ones((rows, n)), np.ones((1, n)))


def child(args: argparse.Namespace) -> int:
    """Play, and report every few seconds in a line of JSON."""
    from ggml_cffi.core.handle import live

    faulthandler.enable()
    warnings.simplefilter("ignore", ResourceWarning)
    GPUS[:] = [d.name for d in ggml.devices() if not d.is_cpu][:2]
    warm_up()
    start = time.monotonic()
    names = args.scenes.split(",") if args.scenes else list(SCENES)
    with ggml.Session(GPUS, max_programs=3) as session:
        SHARED.append((session, [Work(random.Random(k), session) for k in range(4)]))
        players = [Player(args.seed * 1000 + k, start + 60 * args.minutes, names) for k in range(args.threads)]
        for player in players:
            player.start()
        while any(player.is_alive() for player in players):
            time.sleep(_EVERY)
            gc.collect()
            failures = [player.failure for player in players if player.failure]
            still = [p.doing for p in players if time.monotonic() - p.since > _STANDSTILL]
            counts = sum((player.counts for player in players), Counter())
            report = {"seconds": time.monotonic() - start, "resident": resident(), "counts": counts}
            n_live = sum(live().values())
            sys.stdout.write(json.dumps(report | {"live": n_live, "failures": failures, "still": still}) + "\n")
            sys.stdout.flush()
            if still:
                faulthandler.dump_traceback()
            if still or failures:
                os._exit(1)
    return 0


def resident() -> int:
    """Return the resident bytes of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


# ---------------------------------------------------------------------- the parent


def growth(samples: list[tuple[float, int]]) -> float:
    """Return the growth of memory from the first to the last quarter of the last two thirds of the time."""
    window = [n for seconds, n in samples if seconds >= samples[-1][0] / 3]
    part = max(len(window) // 4, 1)
    return median(window[-part:]) / median(window[:part]) - 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", help=f"only these, separated by commas: {', '.join(SCENES)}")
    parser.add_argument("--scene", help="this one, once, with the --seed that a failure prints")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "GGML_VK_VISIBLE_DEVICES" not in os.environ and not args.child:
        # In a process of its own: the driver reads the variable when it is first loaded.
        done = subprocess.run([sys.executable, "-c", _COUNT], capture_output=True, text=True, check=True)
        if int(done.stdout) < 2:
            os.environ["GGML_VK_VISIBLE_DEVICES"] = "0,0"
    if args.scene:
        GPUS[:] = [d.name for d in ggml.devices() if not d.is_cpu][:2]
        with ggml.Session(GPUS, max_programs=3) as session:
            SHARED.append((session, [Work(random.Random(k), session) for k in range(4)]))
            SCENES[args.scene](random.Random(args.seed))
        return 0
    return child(args) if args.child else watch(args)


def watch(args: argparse.Namespace) -> int:
    """Run the child, and judge its reports."""
    command = [sys.executable, "-m", "benchmarks.soak", "--child", *sys.argv[1:]]
    # The memory that malloc keeps for each finished thread would look like a leak.
    environment = {"MALLOC_ARENA_MAX": "2", **os.environ}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    alarm = threading.Timer(0, print)
    samples: list[tuple[float, int]] = []
    report: dict[str, Any] = {"counts": {}, "failures": [], "still": [], "seconds": 0}
    shown = -60.0
    for line in process.stdout:
        alarm.cancel()
        alarm = threading.Timer(2 * _STANDSTILL, process.kill)
        alarm.daemon = True
        alarm.start()
        report = json.loads(line)
        samples.append((report["seconds"], report["resident"]))
        if report["seconds"] - shown > min(60.0, 60 * args.minutes / 10):
            shown = report["seconds"]
            scenes = sum(report["counts"].values())
            megabytes = report["resident"] / 2**20
            print(
                f"{shown / 60:6.1f} min {scenes:8} scenes {megabytes:9.1f} MiB {report['live']:6} objects", flush=True
            )
    code = process.wait()
    alarm.cancel()
    grown = growth(samples) if samples else 0.0
    wrong = list(report["failures"])
    wrong += [f"no progress in {name}" for name in report["still"]]
    if code and not wrong:
        wrong.append(f"the process ended with {code}")
    if grown > _GROWTH:
        wrong.append(f"memory grew by {grown:.1%}")
    print(f"\nscenes: {', '.join(f'{name} {n}' for name, n in sorted(report['counts'].items()))}")
    print(f"memory over the last two thirds: {grown:+.2%}")
    print("\n".join(wrong) if wrong else "no error")
    from benchmarks import save

    thinned = samples[:: max(len(samples) // 100, 1)]
    result = {
        "minutes": report["seconds"] / 60,
        "threads": args.threads,
        "seed": args.seed,
        "scenes": report["counts"],
        "resident": [{"seconds": round(s), "bytes": n} for s, n in thinned],
        "growth": grown,
        "wrong": wrong,
    }
    print(save("soak", result))
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
