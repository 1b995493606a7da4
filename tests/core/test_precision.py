"""Products in which a device keeps F32 operands, and the default precision of a context."""

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import parallel
from ggml_cffi.core.precision import as_prec, keeps_f32
from tests.support import skip_if_newer_needed


def test_the_cpu_keeps_f32_in_every_product():
    cpu = ggml.device("CPU")
    assert all(keeps_f32(cpu, rows, matrices) for rows in (1, 9, 4096) for matrices in (1, 7))


def test_a_gpu_keeps_f32_in_products_of_few_rows(device_name, vulkan):
    device = ggml.device(device_name)
    assert all(keeps_f32(device, rows, matrices) for rows, matrices in ((1, 1), (1, 7), (8, 1)))
    assert keeps_f32(device, 9, 1) == keeps_f32(device, 8, 2) == device.is_cpu


def test_a_context_asks_its_devices():
    with ggml.Context(devices=[ggml.device("CPU")]) as known, ggml.Context() as unknown:
        assert known.keeps_f32(100, 1)
        assert unknown.keeps_f32(100, 1) == all(keeps_f32(device, 100, 1) for device in ggml.devices())


@pytest.mark.parametrize("wrong", ["f16", "F32", None, ggml.Prec.F32, 10])
def test_there_are_two_precisions(wrong):
    message = 'precision must be "default" or "f32", not '
    with pytest.raises(ValueError, match=message):
        as_prec(wrong)
    with pytest.raises(ValueError, match=message):
        ggml.Context(precision=wrong)
    with pytest.raises(ValueError, match=message):
        ggml.Session(["CPU"], precision=wrong)
    with pytest.raises(ValueError, match=message):
        parallel.TensorParallel(["CPU"], precision=wrong)


def test_the_context_decides_about_products_without_precision(rng):
    values = rng.standard_normal((20, 16))
    with ggml.Context(precision="f32", devices=ggml.devices()) as ctx:
        x, w = ctx.constant(values), ctx.constant(values)
        y = ggml.mul_mat(w, x)
        with ggml.Graph(y) as graph, ggml.Scheduler(["CPU"]) as scheduler:
            assert len(graph) == 1 if ctx.keeps_f32(20, 1) else len(graph) > 1
            scheduler.alloc(graph)
            scheduler.compute(graph)
            np.testing.assert_allclose(y.numpy(), values @ values.T, rtol=1e-5, atol=1e-5)


def test_a_products_own_precision_overrides_that_of_the_context():
    with ggml.Context(precision="f32", devices=ggml.devices()) as ctx, skip_if_newer_needed():
        x, w = ctx.constant(np.ones((20, 16))), ctx.constant(np.ones((20, 16)))
        with ggml.Graph(ggml.mul_mat(w, x, prec=ggml.Prec.BF16, b_prec=ggml.Prec.BF16)) as graph:
            assert len(graph) == 1
