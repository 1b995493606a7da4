"""Every way to split a model over devices gives the result of one device, and takes the planned bytes."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from tests.support import PATIENCE, llama_float64, need, relative_error, run_python
from tests.support.splits import PROMPT, answers, gpu_memory

SPLITS = ("layer", "pipeline", "data", "tensor")


@pytest.fixture(params=SPLITS)
def split(request):
    return request.param


def test_two_gpus_agree_with_float64(two_gpus, path, split, rng):
    ids = [int(t) for t in rng.integers(0, 50, 41)]
    want = llama_float64.Reference(path).forward(ids)
    with models.load(path, two_gpus, split, n_batch=16) as model:
        assert relative_error(model.forward(ids), want) < 1e-2  # three batches
        made = [*model.generate_tokens(ids, 3, stop_at_end=False)]  # a prompt of three batches
        assert made[0] == model.forward(ids, last=True).argmax()
        used = {backend.name for _, backend in model.assignment()}
        assert used == ({two_gpus[0]} if split == "data" else set(two_gpus))  # one sequence: the other replica is idle
        assert model.layer_backend(0).name == two_gpus[0]
        assert [len(share.layers) for share in model.placement if share.weight_bytes] == (
            [3, 3] if split in ("data", "tensor") else [1, 2]
        )
    with pytest.raises(ggml.ClosedError):
        model.assignment()


FOUR = """
import sys
import numpy as np
from ggml_cffi import models
from tests.support import llama_float64, relative_error
from tests.support.splits import answers
path, gpus, ids = sys.argv[1], [f"Vulkan{i}" for i in range(4)], [*range(1, 42)]
want, tokens = llama_float64.Reference(path).forward(ids), None
for split in ("layer", "pipeline", "data", "tensor"):
    with models.load(path, gpus, split, n_batch=16) as model:
        error = relative_error(model.forward(ids), want)
        assert error < 1e-2, (split, error)
        tokens = tokens or answers(model, [ids, ids[:5]])
        assert answers(model, [ids, ids[:5]]) == tokens, split
        layers = [len(share.layers) for share in model.placement if share.device in gpus]
        assert layers == ([4] * 4 if split in ("data", "tensor") else [1] * 4), (split, layers)
"""


@pytest.mark.usefixtures("vulkan")
def test_every_split_works_on_four_gpus(tmp_path, rng):
    need(("Vulkan0",))
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, n_layers=4)
    run_python(FOUR.replace("sys.argv[1]", repr(str(path))), GGML_VK_VISIBLE_DEVICES="0,0,0,0")


def test_several_models_on_the_same_gpus(two_gpus, path):
    """Each model locks its devices only during a call, and there is no deadlock."""
    kinds = ("layer", "tensor", "layer", "pipeline")
    with ExitStack() as stack:
        loaded = [stack.enter_context(models.load(path, two_gpus, kind, n_batch=16)) for kind in kinds]
        loaded.append(stack.enter_context(models.load(path, two_gpus[::-1], "layer", n_batch=16)))
        want = [answers(model, [PROMPT, PROMPT[:5]], 12) for model in loaded]
        pool = stack.enter_context(ThreadPoolExecutor(len(loaded)))
        for _ in range(3):
            for model in loaded:
                model.clear_cache()
            going = [pool.submit(answers, model, [PROMPT, PROMPT[:5]], 12) for model in loaded]
            assert [future.result(PATIENCE) for future in going] == want


def test_a_cache_goes_from_one_split_to_another(two_gpus, path, tmp_path):
    with models.load(path, two_gpus, "layer") as model:
        want = answers(model, [PROMPT])
        assert model.save_cache(tmp_path / "layer.kv") == len(PROMPT) + 2
    with models.load(path, two_gpus, "tensor") as model:
        assert model.load_cache(tmp_path / "layer.kv") == len(PROMPT) + 2
        assert answers(model, [PROMPT]) == want
        assert model.timings.reused_tokens == len(PROMPT) - 1
        model.save_cache(tmp_path / "tensor.kv")
    with models.load(path, two_gpus, "data") as model:
        model.load_cache(tmp_path / "tensor.kv")
        assert answers(model, [PROMPT]) == want
        assert model.timings.reused_tokens == len(PROMPT) - 1
        model.save_cache(tmp_path / "data.kv")
    for name in ("layer", "tensor"):
        with ggml.GGUFFile(tmp_path / f"{name}.kv") as a, ggml.GGUFFile(tmp_path / "tensor.kv") as b:
            assert {k: t.shape for k, t in a.tensors.items()} == {k: t.shape for k, t in b.tensors.items()}


def test_every_split_takes_the_planned_bytes(two_gpus, path, split, monkeypatch):
    gpu_memory(monkeypatch, 1 << 30)  # software devices share the memory of the machine, which others use meanwhile
    plan = models.plan(path, two_gpus, split, n_batch=16)
    assert plan.fits
    assert plan.split == split
    with models.load(path, two_gpus, split, n_batch=16) as model:
        model.forward(PROMPT, last=True)
        for planned, share in zip(plan.devices, model.placement, strict=True):
            assert planned.device == share.device
            for kind in ("weight_bytes", "cache_bytes", "compute_bytes"):
                assert abs(getattr(planned, kind) - getattr(share, kind)) <= 0.03 * getattr(share, kind), kind
    assert f"split {split}" in str(plan)


@pytest.mark.parametrize("split", ["data", "tensor"])
def test_a_split_that_does_not_fit_is_refused(two_gpus, path, split, monkeypatch):
    gpu_memory(monkeypatch, 300_000)
    plan = models.plan(path, two_gpus, split, n_batch=16)
    assert not plan.fits
    with pytest.raises(ggml.OutOfMemoryError, match="{} lacks .*{} lacks .* These would fit".format(*two_gpus)):
        models.load(path, two_gpus, split, n_batch=16)


def test_unknown_splits_and_balances_are_refused(path, tmp_path, rng):
    with pytest.raises(ValueError, match="split 'rows' does not exist: use one of 'layer', 'pipeline'"):
        models.load(path, ["CPU"], "rows")
    for split in ("data", "tensor"):
        with pytest.raises(ValueError, match=f"split '{split}' gives all devices the same: balance is for layers"):
            models.plan(path, ["CPU"], split, balance="speed")


@pytest.mark.parametrize("split", ["data", "tensor", "pipeline"])
def test_every_split_works_on_the_cpu_alone(path, split):
    ids = PROMPT * 3
    # Batches of another size round sums otherwise, and a cache in F16 would round that up to 2 ** -11.
    with models.load(path, ["CPU"], kv_dtype="f32") as model:
        want, made = model.forward(ids), answers(model, [ids])
        vectors = model.embed([ids])
    with models.load(path, ["CPU"], split, n_batch=16, kv_dtype="f32") as model:
        assert relative_error(model.forward(ids), want) < 1e-5
        assert answers(model, [ids]) == made
        assert {backend.name for _, backend in model.assignment()} == {"CPU"}
        assert relative_error(model.embed([ids]), vectors) < 1e-5
        assert model.scheduler.graph is not None


def test_shards_have_no_scheduler_and_give_no_embeddings(two_gpus, path):
    with models.load(path, two_gpus, "tensor", n_batch=16) as model:
        with pytest.raises(ValueError, match="have no scheduler"):
            model.scheduler  # noqa: B018
        with pytest.raises(ValueError, match="split='layer'"):
            model.embed([PROMPT])
