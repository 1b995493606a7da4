"""Run the tests with each variant of the CPU backend that this processor can run.

    python tools/cpu_variants.py FOLDER [PYTEST ARGUMENTS...]

FOLDER has the libraries of ``build_lib.sh --portable``. ggml would choose the variant with the highest score; here each
one gets a folder of its own, so that there is no choice. A FOLDER of the native build has one variant, ``native``.
Without arguments, the tests are those of ``make test`` that need no GPU. Each variant has two processors, as ``make
test`` expects, and as many variants run at a time as the machine has pairs of them. The last lines count the tests of
each variant; the exit code is 1 if one failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from xml.etree import ElementTree

NATIVE, PREFIX = "libggml-cpu.so.0", "libggml-cpu-"
TESTS = ["-n", "2", "--dist", "worksteal", "-m", "not nightly"]


@dataclass
class Result:
    """Numbers of tests, and the names and messages of those that failed."""

    passed: int
    skipped: int
    failed: list[str]
    exit_code: int

    def __str__(self) -> str:
        return f"{self.passed} passed, {len(self.failed)} failed, {self.skipped} skipped (exit code {self.exit_code})"


def runs_here(variant: Path) -> bool:
    """Return whether this processor has the instructions of a variant; its score is 0 if not."""
    if variant.name == NATIVE:
        return True
    code = "import ctypes, sys; sys.exit(not ctypes.CDLL(sys.argv[1]).ggml_backend_score())"
    return subprocess.run([sys.executable, "-c", code, variant], check=False).returncode == 0


def read(report: Path, exit_code: int) -> Result:
    """Return the numbers in a report of pytest in the form of JUnit."""
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    skipped = sum(case.find("skipped") is not None for case in cases)
    failed = []
    for case in cases:
        problem = next((found for found in case if found.tag in ("failure", "error")), None)
        if problem is not None:
            message = problem.get("message", "").splitlines() or [""]
            failed.append(f"{case.get('classname')}::{case.get('name')}: {message[0][:200]}")
    return Result(len(cases) - len(failed) - skipped, skipped, failed, exit_code)


def test(variant: Path, arguments: list[str], processors: list[int]) -> Result:
    """Run the tests with one variant on some processors."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, report = Path(temporary, "lib"), Path(temporary, "report.xml")
        folder.mkdir()
        for file in variant.parent.iterdir():
            if file == variant or not file.name.startswith(PREFIX):
                (folder / file.name).symlink_to(file.resolve())
        command = ["taskset", "-c", ",".join(map(str, processors)), sys.executable, "-m", "pytest", "-q"]
        command += ["-p", "no:cacheprovider", f"--basetemp={temporary}/files", f"--junitxml={report}", *arguments]
        environment = {**os.environ, "GGML_CFFI_LIBRARY_PATH": str(folder), "GGML_VK_VISIBLE_DEVICES": "99"}
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
        result = read(report, done.returncode)
        if done.returncode:
            print(done.stdout[-20_000:], done.stderr[-5_000:], flush=True)
    return result


def main() -> int:
    """Run the tests with each variant, print the results, and return the exit code."""
    folder, arguments = Path(sys.argv[1]), sys.argv[2:] or TESTS
    found = {file.name.removeprefix(PREFIX).split(".")[0]: file for file in sorted(folder.glob(f"{PREFIX}*"))}
    if (folder / NATIVE).exists():
        found = {"native": folder / NATIVE}
    variants = {name: file for name, file in found.items() if runs_here(file)}
    available = sorted(os.sched_getaffinity(0))
    pairs: SimpleQueue[list[int]] = SimpleQueue()
    n_pairs = max(len(available) // 2, 1)
    for i in range(n_pairs):
        pairs.put(available[2 * i : 2 * i + 2])

    def work(name: str) -> Result:
        pair = pairs.get()
        try:
            result = test(variants[name], arguments, pair)
        finally:
            pairs.put(pair)  # others wait for it
        print(f"{name}: {result}", flush=True)
        return result

    with ThreadPoolExecutor(n_pairs) as pool:
        results = dict(zip(variants, pool.map(work, variants), strict=True))
    print()
    for name in found:
        print(f"{name:12} {results.get(name, 'not run: this processor lacks its instructions')}")
        for failed in results[name].failed if name in results else ():
            print(f"{'':12} {failed}")
    return int(not results or any(result.exit_code for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
