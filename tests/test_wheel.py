"""A wheel: its platform and dependencies, and its work in an environment that has nothing else, in another folder.

``GGML_CFFI_WHEEL`` names a wheel to test, such as that of ``make wheel``. Else the tests make one of the libraries that
``build_lib.sh`` has built here.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import ggml_cffi
from ggml_cffi.c import library
from tests.support import PATIENCE, ROOT
from tests.support.once import once

_LIMIT = 25_000_000
"""Bytes that a wheel may have."""


def build(folder: Path, libraries: Path) -> Path:
    """Return a wheel with these libraries, in ``folder``."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
        env={**os.environ, "GGML_CFFI_WHEEL_LIBRARIES": str(libraries)},
    )
    (made,) = folder.glob("*.whl")
    return made


def requirements(wheel: Path) -> set[str]:
    """Return the names of the packages that come with a wheel, without extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    found = [line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    return {re.split(r"[^\w-]", requirement)[0] for requirement in found}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel to test."""
    if given := os.environ.get("GGML_CFFI_WHEEL"):
        return Path(given).resolve()
    own = ROOT / "ggml_cffi" / "lib"
    if library.location() != str(own):
        pytest.skip("needs libraries built by build_lib.sh")
    (made,) = once(tmp_path_factory, "wheel", lambda folder: build(folder, own)).glob("*.whl")
    return made


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The Python of an environment in which only the wheel is installed, and pytest."""

    def install(folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip_install(folder / "bin" / "python", wheel, "pytest")

    return once(tmp_path_factory, "elsewhere", install) / "bin" / "python"


def pip_install(python: Path, *packages: object) -> None:
    """Install packages into an environment."""
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", *packages], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def ask(python: Path, *arguments: object, folder: Path | None = None) -> str:
    """Return the output of a Python in a folder where no checkout is, and without this one on its path."""
    other_places = {"PYTHONPATH", "GGML_CFFI_LIBRARY_PATH"}
    done = subprocess.run(
        [python, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder or python.parent,
        env={name: value for name, value in os.environ.items() if name not in other_places},
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_wheel_with_libraries_is_for_one_platform_and_needs_no_other_library(wheel):
    assert re.search(r"-py3-none-(linux|manylinux|macosx)_\w+\.whl$", wheel.name)
    assert requirements(wheel) == {"cffi", "cloudpickle", "jinja2", "numpy", "tqdm"}
    assert wheel.stat().st_size < _LIMIT


def test_auditwheel_finds_that_a_wheel_runs_with_the_glibc_of_its_tag(wheel):
    tag = re.search(r"-manylinux_2_(\d+)_", wheel.name)
    if tag is None:
        pytest.skip("a wheel of libraries for this machine; make wheel makes one for others")
    told = ask(Path(sys.executable), "-m", "auditwheel", "show", wheel)
    found = re.search(r'platform tag:\s"manylinux_2_(\d+)_', told)
    assert found, told
    assert int(found[1]) <= int(tag[1])
    assert "libvulkan" not in told


@pytest.mark.parametrize("added", [False, True])
def test_a_wheel_of_portable_libraries_is_for_older_systems_unless_a_plugin_was_added(tmp_path, added):
    """``build_lib.sh --backend`` compiles the plug-in for the machine on which it runs."""
    folder = tmp_path / "lib"
    folder.mkdir()
    (folder / "libggml-base.so.0").write_bytes(b"")
    lines = ["core core-1", "platform manylinux_2_28_x86_64", "vulkan vulkan-2", *["cuda cuda-3 added 0f"] * added]
    (folder / "BUILD").write_text("\n".join(lines))
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_") if added else "manylinux_2_28_x86_64"
    assert build(tmp_path, folder).name.endswith(f"-py3-none-{platform}.whl")


def test_a_wheel_without_libraries_is_for_any_platform_and_brings_the_prebuilt_library(tmp_path):
    (tmp_path / "none").mkdir()
    made = build(tmp_path, tmp_path / "none")
    assert made.name.endswith("-py3-none-any.whl")
    assert "libggml-python" in requirements(made)


def test_an_installed_wheel_uses_its_own_libraries_and_lists_the_devices_of_this_machine(python):
    code = "from ggml_cffi.c import library; print(library.location())"
    assert Path(ask(python, "-c", code).strip()).is_relative_to(python.parents[1])
    listed = json.loads(ask(python, "-m", "ggml_cffi", "devices", "--json"))
    assert {device["name"] for device in listed} == {device.name for device in ggml_cffi.devices()}


def test_an_installed_wheel_computes_on_the_cpu_and_on_vulkan_devices(python, tmp_path, two_gpus):
    """The smoke tests run as they are, in a copy without the package beside them."""
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("data", "__pycache__"))
    text = ask(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_smoke.py", folder=tmp_path)
    assert re.search(r"^3 passed", text, re.MULTILINE), text


def test_an_installed_wheel_answers(python, smollm2):
    text = ask(
        python, "-m", "ggml_cffi", "run", str(smollm2), "--devices", "CPU", "-n", "4", "-p", "The capital of France?"
    )
    assert text.strip()


def test_a_missing_extra_is_named_with_the_way_to_install_it(python, tmp_path):
    code = (
        "import ggml_cffi\n"
        "try:\n    ggml_cffi.from_safetensors('x.safetensors')\n"
        "except ImportError as error:\n    print(error)\n"
    )
    text = ask(python, "-c", code)
    assert "pip install '.[models]'" in text
    assert ".whl[models]'" in text
