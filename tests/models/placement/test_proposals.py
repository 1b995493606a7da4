"""Models that do not fit are refused before anything is allocated, with proposals that fit."""

import re

import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.models.placement import proposals as proposing
from tests.support.header_only import LLAMA_70B, llama_header
from tests.support.memory import GIB, memory


def test_too_small_a_cpu_is_refused_before_anything_is_made(path, counted, monkeypatch):
    memory(monkeypatch, CPU=500_000)
    plan = models.plan(path, ["CPU"])
    assert not plan.fits
    assert plan.devices[0].missing > 0
    assert "no: " in plan.table()
    assert "does not fit" in str(plan)
    with pytest.raises(ggml.OutOfMemoryError, match=r"m.gguf does not fit: CPU lacks .* These would fit: ") as caught:
        models.load(path, ["CPU"])
    assert not counted
    for proposal in plan.proposals:
        assert proposal in str(caught.value)


def options_of(proposal):
    """Return the keyword arguments for a proposal."""
    return eval(f"dict({proposal})", {})


def proposals(path, devices=("CPU",), **options):
    """Return the proposals of a plan by the option that they change, after checking that each fits."""
    plan = models.plan(path, devices, **options)
    assert not plan.fits
    found = {}
    for proposal in plan.proposals:
        found[proposal.split("=")[0]] = proposal
        if proposal.startswith(("n_ctx", "kv_dtype", "n_batch")):
            assert models.plan(path, devices, **(options | options_of(proposal))).fits
    return found


def test_each_kind_of_proposal_fits(path, monkeypatch):
    monkeypatch.setattr(proposing, "gpus", list)  # no others in this machine
    (whole,) = models.plan(path, ["CPU"]).devices
    needed = whole.total - whole.mapped_bytes
    memory(monkeypatch, CPU=needed - 1)
    found = proposals(path)
    assert found["n_ctx"] == "n_ctx=256"
    assert found["n_batch"] == "n_batch=256"
    assert any("one more device with " in text and "iB free" in text for text in found)
    # with a quantized cache the CPU computes attention with other operations, which take less memory
    assert found["kv_dtype"] == "kv_dtype='q8_0'"
    # with a tenth of the memory, one change is not enough
    memory(monkeypatch, CPU=needed // 10)
    found = proposals(path)
    assert list(found) == ["n_ctx", next(reversed(found))]
    assert found["n_ctx"] == "n_ctx=256, kv_dtype='q4_0', n_batch=32"
    # with no memory at all, only more devices help
    memory(monkeypatch, CPU=0)
    assert len(proposals(path)) == 1


def test_given_proportions_that_do_not_fit_are_refused(two_gpus, path, monkeypatch, counted):
    memory(monkeypatch, Vulkan0=2_000_000, Vulkan1=600_000)
    found = proposals(path, two_gpus, balance=[1, 3], n_batch=16)
    assert found["balance"] == "balance=[2, 1] (2 of 3 layers on {}, 1 of 3 layers on {})".format(*two_gpus)
    assert models.plan(path, two_gpus, balance=[2, 1], n_batch=16).fits
    with pytest.raises(ggml.OutOfMemoryError, match=rf"{two_gpus[1]} lacks .* balance=\[2, 1\]"):
        models.load(path, two_gpus, balance=[1, 3], n_batch=16)
    assert not counted


@pytest.fixture
def large(tmp_path):
    """Return the header of a model of 4.6 GiB: layers of 70B, and its vocabulary."""
    return llama_header(tmp_path / "m.gguf", **LLAMA_70B | {"n_layers": 8})


def evaluated(proposal):
    """Return the keyword arguments of a proposal without its explanation in parentheses."""
    return options_of(proposal.partition(" (")[0])


@pytest.mark.parametrize(
    ("devices", "options", "kinds"),
    [
        (["4G", "3G", "CPU:8G"], {"balance": [1, 3]}, ["balance"]),
        (["3G", "1G", "CPU:8G"], {"balance": [1, 1]}, ["balance"]),
        (["2G", "2G", "CPU:8G"], {}, []),
        (["2.9G", "2.9G", "CPU:8G"], {}, ["n_ctx", "kv_dtype", "n_batch"]),
        (["4G", "2.5G", "CPU:8G"], {"split": "tensor"}, ["split"]),
        (["8G", "3G", "CPU:8G"], {"split": "data"}, ["split", "devices"]),
    ],
    ids=str,
)
def test_every_proposal_for_a_large_model_fits(large, devices, options, kinds):
    plan = models.plan(large, devices, **options)
    spilled = plan.fits
    assert not plan.fits or plan.devices[-1].layers
    seen = set()
    for proposal in plan.proposals:
        if proposal.startswith(("one more device", "devices with")):
            size = re.search(r"with ([\d.]+) ([GM])iB free", proposal)
            more = f"{size[1]}{size[2]}"
            of_all = [more] * (len(devices) - 1) if proposal.startswith("devices with") else [*devices[:-1], more]
            other = models.plan(large, [*of_all, devices[-1]], **options)
        else:
            changes = evaluated(proposal)
            seen |= {*changes}
            other = models.plan(large, **({"devices": devices} | options | changes))
        assert other.fits, proposal
        assert not spilled or not other.devices[-1].layers
    assert {*kinds} <= seen
    assert plan.proposals


def test_replicas_need_all_weights_each(large):
    plan = models.plan(large, ["4G", "4G", "CPU:8G"], "data")
    assert not plan.fits
    assert all(share.weight_bytes > 4 * GIB for share in plan.devices[:2])
    assert not any("one more device" in proposal for proposal in plan.proposals)
    (needed,) = (proposal for proposal in plan.proposals if proposal.startswith("devices with"))
    assert needed == "devices with 5.6 GiB free each: every replica has all weights"
    assert models.plan(large, ["5.6G", "5.6G", "CPU:8G"], "data").fits
    assert not models.plan(large, ["5.4G", "5.6G", "CPU:8G"], "data").fits


@pytest.mark.parametrize(
    ("devices", "proposed"),
    [
        (["8G", "3G", "CPU:8G"], ["8G", "CPU:8G"]),
        (["3G", "8G", "CPU:8G"], ["8G", "CPU:8G"]),
        (["3G", "NVIDIA L4:8G", "8.5GiB"], ["NVIDIA L4:8G", "8.5GiB"]),
        (["L4:8G", "L4:3G", "CPU:8G"], ["L4:8G", "CPU:8G"]),
    ],
    ids=str,
)
def test_the_devices_on_which_replicas_fit_are_proposed_as_they_were_given(large, devices, proposed):
    plan = models.plan(large, devices, "data")
    assert not plan.fits
    (found,) = (evaluated(proposal)["devices"] for proposal in plan.proposals if proposal.startswith("devices="))
    assert found == proposed
    assert models.plan(large, found, "data").fits


def test_nothing_is_proposed_that_does_not_fit(large):
    plan = models.plan(large, ["CPU:1K"])
    assert not plan.fits
    assert not any("n_ctx" in proposal for proposal in plan.proposals)
