"""Values by C's names: they are set before and after allocation, read after a run, and checked."""

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import flat
from tests.support.flat_guide import CPU, F32, Guide, backends, spread


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("when", ["first", "after reserve", "after alloc"])
def test_values_may_be_set_at_any_point(devices, rng, when, parallel):
    guide = Guide(rng)
    sched = flat.ggml_backend_sched_new(backends(devices), parallel)
    if when == "first":
        guide.set()
        np.testing.assert_array_equal(flat.ggml_get_f32(guide.w1), guide.values[0].reshape(-1))
    spread(guide, sched)
    assert flat.ggml_backend_sched_reserve(sched, guide.graph)
    if when == "after reserve":
        guide.set()
    assert flat.ggml_backend_sched_alloc_graph(sched, guide.graph)
    if when == "after alloc":
        guide.set()
    for _ in range(2):
        assert flat.ggml_backend_sched_graph_compute(sched, guide.graph) == flat.GGML_STATUS_SUCCESS == 0
        guide.check()
    guide.set_x(rng)
    flat.ggml_backend_sched_graph_compute_async(sched, guide.graph)
    guide.check()  # waits for the run
    flat.ggml_backend_sched_synchronize(sched)
    used = {b.name for _, b in sched.assignment()}
    assert used == (set(devices) if len(devices) > 1 else {devices[0], "CPU"})
    flat.ggml_backend_sched_reset(sched)
    guide.set_x(rng)
    flat.ggml_backend_sched_graph_compute(sched, guide.graph)  # a new allocation keeps the placement
    guide.check()
    assert flat.ggml_backend_sched_get_n_splits(sched) >= len(used) - 1
    assert flat.ggml_backend_sched_get_n_copies(sched) in (1, 4)


def test_intermediate_tensors_cannot_be_read_unless_they_are_outputs(rng):
    guide = Guide(rng)
    guide.set()
    sched = flat.ggml_backend_sched_new([CPU()])
    flat.ggml_backend_sched_graph_compute(sched, guide.graph)
    with pytest.raises(ValueError, match="is an intermediate"):
        flat.ggml_get_f32(guide.h)
    with pytest.raises(ValueError, match="is already allocated"):
        flat.ggml_set_output(guide.h)
    flat.ggml_backend_sched_reset(sched)
    flat.ggml_set_output(guide.h)
    flat.ggml_backend_sched_graph_compute(sched, guide.graph)
    want = np.maximum(guide.values[2] @ guide.values[0].T, 0)
    np.testing.assert_allclose(flat.ggml_get_f32(guide.h), want.reshape(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q8_0", "I32"])
def test_values_set_before_allocation_are_there_after_it(dtype, rng):
    ctx = flat.ggml_init()
    a = flat.ggml_new_tensor_2d(ctx, getattr(flat, f"GGML_TYPE_{dtype}"), 32, 2)
    values = rng.integers(-9, 9, (2, 32)) if dtype == "I32" else rng.standard_normal((2, 32))
    flat.ggml_set_f32(a, values)
    before = flat.ggml_get_f32(a)
    assert before.shape == (64,)
    assert before.dtype == np.float32
    np.testing.assert_allclose(before, values.reshape(-1), rtol=1e-2, atol=2e-2)
    flat.ggml_set_f32(flat.ggml_view_1d(ctx, a, 32, a.nb[1]), values[0])  # a part of the tensor
    ctx.alloc("CPU")
    np.testing.assert_array_equal(flat.ggml_get_f32(a), np.tile(before[:32], 2))
    np.testing.assert_array_equal(flat.ggml_get_f32(flat.ggml_view_1d(ctx, a, 32, a.nb[1])), before[:32])


def test_integers_are_set_and_read_as_integers():
    ctx = flat.ggml_init()
    a = flat.ggml_new_tensor_1d(ctx, flat.GGML_TYPE_I32, 3)
    flat.ggml_set_i32(a, [1, 2, 2**24 + 1])
    assert [*flat.ggml_get_i32(a)] == [1, 2, 2**24 + 1]
    assert [*flat.ggml_get_i32(flat.ggml_new_i32(ctx, 7))] == [7]


def test_row_numbers_are_checked_before_and_after_memory():
    ctx = flat.ggml_init()
    table, rows = flat.ggml_new_tensor_2d(ctx, F32, 4, 3), flat.ggml_new_tensor_1d(ctx, flat.GGML_TYPE_I32, 2)
    flat.ggml_set_i32(rows, [0, 3])
    out = flat.ggml_get_rows(ctx, table, rows)
    sched = flat.ggml_backend_sched_new([CPU()])
    graph = flat.ggml_build_forward_expand(ctx, out)
    with pytest.raises(ValueError, match="row numbers of a tensor with 3 rows"):
        flat.ggml_backend_sched_graph_compute(sched, graph)
    with pytest.raises(ValueError, match="row numbers of a tensor with 3 rows"):
        flat.ggml_set_i32(rows, [0, -1])
    flat.ggml_set_i32(rows, [0, 2])
    flat.ggml_set_f32(table, np.arange(12))
    flat.ggml_backend_sched_graph_compute(sched, graph)
    assert [*flat.ggml_get_f32(out)] == [0, 1, 2, 3, 8, 9, 10, 11]


def test_values_outlive_an_allocation_that_fails():
    with ggml.Context() as ctx:
        small, huge = ctx.constant([1, 2]), ctx.new_tensor(F32, (2**50,))
        with pytest.raises(ggml.OutOfMemoryError):
            ctx.alloc("CPU")
        ctx.alloc("CPU", [small])
        assert [*small.numpy()] == [1, 2]
        assert not huge.is_allocated
