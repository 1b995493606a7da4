"""Devices that do not read host memory: inputs and results are copied."""

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import models, ops, parallel
from ggml_cffi.core import transfer
from ggml_cffi.core.buffer import Buffer
from ggml_cffi.parallel.program import ParallelProgram
from ggml_cffi.parallel.rank import Rank
from tests.support import relative_error
from tests.support.llama_float64 import Reference, random_model
from tests.support.ranks import chain, expected


@pytest.fixture(autouse=True)
def no_device_imports_memory(monkeypatch):
    monkeypatch.setattr(Buffer, "imported", lambda which, memory: None)
    transfer.shares_host_memory.cache_clear()
    yield
    transfer.shares_host_memory.cache_clear()


def test_a_function_of_arrays(device_name, rng):
    w = rng.standard_normal((8, 32)).astype(np.float32)
    with parallel.TensorParallel([device_name]) as group:
        kept = group.weight(w)
        f = group.compile(lambda rank, x, y: (ops.linear(x, kept[rank]), ops.add(x, y)))
        for n in (1, 5, 1):
            x, y = rng.standard_normal((2, n, 32)).astype(np.float32)
            product, total = f(x, y)
            assert relative_error(product, x.astype(np.float64) @ w.T.astype(np.float64)) < 2e-3
            np.testing.assert_allclose(total, x + y, rtol=1e-6)


def test_work_is_not_recorded_before_its_inputs_are_copied(two_gpus, rng):
    w, x = rng.standard_normal((64, 64)).astype(np.float32), rng.standard_normal((3, 1, 64)).astype(np.float32)
    with parallel.TensorParallel(two_gpus[0]) as group:
        function, inputs = chain(group.weight(w), 1), [((1, 64), ggml.F32)]
        with ParallelProgram(group, [Rank(0, 1)], function, inputs, ahead=True) as program:
            for row in x:
                program.record()
                assert relative_error(program.run([row]), expected(row, w, 1)) < 2e-3


def test_several_devices_cannot_exchange_data(two_gpus, vulkan):
    with pytest.raises(ValueError, match="use split='layer'"):
        parallel.TensorParallel(two_gpus)


@pytest.mark.parametrize("split", ["layer", "pipeline"])
def test_a_model_by_stages(two_gpus, tmp_path, rng, split):
    path = tmp_path / "model.gguf"
    random_model(path, rng, dtype=ggml.F16)
    reference, ids = Reference(path), [int(t) for t in rng.integers(0, 50, 40)]
    with models.load(path, two_gpus, split, n_ctx=512, n_batch=16) as model:
        planned = models.plan(path, two_gpus, split, n_ctx=512, n_batch=16)
        assert [share.compute_bytes for share in planned.devices[:2]] == [p.compute_bytes for p in model.placement[:2]]
        for group in (stage.group for stage in model.batchers[0].runner.stages):
            before = group.device_bytes()
            group.host_block(1, 1)  # of the next batch in flight: it is there already
            assert group.device_bytes() == before
        assert [len(stage.graph.layers) for stage in model.batchers[0].runner.stages] == [1, 2]
        for n in (1, 7, 40):
            assert relative_error(model.forward(ids[:n]), reference.forward(ids[:n])) < 1e-2
        assert len(list(model.generate_tokens(ids, 300, stop_at_end=False))) == 300  # more KV slots than one step
        model.clear_cache()
        assert relative_error(model.forward(ids), reference.forward(ids)) < 1e-2  # fewer again
