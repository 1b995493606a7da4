"""The command ``doctor``: the page and its exit codes on machines with gaps."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest

import ggml_cffi as ggml
from ggml_cffi import cli
from ggml_cffi.c import library
from ggml_cffi.core.diagnosis import LibraryFacts, collect
from tests.support import need
from tests.support.command import run
from tests.support.libraries import compile_crash, compile_stub, compile_with_missing_dependency, copy_libraries

KEYS = {
    *("ggml_cffi", "library", "plugins", "plugins_error", "vulkan", "devices", "gpus", "peer_access"),
    *("cpu", "python", "environment", "gaps"),
}


def parts(text):
    """Return the lines of each part of the page."""
    blocks = (block.splitlines() for block in text.split("\n\n"))
    return {block[0]: block[1:] for block in blocks}


@pytest.fixture
def core(tmp_path, monkeypatch):
    """Return a folder with the core alone, from which the command takes its libraries."""
    folder = copy_libraries(tmp_path / "core", plugins=())
    monkeypatch.setenv("GGML_CFFI_LIBRARY_PATH", str(folder))
    monkeypatch.delenv("GGML_BACKEND_PATH", raising=False)
    monkeypatch.delenv("GGML_CFFI_BACKENDS", raising=False)
    return folder


def test_the_page_has_the_library_and_each_device_with_its_memory():
    done = run("doctor")
    page = parts(done.stdout)
    assert list(page)[:7] == ["Library", "Plug-ins", "Vulkan", "Devices", "CPU", "Python", "Environment"]
    assert page["Library"][0].startswith(f"  ok   ggml {library.version()}, from {library.location()}: ")
    assert page["Devices"][0].split() == ["device", "type", "free", "total", "features", "description"]
    names = [line.split()[0] for line in page["Devices"][1 : 1 + len(ggml.devices())]]
    assert names == [d.name for d in ggml.devices()]
    assert done.stderr == ""


def test_two_devices_are_told_with_their_features(two_gpus):
    done = run("doctor")
    page = parts(done.stdout)
    for name in two_gpus:
        (line,) = (line for line in page["Devices"] if line.split()[0] == name)
        assert "GiB" in line
        assert "fp16" in line or not name.startswith("Vulkan")
    (used,) = (line for line in done.stdout.splitlines() if "GPUs that are used by default: " in line)
    assert used.endswith(f": {', '.join(d.name for d in ggml.devices() if not d.is_cpu)}")
    assert {*two_gpus} <= {*used.partition(": ")[2].split(", ")}
    plugin = two_gpus[0].rstrip("0123456789").lower()
    assert any(line.startswith(f"  ok   {plugin}: ") for line in page["Plug-ins"])


def test_json_has_the_facts_of_the_page():
    found = json.loads(run("doctor", "--json").stdout)
    assert set(found) == KEYS
    assert found["ggml_cffi"] == ggml.__version__
    assert found["library"]["version"] == library.version()
    assert [d["name"] for d in found["devices"]] == [d.name for d in ggml.devices()]
    assert {p["name"]: p["file"] for p in found["plugins"]} == {p.name: p.file for p in library.plugins()}
    assert set(found["vulkan"]) == {"loader", "drivers", "cards", "device_files", "closed_files"}
    assert all(set(gap) == {"part", "problem", "remedy", "asked"} for gap in found["gaps"])


@pytest.mark.usefixtures("vulkan")
def test_without_vulkan_devices_the_variable_is_the_remedy(monkeypatch):
    need(("Vulkan0",))
    monkeypatch.setenv("GGML_VK_VISIBLE_DEVICES", "99")
    done = run("doctor")
    page = parts(done.stdout)
    assert "GGML_VK_VISIBLE_DEVICES=99 may name no device" in page["Plug-ins"][-1]
    assert "  GGML_VK_VISIBLE_DEVICES=99" in page["Environment"]
    assert "GPUs that are used by default: none" in done.stdout
    monkeypatch.setenv("GGML_CFFI_BACKENDS", "vulkan")
    assert "gap  vulkan is not loaded" in run("doctor", code=1).stdout


@pytest.mark.usefixtures("vulkan")
def test_a_driver_that_is_not_there_or_broken_is_a_gap(monkeypatch, tmp_path):
    need(("Vulkan0",))
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for file, error in ((tmp_path / "missing.json", "No such file or directory"), (broken, "it is no manifest")):
        monkeypatch.setenv("VK_DRIVER_FILES", str(file))
        lines = parts(run("doctor").stdout)["Vulkan"]
        at = next(i for i, line in enumerate(lines) if "gap  the driver" in line)
        assert lines[at].startswith(f"  gap  the driver {file} cannot be used: {error}")
        assert lines[at + 1] == "       -> correct VK_DRIVER_FILES, or unset it"


def test_a_library_for_the_cpu_only_works(core):
    found = json.loads(run("doctor", "--json").stdout)
    assert found["plugins"] == found["gpus"] == []
    assert found["gaps"][0]["problem"] == "there is no plug-in for GPUs"
    assert [d["name"] for d in found["devices"]] == ["CPU"]


def test_each_plugin_that_is_not_loaded_is_a_gap_with_a_remedy(core, monkeypatch):
    compile_with_missing_dependency(core / "libggml-cann.so")
    compile_stub(core / "libggml-cuda.so", API=1)
    compile_stub(core / "libggml-hip.so")
    lines = parts(run("doctor").stdout)["Plug-ins"]
    assert lines[0] == f"  ok   hip: {core}/libggml-hip.so"
    assert lines[1].startswith("  gap  cann is not loaded: libneeded-by-test.so: cannot open shared object file")
    assert lines[2] == "       -> install the library libneeded-by-test.so, or add its folder to LD_LIBRARY_PATH"
    assert lines[3].startswith("  gap  cuda is not loaded: incompatible API version")
    monkeypatch.setenv("GGML_CFFI_BACKENDS", "hip")
    lines = parts(run("doctor").stdout)["Plug-ins"]
    assert "  -    cuda: $GGML_CFFI_BACKENDS excludes it" in lines
    monkeypatch.setenv("GGML_CFFI_BACKENDS", "cuda")
    assert "  gap  cuda is not loaded" in run("doctor", code=1).stdout
    monkeypatch.setenv("GGML_CFFI_BACKENDS", "rocm")
    assert "$GGML_CFFI_BACKENDS has rocm" in run("doctor", code=1).stdout


@pytest.mark.parametrize("names", [None, " CUDA , Hip"])
def test_a_plugin_that_ends_its_process_is_found_and_the_others_are_listed(core, monkeypatch, names):
    compile_crash(core / "libggml-cuda.so")
    compile_stub(core / "libggml-hip.so")
    if names is not None:
        monkeypatch.setenv("GGML_CFFI_BACKENDS", names)
    done = run("doctor", code=1)
    page = parts(done.stdout)
    assert "gap  cuda is not loaded: loading it ends the process (SIGABRT)" in page["Plug-ins"][1]
    assert page["Plug-ins"][2].endswith("exclude the plug-in: GGML_CFFI_BACKENDS=hip")
    assert page["Devices"][1].split()[:2] == ["HIP0", "GPU"]
    assert ("GGML_CFFI_BACKENDS" in "".join(page["Environment"])) == (names is not None)
    assert done.stderr == ""


def test_without_a_usable_library_the_exit_code_is_2(monkeypatch, capsys):
    """The facts are made up: a process of its own would find a library in another place."""
    facts = collect()
    error = LibraryFacts(supported="0.20.2 to 0.27", error="no usable libggml was found")
    found = replace(facts, library=error, plugins=(), devices=(), gpus=(), cpu=None)
    monkeypatch.setattr("ggml_cffi.isolate.Worker", lambda *_, **__: nullcontext(lambda **_: found))
    assert cli.main(["doctor"]) == 2
    page = parts(capsys.readouterr().out)
    assert page["Library"][0] == "  gap  no usable libggml was found; supported are 0.20.2 to 0.27"
    assert page["Plug-ins"] == page["Devices"] == page["CPU"] == ["  nothing"]
