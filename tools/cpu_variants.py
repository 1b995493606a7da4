"""Run the tests with each variant of the CPU backend that this processor can run.

    python tools/cpu_variants.py FOLDER [--only NAME,NAME] [--jobs N] [--logs FOLDER] [-- PYTEST ARGUMENTS...]

FOLDER has the libraries of ``build_lib.sh --portable``. ggml would choose the variant with the highest score; here each
one gets a folder of its own, so that there is no choice. A FOLDER of the native build has one variant, ``native``. The
tests are those of ``make test`` that need no GPU. Pytest's arguments come after those of ``make test`` and take
precedence over them: ``-- -n 8 tests/ops`` is possible.

The running variants share the processors equally. The result of a variant is printed when it ends, and between the
results a line with the progress of those that run. The log of each variant is written while it runs, so that a run
that is cut leaves the results so far. The last lines count the tests of each variant; the exit code is 1 if one failed.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from xml.etree import ElementTree

NATIVE, PREFIX = "libggml-cpu.so.0", "libggml-cpu-"
PERCENT = re.compile(r"\[ *(\d+)%\]")
# A line of pytest's log, with several processes and with one.
FAILED = re.compile(r"^\[gw\d+\] \[ *\d+%\] (?:FAILED|ERROR) (\S.*?) *$|^(\S.*?) (?:FAILED|ERROR) +\[ *\d+%\]$", re.M)


@dataclass
class Result:
    """Numbers of tests, and the names and messages of those that failed."""

    passed: int
    skipped: int
    failed: list[str]
    exit_code: int
    seconds: float

    def __str__(self) -> str:
        counts = f"{self.passed} passed, {len(self.failed)} failed, {self.skipped} skipped"
        return f"{counts} in {self.seconds:.0f} s (exit code {self.exit_code})"


class Run:
    """The tests with one variant on some processors, in a process of their own."""

    def __init__(self, name: str, variant: Path, processors: list[int], arguments: list[str], logs: Path) -> None:
        self.name, self.processors = name, processors
        self.log, self.report = logs / f"{name}.log", logs / f"{name}.xml"
        self.report.unlink(missing_ok=True)
        self.temporary = tempfile.TemporaryDirectory()
        folder = Path(self.temporary.name, "lib")
        folder.mkdir()
        for file in variant.parent.iterdir():
            if file == variant or not file.name.startswith(PREFIX):
                (folder / file.name).symlink_to(file.resolve())
        # -u: the log has each test as soon as it ends. --verbosity=1 has their names; -v would take back only the -q
        # of pyproject.toml.
        command = ["taskset", "-c", ",".join(map(str, processors)), sys.executable, "-u", "-m", "pytest"]
        command += ["--verbosity=1", "-n", str(len(processors)), "--dist", "worksteal"]
        command += ["-m", "not nightly", "-p", "no:cacheprovider"]
        command += [f"--basetemp={self.temporary.name}/files", f"--junitxml={self.report}", *arguments]
        environment = {**os.environ, "GGML_CFFI_LIBRARY_PATH": str(folder), "GGML_VK_VISIBLE_DEVICES": "99"}
        self.started = time.monotonic()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def progress(self) -> str:
        """Return the share of the tests that have ended, and the failures among them."""
        text = self.log.read_text(errors="replace")
        percent = PERCENT.findall(text)
        failed = [first or second for first, second in FAILED.findall(text)]
        names = f", failed: {', '.join(failed)}" if failed else ""
        return f"{percent[-1] if percent else 0} %{names}"

    def result(self) -> Result:
        """Return the result of the ended process, from its report in the form of JUnit."""
        cases = list(ElementTree.parse(self.report).iter("testcase")) if self.report.exists() else []
        skipped = sum(case.find("skipped") is not None for case in cases)
        failed = []
        for case in cases:
            problem = next((found for found in case if found.tag in ("failure", "error")), None)
            if problem is not None:
                message = problem.get("message", "").splitlines() or [""]
                failed.append(f"{case.get('classname')}::{case.get('name')}: {message[0][:200]}")
        passed = len(cases) - len(failed) - skipped
        return Result(passed, skipped, failed, self.process.wait(), self.seconds)

    def close(self) -> None:
        """End the process if it runs, and remove its files except the log and the report."""
        self.process.terminate()
        self.process.wait()
        self.temporary.cleanup()


def runs_here(variant: Path) -> bool:
    """Return whether this processor has the instructions of a variant; its score is 0 if not."""
    if variant.name == NATIVE:
        return True
    code = "import ctypes, sys; sys.exit(not ctypes.CDLL(sys.argv[1]).ggml_backend_score())"
    return subprocess.run([sys.executable, "-c", code, variant], check=False).returncode == 0


def run_all(variants: dict[str, Path], options: argparse.Namespace, arguments: list[str]) -> dict[str, Result]:
    """Run the tests with each variant, print the results and the progress, and return the results."""
    available = sorted(os.sched_getaffinity(0))
    size = len(available) // options.jobs
    free = [available[i * size : (i + 1) * size] for i in range(options.jobs)]
    waiting, running = deque(variants), list[Run]()
    results: dict[str, Result] = {}
    next_line = time.monotonic() + options.every
    try:
        while waiting or running:
            while waiting and free:
                name = waiting.popleft()
                running.append(Run(name, variants[name], free.pop(), arguments, options.logs))
            time.sleep(0.2)
            for run in [run for run in running if run.process.poll() is not None]:
                results[run.name] = run.result()
                print(f"{run.name}: {results[run.name]}", flush=True)
                running.remove(run)
                free.append(run.processors)
                run.close()
            if running and time.monotonic() >= next_line:
                lines = [f"{run.name} after {run.seconds:.0f} s: {run.progress()}" for run in running]
                print("; ".join(lines), flush=True)
                next_line += options.every
    finally:  # a run that is cut prints the results so far
        for run in running:
            print(f"{run.name}: cut after {run.seconds:.0f} s at {run.progress()}", flush=True)
            run.close()
        if running and waiting:
            print(f"not started: {', '.join(waiting)}", flush=True)
    return results


def parse(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, Path]]:
    """Return the options, and the file of each variant that they name."""
    n_processors = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the libraries of build_lib.sh --portable")
    parser.add_argument("--only", help="variants, separated by commas (default: all)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=max(n_processors // 2, 1),
        help="variants that run at a time (default: %(default)s here, one for each two processors)",
    )
    parser.add_argument(
        "--logs",
        type=Path,
        default=Path("build/cpu_variants"),
        help="folder for NAME.log, and NAME.xml in the form of JUnit (default: %(default)s)",
    )
    parser.add_argument("--every", type=float, default=30, help="seconds between two lines of progress")
    options = parser.parse_args(arguments)
    if not 1 <= options.jobs <= n_processors:
        parser.error(f"--jobs must be 1 to {n_processors}, the number of processors, not {options.jobs}")
    found = {file.name.removeprefix(PREFIX).split(".")[0]: file for file in sorted(options.folder.glob(f"{PREFIX}*"))}
    if (options.folder / NATIVE).exists():
        found = {"native": options.folder / NATIVE}
    only = options.only.split(",") if options.only else list(found)
    if unknown := set(only) - set(found):
        parser.error(
            f"no variant {', '.join(sorted(unknown))} in {options.folder}; there is {', '.join(found) or 'none'}"
        )
    return options, {name: found[name] for name in only}


def end(number: int, _frame: FrameType | None) -> None:
    """Leave the program by an exception, so that it prints the results so far."""
    sys.exit(128 + number)


def main() -> int:
    """Run the tests with each variant, print the results, and return the exit code."""
    given = sys.argv[1:]
    place = given.index("--") if "--" in given else len(given)
    options, found = parse(given[:place])
    signal.signal(signal.SIGTERM, end)
    options.logs.mkdir(parents=True, exist_ok=True)
    results = run_all({name: file for name, file in found.items() if runs_here(file)}, options, given[place + 1 :])
    print()
    for name in found:
        print(f"{name:12} {results.get(name, 'not run: this processor lacks its instructions')}")
        for failed in results[name].failed if name in results else ():
            print(f"{'':12} {failed}")
    return int(not results or any(result.exit_code for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
