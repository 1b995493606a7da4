"""The pictures of the README and of these pages: graphs drawn by ``ggml_cffi.viz``, and charts of measurements.

``python docs/make_pictures.py`` writes them to ``docs/images/``. Drawings and profiles are from real runs, which need
two Vulkan devices: ``GGML_VK_VISIBLE_DEVICES=0,0`` makes two of one, software devices included. Charts show figures of
the pages, so that they need no device: ``--charts`` makes these alone. All have a white ground, for dark themes too.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

import ggml_cffi as ggml
from ggml_cffi.viz.svg import shades

DOCS = Path(__file__).parent
IMAGES = DOCS / "images"
N_VOCAB, N_EMBD, N_FF = 256, 64, 128
INK, GREY, LINE = "#222222", "#666666", "#d0d0d0"
BLUE, ORANGE, STONE = "#2b6cb0", "#b85c00", "#9a9a94"  # of the drawings' first and second GPU, and of others


# ---------------------------------------------------------------------- a small model over two GPUs


def two_gpus() -> Iterator[tuple[str, str]]:
    """Draw a small model and its profile: embeddings on the CPU, a layer over two GPUs, and an output head.

    Yields
    ------
    tuple
        Name and SVG text of each picture. The report and the profile are printed.
    """
    rng = np.random.default_rng(0)
    gpus = [device for device in ggml.devices() if not device.is_cpu][:2]
    if len(gpus) < 2:
        sys.exit("two Vulkan devices are needed: GGML_VK_VISIBLE_DEVICES=0,0 makes two of one")

    def values(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32) / 8

    table, head = values(N_VOCAB, N_EMBD), values(N_VOCAB, N_EMBD)
    ups, downs = [values(N_FF, N_EMBD) for _ in gpus], [values(N_EMBD, N_FF) for _ in gpus]
    with ggml.Session(gpus) as session:
        embedding = session.weight(table, on="CPU", name="embedding")
        up = [session.weight(w, on=gpu, name=f"up.{i}") for i, (w, gpu) in enumerate(zip(ups, gpus, strict=True))]
        down = [session.weight(w, on=gpu, name=f"down.{i}") for i, (w, gpu) in enumerate(zip(downs, gpus, strict=True))]
        output = session.weight(head, on=gpus[1], name="head")

        @session.compile
        def model(ids: ggml.Tensor) -> ggml.Tensor:
            x = named("x", ggml.get_rows(embedding, ids))
            parts = []
            for i in range(2):
                hidden = named(f"hidden.{i}", ggml.silu(named(f"rows.{i}", ggml.linear(x, up[i]))))
                parts.append(named(f"part.{i}", ggml.linear(hidden, down[i])))
            return named("logits", ggml.linear(named("sum", ggml.add(*parts)), output))

        ids = np.arange(4, dtype=np.int32)
        got = model(ids)
        hidden = [table[ids] @ w.T for w in ups]
        hidden = [h / (1 + np.exp(-h)) for h in hidden]
        want = sum(h @ w.T for h, w in zip(hidden, downs, strict=True)) @ head.T
        np.testing.assert_allclose(got, want, atol=2e-2 * np.abs(want).max())
        scheduler = model.trace(ids).scheduler
        profile = scheduler.profile(runs=20)
        sys.stdout.write(f"{scheduler.report()}\n\n{profile}\n\n")
        yield "two_gpus.svg", scheduler.draw()
        yield "profile.svg", timeline(profile.events, "The small model on two GPUs and the CPU, node by node")


def named(name: str, tensor: ggml.Tensor) -> ggml.Tensor:
    """Return ``tensor`` under the name that the drawing shows."""
    tensor.name = name
    return tensor


def graph() -> str:
    """Draw a graph that no scheduler holds: attention of one head."""
    with ggml.Context() as ctx:
        x = ctx.new_tensor("f32", (8, 64), name="x")
        q, k, v = (named(n, ggml.linear(x, ctx.new_tensor("f32", (32, 64), name=f"w{n}"))) for n in "qkv")
        scores = named("scores", ggml.soft_max(ggml.diag_mask_inf(ggml.linear(q, k))))
        with ggml.Graph(named("out", scores @ v)) as drawn:
            return drawn.draw()


# ---------------------------------------------------------------------- charts


def timeline(events: Sequence[dict[str, Any]], title: str) -> str:
    """Return a timeline of the trace events of a profile: a track for each backend, with splits, copies and nodes."""
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans = [e for e in events if e["ph"] == "X"]
    end = max(e["ts"] + e["dur"] for e in spans)
    colours = dict(zip(tracks, shades(list(tracks.values())).values(), strict=True))
    left, top, width, height = 90, 62, 800, 46
    x = scale(0, end, left, left + width)
    parts = [*ticks(x, end, top - 6, top + height * len(tracks), "µs")]
    for row, (tid, name) in enumerate(tracks.items()):
        light, dark = colours[tid]
        y = top + row * height
        parts.append(text(16, y + 25, name, fill=dark))
        for kind, at, tall, style in (
            ("split", 4, 38, f'fill="{light}" fill-opacity="0.45" stroke="{dark}" stroke-opacity="0.6"'),
            ("copy", 14, 18, f'fill="#ffffff" stroke="{dark}" stroke-dasharray="3 2"'),
            ("node", 14, 18, f'fill="{dark}"'),
        ):
            for e in spans:
                if e["tid"] == tid and e["cat"] == kind:
                    label, wide = e["args"].get("what", e["name"]), x(e["dur"]) - x(0)
                    parts.append(box(x(e["ts"]), y + at, wide, tall, style, label))
                    short = " ".join(label.split()[:2])  # of a node: operation and name
                    if kind == "node" and wide > 6 * len(short):
                        parts.append(
                            text(x(e["ts"]) + wide / 2, y + 26, short, anchor="middle", size=10, fill="#ffffff")
                        )
    y = top + height * len(tracks) + 42
    parts += legend(left, y, (("split", f'fill="{LINE}" fill-opacity="0.45" stroke="{GREY}"'),))
    parts += legend(left + 100, y, (("copies to it", f'fill="#ffffff" stroke="{GREY}" stroke-dasharray="3 2"'),))
    parts += legend(left + 260, y, (("node", f'fill="{GREY}"'),))
    return document(left + width + 30, y + 22, title, parts)


def overlap() -> str:
    """Return a chart of the trace that the page about overlap describes: when branches of k products are done."""
    events = json.loads((DOCS / "data" / "overlap_h100.json").read_text())["traceEvents"]
    left, top, width, height = 70, 66, 560, 300
    ends = {(e["pid"], e["tid"], int(e["name"][-1])): (e["ts"] + e["dur"]) / 1e3 for e in events if e["ph"] == "X"}
    x, y = scale(1, 8, left, left + width), scale(0, 9, top + height, top)
    parts = [text(left, top - 14, "milliseconds until a GPU is done", fill=GREY)]
    for value in range(0, 10, 3):
        parts.append(line(left, y(value), left + width, y(value), LINE))
        parts.append(text(left - 12, y(value) + 4, str(value), anchor="end", fill=GREY))
    for n in range(1, 9):
        parts.append(text(x(n), top + height + 22, str(n), anchor="middle", fill=GREY))
    parts.append(text(left + width / 2, top + height + 44, "products in each branch", anchor="middle", fill=GREY))
    for pid, tid, colour, dash, label, below in (
        (1, 1, ORANGE, "6 4", "second GPU, as built", 0),
        (1, 0, BLUE, "6 4", "", 0),
        (0, 1, ORANGE, "", "second GPU, overlapping", -8),
        (0, 0, BLUE, "", "first GPU, in both orders", 14),
    ):
        points = [(x(n), y(ends[pid, tid, n])) for n in range(1, 9)]
        path = " ".join(f"{number(a)},{number(b)}" for a, b in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashed}/>')
        parts += [f'<circle cx="{number(a)}" cy="{number(b)}" r="3" fill="{colour}"/>' for a, b in points]
        parts.append(text(points[-1][0] + 12, points[-1][1] + 4 + below, label, fill=colour))
    title = "Two branches on two H100: in the order as built, and overlapping"
    return document(left + width + 230, top + height + 66, title, parts)


def splits() -> str:
    """Return a chart of the measurements of models on two GPUs: speed of each split over that of one GPU."""
    models, names = ("8B Q4_K", "1B F16"), ("layer", "pipeline", "data", "tensor")
    rows = page_table("tested.md", "| model | split | prompt 512 |")
    tests = rows[0][2:5]
    cells = {(row[0], row[1]): row[2:] for row in rows[1:]}
    left, top, panel, gap, bar = 96, 96, 236, 42, 11
    high = len(names) * (2 * bar + 12)
    parts = legend(left, 58, (("this package", f'fill="{BLUE}"'),))
    parts += legend(left + 170, 58, (("llama.cpp", f'fill="{STONE}"'),))
    parts += [line(left + 310, 48, left + 310, 64, INK), text(left + 320, 60, "one GPU of the same program")]
    for i, model in enumerate(models):
        y = top + i * (high + 62)
        parts.append(text(16, y + 4, model, weight="bold"))
        for j, test in enumerate(tests):
            x = scale(0, 2.2, left + j * (panel + gap), left + j * (panel + gap) + panel)
            parts.append(text(x(0), y + 4, test, weight="bold"))
            parts.append(line(x(1), y + 14, x(1), y + 14 + high, INK))
            for k, name in enumerate(names):
                at = y + 18 + k * (2 * bar + 12)
                if not j:
                    parts.append(text(left - 10, at + bar + 4, name, anchor="end"))
                for who, (colour, cell) in enumerate(
                    ((BLUE, cells[model, name][j]), (STONE, cells[model, name][j + 3]))
                ):
                    if ratio := re.search(r"\(([\d.]+)", cell):
                        value = float(ratio[1])
                        parts.append(box(x(0), at + who * (bar + 1), x(value) - x(0), bar, f'fill="{colour}"', cell))
                        parts.append(text(x(value) + 5, at + who * (bar + 1) + 9, f"{value:.2f}", size=10, halo=True))
    title = "Two H200: tokens per second of each split, over one GPU (2026-11-26)"
    return document(left + 3 * panel + 2 * gap + 30, top + 2 * (high + 62) - 30, title, parts)


def page_table(page: str, head: str) -> list[list[str]]:
    """Return the cells of the table of a page whose first line begins with ``head``, without the line of dashes."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    start = next(i for i, found in enumerate(lines) if found.startswith(head))
    rows = []
    for found in lines[start:]:
        if not found.startswith("|"):
            break
        rows.append([cell.strip() for cell in found.strip("|").split("|")])
    return [rows[0], *rows[2:]]


# ---------------------------------------------------------------------- parts of a chart


def document(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    """Return an SVG document with a title above the parts."""
    size = f'width="{number(width)}" height="{number(height)}" viewBox="0 0 {number(width)} {number(height)}"'
    fonts = 'font-family="DejaVu Sans, Verdana, Arial, sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {fonts} fill="{INK}">'
    ground = f'<rect width="{number(width)}" height="{number(height)}" rx="6" fill="#ffffff"/>'
    return "\n".join(
        (head, f"<title>{escape(title)}</title>", ground, text(16, 28, title, size=14), *parts, "</svg>\n")
    )


def scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    """Return the function that maps ``low`` to ``start`` and ``high`` to ``stop``."""
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def ticks(x: Callable[[float], float], end: float, top: float, bottom: float, unit: str) -> Iterator[str]:
    """Yield vertical lines at round values from 0 to ``end``, with their numbers below."""
    step = next(s for s in (f * 10.0**e for e in range(9) for f in (1, 2, 5)) if end / s <= 8)
    for i in range(int(end / step) + 1):
        yield line(x(i * step), top, x(i * step), bottom, LINE)
        yield text(
            x(i * step), bottom + 16, f"{i * step:,.0f}{f' {unit}' if not i else ''}", anchor="middle", fill=GREY
        )


def legend(x: float, y: float, entries: Sequence[tuple[str, str]]) -> list[str]:
    """Return boxes with labels beside them."""
    return [part for label, style in entries for part in (box(x, y - 8, 22, 12, style), text(x + 30, y + 2, label))]


def box(x: float, y: float, width: float, height: float, style: str, title: str = "") -> str:
    """Return a rectangle; browsers show the title under the mouse."""
    inner = f"<title>{escape(title)}</title>" if title else ""
    sizes = f'x="{number(x)}" y="{number(y)}" width="{number(max(width, 1))}" height="{number(height)}"'
    return f'<rect {sizes} rx="2" {style}>{inner}</rect>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    """Return a thin line."""
    ends = f'x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}"'
    return f'<line {ends} stroke="{colour}" stroke-width="1"/>'


def text(
    x: float,
    y: float,
    words: str,
    *,
    anchor: str = "start",
    size: int = 12,
    fill: str = INK,
    weight: str = "normal",
    halo: bool = False,
) -> str:
    """Return a line of text that begins, ends or has its middle at ``x``; a halo covers lines behind it."""
    style = f'text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" fill="{fill}"'
    style += ' paint-order="stroke" stroke="#ffffff" stroke-width="3"' if halo else ""
    return f'<text x="{number(x)}" y="{number(y)}" {style}>{escape(words)}</text>'


def number(value: float) -> str:
    """Return a coordinate with at most one decimal."""
    return f"{value:.1f}".removesuffix(".0")


#: Pictures that need no GPU: each is the same in every run.
CHARTS = {"graph.svg": graph, "overlap.svg": overlap, "splits.svg": splits}


def main() -> None:
    """Write the pictures."""
    IMAGES.mkdir(exist_ok=True)
    made = [(name, chart()) for name, chart in CHARTS.items()]
    if "--charts" not in sys.argv[1:]:
        made += two_gpus()
    for name, svg in made:
        (IMAGES / name).write_text(svg, encoding="utf-8")
        sys.stdout.write(f"{IMAGES / name}\n")


if __name__ == "__main__":
    main()
