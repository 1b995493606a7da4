"""Every example, and every Python block of the README, runs."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

import ggml_cffi
from tests.docs.test_docs import needs_model
from tests.support import PATIENCE, ROOT, need, run_python

EXAMPLES = sorted(str(path.relative_to(ROOT / "examples")) for path in (ROOT / "examples").rglob("*.py"))
TESTED_ELSEWHERE = ["demo.py", "serve.py"]
GUIDE = [name for name in EXAMPLES if name.startswith("guide/")]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


NEEDS = {
    "dask_cluster.py": ("distributed", "cluster"),
    "embeddings.py": ("sklearn", "dev"),
    "ray_cluster.py": ("ray", "cluster"),
    "langchain_embeddings.py": ("langchain_core", "adapters"),
    "llama_index_embeddings.py": ("llama_index", "adapters"),
}


def source(name):
    return (ROOT / "examples" / name).read_text()


def run(name, *arguments, **env):
    command = [sys.executable, ROOT / "examples" / name, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=PATIENCE, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=needs_model(source(n))) for n in EXAMPLES if n not in (*TESTED_ELSEWHERE, *GUIDE)],
)
def test_an_example_runs(name):
    package, extra = NEEDS.get(name, (None, None))
    if package and not find_spec(package):
        pytest.skip(f"needs {package}: pip install '.[{extra}]'")
    assert run(name, RAY_USAGE_STATS_ENABLED="0")


@pytest.mark.usefixtures("vulkan")
@pytest.mark.parametrize("name", GUIDE)
def test_a_guide_script_uses_the_gpus_or_says_that_they_are_missing(name):
    need(("Vulkan0", "Vulkan1"))
    assert "Vulkan" in run(name) or name.endswith(("devices.py", "asynchronous.py"))
    out = run(name, GGML_VK_VISIBLE_DEVICES="99")
    assert re.search("missing|machine has 0", out)


@pytest.mark.usefixtures("vulkan")
@pytest.mark.parametrize("name", ["scheduler.py", "placement.py"])
@pytest.mark.parametrize("way", ["flat", "objects"])
def test_a_guide_script_for_two_gpus_says_that_the_machine_has_one(way, name):
    need(("Vulkan0",))
    assert "machine has 1" in run(f"guide/{way}/{name}", GGML_VK_VISIBLE_DEVICES="0")


@pytest.mark.parametrize("name", ["two_devices.py", "placement.py"])
def test_an_example_runs_on_the_cpu_alone(name):
    assert "CPU" in run(name, GGML_VK_VISIBLE_DEVICES="99")


def test_the_example_of_two_devices_uses_both(two_gpus):
    out = run("two_devices.py")
    first, second, *_ = ggml_cffi.devices()
    assert f"MUL_MAT  on {first.name}" in out
    assert f"MUL_MAT  on {second.name}" in out
    assert not second.is_cpu


@pytest.mark.model
def test_the_demo_splits_a_model_over_two_devices_and_answers():
    need(("Vulkan0", "Vulkan1"))
    out = run("demo.py", "8")
    first, *_, last = (device.name for device in ggml_cffi.devices() if not device.is_cpu)
    assert re.search(rf"{first} +GPU|{first} +CPU", out)
    assert re.search(rf"{first} +0-\d+ .*[\d.]+ MiB", out)
    assert re.search(rf"{last} +\d+-29 \+ output +[\d.]+ MiB", out)
    assert "Paris" in out
    assert re.search(r"prompt: \d+ tokens, [\d.]+ tokens/s; decode: \d+ tokens, [\d.]+ tokens/s", out)
    assert re.search(rf"computed on {first} \(\d+ nodes\), .*{last} \(\d+ nodes\)", out)


def test_the_readme_has_code():
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("block", [pytest.param(b, id=b.strip().splitlines()[0], marks=needs_model(b)) for b in BLOCKS])
def test_the_code_of_the_readme_runs(block):
    # On the CPU, where it takes seconds.
    done = run_python(block, GGML_VK_VISIBLE_DEVICES="99")
    assert done.stdout
    assert "Warning" not in done.stderr
