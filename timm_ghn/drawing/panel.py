"""One graph on the plane: its levels folded into columns, edges with rounded corners, and nodes."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from timm_ghn.drawing.routes import Routes, fold
from timm_ghn.drawing.scene import FAINT, Command, Curve, Point, Text, arrow_head, rounded, towards
from timm_ghn.drawing.symbols import STYLES, boundary, draw_node
from timm_ghn.graph.graph import Graph
from timm_ghn.graph.nodes import Node

ROW = 25.0  # between levels
LANE = 21.0  # between neighbours of one level
TURN = 11.0  # between lanes where the snake turns
COLUMN_GAP = 16.0
HEAD = 58.0  # title and subtitle
TITLE_SIZE, SUBTITLE_SIZE = 19.0, 12.5
_EDGE, _SKIP = "#5c6370", "#3f8fbf"
_ASPECT = 1.5  # width to height that is aimed at
_MIN_ROWS, _MAX_ROWS = 10, 80


def choose_rows(depths: Sequence[int]) -> int:
    """Number of levels in a column that makes the whole drawing about `_ASPECT` times as wide as high."""

    def misfit(rows: int) -> float:
        columns = sum(math.ceil(depth / rows) for depth in depths)
        return abs(math.log(columns * (1.7 * LANE + COLUMN_GAP) / (rows * ROW * _ASPECT)))

    return min(range(_MIN_ROWS, _MAX_ROWS + 1), key=misfit)


@dataclass
class Panel:
    """A graph folded into columns of at most `rows` levels; positions are relative to `left` and `top`."""

    graph: Graph
    routes: Routes
    rows: int
    left: float = 0.0
    top: float = 0.0
    _axes: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._columns = fold(self.routes, self.rows)
        self._starts = [start for start, _ in self._columns]
        before, after = [0.5] * len(self._columns), [0.5] * len(self._columns)  # lanes left and right of the axes
        for level, lane, extent in self._used():
            column = bisect_right(self._starts, level) - 1
            side = lane if column % 2 == 0 else -lane
            before[column], after[column] = max(before[column], extent - side), max(after[column], extent + side)
        position = 0.0
        for left, right in zip(before, after, strict=True):
            position += left * LANE
            self._axes.append(position)
            position += right * LANE + COLUMN_GAP
        self.width = position - COLUMN_GAP
        outermost = max(abs(lane) for _, lane, _ in self._used())
        self.turn_room = outermost * TURN if len(self._columns) > 1 else 0.0
        self.height = HEAD + (min(self.rows, self.routes.num_levels) - 1) * ROW + self.turn_room + 12.0

    def _used(self) -> Iterator[tuple[int, int, float]]:
        """Level, lane and half of the width, in lanes, of everything that is drawn."""
        levels = self.routes.levels
        for level, lane in zip(levels, self.routes.lanes, strict=True):
            yield level, lane, 0.45
        for source, target, lane in self.routes.edges:
            for level in range(levels[source] + 1, levels[target]):
                yield level, lane, 0.0

    def items(self, corner: Point, head: float, title: str) -> list[Curve | Text]:
        """Title, edges and nodes, with the upper left corner at a position, and `head` between title and graph."""
        left, top = corner
        self.left, self.top = left, top + HEAD + head
        found: list[Curve | Text] = [
            Text((left, top + 11.0), title, TITLE_SIZE, bold=True),
            Text((left, top + (31.0 if title else 11.0)), subtitle(self.graph), SUBTITLE_SIZE, FAINT),
            *self._edges(),
        ]
        for index, node in enumerate(self.graph.nodes):
            found += draw_node(self._node_position(index), node, _tooltip(index, node))
        return found

    def _node_position(self, node: int) -> Point:
        x, y, _ = self._place(self.routes.levels[node], self.routes.lanes[node])
        return x, y

    def _place(self, level: int, lane: int) -> tuple[float, float, bool]:
        """Coordinates, and whether the snake turns there."""
        column = bisect_right(self._starts, level) - 1
        start, row = self._columns[column]
        down = column % 2 == 0
        x = self.left + self._axes[column] + (lane if down else -lane) * LANE
        y = self.top + (row + (level - start if down else start - level)) * ROW
        return x, y, (level == start and column > 0) or level + 1 in self._starts

    def _waypoint(self, level: int, lane: int) -> Point:
        """Where an edge passes a level: outer lanes turn further out."""
        x, y, turns = self._place(level, lane)
        return x, y - (max(-0.8 * ROW, min(0.8 * ROW, lane * TURN)) if turns else 0.0)

    def _edges(self) -> Iterator[Curve]:
        lines: dict[bool, list[Command]] = {True: [], False: []}
        heads: dict[bool, list[Command]] = {True: [], False: []}
        levels = self.routes.levels
        for source, target, lane in self.routes.edges:
            between = [self._waypoint(level, lane) for level in range(levels[source] + 1, levels[target])]
            points = [self._node_position(source), *between, self._node_position(target)]
            points[-1] = boundary(points[-1], points[-2], STYLES[self.graph.nodes[target].op])
            skip = bool(between)
            heads[skip] += arrow_head(points[-2], points[-1])
            points[-1] = towards(points[-1], points[-2], 3.0)
            lines[skip] += rounded(points)
        for skip, color in ((True, _SKIP), (False, _EDGE)):
            if lines[skip]:
                yield Curve(tuple(lines[skip]), stroke=color, width=1.2)
                yield Curve(tuple(heads[skip]), fill=color)


def subtitle(graph: Graph) -> str:
    """The line under a title."""
    return f"{len(graph):,} nodes, {len(graph.edges):,} edges"


def _tooltip(index: int, node: Node) -> str:
    shape = "x".join(map(str, node.shape)) if node.shape else ""
    return " ".join(filter(None, [str(index), node.op.value, shape, *(target.name for target in node.targets)]))
