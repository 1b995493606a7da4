"""Drawings: a graph as an SVG document."""

from __future__ import annotations

import colorsys
import os
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from ggml_cffi.core.op_sets import VIEWS
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.core.text import clean, columns, count, shorten
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.scheduler import Scheduler
from ggml_cffi.viz.layout import BOX_HEIGHT, Box, Layout, place
from ggml_cffi.viz.report import summary
from ggml_cffi.viz.snapshot import Copy, Snapshot, describe, is_weight, op_name

__all__ = ["shades", "svg"]

# A light and a dark shade for each backend. The CPU is grey; tensors without a known device are white.
_SHADES = [
    ("#d6e6f7", "#2b6cb0"),
    ("#fde3c8", "#b85c00"),
    ("#d8efd9", "#2f7d32"),
    ("#e8dcf5", "#6b3fa0"),
    ("#f9d9de", "#b02a45"),
    ("#cfeeed", "#0f766e"),
    ("#faf0c0", "#8a6d00"),
    ("#ead9cc", "#7a4a24"),
]
_CPU, _NOWHERE = ("#e4e4e0", "#555555"), ("#ffffff", "#444444")
_CHAR, _MARGIN, _FRAME_TOP, _LONGEST_NAME = 7.3, 28.0, 26.0, 26


def svg(drawn: Graph | Scheduler, path: str | os.PathLike[str] | None = None) -> str:
    """Return a drawing of a graph as a self-contained SVG document.

    Each backend has a colour and a column; time runs down. Splits have frames. A dashed line with a number of bytes is
    a copy between backends. Leaves are round, views pale, outputs bold.

    Parameters
    ----------
    drawn
        A scheduler that holds a graph, or a graph. Colours need a graph that some scheduler holds.
    path
        File to write the document to.

    Raises
    ------
    ValueError
        If the scheduler holds no graph.
    TypeError
        If ``drawn`` is neither.
    """
    if isinstance(drawn, Scheduler):
        with drawn.lock:
            text = _Drawing(Snapshot.of(drawn)).text()
    elif isinstance(drawn, Graph):
        text = _Drawing(Snapshot(drawn)).text()
    else:
        raise TypeError(f"svg draws a Graph or a Scheduler, not {type(drawn).__name__}")
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def shades(backends: list[str]) -> dict[str, tuple[str, str]]:
    """Return a light and a dark colour for each backend."""
    found: dict[str, tuple[str, str]] = {}
    for name in backends:
        if name == "CPU":
            found[name] = _CPU
        elif len(found) < len(_SHADES):
            found[name] = _SHADES[len(found)]
        else:
            hue = len(found) * 0.618 % 1
            light, dark = colorsys.hls_to_rgb(hue, 0.88, 0.7), colorsys.hls_to_rgb(hue, 0.32, 0.7)
            found[name] = _hex(light), _hex(dark)
    return found


def _hex(rgb: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * v):02x}" for v in rgb)


class _Drawing:
    """The parts of one document."""

    def __init__(self, seen: Snapshot) -> None:
        self.seen = seen
        self.colour = shades(seen.backends)
        self.tensors = [*seen.nodes, *seen.leaves]
        self.index = {t.ptr: i for i, t in enumerate(self.tensors)}
        self.captions = [self._caption(t) for t in self.tensors]
        self.copied = {(copy.tensor.ptr, copy.target): copy for copy in seen.copies}
        self.labelled: dict[int, list[tuple[float, float]]] = {}

    def text(self) -> str:
        """Return the document."""
        boxes, lanes = self._boxes()
        at = place(boxes, lanes)
        legend, top, least = self._legend()
        width, height = max(at.width, least) + 2 * _MARGIN, at.height + top + _MARGIN
        body = [self._frame(k, at) for k in range(len(self.seen.splits))]
        edges, labels_ = self._edges(boxes, at)
        nodes = [self._node(i, at.x[i], at.y[i], boxes[i].width) for i in range(len(boxes))]
        return "\n".join(
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{_n(width)}" height="{_n(height)}" '
                f'viewBox="0 0 {_n(width)} {_n(height)}" font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" '
                'font-size="12" fill="#222222">',
                f"<title>{escape(self._title())}</title>",
                '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
                'orient="auto" markerUnits="userSpaceOnUse">'
                '<path d="M0 0.5 L8 4 L0 7.5 Z" fill="#666666"/></marker></defs>',
                f'<rect width="{_n(width)}" height="{_n(height)}" fill="#ffffff"/>',
                *legend,
                f'<g transform="translate({_n(_MARGIN)} {_n(top)})">',
                *body,
                *edges,
                *nodes,
                *labels_,
                "</g>",
                "</svg>\n",
            )
        )

    # ------------------------------------------------------------------ boxes and groups

    def _boxes(self) -> tuple[list[Box], list[int]]:
        """Return a box for each tensor, nodes first, and the column of each group."""
        seen, index = self.seen, self.index
        groups = self._groups()
        boxes = []
        for i, t in enumerate(self.tensors):
            sources = [index[s] for s in dict.fromkeys(seen.sources.get(t.ptr, ()))]
            width = max(map(columns, self.captions[i])) * _CHAR + 18
            boxes.append(Box(width, groups.get(t.ptr, 0), sources, late=t.ptr not in seen.sources))
        used = list(dict.fromkeys(part.backend for part in seen.splits))
        order = [name for name in seen.backends if name in used]
        return boxes, [order.index(part.backend) for part in seen.splits] or [0]

    def _groups(self) -> dict[Any, int]:
        """Return the split that frames each node; for a view, the split of its data (of its user if that is a leaf)."""
        seen, found = self.seen, self.seen.split_of()
        first_use: dict[Any, int] = {}
        for t in reversed(seen.nodes):
            group = found.get(t.ptr, first_use.get(t.ptr))
            if group is not None:
                for s in seen.sources[t.ptr]:
                    first_use[s] = min(first_use.get(s, group), group)
        made = set(found)
        for t in seen.nodes:
            if t.ptr not in found:
                origin = [s for s in seen.sources[t.ptr] if s in made]
                found[t.ptr] = found[origin[0]] if origin else first_use.get(t.ptr, 0)
                made.update([t.ptr] if origin else [])
        return found

    def _caption(self, t: Tensor) -> tuple[str, str]:
        kind = op_name(t) if t.ptr in self.seen.sources else "weight" if is_weight(t) else "leaf"
        return f"{kind} {shorten(clean(t.name), _LONGEST_NAME)}", f"{t.shape} {t.dtype.name}"

    def _title(self) -> str:
        seen = self.seen
        return summary(len(seen.nodes), len(seen.leaves), len(seen.splits), seen.copies)

    # ------------------------------------------------------------------ parts

    def _legend(self) -> tuple[list[str], float, float]:
        """Return the legend, its height and its width."""
        out = [f'<g class="legend"><text x="{_n(_MARGIN)}" y="30" font-size="14">{escape(self._title())}</text>']
        x, y = _MARGIN, 58.0
        counts = dict.fromkeys(self.seen.backends, 0)
        for part in self.seen.splits:
            counts[part.backend] += len(part.nodes)
        entries = [(f"{name}: {count(n, 'node')}", *self.colour[name], 3, 1.2, 1.0) for name, n in counts.items()]
        light, dark = _NOWHERE
        entries += [
            ("leaf", light, dark, 8, 1.2, 1.0),
            ("view", light, dark, 3, 0.8, 0.5),
            ("output", light, dark, 3, 2.8, 1.0),
        ]
        for label, fill, stroke, radius, thick, opacity in entries:
            out.append(
                f'<rect x="{_n(x)}" y="{_n(y - 12)}" width="26" height="16" rx="{radius}" fill="{fill}" '
                f'stroke="{stroke}" stroke-width="{thick}" opacity="{opacity}"/>'
                f'<text x="{_n(x + 34)}" y="{_n(y)}">{escape(label)}</text>'
            )
            x += 34 + columns(label) * _CHAR + 24
        if self.seen.splits:
            out.append(
                f'<path d="M{_n(x)} {_n(y - 4)} h30" stroke="#222222" stroke-width="1.6" stroke-dasharray="5 3"/>'
                f'<text x="{_n(x + 38)}" y="{_n(y)}">copied, with bytes</text>'
            )
            x += 38 + 18 * _CHAR
        out.append("</g>")
        return out, y + 24 + _FRAME_TOP, x - _MARGIN

    def _frame(self, k: int, at: Layout) -> str:
        part, frame = self.seen.splits[k], at.frames[k]
        fill, stroke = self.colour[part.backend]
        copied = sum(copy.nbytes for copy in self.seen.copies_to(k))
        label = f"split {k} · {part.backend} · {count(len(part.nodes), 'node')}"
        if copied:
            label += f" · {copied:,} B in"
        # Labels of copies must overlap neither the title nor one another.
        height = frame.top - 16
        for step in range(0, round(columns(label) * 6.7), 20):
            self.labelled.setdefault(int(height // 12), []).append((frame.left + step, height))
        return (
            f'<g class="split" data-split="{k}" data-backend={quoteattr(part.backend)}>'
            f'<rect x="{_n(frame.left - 12)}" y="{_n(frame.top - _FRAME_TOP)}" '
            f'width="{_n(frame.right - frame.left + 24)}" height="{_n(frame.bottom - frame.top + _FRAME_TOP + 9)}" '
            f'rx="6" fill="{fill}" fill-opacity="0.28" stroke="{stroke}" stroke-opacity="0.6"/>'
            f'<text x="{_n(frame.left - 4)}" y="{_n(frame.top - 12)}" font-size="11" fill="{stroke}">'
            f"{escape(label)}</text></g>"
        )

    def _node(self, i: int, x: float, y: float, width: float) -> str:
        t, (first, second) = self.tensors[i], self.captions[i]
        where = self.seen.where.get(t.ptr, "")
        fill, stroke = self.colour[where] if where else _NOWHERE
        kind = "leaf" if t.ptr not in self.seen.sources else "view" if t.op in VIEWS else "node"
        radius, thick, ink = 3.0, 1.2, "#222222"
        if kind == "leaf":
            radius = BOX_HEIGHT / 2
        elif kind == "view":
            fill, thick, ink = "#ffffff", 0.8, "#777777"
        if t in self.seen.graph.outputs:
            thick = 2.8
        op, _, name = first.partition(" ")
        faint = ' stroke-opacity="0.55"' if kind == "view" else ""
        title = f"{describe(t)}{f' on {where}' if where else ''}, {t.nbytes:,} bytes"
        return (
            f'<g class="{kind}" id="t{i}" data-op={quoteattr(op)} data-name={quoteattr(clean(t.name))} '
            f"data-backend={quoteattr(where)}><title>{escape(title)}</title>"
            f'<rect x="{_n(x - width / 2)}" y="{_n(y)}" width="{_n(width)}" height="{_n(BOX_HEIGHT)}" '
            f'rx="{_n(radius)}" fill="{fill}" stroke="{stroke}" stroke-width="{thick}"{faint}/>'
            f'<text text-anchor="middle" fill="{ink}"><tspan x="{_n(x)}" y="{_n(y + 16)}">'
            f'<tspan font-weight="bold">{escape(op)}</tspan> {escape(name)}</tspan>'
            f'<tspan x="{_n(x)}" y="{_n(y + 31)}" font-size="11">{escape(second)}</tspan></text></g>'
        )

    def _edges(self, boxes: list[Box], at: Layout) -> tuple[list[str], list[str]]:
        """Return the lines, and the labels of copies, which are drawn on top."""
        lines, texts = [], []
        for i, box in enumerate(boxes):
            by_side = sorted(box.sources, key=lambda s: (at.routes[s, i] or [(at.x[s], 0.0)])[-1][0])
            step = min(16.0, (box.width - 16) / max(len(by_side), 1))
            for k, s in enumerate(by_side):
                end = at.x[i] + (k - (len(by_side) - 1) / 2) * step, at.y[i]
                start = at.x[s], at.y[s] + BOX_HEIGHT
                copy = self._copy(s, i)
                first = copy is not None and copy.user == self.tensors[i]
                kind = "copy" if first else "edge"
                style = 'stroke="#888888" stroke-width="1.1"'
                if copy is not None:
                    style = f'stroke="{self.colour[copy.source][1]}" stroke-width="1.6" stroke-dasharray="5 3"'
                lines.append(
                    f'<path class="{kind}" data-from="t{s}" data-to="t{i}" d="{_path(start, at.routes[s, i], end)}" '
                    f'fill="none" {style} marker-end="url(#arrow)"/>'
                )
                if copy is not None and first:
                    above = at.routes[s, i][-1] if at.routes[s, i] else None
                    foot = start if above is None else (above[0], above[1] + BOX_HEIGHT)
                    texts.append(self._bytes(copy, foot, end))
        return lines, texts

    def _copy(self, source: int, user: int) -> Copy | None:
        t = self.tensors[user]
        if t.op in VIEWS:
            return None
        return self.copied.get((self.tensors[source].ptr, self.seen.where.get(t.ptr, "")))

    def _bytes(self, copy: Copy, start: tuple[float, float], end: tuple[float, float]) -> str:
        text = f"{copy.nbytes:,} B"
        reach = columns(text) * 6.7
        for part in (0.5, 0.38, 0.62, 0.26, 0.74):
            ease = part * part * (3 - 2 * part)
            x, y = start[0] + (end[0] - start[0]) * ease, start[1] + (end[1] - start[1]) * part
            near = [spot for k in (-1, 0, 1) for spot in self.labelled.get(int(y // 12) + k, ())]
            if all(abs(x - u) > reach or abs(y - v) > 11 for u, v in near):
                break
        self.labelled.setdefault(int(y // 12), []).append((x, y))
        return (
            f'<g class="bytes"><rect x="{_n(x - reach / 2 - 2)}" y="{_n(y - 7)}" width="{_n(reach + 4)}" height="14" '
            f'rx="3" fill="#ffffff" fill-opacity="0.85"/><text x="{_n(x)}" y="{_n(y + 4)}" font-size="11" '
            f'text-anchor="middle" fill="{self.colour[copy.source][1]}">{text}</text></g>'
        )


def _path(start: tuple[float, float], bends: list[tuple[float, float]], end: tuple[float, float]) -> str:
    """Return a path that is straight within each row and curved between rows."""
    (x, y), out = start, [f"M{_n(start[0])} {_n(start[1])}"]
    for u, v in (*bends, end):
        middle = (y + v) / 2
        if abs(u - x) < 0.5:
            u = x
        else:
            out.append(f"V{_n(y)}C{_n(x)} {_n(middle)} {_n(u)} {_n(middle)} {_n(u)} {_n(v)}")
        x, y = u, v + BOX_HEIGHT
    if not out[-1].endswith(f" {_n(end[1])}"):  # an arrow takes its direction from the last segment
        out.append(f"V{_n(end[1])}")
    return "".join(out)


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
