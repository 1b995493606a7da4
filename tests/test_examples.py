"""Every example, and every Python block of the README, runs."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, need, run_python

EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def run(name, **env):
    command = [sys.executable, ROOT / "examples" / name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "demo.py"])
def test_example(name):
    assert run(name)


@pytest.mark.parametrize("name", ["two_devices.py", "placement.py"])
def test_example_with_the_cpu_alone(name):
    assert "CPU" in run(name, GGML_VK_VISIBLE_DEVICES="99")


def test_two_devices_are_both_used(two_gpus):
    out = run("two_devices.py")
    assert "MUL_MAT  on Vulkan0" in out
    assert "MUL_MAT  on Vulkan1" in out


def test_demo():
    need(("Vulkan0", "Vulkan1"))
    out = run("demo.py")
    assert re.search(r"Vulkan0 +GPU|Vulkan0 +CPU", out)
    assert re.search(r"Vulkan0 +0-\d+ +[\d.]+ MiB", out)
    assert re.search(r"Vulkan1 +\d+-29 \+ output +[\d.]+ MiB", out)
    assert "Paris" in out
    assert re.search(r"prompt: \d+ tokens, [\d.]+ tokens/s; decode: \d+ tokens, [\d.]+ tokens/s", out)
    assert "computed on CPU, Vulkan0, Vulkan1, in 3 parts" in out


def test_readme_has_code():
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("block", BLOCKS, ids=[b.strip().splitlines()[0] for b in BLOCKS])
def test_readme_code(block):
    # The code that a reader runs, on the CPU so that it takes seconds.
    done = run_python(block, GGML_VK_VISIBLE_DEVICES="99")
    assert done.stdout
    assert "Warning" not in done.stderr
