"""Identities of graphs that a backend captures."""

import ggml_cffi as ggml
from ggml_cffi import c, ops
from ggml_cffi.parallel.executors.captured import CapturedStepMaker, identity_place


def identity(graph):
    return c.ffi.cast("uint64_t *", graph.ptr)[identity_place()]


def test_the_scheduler_numbers_a_graph_at_this_place():
    place = identity_place()
    assert (place is None) == ggml.GGML_VERSION.startswith("0.20.")
    if place is None:
        return
    with ggml.Context() as context, ggml.Scheduler(["CPU"]) as scheduler:
        graph = ggml.Graph(ops.neg(context.new_tensor("f32", (3,), name="x")))
        assert identity(graph) == 0
        scheduler.split_graph(graph)
        first = identity(graph)
        scheduler.split_graph(graph)
        assert 0 < first < identity(graph)
        graph.close()


def test_each_graph_has_an_identity_until_its_nodes_change():
    if identity_place() is None:
        return
    with ggml.Context() as context, CapturedStepMaker() as maker:
        x = context.new_tensor("f32", (3,))
        graphs = [ggml.Graph(ops.neg(x)), ggml.Graph(ops.abs(x))]
        for graph in graphs:
            assert maker.make(graph, lambda nodes: None).graphs == (graph.ptr,)
        first = [identity(graph) for graph in graphs]
        maker.nodes_changed()
        second = [identity(graph) for graph in graphs]
        assert len({0, *first, *second}) == 5
        for graph in graphs:
            graph.close()
