"""The fuzzer's long run: random calls of every operation, or damaged GGUF files, in child processes.

    python -m benchmarks.fuzz [--calls 100000] [--seed 0] [--jobs 2] [--ops add,mul_mat] [--devices CPU]
    python -m benchmarks.fuzz --gguf 10000
    python -m benchmarks.fuzz --call "add(a=T((2, 3)), b=T((3,), F16))"

Prints the outcomes, and every defect with its smallest call, which ``--call`` repeats. Writes JSON to ``results/``.
Exits with 1 after a defect.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

_BATCH, _EACH = 500, 50
_child: Any = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--gguf", type=int, metavar="N", help="damaged files instead of calls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this time, and report")
    parser.add_argument("--devices", default="CPU", help="devices, separated by commas")
    parser.add_argument("--ops", help="only these, separated by commas")
    parser.add_argument("--no-shrink", action="store_true", help="report defects without shrinking them")
    parser.add_argument("--call", help="make this one call, as a report prints it")
    args = parser.parse_args()
    kind = "files" if args.gguf else "calls"
    devices = tuple(args.devices.split(","))
    if args.call:
        return repeat(args.call, devices)
    total = args.gguf or args.calls
    tally = run(kind, total, args, devices)
    report(tally)
    from benchmarks import save

    defects = [vars(d) for d in tally.defects.values()]
    result = {
        "kind": kind,
        "n": tally.outcomes.total(),
        "seed": args.seed,
        "devices": devices,
        **vars(tally),
        "defects": defects,
    }
    print(save(f"fuzz-{kind}" if devices == ("CPU",) else f"fuzz-{kind}-{devices[0]}", result))
    return int(bool(tally.defects))


def repeat(text: str, devices: tuple[str, ...]) -> int:
    from tests.fuzzing.calls import parse
    from tests.fuzzing.child import Child

    child = Child("calls", devices)
    outcome = child.ask(parse(text))
    child.close()
    print(f"{outcome.kind} · {outcome.stage} · {outcome.what}\n{outcome.detail}")
    return int(outcome.is_defect)


def batch(kind: str, devices: tuple[str, ...], ops: str | None, seed: int, n: int, known: frozenset[str]) -> Any:
    """Run one batch in a process of the pool, which keeps one child."""
    global _child
    from tests.fuzzing import calls, files, hunt
    from tests.fuzzing.child import Child

    if _child is None:
        _child = Child(kind, devices)
    _child.ask(None)
    if kind == "files":
        return hunt.hunt(files.damages(), _child, seed, n, lambda job: job.base, known=known)
    tally = hunt.Tally()
    chosen = ops.split(",") if ops else calls.operations()
    for i in range(n // _EACH):  # one operation at a time, in turns, since hypothesis repeats itself in long runs
        op = chosen[(seed * (n // _EACH) + i) % len(chosen)]
        strategy = calls.calls(op)
        skip = known | frozenset(tally.defects)
        tally.add(hunt.hunt(strategy, _child, seed, _EACH, lambda job: job.op, known=skip, shrink="*" not in known))
    return tally


def run(kind: str, total: int, args: argparse.Namespace, devices: tuple[str, ...]) -> Any:
    from tests.fuzzing.hunt import Tally

    tally, start, done = Tally(), time.monotonic(), 0
    waiting: dict[Future[Any], int] = {}
    at = 0
    marker = frozenset({"*"}) if args.no_shrink else frozenset[str]()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, context) as pool:
        while at < total or waiting:
            if time.monotonic() - start > 60 * args.minutes:
                total = at
            while at < total and len(waiting) < args.jobs:
                n = min(_BATCH, total - at)
                known = frozenset(tally.defects) | marker
                seed = args.seed * 10**6 + at // _BATCH
                waiting[pool.submit(batch, kind, devices, args.ops, seed, n, known)] = n
                at += n
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                done += waiting.pop(future)
                tally.add(future.result())
                rate = done / (time.monotonic() - start)
                print(f"\r{done}/{total}, {rate:.0f}/s, {len(tally.defects)} defects ", end="", file=sys.stderr)
    print(file=sys.stderr)
    return tally


_COLUMNS = ("refused", "accepted", "computed", "compared", "skipped")


def report(tally: Any) -> None:
    counts = sorted(tally.by_group.items())
    defects = {op: sum(n for kind, n in row.items() if kind not in _COLUMNS) for op, row in counts}
    print(f"{'':26}" + "".join(f"{name:>10}" for name in (*_COLUMNS, "defects")))
    for op, row in counts:
        print(f"{op:26}" + "".join(f"{row[name]:10}" for name in _COLUMNS) + f"{defects[op]:10}")
    for title, counter in (
        ("outcomes", tally.outcomes),
        ("refused with", tally.refusals),
        ("not compared because", tally.reasons),
        ("unusual but accepted", tally.loose),
    ):
        print(f"\n{title}")
        for name, n in counter.most_common():
            print(f"{n:10}  {name}")
    print(f"\n{len(tally.defects)} kinds of defects")
    for defect in sorted(tally.defects.values(), key=lambda d: (d.what, d.job)):
        groups = ", ".join(f"{name} {n}" for name, n in defect.groups.most_common(8))
        print(
            f"{defect.groups.total():6}x {defect.what}\n        {groups}\n        {defect.job}   (seed {defect.seed})"
        )


if __name__ == "__main__":
    raise SystemExit(main())
