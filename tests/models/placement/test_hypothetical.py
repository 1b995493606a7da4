"""Plans for devices that this machine does not have."""

import json

import pytest

import ggml_cffi as ggml
from ggml_cffi import cli, models
from ggml_cffi.c import library
from ggml_cffi.models.placement.hypothetical import HypotheticalDevice
from ggml_cffi.models.runners import weights
from ggml_cffi.models.runners.queries import repacked_memory_for
from tests.support import bert_float64, llama_float64
from tests.support.header_only import LLAMA_70B, llama_header
from tests.support.memory import GIB, memory

MACHINE = ["24G", "24G", "CPU:64G"]
#: A model of which one GPU of a few hundred MiB can hold some layers.
SMALL = {"n_layers": 6, "n_embd": 1024, "n_ff": 4096, "n_vocab": 8000, "n_heads": 8, "n_kv": 4, "dtype": ggml.Q8_0}


@pytest.fixture
def no_gpu(monkeypatch):
    """Fail if the driver of a GPU is loaded."""
    monkeypatch.setattr(library, "load_plugins", lambda *_: pytest.fail("the plug-ins were loaded"))


def layers(plan):
    return [len(share.layers) for share in plan.devices]


def test_a_model_of_40_gb_fits_two_cards_of_24(tmp_path, no_gpu):
    path = llama_header(tmp_path / "m.gguf", **LLAMA_70B)
    plan = models.plan(path, MACHINE)
    assert sum(share.weight_bytes for share in plan.devices) > 39.6e9
    assert plan.fits
    assert layers(plan) == layers(models.plan(path, MACHINE, balance=[1, 1])) == [40, 40, 0]
    assert [(share.device, share.free) for share in plan.devices] == [
        ("GPU0", 24 * GIB),
        ("GPU1", 24 * GIB),
        ("CPU", 64 * GIB),
    ]
    assert plan.reasons == (
        "The plan assumes that its hypothetical GPUs support every type and read host memory.",
        "GPU0 has 40 of 80 layers: its part by free memory, 24.0 GiB.",
        "GPU1 has 40 of 80 layers: its part by free memory, 24.0 GiB.",
        "The embeddings are on GPU0, where the first layer is.",
        "The output is on GPU1, where the last layer is.",
    )
    # The ends take as much as some layers: the part of a smaller card is less than its part of the memory.
    assert models.plan(path, ["24G", "20G", "CPU:64G"]).fits
    assert layers(models.plan(path, ["24G", "19G", "CPU:64G"]))[2] == 0


@pytest.mark.parametrize("tied", [False, True], ids=["two ends", "tied"])
def test_layers_are_on_gpus_if_any_division_fits(tmp_path, rng, tied, no_gpu):
    """The devices have exactly the memory for one division, in steps of 1 KiB."""
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, n_layers=6, tied=tied)
    for n in range(1, 6):
        options = {"n_batch": 16, "n_ctx": 64, "reserve": 0}
        *gpus, _ = models.plan(path, MACHINE, balance=[n, 6 - n], **options).devices
        exact = [f"{-(-share.needed // 1024)}K" for share in gpus]
        plan = models.plan(path, [*exact, "CPU:1G"], **options)
        assert plan.fits
        assert layers(plan)[2] == 0
        # One layer's bytes less on one of them, and the CPU has one layer.
        less = f"{gpus[0].needed // 1024 - 20}K"
        assert layers(models.plan(path, [less, exact[1], "CPU:1G"], **options))[2] > 0


@pytest.mark.parametrize("n_batch", [16, 64])
@pytest.mark.parametrize("free", [(60, 50), (150, 90), (90, 150)], ids=str)
def test_hypothetical_gpus_take_what_real_ones_do(two_gpus, tmp_path, monkeypatch, free, n_batch):
    path = llama_header(tmp_path / "m.gguf", **SMALL)
    options = {"n_batch": n_batch, "n_ctx": 512}
    hypothetical = models.plan(path, [*(f"{n}M" for n in free), "CPU:8G"], **options)
    memory(monkeypatch, Vulkan0=free[0] << 20, Vulkan1=free[1] << 20)
    real = models.plan(path, two_gpus, **options)
    assert layers(hypothetical) == layers(real)
    for ours, theirs in zip(hypothetical.devices, real.devices, strict=True):
        assert (ours.weight_bytes, ours.cache_bytes) == (theirs.weight_bytes, theirs.cache_bytes)
        assert (ours.has_output, ours.has_embeddings) == (theirs.has_output, theirs.has_embeddings)
        assert ours.total == pytest.approx(theirs.total, rel=0.03, abs=1 << 20)


@pytest.mark.parametrize("others", [{}, {"ffn_down": ggml.Q4_K}], ids=["all repacked", "some repacked"])
@pytest.mark.parametrize("balance", [[2, 2, 2], [1, 0, 5], [0, 0, 1]], ids=str)
def test_gpus_get_no_copies_of_repacked_weights(two_gpus, tmp_path, monkeypatch, others, balance):
    """The CPU multiplies by them in large batches too. Beside other weights, the plan counts the results for both."""
    # Hypothetical devices write keys and values apart, for which rotated keys are intermediates.
    monkeypatch.setattr(weights, "writes_at_once", lambda backend: False)
    if not repacked_memory_for(ggml.Q4_0, (1024, 1024)):
        pytest.skip("this processor has no kernels for repacked Q4_0")
    path = llama_header(tmp_path / "m.gguf", **SMALL | {"dtype": ggml.Q4_0, "others": others})
    options = {"n_batch": 512, "n_ctx": 512, "balance": balance, "repack": True, "reserve": 0}
    hypothetical = models.plan(path, ["8G", "8G", "CPU:64G"], **options)
    real = models.plan(path, two_gpus, **options)
    assert layers(hypothetical) == layers(real)
    (first, _, cpu), (real_first, _, real_cpu) = hypothetical.devices, real.devices
    for ours, theirs in ((first, real_first), (cpu, real_cpu)):
        assert theirs.compute_bytes <= ours.compute_bytes
        assert others or ours.compute_bytes <= 1.4 * theirs.compute_bytes


def test_each_split_and_encoders_can_be_planned(tmp_path, rng, path, no_gpu):
    for split in ("pipeline", "data", "tensor"):
        plan = models.plan(path, MACHINE, split)
        assert (plan.split, plan.fits) == (split, True)
    encoder = bert_float64.random_model(tmp_path / "b.gguf", rng)
    plan = models.plan(encoder, MACHINE)
    assert plan.fits
    assert all(share.compute_bytes for share in plan.devices if share.layers)


def test_the_inputs_of_an_encoder_are_where_its_first_layer_is(tmp_path, rng, no_gpu):
    encoder = bert_float64.random_model(tmp_path / "b.gguf", rng)
    for balance, first in (([1, 0], 0), ([0, 1], 1), ([1, 1], 0), ([0, 0, 1], 2), ([1, 0, 1], 2)):
        plan = models.plan(encoder, MACHINE, balance=balance)
        assert 0 in plan.devices[first].layers
        assert [bool(share.input_bytes) for share in plan.devices] == [i == first for i in range(3)]


def test_the_cpu_has_this_machines_memory_unless_it_is_given(path, no_gpu):
    (cpu,) = (d for d in models.plan(path, ["24G"]).devices if d.device == "CPU")
    assert cpu.free == ggml.device("CPU").memory().free
    (cpu,) = models.plan(path, ["cpu:1.5GiB"]).devices
    assert cpu.free == 3 * GIB // 2
    (first, second, _) = models.plan(path, ["NVIDIA L4:22.5G", "512m"]).devices
    assert (first.device, first.free, second.device, second.free) == ("NVIDIA L4", 45 * GIB // 2, "GPU1", GIB // 2)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (["24X"], r"device '24X': '24X' is no size: use a number of bytes, or a text such as 512M or 24G \(GiB\)"),
        (["-1G"], "device '-1G': '-1G' is no size"),
        (["1..5G"], "device '1..5G': '1..5G' is no size"),
        (["24G", "Vulkan0"], "'Vulkan0' is no hypothetical device: a plan is for this machine's devices or for"),
        (["CPU", "24G"], "'CPU' is no hypothetical device"),
        (["CPU:4G", "24G"], "the CPU comes last"),
        (["24"], "there is no device '24'"),
    ],
)
def test_nonsense_is_refused(path, devices, message):
    with pytest.raises(ValueError, match=message):
        models.plan(path, devices)


def test_hypothetical_devices_cannot_be_timed_or_loaded_onto(path, capsys):
    for options in ({"split": "auto"}, {"balance": "speed"}):
        with pytest.raises(ValueError, match="times devices, and hypothetical ones cannot be timed"):
            models.plan(path, MACHINE, **options)
    message = "devices '24G', '24G', 'CPU:64G' are for plans only: name devices of this machine, or use models.plan"
    with pytest.raises(ValueError, match=message):
        models.load(path, MACHINE)
    assert cli.main(["run", str(path), "-p", "a", "--devices", "24G,24G,CPU:64G"]) == 2
    assert message in capsys.readouterr().err


def test_hypothetical_devices_on_the_command_line(path, capsys, no_gpu):
    assert cli.main(["plan", str(path), "--devices", "24G,24G,CPU:64G", "--reserve", "2G", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(d["device"], d["free"], d["reserve"]) for d in found["devices"]] == [
        ("GPU0", 24 * GIB, 2 * GIB),
        ("GPU1", 24 * GIB, 2 * GIB),
        ("CPU", 64 * GIB, 0),
    ]
    assert cli.main(["plan", str(path), "--devices", "24X"]) == 2
    assert "device '24X': '24X' is no size" in capsys.readouterr().err


def test_a_helper_of_the_cpu_holds_no_layers(path, monkeypatch):
    kinds = {"BLAS": ggml.DeviceType.ACCEL, "CPU": ggml.DeviceType.CPU}
    monkeypatch.setattr(HypotheticalDevice, "type", property(lambda device: kinds[device.name]))
    for split in ("layer", "data"):
        with pytest.raises(ValueError, match=r"^BLAS only multiplies for the CPU and holds no layers: name GPUs"):
            models.plan(path, ["BLAS:1G", "CPU:1G"], split)


def test_devices_of_several_backends_cannot_share_layers(path, monkeypatch):
    monkeypatch.setattr(HypotheticalDevice, "backend_name", property(lambda device: device.name), raising=False)
    with pytest.raises(ValueError, match=r"CUDA, Vulkan are of several backends \(CUDA, Vulkan\), .*use split='layer'"):
        models.plan(path, ["CUDA:1G", "Vulkan:1G"], "tensor")
    assert models.plan(path, ["CUDA:1G", "Vulkan:1G"]).fits
