"""What the tests share.

Tests that take ``devices`` run on the CPU, on one Vulkan device and on two. Where the machine has fewer than two GPUs,
ggml is told to list the first Vulkan device twice, software devices included.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ggml_cffi.core.handle import live
from tests.support import need

_COUNT = "import ggml_cffi; print(sum(not d.is_cpu for d in ggml_cffi.devices()))"

if "GGML_VK_VISIBLE_DEVICES" not in os.environ:
    # In a process of its own: the driver reads the variable when it is first loaded.
    done = subprocess.run([sys.executable, "-c", _COUNT], capture_output=True, text=True, check=True)
    if int(done.stdout) < 2:
        os.environ["GGML_VK_VISIBLE_DEVICES"] = "0,0"

# A shell that starts the tests in the background has them ignore Ctrl-C; some are about it.
signal.signal(signal.SIGINT, signal.default_int_handler)

DEVICE_SETS = [("CPU",), ("Vulkan0",), ("Vulkan0", "Vulkan1")]


def pytest_collection_finish() -> None:
    """What was collected stays until the end: no need to look through it after every test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=DEVICE_SETS, ids="+".join)
def devices(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Names of devices to compute on."""
    return need(request.param)


@pytest.fixture
def two_gpus() -> tuple[str, str]:
    """Names of two Vulkan devices."""
    return need(("Vulkan0", "Vulkan1"))  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Every C object that a test made is freed when it ends."""
    gc.collect()
    before = live()
    yield
    gc.collect()
    left = live() - before
    assert not left, f"C objects left behind: {dict(left)}"


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers, the same every time."""
    return np.random.default_rng(42)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The file of SmolLM2-135M-Instruct."""
    from ggml_cffi.models import fetch

    return fetch("smollm2")
