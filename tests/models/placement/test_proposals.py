"""Models that do not fit are refused before anything is allocated, with proposals that fit."""

import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.models.placement import proposals as proposing
from tests.support.memory import memory


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
    assert found["n_ctx"] == "n_ctx=512, kv_dtype='q4_0', n_batch=32"
    # with no memory at all, only more devices help
    memory(monkeypatch, CPU=0)
    assert len(proposals(path)) == 1


def test_given_proportions_that_do_not_fit_are_refused(two_gpus, path, monkeypatch, counted):
    memory(monkeypatch, Vulkan0=2_000_000, Vulkan1=600_000)
    found = proposals(path, two_gpus, balance=[1, 3], n_batch=16)
    assert found["balance"] == "balance=[2, 1] (2 of 3 layers on Vulkan0, 1 of 3 layers on Vulkan1)"
    assert models.plan(path, two_gpus, balance=[2, 1], n_batch=16).fits
    with pytest.raises(ggml.OutOfMemoryError, match=r"Vulkan1 lacks .* balance=\[2, 1\]"):
        models.load(path, two_gpus, balance=[1, 3], n_batch=16)
    assert not counted
