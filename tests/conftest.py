"""Fixtures and markers that all tests share.

Tests that take ``devices`` run on the CPU, on one Vulkan device and on two. Where the machine has fewer than two GPUs,
ggml lists the first Vulkan device twice, software devices included. ``--devices CUDA0,CUDA1`` names two others.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ggml_cffi.core.handle import live
from tests.support import GPUS, need, software_vulkan
from tests.support.markers import markers_of
from tests.support.terminal import Terminal

_COUNT = "import ggml_cffi; print(sum(not d.is_cpu for d in ggml_cffi.devices()))"

# A shell that starts the tests in the background makes them ignore Ctrl-C, which some tests are about.
signal.signal(signal.SIGINT, signal.default_int_handler)

DEVICE_SETS = [("CPU",), ("Vulkan0",), ("Vulkan0", "Vulkan1")]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that names the two GPUs of tests that take devices from a fixture."""
    parser.addoption("--devices", default=",".join(GPUS), help="two GPUs to compute on (default: %(default)s)")


def pytest_configure(config: pytest.Config) -> None:
    """Use the GPUs that the option names."""
    GPUS.update(zip(GPUS, config.getoption("devices").split(","), strict=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add the markers that follow from a test's code: gpu, two_gpus, model, subprocess, slow."""
    for item in items:
        for name in markers_of(item):
            item.add_marker(name)


def pytest_collection_finish() -> None:
    """Exclude the collected tests from garbage collection: they stay until the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def at_least_two_vulkan_devices() -> None:
    """List the first Vulkan device twice where there are fewer than two, unless the environment has a list.

    The driver reads the list when it is first loaded, so a process of its own counts the devices.
    """
    if "GGML_VK_VISIBLE_DEVICES" not in os.environ:
        done = subprocess.run([sys.executable, "-c", _COUNT], capture_output=True, text=True, check=True)
        if int(done.stdout) == 1:
            os.environ["GGML_VK_VISIBLE_DEVICES"] = "0,0"
        elif int(done.stdout) == 0:
            software_vulkan.use()


@pytest.fixture(params=DEVICE_SETS, ids="+".join)
def devices(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Names of devices to compute on."""
    return need(request.param)


@pytest.fixture(params=["CPU", "Vulkan0", "Vulkan1"])
def device_name(request: pytest.FixtureRequest) -> str:
    """Name of one device."""
    return need((request.param,))[0]


@pytest.fixture
def two_gpus() -> tuple[str, str]:
    """Names of two Vulkan devices."""
    return need(("Vulkan0", "Vulkan1"))  # type: ignore[return-value]


@pytest.fixture
def vulkan() -> None:
    """Skip a test about ggml's Vulkan backend if ``--devices`` names GPUs of another one."""
    if any(not name.startswith("Vulkan") for name in GPUS.values()):
        pytest.skip(f"about ggml's Vulkan backend, but --devices names others: {', '.join(GPUS.values())}")


@pytest.fixture(autouse=True)
def no_objects_left_behind() -> Iterator[None]:
    """Check that a test frees every C object that it makes.

    Garbage is collected only where C objects exist, which is seldom: it takes longer than most tests.
    """
    before = _live_without_garbage(Counter())
    yield
    left = _live_without_garbage(before) - before
    assert not left, f"C objects left behind: {dict(left)}"


def _live_without_garbage(expected: Counter[str]) -> Counter[str]:
    """Count the C objects, after a collection of garbage if there are more than expected."""
    if live() - expected:
        gc.collect()
    return live()


@pytest.fixture
def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Terminal]:
    """Return a function that puts a terminal in the place of standard error: pytest would undo it before the test."""

    def set_up() -> Terminal:
        made = Terminal()
        monkeypatch.setattr(sys, "stderr", made)
        return made

    return set_up


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers, the same in every run."""
    return np.random.default_rng(42)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The file of SmolLM2-135M-Instruct."""
    from ggml_cffi.models import fetch

    return fetch("smollm2")
