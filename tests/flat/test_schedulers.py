"""Schedulers by C's names: the placement of nodes and inputs, and the graph that a scheduler holds."""

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import flat
from tests.support.flat_guide import CPU, F32, Guide, backends, spread


def test_inputs_move_to_where_they_are_placed_after_a_reservation(two_gpus, rng):
    guide = Guide(rng)
    sched = flat.ggml_backend_sched_new(backends(two_gpus))
    guide.set()
    flat.ggml_backend_sched_reserve(sched, guide.graph)
    assert guide.w2.buffer_type.name == two_gpus[0]
    spread(guide, sched)
    flat.ggml_backend_sched_alloc_graph(sched, guide.graph)
    assert [t.buffer_type.name for t in (guide.w1, guide.w2, guide.x)] == [*two_gpus, two_gpus[0]]
    flat.ggml_backend_sched_graph_compute(sched, guide.graph)
    guide.check()
    for t in (guide.w1, guide.w2, guide.x):  # all of them move back, so that the other buffers are freed
        flat.ggml_backend_sched_set_tensor_backend(sched, t, flat.ggml_backend_sched_get_backend(sched, 1))
    flat.ggml_backend_sched_alloc_graph(sched, guide.graph)
    flat.ggml_backend_sched_graph_compute(sched, guide.graph)
    guide.check()
    assert {t.buffer_type.name for t in guide.ctx.tensors() if t.is_leaf} == {two_gpus[1]}
    assert len(guide.ctx.buffers) == 2


def test_a_second_scheduler_on_another_device_moves_the_inputs(two_gpus, rng):
    guide = Guide(rng)
    guide.set()
    for device in (*two_gpus, "CPU"):
        sched = flat.ggml_backend_sched_new(backends([device]))
        flat.ggml_backend_sched_graph_compute(sched, guide.graph)
        guide.check()
        flat.ggml_backend_sched_free(sched)


def test_an_input_that_another_scheduler_reads_stays(two_gpus, rng):
    guide = Guide(rng)
    first, second = (flat.ggml_backend_sched_new(backends([d])) for d in two_gpus)
    guide.set()
    flat.ggml_backend_sched_graph_compute(first, guide.graph)
    other = flat.ggml_build_forward_expand(guide.ctx, flat.ggml_neg(guide.ctx, guide.x))
    with pytest.raises(ValueError, match=f"none of {two_gpus[1]}, CPU can read"):
        flat.ggml_backend_sched_graph_compute(second, other)
    flat.ggml_backend_sched_graph_compute(first, guide.graph)
    guide.check()


def test_nodes_run_on_the_device_of_their_weights(two_gpus, rng):
    guide, (gpu0, gpu1) = Guide(rng), backends(two_gpus)
    ctx = flat.ggml_init()
    w3 = flat.ggml_new_tensor_2d(ctx, F32, 8, 8)
    buffers = flat.ggml_backend_alloc_ctx_tensors(ctx, gpu1)
    flat.ggml_backend_buffer_set_usage(buffers, flat.GGML_BACKEND_BUFFER_USAGE_WEIGHTS)
    with pytest.raises(ValueError, match="usage must be ANY or WEIGHTS"):
        flat.ggml_backend_buffer_set_usage(buffers, flat.GGML_BACKEND_BUFFER_USAGE_COMPUTE)
    flat.ggml_set_f32(w3, np.eye(8))
    guide.set()
    result = flat.ggml_mul_mat(guide.ctx, w3, guide.y)
    graph = flat.ggml_build_forward_expand(guide.ctx, result)
    sched = flat.ggml_backend_sched_new([gpu0, gpu1])
    flat.ggml_backend_sched_graph_compute(sched, graph)
    assert flat.ggml_backend_sched_get_tensor_backend(sched, result) is gpu1
    guide.y = result
    guide.check()
    flat.ggml_backend_buffer_free(buffers)
    with pytest.raises(ggml.ClosedError):
        flat.ggml_backend_sched_alloc_graph(sched, graph)


def test_the_placement_of_a_tensor_is_known_before_and_after_allocation(rng):
    guide = Guide(rng)
    sched = flat.ggml_backend_sched_new([CPU()])
    cpu = flat.ggml_backend_sched_get_backend(sched, 0)
    assert flat.ggml_backend_sched_get_n_backends(sched) == 1
    assert flat.ggml_backend_sched_get_tensor_backend(sched, guide.h) is None
    flat.ggml_backend_sched_set_tensor_backend(sched, guide.h, cpu)
    assert flat.ggml_backend_sched_get_tensor_backend(sched, guide.h) is cpu
    assert flat.ggml_backend_sched_get_n_splits(sched) == 0
    flat.ggml_backend_sched_alloc_graph(sched, guide.graph)
    assert flat.ggml_backend_sched_get_tensor_backend(sched, guide.y) is cpu
    assert flat.ggml_backend_sched_get_buffer_size(sched, cpu) > 0
    with pytest.raises(ValueError, match="is not one of"):
        flat.ggml_backend_sched_get_buffer_size(sched, CPU())
    with pytest.raises(IndexError, match="has 1 backends"):
        flat.ggml_backend_sched_get_backend(sched, 1)


def test_flat_functions_accept_objects_of_the_other_interfaces(rng):
    with ggml.Context() as ctx, ggml.Scheduler(["CPU"]) as sched:
        a = flat.ggml_new_tensor_1d(ctx, F32, 3)
        flat.ggml_set_f32(a, [1, 2, 3])
        out = flat.ggml_neg(ctx, a)
        with ggml.Graph(out) as graph:
            assert flat.ggml_backend_sched_get_tensor_backend(sched, out) is None
            flat.ggml_backend_sched_graph_compute_async(sched, graph)
            flat.ggml_backend_sched_synchronize(sched)
            assert flat.ggml_backend_sched_get_tensor_backend(sched, out) is sched.backends[0]
            assert [*flat.ggml_get_f32(out)] == [-1, -2, -3]


def test_a_second_graph_is_refused_where_c_would_compute_the_first(rng):
    guide = Guide(rng)
    guide.set()
    sched = flat.ggml_backend_sched_new([CPU()])
    flat.ggml_backend_sched_graph_compute(sched, guide.graph)
    other = flat.ggml_build_forward_expand(guide.ctx, flat.ggml_neg(guide.ctx, guide.x))
    with pytest.raises(ValueError, match="the scheduler holds"):
        flat.ggml_backend_sched_graph_compute(sched, other)
    flat.ggml_backend_sched_reset(sched)
    flat.ggml_backend_sched_graph_compute(sched, other)
    np.testing.assert_array_equal(flat.ggml_get_f32(other.outputs[0]), -guide.values[2].reshape(-1))
