"""The scheduled runner."""

import ggml_cffi as ggml
from ggml_cffi import models
from tests.support import relative_error


def test_large_batches_of_the_cpus_layers_go_to_the_gpu(two_gpus, path):
    """From 32 tokens on, ggml copies the weights of these layers to the GPU."""
    ids = [i % 50 for i in range(64)]
    with models.load(path, ["CPU"], n_batch=128) as model:
        want = model.forward(ids)
    with models.load(path, [two_gpus[0], "CPU"], "layer", balance=(1, 2), n_batch=128) as model:
        assert {share.device: bool(share.layers) for share in model.placement} == {two_gpus[0]: True, "CPU": True}
        for n, where in ((1, {two_gpus[0], "CPU"}), (64, {two_gpus[0]})):
            got = model.forward(ids[:n])
            products = [backend.name for t, backend in model.assignment() if t.op is ggml.Op.MUL_MAT]
            assert set(products) == where
            assert relative_error(got, want[:n]) < 1e-2
            model.clear_cache()
