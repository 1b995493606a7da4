"""Layout of a drawing: rows by longest path, order in a row by the mean position of the neighbours.

Sources: K. Sugiyama, S. Tagawa, M. Toda, Methods for Visual Understanding of Hierarchical System Structures, 1981
(rows and order); R. E. Barlow et al., Statistical Inference under Order Restrictions, 1972 (places in a row).
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

BOX_HEIGHT, ROW = 38.0, 82.0
_GAP, _LANE_GAP, _LANE_MIN = 22.0, 46.0, 300.0
_BEND_WIDTH = 6.0
_MOST_BENDS = 8_000  # beyond this number, the longest edges are straight lines
_ORDER_SWEEPS, _PLACE_SWEEPS = 8, 10
_TO_THE_MIDDLE = 0.9  # without this pull a deep graph drifts to the side of its long edges


@dataclass
class Box:
    """A box to place."""

    width: float
    group: int
    """Boxes of one group share a frame. Groups are numbered in the order in which they run."""
    sources: list[int]
    """Boxes with an edge to this one."""
    late: bool = False
    """True for a leaf, which is placed right above its first user instead of at the top."""


class Frame(NamedTuple):
    """A rectangle around a group."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass
class Layout:
    """Positions in units of the drawing."""

    x: list[float]
    """Middle of each box."""
    y: list[float]
    """Top of each box."""
    routes: dict[tuple[int, int], list[tuple[float, float]]]
    """For each edge, middle and top of every row that it crosses between its two boxes."""
    frames: dict[int, Frame]
    width: float
    height: float


def place(boxes: Sequence[Box], lanes: Sequence[int]) -> Layout:
    """Place ``boxes``, sorted so that sources precede their users; boxes marked ``late`` may be anywhere in the list.

    Parameters
    ----------
    boxes
        The boxes.
    lanes
        The column of each group. Groups of one column are drawn one below the other, in order.
    """
    rows = _rows(boxes, lanes)
    plan = _Plan(boxes, lanes, rows)
    plan.order()
    return plan.finish()


def _rows(boxes: Sequence[Box], lanes: Sequence[int]) -> list[int]:
    """Return the row of each box: below its sources, and below the earlier groups of its column."""
    rows = [-1] * len(boxes)
    bottom: dict[int, int] = {}  # of each column, over the groups that are done
    lowest: dict[int, int] = {}  # of the group in progress in each column
    current: dict[int, int] = {}
    for i in sorted((i for i, b in enumerate(boxes) if not b.late), key=lambda i: (boxes[i].group, i)):
        box, lane = boxes[i], lanes[boxes[i].group]
        if current.get(lane) != box.group:
            current[lane] = box.group
            bottom[lane] = lowest.get(lane, -1)
        floor = bottom[lane] + 1
        new = [s for s in box.sources if rows[s] < 0]
        rows[i] = max([floor + bool(new), *(rows[s] + 1 for s in box.sources)])
        for s in new:
            rows[s] = rows[i] - 1
            boxes[s].group = box.group
        lowest[lane] = max(lowest.get(lane, -1), rows[i])
    return [max(r, 0) for r in rows]


@dataclass
class _Plan:
    """Boxes, and the bends of the edges that cross rows, in order in each row."""

    boxes: Sequence[Box]
    lanes: Sequence[int]
    rows: list[int]
    lane: list[int] = field(init=False)
    up: list[list[int]] = field(init=False)
    down: list[list[int]] = field(init=False)
    bends: dict[int, list[int]] = field(init=False)

    def __post_init__(self) -> None:
        n = len(self.boxes)
        self.lane = [self.lanes[b.group] for b in self.boxes]
        self.width = [b.width for b in self.boxes]
        self.row = list(self.rows)
        self.up, self.down = [[] for _ in range(n)], [[] for _ in range(n)]
        self.bends = {}
        self._bend()
        self.layers: list[list[int]] = [[] for _ in range(max(self.row, default=0) + 1)]
        for e, r in enumerate(self.row):
            self.layers[r].append(e)
        for layer in self.layers:
            layer.sort(key=lambda e: self.lane[e])

    def _bend(self) -> None:
        """Create a chain of bends for each box with users more than one row below; all edges of the box share it."""
        spans = [0] * len(self.boxes)
        for i, box in enumerate(self.boxes):
            for s in box.sources:
                spans[s] = max(spans[s], self.rows[i] - self.rows[s] - 1)
        left = _MOST_BENDS
        for s in sorted(range(len(spans)), key=spans.__getitem__):
            left -= spans[s]
            if left < 0:
                break
            chain = [s]
            for k in range(spans[s]):
                chain.append(len(self.row))
                self.row.append(self.rows[s] + k + 1)
                self.lane.append(self.lane[s])
                self.width.append(_BEND_WIDTH)
                self.up.append([chain[-2]])
                self.down.append([])
                self.down[chain[-2]].append(chain[-1])
            self.bends[s] = chain
        for i, box in enumerate(self.boxes):
            for s in box.sources:
                steps = self.rows[i] - self.rows[s] - 1
                if s in self.bends:
                    self.up[i].append(self.bends[s][steps])
                    self.down[self.bends[s][steps]].append(i)

    # ------------------------------------------------------------------ order in the rows

    def order(self) -> None:
        """Sweep down and up, and keep the order with the fewest crossings."""
        best, fewest = [list(layer) for layer in self.layers], self._crossings()
        for sweep in range(_ORDER_SWEEPS):
            if not fewest:
                break
            down = sweep % 2 == 0
            for above, layer in pairwise(self.layers if down else self.layers[::-1]):
                self._sort(layer, above, self.up if down else self.down)
            crossings = self._crossings()
            if crossings < fewest:
                best, fewest = [list(layer) for layer in self.layers], crossings
        self.layers = best

    def _sort(self, layer: list[int], fixed: list[int], neighbours: list[list[int]]) -> None:
        place = {e: k for k, e in enumerate(fixed)}
        keys = {}
        for k, e in enumerate(layer):
            near = neighbours[e]
            keys[e] = (self.lane[e], sum(place[n] for n in near) / len(near) if near else float(k))
        layer.sort(key=keys.__getitem__)

    def _crossings(self) -> int:
        total = 0
        for above, layer in pairwise(self.layers):
            place = {e: k for k, e in enumerate(layer)}
            seen: list[int] = []
            for e in above:
                ends = sorted(place[d] for d in self.down[e])
                total += sum(len(seen) - bisect_right(seen, end) for end in ends)
                for end in ends:
                    insort(seen, end)
        return total

    # ------------------------------------------------------------------ places

    def finish(self) -> Layout:
        """Return the positions for the order found."""
        x = [0.0] * len(self.row)
        parts = [[e for e in layer if self.lane[e] == k] for layer in self.layers for k in sorted(set(self.lanes))]
        parts = [part for part in parts if part]
        for part in parts:
            self._position(part, [0.0] * len(part), x)
        for sweep in range(_PLACE_SWEEPS):
            both = sweep >= _PLACE_SWEEPS - 2
            for part in parts if sweep % 2 == 0 else parts[::-1]:
                wanted = []
                for e in part:
                    near = self.up[e] + self.down[e] if both else self.up[e] if sweep % 2 == 0 else self.down[e]
                    near = [n for n in near if self.lane[n] == self.lane[e]]
                    pull = 1.0 if e >= len(self.boxes) else _TO_THE_MIDDLE
                    wanted.append(pull * sum(x[n] for n in near) / len(near) if near else x[e])
                self._position(part, wanted, x)
        edges = self._columns(x)
        y = [r * ROW for r in self.row]
        return Layout(
            x[: len(self.boxes)],
            y[: len(self.boxes)],
            self._routes(x, y),
            self._frames(edges),
            max((right for _, right in edges.values()), default=0.0),
            (len(self.layers) - 1) * ROW + BOX_HEIGHT,
        )

    def _position(self, part: list[int], wanted: list[float], x: list[float]) -> None:
        """Move boxes as near to ``wanted`` as widths and order allow: least squares, with pools of neighbours."""
        offset, before, offsets = 0.0, None, []
        for e in part:
            if before is not None:
                offset += (self.width[before] + self.width[e]) / 2 + _GAP
            offsets.append(offset)
            before = e
        pools: list[tuple[float, float, int]] = []  # sum, weight, members
        for e, want, shift in zip(part, wanted, offsets, strict=True):
            weight = 4.0 if e >= len(self.boxes) else 1.0  # bends first, so that long edges are straight
            total, count = (want - shift) * weight, 1
            while pools and pools[-1][0] / pools[-1][1] > total / weight:
                t, w, k = pools.pop()
                total, weight, count = total + t, weight + w, count + k
            pools.append((total, weight, count))
        k = 0
        for total, weight, count in pools:
            for _ in range(count):
                x[part[k]] = total / weight + offsets[k]
                k += 1

    def _columns(self, x: list[float]) -> dict[int, tuple[float, float]]:
        """Put the columns side by side, and return the left and right edge of each."""
        edges: dict[int, tuple[float, float]] = {}
        start = 0.0
        for lane in sorted(set(self.lane)):
            members = [e for e, k in enumerate(self.lane) if k == lane]
            left = min(x[e] - self.width[e] / 2 for e in members)
            right = max(x[e] + self.width[e] / 2 for e in members)
            spare = max(0.0, _LANE_MIN - (right - left)) / 2
            for e in members:
                x[e] += start + spare - left
            edges[lane] = start, start + (right - left) + 2 * spare
            start = edges[lane][1] + _LANE_GAP
        return edges

    def _routes(self, x: list[float], y: list[float]) -> dict[tuple[int, int], list[tuple[float, float]]]:
        routes = {}
        for i, box in enumerate(self.boxes):
            for s in box.sources:
                chain = self.bends.get(s, [s])[1 : self.rows[i] - self.rows[s]]
                routes[s, i] = [(x[e], y[e]) for e in chain]
        return routes

    def _frames(self, edges: dict[int, tuple[float, float]]) -> dict[int, Frame]:
        found: dict[int, tuple[int, int]] = {}
        for box, row in zip(self.boxes, self.rows, strict=True):
            first, last = found.get(box.group, (row, row))
            found[box.group] = min(first, row), max(last, row)
        return {
            group: Frame(*_left_right(edges, self.lanes[group], first, last)) for group, (first, last) in found.items()
        }


def _left_right(edges: dict[int, tuple[float, float]], lane: int, first: int, last: int) -> Iterable[float]:
    left, right = edges[lane]
    return left, first * ROW, right, last * ROW + BOX_HEIGHT
