"""Helpers that several test modules use."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import ggml_cffi
from ggml_cffi.core.cuda import has_cuda_kernels

ROOT = Path(__file__).resolve().parents[2]
"""The root of the checkout."""
PATIENCE = 1500
"""Seconds after which a process counts as hanging: a software Vulkan device with a cold cache compiles for minutes."""
DATA = ROOT / "tests" / "data"
"""The folder of reference outputs."""
GPUS = {"Vulkan0": "Vulkan0", "Vulkan1": "Vulkan1"}
"""The devices in the place of these two: the option ``--devices`` of pytest names others."""


def need(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return ``names`` if the machine has such devices, else skip the test, with the missing ones as the reason."""
    names = tuple(GPUS.get(name, name) for name in names)
    missing = set(names) - {d.name for d in ggml_cffi.devices()}
    if missing:
        import pytest  # worker processes of the tests import this module too

        pytest.skip(
            f"no {', '.join(sorted(missing))}: needs the backend's plug-in, a loader and a driver (see make setup)"
        )
    return names


def bound_of_products(devices: Sequence[str], usual: float, n: int = 4) -> float:
    """Return the allowed relative error of up to ``n`` products of F32 in a row, with the default precision.

    CUDA's kernels cut the last 13 bits of F32 operands off (TF32), which leaves an error of up to 2**-10 for each.
    """
    cuts = any(has_cuda_kernels(ggml_cffi.device(name)) for name in devices)
    return max(usual, 2 * n * 2.0**-10) if cuts else usual


@contextmanager
def skip_if_newer_needed() -> Iterator[None]:
    """Skip the test if it uses something that the loaded version of ggml lacks; the reason names the version."""
    try:
        yield
    except ggml_cffi.LibraryMismatchError as error:
        import pytest

        pytest.skip(str(error))


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Return the norm of the difference over the norm of the reference."""
    want = np.asarray(want, np.float64)
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / max(np.linalg.norm(want), 1e-30))


def run_python(code: str, *, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-X", "dev", "-c", code],
        capture_output=True,
        text=True,
        check=check,
        timeout=PATIENCE,
        cwd=ROOT,
        env={**os.environ, **env},
    )
