"""``tools/cpu_variants.py`` with stubs as variants, and a few tests that take no time as the suite."""

import os
import signal
import subprocess
import sys

import pytest

from tests.support import PATIENCE, ROOT
from tests.support.libraries import compile_stub

_SUITE = """
import os, pathlib, time

def test_the_folder_has_one_variant():
    folder = pathlib.Path(os.environ["GGML_CFFI_LIBRARY_PATH"])
    assert sorted(file.name for file in folder.iterdir()) == ["libggml-base.so.0", f"libggml-cpu-{here()}.so"]

def test_the_best_variant_fails():
    assert here() != "best", "as it shall"

def test_the_slow_variant_hangs():
    time.sleep(1000 if here() == "slow" else 0)

def here():
    (variant,) = pathlib.Path(os.environ["GGML_CFFI_LIBRARY_PATH"]).glob("libggml-cpu-*")
    return variant.name.removeprefix("libggml-cpu-").removesuffix(".so")
"""


class Tool:
    """The program with a folder of variants, and a suite of three tests."""

    def __init__(self, folder):
        self.libraries, self.logs, self.suite = folder / "libraries", folder / "logs", folder / "test_suite.py"
        self.libraries.mkdir()
        (folder / "pytest.ini").write_text("[pytest]\naddopts = -q\n")  # as in pyproject.toml
        (self.libraries / "libggml-base.so.0").touch()
        for name, score in (("best", 3), ("good", 2), ("newer", 0)):
            self.add(name, score)
        self.suite.write_text(_SUITE)

    def add(self, name, score):
        compile_stub(self.libraries / f"libggml-cpu-{name}.so", SCORE=score)

    def start(self, *options):
        command = [sys.executable, ROOT / "tools" / "cpu_variants.py", self.libraries, "--logs", self.logs, *options]
        command += ["--", "-n", "0", self.suite]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)

    def run(self, *options, code=0):
        process = self.start(*options)
        output, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == code, output + errors
        return output, errors


@pytest.fixture
def tool(tmp_path):
    return Tool(tmp_path)


def results(output):
    """Return the lines after the empty one, without the seconds."""
    return [line.split(" in ")[0] for line in output.split("\n\n")[-1].splitlines()]


def test_each_variant_of_this_processor_is_tested_alone(tool):
    output, _ = tool.run("--jobs", "1", code=1)
    assert results(output) == [
        "best         2 passed, 1 failed, 0 skipped",
        f"{'':13}test_suite::test_the_best_variant_fails: AssertionError: as it shall",
        "good         3 passed, 0 failed, 0 skipped",
        "newer        not run: this processor lacks its instructions",
    ]
    assert sorted(file.name for file in tool.logs.iterdir()) == ["best.log", "best.xml", "good.log", "good.xml"]
    assert "test_the_best_variant_fails FAILED" in (tool.logs / "best.log").read_text()


def test_the_caller_chooses_variants(tool):
    output, _ = tool.run("--only", "good")
    assert results(output) == ["good         3 passed, 0 failed, 0 skipped"]
    _, errors = tool.run("--only", "good,better", code=2)
    assert f"no variant better in {tool.libraries}; there is best, good, newer" in errors


def test_more_variants_at_a_time_than_processors_are_refused(tool):
    n = len(os.sched_getaffinity(0))
    for jobs in (0, n + 1):
        _, errors = tool.run("--jobs", str(jobs), code=2)
        assert f"--jobs must be 1 to {n}, the number of processors, not {jobs}" in errors


def test_a_run_that_is_cut_has_printed_what_it_had(tool):
    tool.add("slow", 1)
    tool.add("waiting", 1)
    process = tool.start("--jobs", "1", "--every", "0.1", "--only", "best,slow,waiting")
    lines = []
    for line in process.stdout:  # each arrives when it is printed
        lines.append(line)
        if line.startswith("slow after") and ": 66 %" in line:
            break
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM
    assert any(line.startswith("best: 2 passed, 1 failed, 0 skipped in") for line in lines)
    cut, waiting = rest.splitlines()[-2:]
    assert cut.startswith("slow: cut after")
    assert cut.endswith("at 66 %")
    assert waiting == "not started: waiting"
    assert "test_the_best_variant_fails PASSED" in (tool.logs / "slow.log").read_text()


def test_progress_names_the_tests_that_have_failed(tool):
    tool.suite.write_text(_SUITE + "\ndef test_last():\n    time.sleep(1000)\n")
    process = tool.start("--jobs", "1", "--every", "0.1", "--only", "best")
    for _, line in zip(range(PATIENCE * 10), process.stdout, strict=False):
        if "failed" in line:
            break
    process.terminate()
    process.communicate(timeout=PATIENCE)
    assert line.endswith("test_suite.py::test_the_best_variant_fails\n")
