"""The loader of plug-ins: the files it finds, the ones it refuses with a reason, and the restriction to some."""

import json
import os
import signal

import pytest

import ggml_cffi as ggml
from ggml_cffi.c import library
from ggml_cffi.c.places import files_of_plugins, version_of_file
from tests.support import run_python
from tests.support.libraries import (
    compile_crash,
    compile_stub,
    compile_with_missing_dependency,
    copy_libraries,
    use_stub_loader,
)

_LIST = """
import json
import ggml_cffi as ggml
from ggml_cffi.c import library
from ggml_cffi.core.device import gpus
try:
    names = [d.name for d in ggml.devices()]
    print(json.dumps({
        "devices": {d.name: d.type.name for d in ggml.devices()},
        "all": [d.name for d in ggml.devices(all=True)],
        "gpus": [d.name for d in gpus()],
        "plugins": {p.name: p.reason for p in library.plugins()},
        "loaded": [p.name for p in library.plugins() if p.loaded],
    }))
except Exception as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
"""


def listing(folder, *, before="", **env):
    """List devices and plug-ins in a new process that finds its libraries in ``folder``."""
    env = {"GGML_CFFI_LIBRARY_PATH": str(folder), "GGML_BACKEND_PATH": "", **env}
    done = run_python(before + _LIST, **env)
    return json.loads(done.stdout), done.stderr


@pytest.fixture
def core(tmp_path, monkeypatch):
    folder = copy_libraries(tmp_path / "core", plugins=())
    use_stub_loader(folder, monkeypatch)
    return folder


def test_a_plugin_of_any_name_is_loaded_when_devices_are_listed(core):
    compile_stub(core / "libggml-cuda.so")
    compile_stub(core / "libggml-somewhere.so")
    found, messages = listing(core)
    assert found["devices"] == {"CUDA0": "GPU", "SOMEWHERE0": "GPU", "CPU": "CPU"}
    assert found["gpus"] == ["CUDA0", "SOMEWHERE0"]
    assert found["loaded"] == ["cuda", "somewhere"]
    assert messages == ""


def test_each_failure_has_its_reason_and_the_others_are_loaded(core):
    compile_with_missing_dependency(core / "libggml-cann.so")
    compile_stub(core / "libggml-cuda.so", FAILS=1)
    compile_stub(core / "libggml-hip.so", API=1)
    compile_stub(core / "libggml-sycl.so", SCORE=0)
    compile_stub(core / "libggml-opencl.so", SCORE=5)
    (core / "libggml-musa.so").write_text("no library")
    found, messages = listing(core)
    assert found["loaded"] == ["opencl"]
    assert found["gpus"] == ["OPENCL0"]
    reasons = found["plugins"]
    assert "libneeded-by-test.so: cannot open shared object file" in reasons["cann"]
    assert reasons["cuda"] == "ggml_backend_init returned NULL"
    assert reasons["hip"] == "incompatible API version (backend: 1, current: 2)"
    assert "is not supported on this system" in reasons["sycl"]
    assert reasons["opencl"] == ""
    assert reasons["musa"].startswith(f"{core}/libggml-musa.so: file too short")
    assert messages == ""  # nobody has asked for these plug-ins


@pytest.mark.parametrize("numbers", ["0,0", "99"])
def test_the_last_message_of_a_plugin_that_ends_the_process_is_kept(core, numbers):
    compile_crash(core / "libggml-cuda.so", "the driver aborts")
    env = {"GGML_CFFI_LIBRARY_PATH": str(core), "GGML_BACKEND_PATH": "", "GGML_VK_VISIBLE_DEVICES": numbers}
    done = run_python("import ggml_cffi; ggml_cffi.devices()", check=False, **env)
    assert done.returncode == -signal.SIGABRT
    assert "the driver aborts" in done.stderr


def test_the_log_has_a_line_for_each_plugin(core):
    compile_stub(core / "libggml-cuda.so", FAILS=1)
    compile_stub(core / "libggml-hip.so")
    setup = "import logging\nlogging.basicConfig(level=logging.INFO, format='%(name)s %(levelname)s %(message)s')\n"
    _, messages = listing(core, before=setup)
    assert messages.splitlines() == [
        f"ggml_cffi INFO the cuda plug-in at {core}/libggml-cuda.so is not loaded: ggml_backend_init returned NULL",
        f"ggml_cffi INFO loaded the hip plug-in from {core}/libggml-hip.so",
    ]


def test_the_variant_of_a_plugin_with_the_highest_score_is_loaded(core):
    for variant, score in (("old", 1), ("new", 3), ("newest", 0)):
        compile_stub(core / f"libggml-cuda-{variant}.so", NAME=variant, SCORE=score)
    found, _ = listing(core)
    assert found["gpus"] == ["new0"]
    assert found["loaded"] == ["cuda"]


def test_a_plugin_of_another_version_is_refused_before_it_runs(core, tmp_path):
    """The name of the real file tells the version, or a core in the folder of the plug-in."""
    compile_stub(core / "libggml-cuda.so.0.19.9")
    (core / "libggml-cuda.so").symlink_to("libggml-cuda.so.0.19.9")
    found, _ = listing(core)
    assert found["gpus"] == []
    assert found["plugins"]["cuda"] == f"it is of ggml 0.19.9, not {library.version()} as the core"

    version = library.version().encode() + b"\0"
    other = copy_libraries(tmp_path / "other", changed=[(version, b"9" + version[1:])], plugins=())
    plugin = compile_stub(other / "libggml-hip.so")
    for given in (plugin, other):
        found, _ = listing(core, GGML_BACKEND_PATH=str(given))
        assert found["plugins"]["hip"] == f"it is of ggml 9{library.version()[1:]}, not {library.version()} as the core"


def test_a_file_that_ggml_backend_path_names_may_have_any_name(core, tmp_path):
    file = compile_stub(tmp_path / "mine.so", NAME="Mine")
    found, _ = listing(core, GGML_BACKEND_PATH=str(file))
    assert found["gpus"] == ["Mine0"]
    assert found["loaded"] == ["mine"]


def test_an_accelerator_is_listed_with_its_type_and_is_no_gpu(core):
    compile_stub(core / "libggml-blas.so", TYPE=3)
    found, _ = listing(core)
    assert found["devices"] == {"BLAS0": "ACCEL", "CPU": "CPU"}
    assert found["gpus"] == []


def test_a_gpu_that_two_plugins_reach_is_used_once(core):
    compile_stub(core / "libggml-opencl.so", ADDRESS="0000:01:00.0")
    compile_stub(core / "libggml-cuda.so", ADDRESS="0000:01:00.0")
    compile_stub(core / "libggml-sycl.so", ADDRESS="0000:02:00.0")
    compile_stub(core / "libggml-hip.so")
    found, _ = listing(core)
    assert list(found["devices"]) == ["CUDA0", "HIP0", "SYCL0", "CPU"]
    assert found["all"] == ["CUDA0", "HIP0", "SYCL0", "OPENCL0", "CPU"]
    assert found["gpus"] == ["CUDA0", "HIP0", "SYCL0"]


def test_the_vulkan_plugin_is_loaded_only_with_a_vulkan_loader(core):
    """The plug-in of a wheel is not linked to the loader: ggml would take it, and find no device."""
    compile_stub(core / "libggml-vulkan.so", NAME="Vulkan")
    found, _ = listing(core)
    assert found["gpus"] == ["Vulkan0"]
    (core / "libvulkan.so.1").write_text("no library")
    found, messages = listing(core)
    assert found["devices"] == {"CPU": "CPU"}
    assert "libvulkan.so.1" in found["plugins"]["vulkan"]
    assert messages == ""


@pytest.mark.parametrize("address", ["0000:01:00.0", None])
def test_logical_devices_of_one_backend_are_two_devices(core, address):
    macros = {"DEVICES": 2} | ({"ADDRESS": address} if address else {})
    compile_stub(core / "libggml-vulkan.so", NAME="Vulkan", **macros)
    found, _ = listing(core)
    assert found["gpus"] == ["Vulkan0", "Vulkan1"]
    compile_stub(core / "libggml-cuda.so", **macros)
    found, _ = listing(core)
    assert found["all"] == ["CUDA0", "CUDA1", "Vulkan0", "Vulkan1", "CPU"]
    assert found["gpus"] == (["CUDA0", "CUDA1"] if address else ["CUDA0", "CUDA1", "Vulkan0", "Vulkan1"])


def test_integrated_gpus_take_part_only_without_others_or_by_name(core):
    compile_stub(core / "libggml-vulkan.so", NAME="Vulkan", TYPE=2)
    found, _ = listing(core)
    assert found["devices"] == {"Vulkan0": "IGPU", "CPU": "CPU"}
    assert found["gpus"] == ["Vulkan0"]
    compile_stub(core / "libggml-sycl.so")
    found, _ = listing(core)
    assert found["devices"] == {"SYCL0": "GPU", "Vulkan0": "IGPU", "CPU": "CPU"}
    assert found["gpus"] == ["SYCL0"]


_CHOOSE = """
import json, os
import ggml_cffi as ggml
from ggml_cffi.parallel import TensorParallel
from ggml_cffi.rpc.server import serve
found = {}
for text in json.loads(os.environ["TEXTS"]):
    try:
        found[text] = ggml.device(text).name
    except Exception as error:
        found[text] = f"{type(error).__name__}: {error}"
    # The stubs cannot be opened: the messages name the device that each entry point has found.
    for use in (lambda d: ggml.Session([d]), lambda d: TensorParallel([d]), lambda d: serve([d], port=-1)):
        try:
            use(text)
        except Exception as error:
            found.setdefault(f"{text} in use", []).append(str(error))
print(json.dumps(found))
"""


def choosing(core, *texts):
    """Return the devices that texts find in a new process, and the messages of entry points that take them."""
    compile_stub(core / "libggml-rpc.so", DEVICES=0)
    env = {"GGML_CFFI_LIBRARY_PATH": str(core), "GGML_BACKEND_PATH": "", "TEXTS": json.dumps(texts)}
    return json.loads(run_python(_CHOOSE, **env).stdout)


def test_every_entry_point_finds_a_device_by_name_address_hardware_and_position(core):
    compile_stub(core / "libggml-cuda.so", ADDRESS="0000:0a:00.0", DESCRIPTION="NVIDIA H200")
    compile_stub(core / "libggml-vulkan.so", NAME="Vulkan", ADDRESS="0000:0a:00.0", DESCRIPTION="NVIDIA H200")
    compile_stub(core / "libggml-sycl.so", ADDRESS="0001:0a:00.0", DESCRIPTION="Intel Arc B580")
    expected = {
        "CUDA0": "CUDA0",
        "vulkan0": "Vulkan0",
        "0000:0A:00.0": "CUDA0",
        "0a:00.0": "CUDA0",
        "h200": "CUDA0",
        "0001:0a:00.0": "SYCL0",
        "b580": "SYCL0",
        "0": "CUDA0",
        "1": "SYCL0",
        "2": "CPU",
    }
    found = choosing(core, *expected)
    assert {text: found[text] for text in expected} == expected
    for text, name in expected.items():
        if name != "CPU":
            session, group, server = found[f"{text} in use"]
            assert session.startswith(f"the driver refused to open {name}")
            assert group.startswith(f"the driver refused to open {name}")
            assert server == "port must be 0 to 65535, not -1"  # the device was found


def test_a_text_that_fits_no_device_or_several_raises_with_the_names(core):
    compile_stub(core / "libggml-cuda.so", DEVICES=2, ADDRESS="0000:0a:00.0", DESCRIPTION="NVIDIA H200")
    found = choosing(core, "h200", "0a:00.0", "0b:00.0", "4090", "3")
    several = "fits several devices: CUDA0 (NVIDIA H200, 0000:0a:00.0), CUDA1 (NVIDIA H200, 0000:0a:00.0)"
    for text in ("h200", "0a:00.0"):
        assert found[text].startswith(f"ValueError: '{text}' {several}")
        assert all(message.startswith(f"'{text}' {several}") for message in found[f"{text} in use"])
    for text in ("0b:00.0", "4090", "3"):
        assert found[text].startswith(f"ValueError: there is no device '{text}'; this machine has CUDA0 (NVIDIA H200)")


_OTHERS = """
import json
import ggml_cffi as ggml
from ggml_cffi.core.device import other_backends
given = [None, [0], [1, "CPU"], ["0000:0b:00.0", "0a:00.0"], ["CUDA0"], ["vulkan0"], [0, "CUDA1"], ["CPU"], []]
found = [[[d.name for d in own] for own in other_backends(chosen)] for chosen in given]
print(json.dumps([*found, other_backends([ggml.device(0)])]))
"""


def test_gpus_are_the_devices_of_other_backends_too_unless_a_backend_was_named(core):
    both = {"DEVICES": 2, "ADDRESS": "0000:0a:00.0", "SECOND_ADDRESS": "0000:0b:00.0"}
    compile_stub(core / "libggml-cuda.so", **both)
    compile_stub(core / "libggml-vulkan.so", NAME="Vulkan", **both)
    compile_stub(core / "libggml-opencl.so", ADDRESS="0000:0b:00.0")  # it shows one of the cards
    found = json.loads(run_python(_OTHERS, GGML_CFFI_LIBRARY_PATH=str(core), GGML_BACKEND_PATH="").stdout)
    every, first, second, swapped, *named = found
    assert every == [["Vulkan0", "Vulkan1"]]
    assert first == [["Vulkan0"]]
    assert second == [["Vulkan1", "CPU"], ["OPENCL0", "CPU"]]
    assert swapped == [["Vulkan1", "Vulkan0"]]
    assert named == [[]] * 6


def test_devices_of_several_backends_cannot_share_layers(core):
    compile_stub(core / "libggml-cuda.so")
    compile_stub(core / "libggml-vulkan.so", NAME="Vulkan")
    code = (
        "import ggml_cffi as ggml\nfrom ggml_cffi.parallel.tensor_parallel import check_devices\n"
        "check_devices([ggml.device('CUDA0')])\n"
        "try:\n    check_devices(ggml.devices()[:2])\nexcept ValueError as error:\n    print(error)\n"
    )
    done = run_python(code, GGML_CFFI_LIBRARY_PATH=str(core), GGML_BACKEND_PATH="")
    assert done.stdout.startswith("CUDA0, Vulkan0 are of several backends (CUDA, Vulkan), whose memory and events are")


def test_each_device_of_a_card_has_its_own_lock(core):
    compile_stub(core / "libggml-cuda.so", ADDRESS="0000:0a:00.0")
    compile_stub(core / "libggml-vulkan.so", NAME="Vulkan", ADDRESS="0000:0a:00.0")
    code = (
        "import ggml_cffi as ggml\nfrom ggml_cffi.core.device import device_lock\n"
        "first, second, _ = (device_lock(d.ptr) for d in ggml.devices(all=True))\n"
        "print(first is not second, first is device_lock(ggml.device('CUDA0').ptr))\n"
    )
    done = run_python(code, GGML_CFFI_LIBRARY_PATH=str(core), GGML_BACKEND_PATH="")
    assert done.stdout.split() == ["True", "True"]


@pytest.mark.parametrize(
    ("value", "loaded"), [("hip", ["hip"]), (" CUDA , hip", ["cuda", "hip"]), ("", []), ("cpu", [])]
)
def test_the_environment_restricts_the_plugins(core, value, loaded):
    compile_stub(core / "libggml-cuda.so")
    compile_stub(core / "libggml-hip.so")
    found, messages = listing(core, GGML_CFFI_BACKENDS=value)
    assert found["loaded"] == loaded
    assert {found["plugins"][name] for name in {"cuda", "hip"} - set(loaded)} <= {"$GGML_CFFI_BACKENDS excludes it"}
    assert messages == ""


def test_a_plugin_that_the_environment_names_and_that_fails_gives_a_warning(core):
    compile_stub(core / "libggml-cuda.so", FAILS=1)
    found, messages = listing(core, GGML_CFFI_BACKENDS="cuda")
    assert found["devices"] == {"CPU": "CPU"}
    assert messages.startswith(f"the cuda plug-in at {core}/libggml-cuda.so is not loaded: ggml_backend_init returned")


def test_an_unknown_name_raises_with_the_names_of_those_found(core):
    compile_stub(core / "libggml-cuda.so")
    found, _ = listing(core, GGML_CFFI_BACKENDS="cuda,rocm")
    assert found["error"].startswith("ValueError: $GGML_CFFI_BACKENDS has rocm, but the plug-ins of ggml")
    assert "are cuda; run `ggml-cffi doctor`" in found["error"]


def test_load_backends_restricts_the_plugins_and_replaces_the_environment(core):
    compile_stub(core / "libggml-cuda.so")
    compile_stub(core / "libggml-hip.so")
    choose = "import ggml_cffi; ggml_cffi.load_backends(['hip'])\n"
    for env in ({}, {"GGML_CFFI_BACKENDS": "cuda"}):
        found, _ = listing(core, before=choose, **env)
        assert found["loaded"] == ["hip"]
        assert found["plugins"]["cuda"] == "the call of load_backends excludes it"


def test_load_backends_raises_if_a_plugin_is_unknown_or_fails(core):
    compile_stub(core / "libggml-cuda.so", FAILS=1)
    code = (
        "import ggml_cffi\ntry:\n    ggml_cffi.load_backends({})\n"
        "except Exception as error:\n    print(type(error).__name__, error)"
    )
    for names, message in (
        (["hip"], "ValueError the call of load_backends has hip, but the plug-ins of ggml"),
        (["cuda"], f"LibraryNotFoundError the cuda plug-in at {core}/libggml-cuda.so is not loaded: ggml_backend_init"),
        ("cuda", "TypeError names is a sequence"),
    ):
        done = run_python(code.format(repr(names)), GGML_CFFI_LIBRARY_PATH=str(core), GGML_BACKEND_PATH="")
        assert done.stdout.startswith(message)


def test_load_backends_after_the_first_listing_raises():
    ggml.devices()
    with pytest.raises(ggml.GgmlError, match="loaded already: choose them before the first use of a device"):
        ggml.load_backends(["vulkan"])


def test_an_excluded_plugin_is_not_loaded_for_its_functions_either(core):
    compile_stub(core / "libggml-vulkan.so")
    code = (
        "from ggml_cffi import c\n"
        "try:\n    c.ggml_backend_vk_get_device_count\nexcept ImportError as error:\n    print(error)\n"
    )
    env = {"GGML_CFFI_LIBRARY_PATH": str(core), "GGML_BACKEND_PATH": "", "GGML_CFFI_BACKENDS": ""}
    assert "is not loaded: $GGML_CFFI_BACKENDS excludes it" in run_python(code, **env).stdout


_FORK = """
import os, warnings
import ggml_cffi as ggml
from ggml_cffi.c import library
warnings.simplefilter("ignore")
{before}
child = os.fork()
if child:
    os.waitpid(child, 0)
try:
    ggml.Backend("CUDA0")
except ggml.GgmlError as error:
    print("parent" if child else "child", error, flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system with fork")
@pytest.mark.parametrize(
    ("before", "usable"),
    [
        ("ggml.devices()", False),
        ("library.load('cuda')", False),
        ("library.load('rpc')", True),  # it opens no driver
        ("ggml.device('CPU')", True),
    ],
)
def test_a_device_of_any_plugin_is_refused_in_a_process_forked_after_its_loading(core, before, usable):
    compile_stub(core / "libggml-cuda.so")
    compile_stub(core / "libggml-rpc.so", DEVICES=0)
    done = run_python(_FORK.format(before=before), GGML_CFFI_LIBRARY_PATH=str(core), GGML_BACKEND_PATH="")
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    refused = "CUDA0 cannot be used in a forked process whose parent used the driver"
    opened = "the driver refused to open CUDA0"
    assert lines["child"].startswith(opened if usable else refused)
    assert lines["parent"].startswith(opened)


def test_files_of_the_core_are_no_plugins(tmp_path, monkeypatch):
    monkeypatch.delenv("GGML_BACKEND_PATH", raising=False)
    for name in (
        *("libggml.so.0", "libggml-base.so.0", "libggml-cpu.so.0", "libggml-cpu-haswell.so", "libother.so", "BUILD"),
        *("libggml-vulkan.so", "libggml-rpc.so.0", "libggml-cuda-12.so", "libggml-cuda-13.so", "libggml-blas.txt"),
    ):
        (tmp_path / name).touch()
    names = {name: [os.path.basename(f) for f in files] for name, files in files_of_plugins(str(tmp_path)).items()}
    assert names == {
        "cuda": ["libggml-cuda-12.so", "libggml-cuda-13.so"],
        "rpc": ["libggml-rpc.so.0"],
        "vulkan": ["libggml-vulkan.so"],
    }


def test_links_to_one_file_are_one_plugin(tmp_path, monkeypatch):
    monkeypatch.delenv("GGML_BACKEND_PATH", raising=False)
    (tmp_path / "libggml-hip.so.0.27.0").touch()
    (tmp_path / "libggml-hip.so.0").symlink_to("libggml-hip.so.0.27.0")
    (tmp_path / "libggml-hip.so").symlink_to("libggml-hip.so.0")
    (file,) = files_of_plugins(str(tmp_path))["hip"]
    assert version_of_file(file) == "0.27.0"
    assert version_of_file(str(tmp_path / "libggml-cuda.so")) is None
