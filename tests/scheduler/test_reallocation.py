"""Memory of results in the steady state: ggml reports each reallocation from version 0.27 on."""

from contextlib import contextmanager

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import c, models
from ggml_cffi.c import library
from tests.support import llama_float64

REPORT = "ggml_backend_sched_set_realloc_callback"
pytestmark = pytest.mark.skipif(
    not library.provides(REPORT), reason=f"needs ggml 0.27, which has {REPORT}; {library.version()} was loaded"
)


@contextmanager
def reallocations(scheduler):
    """Yield the list of reallocations of a scheduler: for each, whether the placement and whether the size changed."""
    found = []

    @c.ffi.callback("ggml_backend_sched_realloc_callback")
    def note(_scheduler, _graph, placement_changed, size_changed, _data):
        found.append((placement_changed, size_changed))

    c.ggml_backend_sched_set_realloc_callback(scheduler.ptr, note, c.NULL)
    try:
        yield found
    finally:
        c.ggml_backend_sched_set_realloc_callback(scheduler.ptr, c.NULL, c.NULL)


def test_nothing_is_reallocated_for_a_graph_that_was_reserved(devices, rng):
    W = rng.standard_normal((64, 64), dtype=np.float32)
    with ggml.Context() as ctx, ggml.Scheduler(devices) as scheduler:
        graphs = []
        for n in (32, 8, 32):
            w, x = ctx.constant(W), ctx.new_tensor("f32", (n, 64))
            graphs.append(ggml.Graph(ggml.soft_max(ggml.linear(x, w))))
        scheduler.reserve(graphs[0])
        with reallocations(scheduler) as found:
            for graph in graphs:
                scheduler.alloc(graph)
                for _ in range(2):
                    scheduler.compute()
        assert found == []
        scheduler.reset()
        for graph in graphs:
            graph.close()


def test_nothing_is_reallocated_while_a_model_decodes(devices, tmp_path, rng):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng)
    with models.load(path, devices, "layer" if len(devices) > 1 else "auto", n_ctx=64) as model:
        model.forward([1, 2, 3], last=True)
        (runner,) = {batcher.runner for batcher in model.batchers}
        if not hasattr(runner, "scheduler"):
            pytest.skip("this split does not run through ggml's scheduler")
        with reallocations(runner.scheduler) as found:
            list(model.generate_tokens([1, 2, 3], 20, stop_at_end=False))
        assert len(found) <= 1  # for the graph of one token
