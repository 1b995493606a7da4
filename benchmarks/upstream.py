"""Upstream's own cases (``test-backend-ops``), rebuilt with ggml_cffi: the number that run and agree on two devices.

Needs a source checkout and a C++ compiler, see ``tests/upstream``. A software GPU compiles each case for seconds: use
``--limit 5`` and a few ``--ops`` there.

    python -m benchmarks.upstream [--ops ADD MUL_MAT ...] [--limit N] [--devices CPU Vulkan0] [--max-work 2e7]
                                   [--cases FILE.csv]
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from benchmarks import save

COLUMNS = ("listed", "rebuilt", "ran", "agreed", "unsupported", "too large", "refused", "other")


def main() -> int:
    from tests.upstream import listing, refusals, runner

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", help="operations, by upstream's names (default: all)")
    parser.add_argument("--limit", type=int, help="cases of each operation, evenly from its list (default: all)")
    parser.add_argument("--devices", nargs="+", default=["CPU", "Vulkan0"], help="the first is the reference")
    parser.add_argument("--max-work", type=float, default=2e7, help="operations in a case; larger cases are left out")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for a case")
    parser.add_argument(
        "--cases", help="list of another version: the output of test-backend-ops support --output csv -b CPU"
    )
    args = parser.parse_args()
    find_gpu(args.devices)
    listed = listing.cases(args.cases)
    chosen = [case for case in listed if not args.ops or case.op in args.ops]
    if args.limit:
        chosen = runner.spread(chosen, args.limit)
    bad = (runner.DIFFERED, runner.REFUSED, runner.CRASHED, runner.TIMED_OUT, runner.FAILED, runner.MISSING)
    outcomes: list[runner.Outcome] = []
    try:
        for outcome in runner.run(chosen, args.devices, max_work=int(args.max_work), timeout=args.timeout):
            outcomes.append(outcome)
            if sys.stderr.isatty():
                print(f"\r{len(outcomes)} of {len(chosen)} {outcome.op:30}", end="", file=sys.stderr)
            known = outcome.status == runner.REFUSED and refusals.reason(outcome)
            if outcome.status in bad and not known:
                print(f"{outcome.status}: {outcome.op}({outcome.text}) {outcome.detail}")
    except KeyboardInterrupt:
        print(f"stopped after {len(outcomes)} of {len(chosen)} cases")
    result = {"devices": args.devices, "of": len(listed), "operations": table(outcomes)}
    show(result["operations"])
    result["refused"] = dict(Counter(filter(None, map(refusals.reason, outcomes))).most_common())
    for words, count in result["refused"].items():
        print(f"{count:6} refused: {words}")
    result["not agreed"] = [
        {"case": f"{o.op}({o.text})", "status": o.status, "detail": o.detail} for o in outcomes if o.status in bad
    ]
    print(save("upstream", result))
    return 0


def find_gpu(devices: list[str]) -> None:
    """Make ggml list a software GPU, which it hides by default, if the machine has no other."""
    import ggml_cffi
    from tests.support import software_vulkan

    found = {device.name for device in ggml_cffi.devices()}
    if not found >= set(devices):
        software_vulkan.use()  # for the children: the driver is loaded here


def table(outcomes: list) -> dict[str, dict[str, int]]:
    """Count the cases of each operation by outcome. The last row is the sum."""
    from tests.upstream import runner

    counts: dict[str, Counter[str]] = {}
    for o in outcomes:
        row = counts.setdefault(o.op, Counter())
        row["listed"] += 1
        ran = o.status in (runner.AGREED, runner.DIFFERED, runner.RAN)
        row["ran"] += ran
        row["rebuilt"] += o.status not in (runner.MISSING, runner.REFUSED)
        if o.status in COLUMNS:
            row[o.status] += o.status != runner.RAN
        elif not ran:
            row["other"] += 1
    rows = {op: {name: row[name] for name in COLUMNS} for op, row in sorted(counts.items())}
    rows["all"] = {name: sum(row[name] for row in rows.values()) for name in COLUMNS}
    return rows


def show(rows: dict[str, dict[str, int]]) -> None:
    print(f"{'':26}" + "".join(f"{name:>12}" for name in COLUMNS))
    for op, row in rows.items():
        print(f"{op:26}" + "".join(f"{row[name] or '':>12}" for name in COLUMNS))


if __name__ == "__main__":
    raise SystemExit(main())
