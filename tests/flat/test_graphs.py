"""Graphs by C's names."""

from ggml_cffi import flat
from tests.support.flat_guide import CPU, F32


def test_a_graph_collects_outputs_as_in_c():
    ctx = flat.ggml_init()
    a = flat.ggml_new_tensor_1d(ctx, F32, 3)
    flat.ggml_set_input(a)
    flat.ggml_set_f32(a, 2)  # one value for all
    graph = flat.ggml_new_graph(ctx)
    double, square = flat.ggml_scale(ctx, a, 2.0), flat.ggml_sqr(ctx, a)
    flat.ggml_build_forward_expand(graph, double)
    flat.ggml_build_forward_expand(graph, square)
    assert flat.ggml_graph_n_nodes(graph) == 2
    sched = flat.ggml_backend_sched_new([CPU()])
    for _ in range(2):
        flat.ggml_backend_sched_graph_compute(sched, graph)
        assert [*flat.ggml_get_f32(double)] == [*flat.ggml_get_f32(square)] == [4, 4, 4]
