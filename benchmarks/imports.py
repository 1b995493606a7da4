"""Time of ``import ggml_cffi`` above ``import numpy``, in fresh interpreters, in turns.

python -m benchmarks.imports [--rounds 15]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

TIMED = """
import numpy, time
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    from benchmarks import save

    found: dict[str, list[float]] = {"ggml_cffi": [], "ggml_cffi.models": [], "cffi": []}
    for _ in range(rounds):
        for module, times in found.items():
            code = TIMED.format(module=module)
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            times.append(float(done.stdout) * 1e3)
    medians = {module: statistics.median(times) for module, times in found.items()}
    for module, ms in medians.items():
        print(f"import {module:20}{ms:7.1f} ms above numpy")
    print(save("imports", {"milliseconds": medians}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
