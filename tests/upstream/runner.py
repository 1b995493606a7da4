"""Computation of cases on several devices in a child process, and comparison of the results.

A child computes one case after the other, so that a device compiles each of its shaders once. If a case ends the
process or exceeds its time limit, a new child continues with the next case.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

import ggml_cffi as ggml
from tests.upstream import judge
from tests.upstream.builders import UnknownCaseError, build, load
from tests.upstream.draw import Array, Inputs, work
from tests.upstream.listing import Listed
from tests.upstream.text import Params, parse, size

AGREED, DIFFERED, RAN = "agreed", "differed", "ran"
REFUSED, MISSING, UNSUPPORTED, LARGE = "refused", "missing", "unsupported", "too large"
CRASHED, TIMED_OUT, FAILED = "crashed", "timed out", "failed"

_VIEWS = (ggml.Op.VIEW, ggml.Op.RESHAPE, ggml.Op.PERMUTE, ggml.Op.TRANSPOSE)


@dataclass
class Outcome:
    """Outcome of a case."""

    number: int
    op: str
    text: str
    status: str
    """``agreed``, ``differed``, ``ran`` (with one device there is nothing to compare), ``refused`` (by ggml_cffi,
    though ggml's CPU backend says it can), ``missing`` (no such operation, argument or parameter here), ``unsupported``
    (by a device or the loaded ggml), ``too large``, ``crashed``, ``timed out``, ``failed``."""
    detail: str = ""
    error: float = 0.0
    work: int = 0
    seconds: float = 0.0


def spread(cases: Sequence[Listed], per_op: int, *, smaller: float = 1.0) -> list[Listed]:
    """Choose at most ``per_op`` cases of each operation, evenly from its list; only from the ``smaller`` part of it."""
    by_op: dict[str, list[Listed]] = {}
    for case in cases:
        by_op.setdefault(case.op, []).append(case)
    chosen = []
    for group in by_op.values():
        ranked = sorted(group, key=lambda case: size(case.text))[: max(per_op, round(len(group) * smaller))]
        ranked.sort(key=lambda case: case.number)
        n = min(per_op, len(ranked))
        chosen += [ranked[i * len(ranked) // n] for i in range(n)]
    return chosen


class Machine:
    """Devices, with a scheduler each. The first is the reference."""

    def __init__(self, devices: Sequence[str]) -> None:
        self._stack = ExitStack()
        self.schedulers = {name: self._stack.enter_context(ggml.Scheduler([name])) for name in devices}
        self.builders = load()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, case: Listed, max_work: int) -> Outcome:
        """Run one case on every device."""
        outcome = Outcome(case.number, case.op, case.text, RAN)
        start = perf_counter()
        if case.op not in self.builders:
            outcome.status = MISSING
            return outcome
        try:
            self._compare(case, outcome, max_work)
        except (AttributeError, TypeError) as error:
            absent = "ggml_cffi" in str(error) or "argument" in str(error)
            outcome.status, outcome.detail = MISSING if absent else FAILED, f"{type(error).__name__}: {error}"
        except UnknownCaseError as error:
            outcome.status, outcome.detail = MISSING, str(error)
        except ggml.LibraryMismatchError as error:
            outcome.status, outcome.detail = UNSUPPORTED, str(error)
        except ggml.UnsupportedOpError as error:
            outcome.status, outcome.detail = UNSUPPORTED, str(error)
        except ValueError as error:
            outcome.status, outcome.detail = REFUSED if case.on_cpu else UNSUPPORTED, str(error)
        except Exception as error:  # the next case must run regardless of the error
            outcome.status, outcome.detail = FAILED, f"{type(error).__name__}: {error}"
        outcome.seconds = round(perf_counter() - start, 4)
        return outcome

    def _compare(self, case: Listed, outcome: Outcome, max_work: int) -> None:
        p = parse(case.text)
        rng, drawn = np.random.default_rng(case.number), []
        want: Array | None = None
        for name in self.schedulers:
            got = self._compute(name, case.op, p, rng, drawn, outcome, max_work)
            if got is None:
                outcome.status = LARGE
                return
            if want is None:
                want = got
                continue
            error, remark = judge.error(case.op, p, want, got)
            outcome.error = max(outcome.error, error)
            allowed = judge.limit(case.op, p)
            if error > allowed:
                outcome.status = DIFFERED
                outcome.detail = remark or f"{name}: error {error:.3g}, at most {allowed:.3g} is allowed"
                return
            outcome.status = AGREED

    def _compute(
        self,
        name: str,
        op: str,
        p: Params,
        rng: np.random.Generator,
        drawn: list[Array],
        outcome: Outcome,
        max_work: int,
    ) -> Array | None:
        scheduler = self.schedulers[name]
        with ggml.Context() as ctx:
            inputs = Inputs(ctx, name, rng, drawn)
            result = build(op, inputs, p)
            outcome.work = work(result)
            if outcome.work > max_work:
                return None
            with ggml.Graph(result) as graph:
                scheduler.unplace()
                for node in graph.nodes:
                    if node.op not in _VIEWS:
                        scheduler.place(node, scheduler.backends[0])
                try:
                    scheduler.alloc(graph)
                    inputs.write()
                    scheduler.compute(graph)
                    return (result if inputs.read is None else inputs.read).numpy()
                finally:
                    scheduler.reset()


def run(cases: Sequence[Listed], devices: Sequence[str], *, max_work: int, timeout: float = 60.0) -> Iterator[Outcome]:
    """Run every case in child processes; ``timeout`` is the time limit of a case in seconds."""
    left = list(cases)
    while left:
        for outcome in _child(tuple(left), devices, max_work, timeout):
            left.pop(0)
            yield outcome


def _child(cases: Sequence[Listed], devices: Sequence[str], max_work: int, timeout: float) -> Iterator[Outcome]:
    """Run one child until it ends; return its outcomes, with that of the case that ended it."""
    with tempfile.TemporaryFile("w+") as order, tempfile.TemporaryFile("w+", errors="replace") as log:
        json.dump({"cases": [asdict(case) for case in cases], "devices": list(devices), "max_work": max_work}, order)
        order.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.upstream.runner"],
            stdin=order,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        )
        done, late, ready = 0, threading.Event(), False
        try:
            timer = _timer(child, late, timeout)
            assert child.stdout is not None
            for line in child.stdout:
                timer.cancel()
                if ready:
                    done += 1
                    yield Outcome(**json.loads(line))
                ready = True
                timer = _timer(child, late, timeout)
            timer.cancel()
            code = child.wait()
        finally:
            timer.cancel()
            child.kill()
            child.wait()
            child.stdout.close()
        if done < len(cases):
            case = cases[done]
            log.seek(0)
            last = [line.strip() for line in log if line.strip()][-3:]
            if not ready:
                raise RuntimeError(f"the devices {', '.join(devices)} could not be opened: {' | '.join(last)}")
            status = TIMED_OUT if late.is_set() else CRASHED
            detail = f"after {timeout:g} s" if late.is_set() else f"code {code}: {' | '.join(last)}"
            yield Outcome(case.number, case.op, case.text, status, detail)


def _timer(child: subprocess.Popen[str], late: threading.Event, seconds: float) -> threading.Timer:
    def stop() -> None:
        late.set()
        child.kill()

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    return timer


def main() -> None:
    """Run as the child: read the cases, and write one outcome per line."""
    order = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # ggml's Vulkan backend prints to stdout
    with Machine(order["devices"]) as machine:
        print("ready", file=out)
        for case in order["cases"]:
            print(json.dumps(asdict(machine.run(Listed(**case), order["max_work"]))), file=out)


if __name__ == "__main__":
    main()
