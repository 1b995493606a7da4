"""The gaps of a diagnosis, each with its remedy, in made-up machines."""

from dataclasses import replace

import pytest

from ggml_cffi.c.library import Plugin, RefusedPlace
from ggml_cffi.core.device import Capabilities
from ggml_cffi.core.diagnosis import DeviceFacts, Diagnosis, LibraryFacts, PythonFacts
from ggml_cffi.core.gaps import find_gaps
from ggml_cffi.core.vulkan_setup import Card, VulkanDriver, VulkanLoader, VulkanSetup

CAPABILITIES = Capabilities(True, True, False, True, True)
FAST = {"fp16": "1", "int_dot": "1", "matrix_cores": "KHR_coopmat"}
GPU = DeviceFacts("Vulkan0", "GPU", "Vulkan", "a GPU", 1, 2, None, None, CAPABILITIES, FAST, False)
DRIVER = VulkanDriver("/usr/share/vulkan/icd.d/radeon_icd.json", "libvulkan_radeon.so", "1.3.0")
SETUP = VulkanSetup(
    VulkanLoader("libvulkan.so.1", "1.3.0"), (DRIVER,), (Card("0000:01:00.0", "AMD"),), ("/dev/dri/renderD128",), ()
)
VULKAN = Plugin("vulkan", "/lib/libggml-vulkan.so", loaded=True, n_devices=1)
WHOLE = Diagnosis(
    LibraryFacts("0.25.3", "/lib", "the system's libraries", "0.20.2 to 0.27"),
    (Plugin("rpc", "/lib/libggml-rpc.so", loaded=True, n_devices=0), VULKAN),
    "",
    SETUP,
    (GPU,),
    ("Vulkan0",),
    "",
    None,
    PythonFacts("3.11", "python", "Linux", {}),
    {},
)
"""A machine without a gap."""


def gap(found):
    """Return the part, the problem and the remedy of the only gap, and True if it was asked for."""
    (only,) = find_gaps(found)
    return only.part, only.problem, only.remedy, only.asked


def test_a_whole_machine_has_no_gap():
    assert find_gaps(WHOLE) == []


def test_a_folder_of_the_environment_that_is_not_used_was_asked_for():
    refused = (RefusedPlace("$GGML_CFFI_LIBRARY_PATH", "/x", "no such folder"), RefusedPlace("the wheel", "/y", "old"))
    part, problem, _, asked = gap(replace(WHOLE, library=replace(WHOLE.library, refused=refused)))
    assert (part, problem, asked) == ("library", "/x of GGML_CFFI_LIBRARY_PATH is not used: no such folder", True)


def test_a_missing_library_says_how_to_get_one():
    facts = LibraryFacts(supported="0.20.2 to 0.27", error="no usable libggml")
    part, problem, remedy, asked = gap(replace(WHOLE, library=facts, plugins=(), devices=()))
    assert (part, asked) == ("library", True)
    assert "0.20.2 to 0.27" in problem
    assert "pip install libggml-python" in remedy


def test_a_library_for_the_cpu_only_says_how_to_get_vulkan():
    part, problem, remedy, asked = gap(replace(WHOLE, plugins=WHOLE.plugins[:1], devices=(), gpus=()))
    assert (part, problem, asked) == ("plugins", "there is no plug-in for GPUs", False)
    assert "./build_lib.sh" in remedy


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("libvulkan.so.1: cannot open shared object file: No such file or directory", "libvulkan1"),
        ("libcuda.so.1: cannot open shared object file: No such file or directory", "docker run --gpus all"),
        ("libcudart.so.13: cannot open shared object file: No such file or directory", "install the CUDA runtime"),
        ("libamdhip64.so.6: cannot open shared object file: No such file or directory", "install the ROCm runtime"),
        ("libOpenCL.so.1: cannot open shared object file: No such file or directory", "ocl-icd-libopencl1"),
        ("libmine.so: cannot open shared object file: No such file or directory", "install the library libmine.so"),
        ("it is of ggml 0.20.2, not 0.25.3 as the core", "of the same build as the core"),
        ("incompatible API version (backend: 1, current: 2)", "of the same build as the core"),
        ("/x/libggml-cuda.so: undefined symbol: ggml_new", "of the same build as the core"),
        ("ggml_backend_init returned NULL", "check its driver"),
        ("loading it ends the process (SIGSEGV)", "exclude the plug-in: GGML_CFFI_BACKENDS=rpc,vulkan"),
    ],
)
def test_a_plugin_that_is_not_loaded_has_a_remedy_for_the_reason(reason, remedy):
    failed = Plugin("cuda", "/lib/libggml-cuda.so", reason=reason)
    found = replace(WHOLE, plugins=(*WHOLE.plugins, failed))
    part, problem, advice, asked = gap(found)
    assert part == "plugins"
    assert problem == f"cuda is not loaded: {reason} (/lib/libggml-cuda.so)"
    assert remedy in advice
    assert asked == ("ends the process" in reason)
    assert gap(replace(found, environment={"GGML_CFFI_BACKENDS": "cuda"}))[3] is True


def test_the_remedy_for_crashes_keeps_the_plugins_that_neither_crash_nor_are_excluded():
    crash = "loading it ends the process (SIGSEGV)"
    crashing = [Plugin(name, f"/lib/libggml-{name}.so", reason=crash) for name in ("cuda", "sycl")]
    excluded = Plugin("hip", "/lib/libggml-hip.so", reason="excluded", excluded=True)
    gaps = find_gaps(replace(WHOLE, plugins=(*WHOLE.plugins, *crashing, excluded)))
    assert [g.remedy.partition("exclude the plug-in: ")[2] for g in gaps] == ["GGML_CFFI_BACKENDS=rpc,vulkan"] * 2


def test_an_excluded_plugin_is_no_gap():
    excluded = Plugin("cuda", "/lib/libggml-cuda.so", reason="excluded", excluded=True)
    assert find_gaps(replace(WHOLE, plugins=(*WHOLE.plugins, excluded))) == []


def test_an_unknown_name_in_the_environment_was_asked_for():
    assert gap(replace(WHOLE, plugins=(), plugins_error="it has rocm")) == (
        *("plugins", "it has rocm", "correct GGML_CFFI_BACKENDS, or unset it", True),
    )


@pytest.mark.parametrize(
    ("loaded", "visible", "remedy"),
    [
        (False, None, "see the drivers below"),
        (False, "99", "GGML_VK_VISIBLE_DEVICES=99 may name no device"),
        (True, None, "GGML_VK_VISIBLE_DEVICES=0 lists the first"),
        (True, "", "GGML_VK_VISIBLE_DEVICES= may name no device"),
    ],
)
def test_vulkan_without_devices_points_to_the_variable_and_the_drivers(loaded, visible, remedy):
    plugin = Plugin("vulkan", "/v", loaded, n_devices=0 if loaded else None, reason="" if loaded else "NULL")
    environment = {} if visible is None else {"GGML_VK_VISIBLE_DEVICES": visible}
    found = replace(WHOLE, plugins=(plugin,), devices=(), gpus=(), environment=environment)
    assert remedy in gap(found)[2]


def vulkan_gap(**changes):
    part, problem, remedy, asked = gap(replace(WHOLE, vulkan=replace(SETUP, **changes)))
    assert (part, asked) == ("vulkan", False)
    return problem, remedy


def test_a_missing_loader_names_its_package():
    problem, remedy = vulkan_gap(loader=VulkanLoader("libvulkan.so.1", error="cannot open"))
    assert problem == "there is no Vulkan loader: cannot open"
    assert "libvulkan1" in remedy


def test_a_driver_that_cannot_be_used_has_the_reason():
    broken = VulkanDriver("/m/intel.json", error="no manifest")
    problem, remedy = vulkan_gap(drivers=(DRIVER, broken))
    assert problem == "the driver /m/intel.json cannot be used: no manifest"
    assert "remove the manifest" in remedy
    found = replace(WHOLE, vulkan=replace(SETUP, drivers=(DRIVER, broken)), environment={"VK_DRIVER_FILES": "/m"})
    assert gap(found)[2] == "correct VK_DRIVER_FILES, or unset it"


@pytest.mark.parametrize(("vendor", "package"), [("NVIDIA", "nvidia-vulkan-icd"), ("Intel", "mesa-vulkan-drivers")])
def test_a_gpu_without_a_driver_names_the_package_of_its_vendor(vendor, package):
    cards = (Card("0000:02:00.0", vendor),)
    problem, remedy = vulkan_gap(cards=cards, device_files=("/dev/dri/renderD128", "/dev/nvidia0"))
    assert problem == f"there is no Vulkan driver for the {vendor} GPU at 0000:02:00.0"
    assert package in remedy


def test_a_container_of_nvidia_needs_the_graphics_capability():
    setup = replace(SETUP, cards=(Card("0000:02:00.0", "NVIDIA"),), device_files=("/dev/nvidia0",))
    found = replace(WHOLE, vulkan=setup, environment={"NVIDIA_VISIBLE_DEVICES": "all"})
    assert "NVIDIA_DRIVER_CAPABILITIES=graphics" in gap(found)[2]


@pytest.mark.parametrize(("vendor", "option"), [("NVIDIA", "--gpus all"), ("AMD", "--device /dev/dri")])
def test_a_gpu_without_a_device_file_says_how_a_container_gets_it(vendor, option):
    problem, remedy = vulkan_gap(cards=(Card("0000:02:00.0", vendor),), device_files=())
    assert problem == f"the {vendor} GPU at 0000:02:00.0 has no device file"
    assert option in remedy


def test_a_machine_without_drivers_and_gpus_says_so():
    problem, remedy = vulkan_gap(drivers=(), cards=())
    assert problem == "there is no Vulkan driver"
    assert "mesa-vulkan-drivers" in remedy


def test_closed_device_files_name_the_groups():
    problem, remedy = vulkan_gap(closed_files=("/dev/dri/renderD128",))
    assert problem == "this user may not open /dev/dri/renderD128"
    assert "render,video" in remedy


def test_vulkan_is_no_gap_where_nobody_wants_it():
    setup = replace(SETUP, loader=VulkanLoader("libvulkan.so.1", error="missing"))
    cuda = Plugin("cuda", "/lib/libggml-cuda.so", loaded=True, n_devices=1)
    assert find_gaps(replace(WHOLE, vulkan=setup, plugins=(cuda,), gpus=("CUDA0",))) == []
    excluded = Plugin("vulkan", "/lib/libggml-vulkan.so", reason="excluded", excluded=True)
    assert find_gaps(replace(WHOLE, vulkan=setup, plugins=(excluded,), gpus=())) == []


def test_missing_features_are_told_for_real_gpus_only():
    slow = replace(GPU, features={"fp16": "0", "int_dot": "0", "matrix_cores": "none"})
    part, problem, _, asked = gap(replace(WHOLE, devices=(slow,)))
    assert (part, asked) == ("devices", False)
    assert problem == "Vulkan0 has no fp16, no integer dot products, no matrix cores"
    assert find_gaps(replace(WHOLE, devices=(replace(slow, emulated=True),))) == []
