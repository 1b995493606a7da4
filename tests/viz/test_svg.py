"""Drawings of graphs, and their layout."""

import re
import time
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

import ggml_cffi as ggml
from ggml_cffi.core import text as _text
from ggml_cffi.viz import layout
from ggml_cffi.viz.svg import shades, svg
from tests.support.svg import SVG, parse

NASTY = "<b> & \"x\" 'größe' 漢字 \x1b[31m\x07 ]]> \u202e"


def ids(found):
    return [g.get("id") for kind in ("node", "view", "leaf") for g in found[kind]]


def test_a_drawing_has_every_tensor_once(net, devices):
    n = net(devices[0])
    with ggml.Graph(n.y, n.empty) as graph, ggml.Scheduler(devices) as s:
        nodes, leaves = graph.nodes, graph.leaves
        plain = graph.draw()
        s.alloc(graph)
        for text in (plain, svg(s), s.draw(), graph.draw(), svg(graph)):
            _, found = parse(text)
            assert len(set(ids(found))) == len(nodes) + len(leaves) == len(ids(found))
            names = sorted(g.get("data-name") for kind in ("node", "view") for g in found[kind])
            assert names == sorted(_text.clean(t.name) for t in nodes)
            assert len(found["leaf"]) == len(leaves)
            assert {g.get("data-op") for g in found["leaf"]} == {"leaf", "weight"}
            assert [g.get("data-op") for g in found["view"]] == ["reshape", "transpose"]
            assert {"mul_mat", "relu", "scale", "mul"} == {g.get("data-op") for g in found["node"]}
            captions = {g.get("data-name"): "".join(g.itertext()) for g in found["node"]}
            assert "scale y" in captions["y"]
            assert "(8, 4) F32" in captions["y"]
            edges = found["edge"] + found["copy"]
            assert len(edges) == sum(len({p for p in sources if p}) for _, sources in s.held.sources())
            assert {e.get("data-from") for e in edges} | {e.get("data-to") for e in edges} == set(ids(found))
        assert {g.get("data-backend") for g in parse(plain)[1]["node"]} == {""}


def test_colours_follow_the_assignment(net, two_gpus):
    n = net(two_gpus[0])
    with ggml.Graph(n.y) as graph, ggml.Scheduler(two_gpus) as s:
        s.place(n.h, two_gpus[0])
        relu = graph.nodes[[t.op for t in graph.nodes].index(ggml.Op.UNARY)]
        s.place(relu, two_gpus[1])
        s.alloc(graph)
        root, found = parse(s.draw())
        drawn = {g.get("id"): g for kind in ("node", "view", "leaf") for g in found[kind]}
        for i, t in enumerate(graph.nodes):
            assert drawn[f"t{i}"].get("data-backend") == s.backend_of(t).name
        fills = {}
        for g in found["node"]:
            fills.setdefault(g.get("data-backend"), set()).add(g.find(f"{SVG}rect").get("fill"))
        assert {len(f) for f in fills.values()} == {1}
        assert len({f for fill in fills.values() for f in fill}) == len(fills) == 2
        # The legend shows the same colours.
        legend = root.find(f".//{SVG}g[@class='legend']")
        shown = dict(
            zip([e.text for e in legend.findall(f"{SVG}text")][1:], legend.findall(f"{SVG}rect"), strict=False)
        )
        for name, fill in fills.items():
            assert [r.get("fill") for label, r in shown.items() if label.startswith(f"{name}:")] == list(fill)
        # Splits and copies match those of the scheduler.
        assert [g.get("data-backend") for g in found["split"]] == [split.backend.name for split in s.splits]
        assert sorted("".join(g.itertext()) for g in found["bytes"]) == sorted(f"{t.nbytes:,} B" for t, _ in s.copies)
        index = {t: f"t{i}" for i, t in enumerate(graph.nodes)}
        assert sorted(e.get("data-from") for e in found["copy"]) == sorted(index[t] for t, _ in s.copies)
        assert all(e.get("stroke-dasharray") for e in found["copy"])
        _, guessed = parse(graph.draw())  # backends derived from the memory
        for kind in ("node", "view", "leaf", "split"):
            assert [g.get("data-backend") for g in guessed[kind]] == [g.get("data-backend") for g in found[kind]]
        assert [e.get("data-from") for e in guessed["copy"]] == [e.get("data-from") for e in found["copy"]]


def test_a_drawing_shows_a_graphs_own_operands(net, two_gpus):
    """A graph that is not held is drawn with its own operands, although a scheduler of another graph replaced them."""
    n = net(two_gpus[0])
    with ggml.Graph(n.h) as part, ggml.Graph(n.y) as graph, ggml.Scheduler(two_gpus) as s:
        before = part.draw()
        s.place(n.h, "CPU")
        s.alloc(graph)
        assert s.copies
        assert part.draw() == before


def test_every_backend_has_a_colour_of_its_own():
    many = shades([*(f"GPU{i}" for i in range(15)), "CPU"])
    assert len(set(many.values())) == 16
    assert many["CPU"] == shades(["CPU"])["CPU"]
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for pair in many.values() for colour in pair)


def test_svg_writes_a_file_and_checks_its_arguments(net, tmp_path):
    n = net("CPU")
    with ggml.Graph(n.y) as graph, ggml.Scheduler(["CPU"]) as s:
        with pytest.raises(ValueError, match="holds no graph"):
            s.draw()
        for path in (tmp_path / "größe.svg", str(tmp_path / "b.svg")):
            text = graph.draw(path)
            assert Path(path).read_text(encoding="utf-8") == text
            ElementTree.parse(path)
        with pytest.raises(TypeError, match="svg draws a Graph or a Scheduler, not Tensor"):
            svg(n.y)
    with pytest.raises(ggml.ClosedError):
        graph.draw()
    with pytest.raises(ggml.ClosedError):
        s.report()


def test_no_two_boxes_overlap(rng):
    boxes, lanes = [], [0, 1, 0, 2, 1]
    for i in range(300):
        sources = sorted({int(k) for k in rng.integers(max(0, i - 40), i, 2)}) if i > 3 else []
        boxes.append(layout.Box(float(rng.integers(40, 200)), i // 60, sources, late=i <= 3))
    at = layout.place(boxes, lanes)
    spots = sorted(zip(at.y, at.x, boxes, strict=True), key=lambda s: s[:2])
    for (y, x, box), (v, u, other) in pairwise(spots):
        assert v >= y
        assert v > y or u - x >= (box.width + other.width) / 2 + 1
    for i, box in enumerate(boxes):
        assert all(at.y[s] < at.y[i] for s in box.sources)
        frame = at.frames[box.group]
        assert frame.left <= at.x[i] - box.width / 2 + 1e-6
        assert at.x[i] + box.width / 2 <= frame.right + 1e-6 <= at.width + 2e-6
        assert frame.top <= at.y[i] <= frame.bottom
    frames = list(at.frames.values())
    for i, a in enumerate(frames):
        for b in frames[i + 1 :]:
            assert a.right < b.left or b.right < a.left or a.bottom < b.top or b.bottom < a.top


def test_a_thousand_nodes_are_drawn():
    with ggml.Context() as ctx:
        shared = ctx.new_tensor("f32", (4, 4))
        x = ctx.new_tensor("f32", (4, 4))
        for _ in range(200):
            h = ggml.relu(ggml.linear(x, ctx.new_tensor("f32", (4, 4))))
            x = ggml.add(ggml.add(h, shared), x)
            x = ggml.scale(x, 0.5)
        with ggml.Graph(x) as graph:
            start = time.process_time()
            text = graph.draw()
            assert time.process_time() - start < 10  # about 0.5 s
            _, found = parse(text)
            assert len(found["node"]) == 1000
            assert len(found["leaf"]) == 202


def test_text_is_cleaned_for_terminals_and_xml():
    assert _text.clean("a\x00b\x1b\ud800\ufffe\u202e漢") == "a\ufffdb\ufffd\ufffd\ufffd\ufffd漢"
    assert _text.clean("größe 漢字") == "größe 漢字"
    assert _text.columns("漢字a") == 5
    assert _text.columns("e\u0301") == 1
    assert _text.columns(_text.shorten("漢字" * 20, 9)) <= 9
    assert _text.shorten("abc", 3) == "abc"
    lines = _text.table([("a", "b"), ("漢", "10")], right=(1,)).splitlines()
    assert lines == ["a    b", "漢  10"]


def test_a_name_of_any_bytes_is_drawn():
    with ggml.Context() as ctx:
        x = ctx.new_tensor("f32", (2,))
        y = ggml.scale(x, 1.0)
        with ggml.Graph(y) as graph:
            for k in range(1, 256, 40):
                raw = bytes(range(k, min(k + 40, 256)))
                ggml.c.ffi.memmove(y.ptr.name, raw + b"\0", len(raw) + 1)
                _, found = parse(graph.draw())
                (g,) = found["node"]
                assert g.get("data-name") == _text.clean(y.name)
