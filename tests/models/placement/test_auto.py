"""The choice of the best split for a model and its devices."""

import json

import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.core.handle import live
from ggml_cffi.models.placement import auto, backend_choice, calibration, reasons
from tests.support.splits import PROMPT, gpu_memory


@pytest.fixture
def costs(monkeypatch):
    """Return the seconds of a layer by split, for a token, a batch, and one batch of many. Tests change them.

    Times of one backend have its name and the split as their key.
    """
    found = {"one": (1e-3, 0.1, 0.1), "pipeline": (1.1e-3, 0.1, 0.06), "tensor": (2e-3, 0.2, 0.2)}

    def fake(self, split, n, n_batch, *, whole_attention=False):
        token, batch, long = found.get((self.backends[0].device.backend_name, split), found[split])
        return auto.Costs(token if n < 8 else batch if n <= n_batch else long * n / n_batch, 1e-5)

    monkeypatch.setattr(auto.Timer, "costs", fake)
    return found


def test_auto_takes_the_split_that_is_never_far_from_the_best(two_gpus, path, costs):
    def chosen(**options):
        plan = models.plan(path, two_gpus, "auto", n_batch=16, **options)
        assert plan.reasons[0].startswith("Of the splits, ")
        assert plan.fits
        return plan.split, [share.device for share in plan.devices if share.layers]

    # The gain by batches in flight is larger than the cost of the transfer between devices for a token.
    assert chosen() == ("pipeline", list(two_gpus))
    costs["tensor"] = 0.5e-3, 0.05, 0.05
    assert chosen() == ("tensor", list(two_gpus))
    costs["tensor"] = 2e-3, 0.2, 0.2
    assert chosen(n_sequences=2) == ("data", list(two_gpus))


def test_auto_takes_the_best_split_for_the_expected_tokens(two_gpus, path, costs):
    def chosen(expect, **options):
        plan = models.plan(path, two_gpus, "auto", n_batch=16, expected_tokens=expect, **options)
        return plan.split, len([share for share in plan.devices if share.layers]), plan.reasons[0]

    assert chosen((0, 64))[:2] == ("layer", 1)
    assert chosen((16, 0))[:2] == ("layer", 1)
    split, n, why = chosen((128, 16))
    assert (split, n) == ("pipeline", 2)
    assert "pipeline has 100% of the best speed" in why
    # Three layers: one GPU takes 8 x 0.3 s for the prompt and 3 ms for a token.
    assert f" one 128 + 16 {(128 + 16) / (8 * 0.3 + 16 * 3e-3):.0f};" in why
    costs["tensor"] = 0.5e-3, 0.2, 0.2
    assert chosen((16, 128))[:2] == ("layer", 1)
    assert chosen((1, 128))[:2] == ("tensor", 2)
    costs["tensor"] = 2e-3, 0.2, 0.2
    assert chosen((128, 16), n_sequences=2)[:2] == ("data", 2)
    for wrong in ((1, 2, 3), (0, 0), (-1, 4)):
        with pytest.raises(ValueError, match="expected_tokens must be the tokens of a prompt and of an answer"):
            chosen(wrong)
    with pytest.raises(ValueError, match=r"expected_tokens \(4000, 1000\) are 5000 together, but n_ctx is"):
        models.load(path, two_gpus, "auto", expected_tokens=(4000, 1000))


def test_auto_takes_one_gpu_if_more_are_not_quicker(two_gpus, path, costs, monkeypatch):
    gpu_memory(monkeypatch, 1 << 30)
    costs["pipeline"] = costs["tensor"] = 2e-3, 0.2, 0.2
    plan = models.plan(path, two_gpus, "auto", n_batch=16)
    with models.load(path, two_gpus, "auto", n_batch=16) as model:
        assert model.plan.reasons == plan.reasons
        assert model.plan.split == "layer"
        assert "one has 100% of the best speed or more in each case. Tokens/s, timed: " in plan.reasons[0]
        assert f"{two_gpus[0]} has 3 of 3 layers: it has room for all." in plan.reasons
        model.forward(PROMPT)
        assert {backend.name for _, backend in model.assignment()} == {two_gpus[0]}


def test_auto_with_one_candidate(two_gpus, path, costs, monkeypatch):
    plan = models.plan(path, ["CPU"], "auto")
    assert plan.split == "layer"
    assert plan.reasons[0] == "Of the splits, layer is the only one that is possible."
    options = {"n_batch": 16, "reserve": 0}
    (one, *_), both, three = (
        models.plan(path, two_gpus, split, balance=balance, **options).devices
        for split, balance in (("layer", [1, 0]), ("pipeline", [1, 2]), ("layer", [1, 1, 1]))
    )
    room_for_two, room_for_one = (max(share.needed for share in shares[:2]) for shares in (both, three))
    assert room_for_one < room_for_two < one.needed
    gpu_memory(monkeypatch, room_for_two)
    plan = models.plan(path, two_gpus, "auto", **options)
    assert plan.split in ("pipeline", "tensor")  # no single GPU has memory for all layers
    assert " one prompt " not in plan.reasons[0]
    gpu_memory(monkeypatch, room_for_one)
    plan = models.plan(path, two_gpus, "auto", **options)
    assert [len(share.layers) for share in plan.devices] == [1, 1, 1]
    with pytest.raises(ValueError, match="n_sequences must be at least 1, not 0"):
        models.plan(path, two_gpus, "auto", n_sequences=0)


def test_layers_are_timed_once(two_gpus, path, tmp_path, monkeypatch):
    monkeypatch.setenv("GGML_CFFI_CACHE", str(tmp_path / "cache"))
    plan = models.plan(path, two_gpus, "auto", n_batch=16)
    kept = json.loads(calibration.path().read_text())
    assert len(kept) == 3 * 3  # a token, a batch and several: on one GPU, in two stages, and on two GPUs with shards
    assert all(" tokens by " in name and all(x >= 0 for x in value) for name, value in kept.items())
    monkeypatch.setattr(auto, "PipelineRunner", None)  # nothing is computed again
    assert models.plan(path, two_gpus, "auto", n_batch=16).reasons[0] == plan.reasons[0]


@pytest.fixture
def two_backends(two_gpus, monkeypatch):
    """Patch the second GPU to be the first one as a device of another backend."""
    first, second = map(ggml.device, two_gpus)
    real = ggml.Device.backend_name.fget
    monkeypatch.setattr(ggml.Device, "backend_name", property(lambda d: "OTHER" if d == second else real(d)))

    def fake(chosen):
        return [[second]] if chosen in ([0], [first.pci_id]) else []

    monkeypatch.setattr(backend_choice, "other_backends", fake)
    monkeypatch.setattr(reasons, "same_cards", lambda: {second: first})
    return first, second


def test_auto_takes_the_backend_that_is_best_for_the_expected_tokens(two_backends, path, costs):
    first, second = two_backends
    costs["OTHER", "one"] = 2e-3, 0.05, 0.05  # slower answers, faster prompts

    def chosen(devices, **options):
        found = models.plan(path, devices, "auto", n_batch=16, **options)
        assert found.fits
        (used,) = [share.device for share in found.devices if share.layers]
        return used, found.reasons[0]

    used, why = chosen([0], expected_tokens=(0, 64))
    assert used == first.name
    assert why.startswith(f"Of the backends and splits, {first.backend_name} one has 100% of the best speed or more")
    used, why = chosen([0], expected_tokens=(64, 1))
    assert used == second.name
    assert why.startswith("Of the backends and splits, OTHER one has 100% of the best speed or more in each case. ")
    seconds = 4 * 0.1 * 3 + 1e-3 * 3, 4 * 0.05 * 3 + 2e-3 * 3  # of three layers
    rates = [f"{name} one 64 + 1 {65 / s:,.0f}" for name, s in zip((first.backend_name, "OTHER"), seconds, strict=True)]
    assert why.endswith(f"Tokens/s, timed: {'; '.join(rates)}.")
    assert chosen([0])[0] == first.name  # each has half of the best speed in one case: the default is kept
    for named in (first.name, second.name, first):
        used, why = chosen([named], expected_tokens=(64, 1))
        assert used == getattr(named, "name", named)
        assert why == "Of the splits, layer is the only one that is possible."


def test_the_model_is_on_the_chosen_backend_alone(two_backends, path, costs):
    _, second = two_backends
    costs["OTHER", "one"] = 0.5e-3, 0.05, 0.05
    before = live()
    with models.load(path, [0], "auto", n_batch=16) as model:
        assert model.plan.reasons == models.plan(path, [0], "auto", n_batch=16).reasons
        assert model.plan.reasons[1] == f"{second.name} is the card of {two_backends[0].name}, by OTHER."
        assert [share.device for share in model.placement] == [second.name, "CPU"]
        assert live()["Backend"] == before["Backend"] + 2
        model.forward(PROMPT)
        assert {backend.name for _, backend in model.assignment()} == {second.name}
    assert live()["Backend"] == before["Backend"]
    with models.load(path, [0], "layer", n_batch=16) as model:  # the default, without a comparison
        assert model.placement[0].device != second.name


def test_a_backend_that_has_no_room_or_does_not_work_is_not_chosen(two_backends, path, costs, monkeypatch):
    first, second = two_backends
    costs["OTHER", "one"] = 0.5e-3, 0.05, 0.05
    real = ggml.Device.memory
    monkeypatch.setattr(ggml.Device, "memory", lambda d: ggml.Memory(1 << 18, 1 << 18) if d == second else real(d))
    found = models.plan(path, [0], "auto", n_batch=16)
    assert found.devices[0].device == first.name
    monkeypatch.setattr(ggml.Device, "memory", lambda d: ggml.Memory(1 << 18, 1 << 18) if d == first else real(d))
    assert models.plan(path, [0], "auto", n_batch=16).devices[0].device == second.name
    monkeypatch.setattr(ggml.Device, "memory", real)

    def refuse(*args):
        raise ggml.GgmlError("the driver refused")

    monkeypatch.setattr(backend_choice, "open_backends", refuse)
    assert models.plan(path, [0], "auto", n_batch=16).devices[0].device == first.name


def test_hypothetical_devices_have_no_backend_to_compare(path):
    with pytest.raises(ValueError, match="hypothetical ones cannot be timed"):
        models.plan(path, ["24G"], "auto")
