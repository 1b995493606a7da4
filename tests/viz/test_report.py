"""Reports of scheduled graphs."""

import pytest

import ggml_cffi as ggml
from tests.support import need
from tests.support.svg import parse


def test_a_report_has_splits_copies_and_memory(net, devices):
    n = net(devices[0])
    with ggml.Graph(n.y) as graph, ggml.Scheduler(devices) as s:
        with pytest.raises(ValueError, match="holds no graph"):
            s.report()
        s.place(n.h, "CPU")
        s.alloc(graph)
        r = s.report()
        assert [(row.backend, row.n_nodes) for row in r.splits] == [(p.backend.name, len(p.nodes)) for p in s.splits]
        assert r.n_nodes == len(graph)
        assert r.n_leaves == len(graph.leaves) == 3
        assert r.copied == sum(t.nbytes for t, _ in s.copies)
        assert [(copy.tensor, copy.target) for row in r.splits for copy in row.copies] == [
            (t, b.name) for t, b in s.copies
        ]
        assert {name: m.compute for name, m in r.memory.items()} == {b.name: k for b, k in s.buffer_sizes().items()}
        assert sum(m.weights for m in r.memory.values()) == n.w.nbytes == r.memory[devices[0]].weights
        assert sum(m.inputs for m in r.memory.values()) == n.x.nbytes + n.cache.nbytes
        assert r.total == sum(s.buffer_sizes().values()) + n.w.nbytes + n.x.nbytes + n.cache.nbytes
        text = str(r)
        for row in r.splits:
            assert row.backend in text
            assert row.first in text
            assert row.last in text
        assert (f"{r.copied:,} bytes copied per run" in text) == (r.copied > 0)
        assert f"{r.total:,}" in text.splitlines()[-1]
        assert "\x1b" not in text
    assert str(r) == text  # even if everything is closed


def test_backends_of_one_device_have_numbered_labels(net):
    (name,) = need(("Vulkan0",))
    with ggml.Backend(name) as first, ggml.Backend(name) as second, ggml.Scheduler([first, second]) as s:
        n = net(name)
        with ggml.Graph(n.y) as graph:
            s.alloc(graph)
            r = s.report()
            assert list(r.memory) == [f"{name} #1", f"{name} #2", "CPU"]
            assert sum(m.compute for m in r.memory.values()) == sum(s.buffer_sizes().values())
            _, found = parse(s.draw())
            assert {g.get("data-backend") for g in found["node"]} == {f"{name} #1"}


def test_a_graph_of_views_has_no_splits():
    with ggml.Context() as ctx:
        x = ctx.new_tensor("f32", (4, 6))
        shown = ggml.transpose(ggml.reshape(x, (6, 4)))
        with ggml.Graph(shown) as graph, ggml.Scheduler(["CPU"]) as s:
            for look in (graph.draw, s.draw):
                _, found = parse(look())
                assert len(found["view"]) == 2
                assert len(found["leaf"]) == 1
                assert not found["split"]
                s.alloc(graph)
            assert s.report().splits == []
            assert str(s.report()).startswith("2 nodes, 1 leaf\n")
