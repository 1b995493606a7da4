"""The choice among hypothetical devices: cards that several backends show, all GPUs, and texts that find a device."""

from dataclasses import dataclass

import pytest

from ggml_cffi.core.device_choice import default_gpus, find, other_views, pci_address
from ggml_cffi.enums import BackendDevType


@dataclass(frozen=True)
class Card:
    """A device with the properties that a choice depends on."""

    name: str
    description: str = "NVIDIA H200"
    pci_id: str | None = None
    type: BackendDevType = BackendDevType.GPU
    is_remote: bool = False

    @property
    def backend_name(self):
        return self.name.rstrip("0123456789")


CPU = Card("CPU", "AMD EPYC", type=BackendDevType.CPU)


def names(views):
    return {view.name: card.name for view, card in views.items()}


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0000:41:00.0", "0000:41:00.0"),
        ("0000:C1:0A.1", "0000:c1:0a.1"),
        ("41:00.0", "0000:41:00.0"),
        ("00000001:41:00.0", "0001:41:00.0"),
        ("41:00", None),
        ("41:00.8", None),
        ("host:50052", None),
        ("host:50052/1", None),
        ("cuda:0", None),
        ("", None),
    ],
)
def test_pci_ids_have_one_form(text, address):
    assert pci_address(text) == address


@pytest.mark.parametrize(
    ("backends", "used"),
    [
        (["Vulkan", "CUDA"], "CUDA0"),
        (["CUDA", "Vulkan"], "CUDA0"),
        (["Vulkan", "ROCm"], "ROCm0"),
        (["SYCL", "Vulkan"], "SYCL0"),
        (["OpenCL", "Vulkan"], "Vulkan0"),
        (["Mine", "OpenCL", "Vulkan"], "Mine0"),
        (["SYCL", "CANN"], "SYCL0"),  # of equal rank: the first that is listed
    ],
)
def test_a_card_of_several_backends_is_that_of_the_best(backends, used):
    found = [Card(f"{backend}0", pci_id="0000:41:00.0") for backend in backends]
    assert names(other_views(found)) == {d.name: used for d in found if d.name != used}


def test_the_case_and_the_domain_of_a_pci_id_do_not_matter():
    assert names(other_views([Card("CUDA0", pci_id="0000:c1:00.0"), Card("Vulkan0", pci_id="C1:00.0")])) == {
        "Vulkan0": "CUDA0"
    }


def test_logical_devices_of_one_backend_stay_apart():
    twice = [Card("Vulkan0", pci_id="0000:41:00.0"), Card("Vulkan1", pci_id="0000:41:00.0")]
    assert other_views(twice) == {}
    assert other_views([Card("Vulkan0"), Card("Vulkan1")]) == {}
    # Of the better backend both are used, and neither of the other.
    both = [Card("CUDA0", pci_id="0000:41:00.0"), Card("CUDA1", pci_id="0000:41:00.0"), *twice]
    assert names(other_views(both)) == {"Vulkan0": "CUDA0", "Vulkan1": "CUDA0"}


def test_different_cards_devices_without_an_address_and_remote_ones_are_kept():
    found = [
        Card("CUDA0", pci_id="0000:41:00.0"),
        Card("Vulkan0", pci_id="0000:42:00.0"),
        Card("SYCL0"),
        Card("Vulkan1"),
        Card("rpc://h:1", pci_id="0000:41:00.0", is_remote=True),
        CPU,
    ]
    assert other_views(found) == {}


def test_an_integrated_gpu_that_a_better_backend_lists_as_a_gpu_is_one_card():
    sycl = Card("SYCL0", "Intel Iris", pci_id="0000:00:02.0")
    vulkan = Card("Vulkan0", "Intel Iris", pci_id="0000:00:02.0", type=BackendDevType.IGPU)
    assert names(other_views([sycl, vulkan])) == {"Vulkan0": "SYCL0"}


def test_integrated_gpus_are_the_default_only_without_others():
    gpu, remote = Card("Vulkan0"), Card("rpc://h:1", is_remote=True)
    integrated, blas = Card("Vulkan1", type=BackendDevType.IGPU), Card("BLAS", type=BackendDevType.ACCEL)
    assert default_gpus([gpu, remote, integrated, blas, CPU]) == [gpu, remote]
    assert default_gpus([remote, integrated, CPU]) == [remote]
    assert default_gpus([integrated, blas, CPU]) == [integrated]
    assert default_gpus([blas, CPU]) == []


FOUND = [
    Card("CUDA0", "NVIDIA H200", "0000:41:00.0"),
    Card("CUDA1", "NVIDIA H200", "0000:C2:00.0"),
    Card("Vulkan2", "AMD Radeon RX 7900 XTX", "0000:03:00.0"),
    Card("rpc://host:50052", "RPC server", is_remote=True),
    CPU,
]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("cuda1", "CUDA1"),
        ("HOST:50052", "rpc://host:50052"),
        ("0000:41:00.0", "CUDA0"),
        ("0000:c2:00.0", "CUDA1"),
        ("C2:00.0", "CUDA1"),
        ("7900", "Vulkan2"),
        ("radeon rx", "Vulkan2"),
        ("EPYC", "CPU"),
        ("vulkan0", "Vulkan0"),  # a second view
    ],
)
def test_a_text_finds_a_device(text, name):
    assert find(text, FOUND, [Card("Vulkan0", "NVIDIA H200", "0000:41:00.0")]).name == name


@pytest.mark.parametrize("text", ["", "H", "0000:05:00.0", "Vulkan0", "H100", "50052"])
def test_a_text_that_fits_nothing_finds_nothing(text):
    assert find(text, FOUND) is None


def test_a_text_that_fits_several_devices_raises_with_their_names():
    message = r"'h200' fits several devices: CUDA0 \(NVIDIA H200, 0000:41:00.0\), CUDA1 \(NVIDIA H200, 0000:C2:00.0\)"
    with pytest.raises(ValueError, match=message):
        find("h200", FOUND)
    twice = [Card("Vulkan0", "llvmpipe", "0000:41:00.0"), Card("Vulkan1", "llvmpipe", "0000:41:00.0")]
    with pytest.raises(ValueError, match=r"fits several devices: Vulkan0 \(llvmpipe, .*; use one of these names"):
        find("41:00.0", twice)
    assert find("Vulkan1", twice) == twice[1]
