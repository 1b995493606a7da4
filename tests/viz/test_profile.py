"""Times of nodes and splits."""

import copy
import json
import math
import pickle
from importlib import import_module

import numpy as np
import pytest

import ggml_cffi as ggml

profiles = import_module("ggml_cffi.viz.profile")  # the package has a function of that name


@pytest.fixture
def net():
    """A product, a step in place, a view, an empty node; markup in a name."""

    class Net:
        def __init__(self):
            self.x = work.new_tensor("f32", (4, 16), name="x <&> größe")
            self.w = work.new_tensor("f32", (8, 16), name="w")
            self.h = ggml.linear(self.x, self.w)
            self.r = ggml.relu(self.h)
            self.view = ggml.reshape(self.r, (8, 4))
            self.y = ggml.scale_inplace(ggml.scale(self.view, 2.0), 3.0)
            self.y.name = "y <&> 漢字"
            self.empty = ggml.scale(work.new_tensor("f32", (0, 4)), 2.0)

    with ggml.Context() as work:
        yield Net()


def check(p, s, path):
    """Check a profile, and return the events of its trace by kind."""
    assert [(row.node, row.backend) for row in p.nodes] == [(t, b.name) for t, b in s.assignment()]
    assert [(row.backend, row.n_nodes) for row in p.splits] == [(x.backend.name, len(x.nodes)) for x in s.splits]
    assert [s.splits[row.split].backend.name for row in p.nodes] == [row.backend for row in p.nodes]
    for row in (*p.nodes, *p.splits):
        assert 0 < row.seconds.min <= row.seconds.median
    assert 0 < p.total.min <= p.total.median
    for groups in (p.by_op(), p.by_backend()):
        assert math.isclose(sum(g.seconds for g in groups.values()), p.node_seconds)
        assert sum(g.n_nodes for g in groups.values()) == len(p.nodes)
        assert sum(g.nbytes for g in groups.values()) == sum(row.nbytes for row in p.nodes)
        assert [g.seconds for g in groups.values()] == sorted((g.seconds for g in groups.values()), reverse=True)
    assert {(c.tensor, c.target) for row in p.splits for c in row.copies} == {(t, b.name) for t, b in s.copies}

    assert pickle.loads(pickle.dumps(p)) == copy.deepcopy(p) == p
    assert all(row.node is None for row in copy.deepcopy(p).nodes)  # tensors are memory of this process
    p.trace(path)
    trace = json.loads(path.read_text(encoding="utf-8"))
    events = {kind: [e for e in trace["traceEvents"] if e.get("cat") == kind] for kind in ("split", "node", "copy")}
    tracks = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert list(tracks.values()) == [b.name for b in s.backends]
    assert [(e["args"]["what"], tracks[e["tid"]]) for e in events["node"]] == [(r.text, r.backend) for r in p.nodes]
    assert [tracks[e["tid"]] for e in events["split"]] == [row.backend for row in p.splits]
    # Nodes and copies lie inside their split and one after another, splits one after another.
    ends = {}
    for e in sorted(events["node"] + events["copy"], key=lambda e: e["ts"]):
        assert (e["ph"], e["pid"]) == ("X", 1)
        around = [
            o for o in events["split"] if o["tid"] == e["tid"] and o["ts"] - 1e-3 <= e["ts"] <= o["ts"] + o["dur"]
        ]
        assert e["ts"] + e["dur"] <= max(o["ts"] + o["dur"] for o in around) + 1e-3
        assert e["ts"] >= ends.get(e["tid"], 0) - 1e-3
        ends[e["tid"]] = e["ts"] + e["dur"]
    for a, b in zip(events["split"], events["split"][1:], strict=False):
        assert a["ts"] + a["dur"] <= b["ts"] + 1e-3
    assert [e["args"]["bytes"] for e in events["copy"]] == [row.copied for row in p.splits if row.copied]
    return events


def test_a_profile_measures_nodes_splits_and_runs(net, devices, rng, tmp_path):
    values = rng.standard_normal((4, 16)).astype(np.float32)
    w = rng.standard_normal((8, 16)).astype(np.float32)
    with ggml.Graph(net.y, net.empty) as graph, ggml.Scheduler(devices) as s:
        s.place(net.h, devices[0])
        s.place(net.r, "CPU")
        s.alloc(graph)
        net.x.set(values)
        net.w.set(w)
        p = s.profile(runs=2)
        assert p.runs == 2
        check(p, s, tmp_path / "größe.json")
        want = 6 * np.maximum(values @ w.T, 0).reshape(8, 4)
        np.testing.assert_allclose(net.y.numpy(), want, rtol=2e-2, atol=2e-2)
        rows = {row.node: row for row in p.nodes}
        assert rows[net.h].flop == 2 * 4 * 16 * 8
        assert rows[net.h].nbytes == 4 * (4 * 16 + 8 * 16 + 4 * 8)
        assert math.isclose(rows[net.h].gflops, rows[net.h].flop / rows[net.h].seconds.median / 1e9)
        assert math.isclose(rows[net.h].gbps, rows[net.h].nbytes / rows[net.h].seconds.median / 1e9)
        assert (rows[net.r].op, rows[net.r].flop, rows[net.r].nbytes) == ("relu", 32, 256)
        assert (rows[net.empty].flop, rows[net.empty].nbytes) == (0, 0)
        assert net.view not in rows
        text = str(p)
        for row in p.nodes:
            assert row.text in text
        nodes = text.rsplit("\n\n", 1)[1].splitlines()[1:]
        slowest = sorted(p.nodes, key=lambda row: -row.seconds.median)
        assert [line.startswith(row.text) for line, row in zip(nodes, slowest, strict=True)] == [True] * len(nodes)
        s.compute()  # the observer is removed
        if devices != ("CPU",):
            assert len(p.splits) > 1
            assert p.splits[0].copies == []
            assert p.splits[0].copy_seconds.median == 0
            assert p.splits[1].copied == net.h.nbytes
            assert 0 < p.splits[1].copy_seconds.median <= p.splits[1].seconds.median
    assert str(p) == text  # even if everything is closed


def test_profile_allocates_the_graph(net, two_gpus, tmp_path):
    with ggml.Graph(net.y) as graph, ggml.Graph(net.empty) as other, ggml.Scheduler(two_gpus, parallel=True) as s:
        for t, name in ((net.h, two_gpus[0]), (net.r, two_gpus[1]), (net.y, two_gpus[1])):
            s.place(t, name)
        p = s.profile(graph, runs=1, warmup=0)
        check(p, s, tmp_path / "t.json")
        assert s.profile(runs=1).nodes[0].node == net.h
        with pytest.raises(ValueError, match="the scheduler holds"):
            s.profile(other)


def test_wrong_arguments_raise(net):
    with ggml.Graph(net.y) as graph, ggml.Scheduler(["CPU"]) as s:
        with pytest.raises(ValueError, match="holds no graph"):
            s.profile()
        for key, value, error in (
            ("runs", 0, ValueError),
            ("runs", 10**30, ValueError),
            ("runs", 1.5, TypeError),
            ("runs", True, TypeError),
            ("warmup", -1, ValueError),
            ("warmup", None, TypeError),
        ):
            with pytest.raises(error):
                s.profile(graph, **{key: value})
    with pytest.raises(ggml.ClosedError):
        s.profile()


def test_a_graph_of_views_has_no_splits():
    with ggml.Context() as ctx:
        shown = ggml.transpose(ctx.new_tensor("f32", (4, 6)))
        with ggml.Graph(shown) as graph, ggml.Scheduler(["CPU"]) as s:
            p = s.profile(graph)
            assert (p.nodes, p.splits, p.node_seconds) == ([], [], 0)
            assert "whole run" in str(p)


def test_an_exception_or_false_stops_the_run(net, monkeypatch):
    """An exception ends the measurement and is raised, and the scheduler stays usable."""
    calls = []

    def clock():
        calls.append(0)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return len(calls)

    with ggml.Graph(net.y) as graph, ggml.Scheduler(["CPU"]) as s:
        s.alloc(graph)
        net.x.set(np.ones((4, 16)))
        net.w.set(np.ones((8, 16)))
        with monkeypatch.context() as patch:
            patch.setattr(profiles, "perf_counter_ns", clock)
            with pytest.raises(KeyboardInterrupt):
                s.profile(runs=1)
        assert len(calls) <= 13
        s.compute()
        assert (net.y.numpy() == 96).all()
        s.profile(runs=1)


def test_bytes_and_operations_are_counted():
    """Count bytes and operations of nodes with rules of their own."""
    with ggml.Context() as ctx, ggml.Scheduler(["CPU"]) as s:
        new = ctx.new_tensor
        table, rows = new("f32", (100, 8)), new("i32", (3,))
        looked = ggml.get_rows(table, rows)
        q, k = new("f32", (1, 2, 5, 16)), new("f16", (1, 2, 32, 16))
        attention = ggml.flash_attn_ext(q, k, new("f16", (1, 2, 32, 16)), None, scale=0.25)
        twice = ggml.mul(looked, looked)
        copied = ggml.cpy(looked, new("f16", (3, 8)))
        soft = ggml.soft_max(looked)
        target = new("f32", (50, 8))
        written = ggml.set_rows(target, looked, new("i64", (3,)))
        experts, ids = new("f32", (6, 4, 8)), new("i32", (2, 2))
        routed = ggml.mul_mat_id(experts, new("f32", (2, 1, 8)), ids)
        with ggml.Graph(attention, twice, copied, soft, written, routed) as graph:
            p = {row.node: row for row in s.profile(graph, runs=1, warmup=0).nodes}
        assert (p[looked].nbytes, p[looked].flop) == (3 * 8 * 4 + 3 * 4 + 3 * 8 * 4, None)
        assert p[attention].flop == 2 * 2 * 5 * 32 * (16 + 16)
        assert (p[twice].nbytes, p[twice].flop) == (2 * 3 * 8 * 4, 24)
        assert p[copied].nbytes == 3 * 8 * (4 + 2)
        assert p[soft].flop is None
        assert p[soft].gflops is None
        assert p[written].nbytes == 3 * 8 * 4 + 3 * 8 + 3 * 8 * 4
        assert p[routed].flop == 2 * 2 * 2 * 4 * 8
        assert p[routed].nbytes == 4 * (4 * (4 * 8) + 2 * 8 + 4 + 2 * 2 * 4)
