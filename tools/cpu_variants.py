"""Run tests with each variant of the CPU backend that this processor can run.

    python tools/cpu_variants.py FOLDER [PYTEST ARGUMENTS...]

FOLDER has the libraries of ``build_lib.sh --portable``. ggml would choose the variant with the highest score; here each
one gets a folder of its own, so that there is no choice. Without arguments, the tests are the smoke tests and those of
every operation, on the CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

PREFIX = "libggml-cpu-"
TESTS = ["-k", "CPU", "tests/test_smoke.py", "tests/ops/test_numerics.py"]


def runs_here(variant: Path) -> bool:
    """Return whether this processor has the instructions of a variant; its score is 0 if not."""
    code = "import ctypes, sys; sys.exit(not ctypes.CDLL(sys.argv[1]).ggml_backend_score())"
    return subprocess.run([sys.executable, "-c", code, variant], check=False).returncode == 0


def test(variant: Path, arguments: list[str]) -> bool:
    """Run the tests with one variant, and return whether they passed."""
    with tempfile.TemporaryDirectory() as folder:
        for file in variant.parent.iterdir():
            if file == variant or not file.name.startswith(PREFIX):
                Path(folder, file.name).symlink_to(file.resolve())
        environment = {**os.environ, "GGML_CFFI_LIBRARY_PATH": folder, "GGML_VK_VISIBLE_DEVICES": "99"}
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", *arguments], check=False, env=environment)
    return done.returncode == 0


def main() -> int:
    """Run the tests with each variant, print the results, and return the exit code."""
    folder, arguments = Path(sys.argv[1]), sys.argv[2:] or TESTS
    results = {}
    for variant in sorted(folder.glob(f"{PREFIX}*")):
        name = variant.name.removeprefix(PREFIX).split(".")[0]
        print(f"{name}:", flush=True)
        results[name] = ("passed" if test(variant, arguments) else "FAILED") if runs_here(variant) else "not run here"
    for name, result in results.items():
        print(f"{name:16} {result}")
    return "FAILED" in results.values()


if __name__ == "__main__":
    sys.exit(main())
