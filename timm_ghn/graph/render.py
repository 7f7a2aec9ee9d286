"""Drawing graphs, side by side as in figure 3 of arXiv 2207.10049: SVG without dependencies, PNG through matplotlib.

A graph is laid out by level (the longest path from the input). The longest path of all is a straight line, the trunk;
branches and skip connections run beside it in lanes. Deep graphs are folded like a snake: down one column, up the
next. What is drawn is a list of paths and texts (`Scene`), which the two writers translate.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any
from xml.sax.saxutils import escape

from timm_ghn.errors import GraphError, MissingDependencyError
from timm_ghn.graph.graph import Graph, Node, Op
from timm_ghn.paths import write_atomically

SUFFIXES = (".svg", ".png")
"""Kinds of files that `save` writes."""

_ROW = 25.0  # between levels
_LANE = 21.0  # between neighbours of one level
_TURN = 11.0  # between lanes where the snake turns
_COLUMN_GAP = 16.0
_PANEL_GAP = 46.0
_MARGIN = 24.0
_HEAD = 58.0  # title and subtitle
_TITLE_SIZE, _SUBTITLE_SIZE, _LEGEND_SIZE, _LABEL_SIZE = 19.0, 12.5, 13.0, 8.5
_ASPECT = 1.5  # width to height that is aimed at
_MIN_ROWS, _MAX_ROWS = 10, 80
_PNG_SCALE = 1.8
_EDGE, _SKIP, _INK, _FAINT = "#5c6370", "#3f8fbf", "#1f2328", "#57606a"

Point = tuple[float, float]


# --- what is drawn --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Curve:
    """A path; commands are those of SVG with absolute coordinates: M, L, Q, C and Z.

    Attributes:
        commands: Letters and their points.
        fill: Color inside, or "none".
        stroke: Color of the line, or "none".
        width: Width of the line.
        tooltip: Text that a browser shows under the pointer.
    """

    commands: tuple[tuple[str, tuple[Point, ...]], ...]
    fill: str = "none"
    stroke: str = "none"
    width: float = 1.0
    tooltip: str = ""


@dataclass(frozen=True, slots=True)
class Text:
    """A line of text.

    Attributes:
        position: Left end or middle of the line, at half of the height of the letters.
        text: What it says.
        size: Height of the font.
        color: Color.
        bold: Whether it is bold.
        centered: Whether `position` is the middle.
    """

    position: Point
    text: str
    size: float
    color: str = _INK
    bold: bool = False
    centered: bool = False


@dataclass(frozen=True, slots=True)
class Scene:
    """A drawing: its size, and what is on it from back to front."""

    width: float
    height: float
    items: tuple[Curve | Text, ...]


@dataclass(frozen=True, slots=True)
class _Style:
    """How an operator looks."""

    shape: str
    fill: str
    radius: float = 8.0
    ink: str = "#ffffff"


_STYLES = {
    Op.INPUT: _Style("house", "#24292f", 9.5),
    Op.CONV: _Style("square", "#2f6fd0"),
    Op.SEP_CONV: _Style("square", "#0e9384"),
    Op.DIL_CONV: _Style("square", "#7a3fc4"),
    Op.BIAS: _Style("diamond", "#b79df2", 5.5),
    Op.BN: _Style("bar", "#f2bf2c", 8.5),
    Op.LN: _Style("bar", "#93c83d", 8.5),
    Op.MSA: _Style("hexagon", "#d6336c", 9.0),
    Op.CSE: _Style("hexagon", "#ec7a08", 9.0),
    Op.SUM: _Style("plus", "#ffffff", 7.0, _INK),
    Op.CONCAT: _Style("lines", "#ffffff", 7.0, _INK),
    Op.MAX_POOL: _Style("triangle", "#e03131", 8.5),
    Op.AVG_POOL: _Style("triangle", "#ff9d9d", 8.5),
    Op.GLOB_AVG: _Style("triangle", "#8c1d1d", 10.0),
    Op.POS_ENC: _Style("slanted", "#cf6fe3", 7.0),
}


def to_scene(graphs: Graph | Sequence[Graph], *, titles: str | Sequence[str] | None = None) -> Scene:
    """Lay out one graph, or several beside each other, with a legend.

    Args:
        graphs: What to draw.
        titles: A title for each graph.

    Raises:
        GraphError: If there is no graph, or the number of titles is another one.
    """
    drawn = [graphs] if isinstance(graphs, Graph) else list(graphs)
    names = [titles] if isinstance(titles, str) else list(titles or [""] * len(drawn))
    if not drawn or len(names) != len(drawn):
        raise GraphError(f"cannot draw {len(drawn)} graphs with {len(names)} titles")
    routes = [_Routes.of(graph) for graph in drawn]
    rows = _choose_rows([route.num_levels for route in routes])
    panels = [_Panel(graph, route, rows) for graph, route in zip(drawn, routes, strict=True)]
    head = max(panel.turn_room for panel in panels)
    items: list[Curve | Text] = []
    left, bottom = _MARGIN, 0.0
    for graph, panel, name in zip(drawn, panels, names, strict=True):
        items += panel.items((left, _MARGIN), head, name)
        left += max(panel.width, _text_width(name, _TITLE_SIZE), _text_width(_subtitle(graph), _SUBTITLE_SIZE))
        left += _PANEL_GAP
        bottom = max(bottom, _MARGIN + head + panel.height)
    width = max(left - _PANEL_GAP + _MARGIN, 380.0)
    legend, bottom = _legend(drawn, bottom + 30.0, width)
    return Scene(width, bottom + _MARGIN, (*items, *legend))


def to_svg(graphs: Graph | Sequence[Graph], *, titles: str | Sequence[str] | None = None) -> str:
    """Draw one graph, or several beside each other, as an SVG document.

    Args:
        graphs: What to draw.
        titles: A title for each graph.

    Raises:
        GraphError: If there is no graph, or the number of titles is another one.
    """
    scene = to_scene(graphs, titles=titles)
    size = f"{scene.width:.0f} {scene.height:.0f}"
    width, height = size.split()
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{width}" height="{height}" '
        "font-family=\"Helvetica, Arial, 'DejaVu Sans', sans-serif\">",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *(_svg_curve(item) if isinstance(item, Curve) else _svg_text(item) for item in scene.items),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def save(
    graphs: Graph | Sequence[Graph], path: str | FilePath, *, titles: str | Sequence[str] | None = None
) -> FilePath:
    """Draw graphs into a file.

    Args:
        graphs: What to draw.
        path: File to write; its suffix, .svg or .png, decides the format.
        titles: A title for each graph.

    Returns:
        The path.

    Raises:
        GraphError: If the suffix is another one.
        MissingDependencyError: If a PNG is asked for and matplotlib is not installed.
        OSError: If the file cannot be written.
    """
    path = FilePath(path)
    if path.suffix.lower() not in SUFFIXES:
        raise GraphError(
            f"cannot draw a graph as {path.suffix or 'a file without suffix'!r}: use {' or '.join(SUFFIXES)}"
        )
    if path.suffix.lower() == ".svg":
        write_atomically(path, to_svg(graphs, titles=titles).encode())
    else:
        write_atomically(path, _to_png(to_scene(graphs, titles=titles)))
    return path


# --- levels, lanes and routes ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Routes:
    """Where nodes and edges run, before the snake is folded.

    Attributes:
        levels: Level of each node.
        lanes: Lane of each node; 0 is the trunk.
        edges: Pairs of nodes, and the lane in which an edge passes the levels between them.
    """

    levels: tuple[int, ...]
    lanes: tuple[int, ...]
    edges: tuple[tuple[int, int, int], ...]

    @property
    def num_levels(self) -> int:
        return max(self.levels) + 1

    @classmethod
    def of(cls, graph: Graph) -> _Routes:
        levels = _levels(graph)
        lanes = _lanes(graph, levels)
        return cls(tuple(levels), tuple(lanes), tuple(_route(graph, levels, lanes)))


def _levels(graph: Graph) -> list[int]:
    """The graph's levels, with sources other than the input moved to just before where they are read."""
    levels = [0] * len(graph)
    for level, nodes in enumerate(graph.levels):
        for node in nodes:
            levels[node] = level
    readers: dict[int, list[int]] = defaultdict(list)
    has_source = {target for _, target in graph.edges}
    for source, target in graph.edges:
        readers[source].append(levels[target])
    for node in range(1, len(graph)):
        if node not in has_source and readers[node]:
            levels[node] = max(min(readers[node]) - 1, 0)
    return levels


def _lanes(graph: Graph, levels: Sequence[int]) -> list[int]:
    """Lane 0 for the longest path; a branch keeps the lane that it begins in."""
    sources: dict[int, list[int]] = defaultdict(list)
    for source, target in graph.edges:
        sources[target].append(source)
    trunk = _trunk(levels, sources)
    lanes = [0] * len(graph)
    taken: dict[int, set[int]] = defaultdict(set)
    for node in trunk:
        taken[levels[node]].add(0)
    for node in sorted(set(range(len(graph))) - trunk, key=lambda index: (levels[index], index)):
        wanted = [lanes[source] for source in sources[node] if source not in trunk]
        free = (lane for lane in _outwards(wanted[0] if wanted else 1) if lane not in taken[levels[node]])
        lanes[node] = next(free)
        taken[levels[node]].add(lanes[node])
    return lanes


def _trunk(levels: Sequence[int], sources: dict[int, list[int]]) -> set[int]:
    node = max(range(len(levels)), key=lambda index: (levels[index], index))
    trunk = {node}
    while before := [source for source in sources[node] if levels[source] == levels[node] - 1]:
        node = max(before)
        trunk.add(node)
    return trunk


def _outwards(start: int) -> Iterator[int]:
    """Lanes by their distance from one: start, start - 1, start + 1, ..."""
    yield start
    step = 1
    while True:
        yield start - step if start > 0 else start + step
        yield start + step if start > 0 else start - step
        step += 1


def _route(graph: Graph, levels: Sequence[int], lanes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Edges with a lane that is free of nodes, and not full of other edges, where they pass by."""
    taken = {(levels[node], lanes[node]) for node in range(len(graph))}
    busy: Counter[tuple[int, int]] = Counter()
    widest = max(abs(lane) for lane in lanes) + 3
    for source, target in sorted(graph.edges, key=lambda edge: levels[edge[1]] - levels[edge[0]]):
        between = range(levels[source] + 1, levels[target])
        if not between:
            yield source, target, lanes[target]
            continue

        def cost(lane: int, source: int = source, target: int = target, between: range = between) -> float:
            crowd = sum(busy[level, lane] for level in between) / len(between)
            return abs(lane - lanes[source]) + abs(lane - lanes[target]) + 0.6 * min(crowd, 4.0) + 0.01 * (lane > 0)

        free = [n for n in range(-widest, widest + 1) if not any((level, n) in taken for level in between)]
        lane = min(free, key=cost)
        busy.update((level, lane) for level in between)
        yield source, target, lane


def _choose_rows(depths: Sequence[int]) -> int:
    """Number of levels in a column that makes the whole drawing about `_ASPECT` times as wide as high."""

    def misfit(rows: int) -> float:
        columns = sum(math.ceil(depth / rows) for depth in depths)
        return abs(math.log(columns * (1.7 * _LANE + _COLUMN_GAP) / (rows * _ROW * _ASPECT)))

    return min(range(_MIN_ROWS, _MAX_ROWS + 1), key=misfit)


def _fold(routes: _Routes, rows: int) -> tuple[tuple[int, int], ...]:
    """First level of each column and its row; a column begins in the row where the one before ends.

    The snake turns where few things are beside the trunk and no skip connection begins or ends.
    """
    crowd: Counter[int] = Counter(level for level, lane in zip(routes.levels, routes.lanes, strict=True) if lane)
    for source, target, _ in routes.edges:
        if routes.levels[target] > routes.levels[source] + 1:
            crowd.update({routes.levels[source]: 1, routes.levels[target]: 1})
    columns = [(0, 0)]
    while True:
        start, row = columns[-1]
        room = rows - row if len(columns) % 2 else row + 1
        if start + room >= routes.num_levels:
            return tuple(columns)
        lengths = range(max(2, room - rows // 4), room + 1)
        length = min(lengths, key=lambda n: 3 * (crowd[start + n - 1] + crowd[start + n]) + room - n)
        columns.append((start + length, row + length - 1 if len(columns) % 2 else row - length + 1))


# --- one graph on the plane -----------------------------------------------------------------------------------------


@dataclass
class _Panel:
    """A graph folded into columns of at most `rows` levels; positions are relative to `left` and `top`."""

    graph: Graph
    routes: _Routes
    rows: int
    left: float = 0.0
    top: float = 0.0
    _axes: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._columns = _fold(self.routes, self.rows)
        self._starts = [start for start, _ in self._columns]
        before, after = [0.5] * len(self._columns), [0.5] * len(self._columns)  # lanes left and right of the axes
        for level, lane, extent in self._used():
            column = bisect_right(self._starts, level) - 1
            side = lane if column % 2 == 0 else -lane
            before[column], after[column] = max(before[column], extent - side), max(after[column], extent + side)
        position = 0.0
        for left, right in zip(before, after, strict=True):
            position += left * _LANE
            self._axes.append(position)
            position += right * _LANE + _COLUMN_GAP
        self.width = position - _COLUMN_GAP
        outermost = max(abs(lane) for _, lane, _ in self._used())
        self.turn_room = outermost * _TURN if len(self._columns) > 1 else 0.0
        self.height = _HEAD + (min(self.rows, self.routes.num_levels) - 1) * _ROW + self.turn_room + 12.0

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
        self.left, self.top = left, top + _HEAD + head
        found: list[Curve | Text] = [
            Text((left, top + 11.0), title, _TITLE_SIZE, bold=True),
            Text((left, top + (31.0 if title else 11.0)), _subtitle(self.graph), _SUBTITLE_SIZE, _FAINT),
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
        x = self.left + self._axes[column] + (lane if down else -lane) * _LANE
        y = self.top + (row + (level - start if down else start - level)) * _ROW
        return x, y, (level == start and column > 0) or level + 1 in self._starts

    def _waypoint(self, level: int, lane: int) -> Point:
        """Where an edge passes a level: outer lanes turn further out."""
        x, y, turns = self._place(level, lane)
        return x, y - (max(-0.8 * _ROW, min(0.8 * _ROW, lane * _TURN)) if turns else 0.0)

    def _edges(self) -> Iterator[Curve]:
        lines: dict[bool, list[tuple[str, tuple[Point, ...]]]] = {True: [], False: []}
        heads: dict[bool, list[tuple[str, tuple[Point, ...]]]] = {True: [], False: []}
        levels = self.routes.levels
        for source, target, lane in self.routes.edges:
            between = [self._waypoint(level, lane) for level in range(levels[source] + 1, levels[target])]
            points = [self._node_position(source), *between, self._node_position(target)]
            points[-1] = _boundary(points[-1], points[-2], _STYLES[self.graph.nodes[target].op])
            skip = bool(between)
            heads[skip] += _arrow_head(points[-2], points[-1])
            points[-1] = _towards(points[-1], points[-2], 3.0)
            lines[skip] += _rounded(points)
        for skip, color in ((True, _SKIP), (False, _EDGE)):
            if lines[skip]:
                yield Curve(tuple(lines[skip]), stroke=color, width=1.2)
                yield Curve(tuple(heads[skip]), fill=color)


def _subtitle(graph: Graph) -> str:
    return f"{len(graph):,} nodes, {len(graph.edges):,} edges"


def _tooltip(index: int, node: Node) -> str:
    shape = "x".join(map(str, node.shape)) if node.shape else ""
    return " ".join(filter(None, [str(index), node.op.value, shape, *(target.name for target in node.targets)]))


def _boundary(center: Point, origin: Point, style: _Style) -> Point:
    """Where a line from `origin` to the center of a symbol meets the box around the symbol."""
    corners = _CORNERS.get(style.shape, ((1.0, 1.0),))
    x, y = origin[0] - center[0], origin[1] - center[1]
    half_width = max(abs(corner[0]) for corner in corners) * style.radius + 0.5
    half_height = max(abs(corner[1]) for corner in corners) * style.radius + 0.5
    scale = min(half_width / abs(x) if x else math.inf, half_height / abs(y) if y else math.inf, 0.9)
    return center[0] + x * scale, center[1] + y * scale


def _towards(start: Point, end: Point, distance: float) -> Point:
    """The point at a distance from `start` on the way to `end`."""
    length = math.dist(start, end) or 1.0
    share = min(distance / length, 0.9)
    return start[0] + (end[0] - start[0]) * share, start[1] + (end[1] - start[1]) * share


def _rounded(points: Sequence[Point], radius: float = 9.0) -> list[tuple[str, tuple[Point, ...]]]:
    """A line through points with rounded corners."""
    commands: list[tuple[str, tuple[Point, ...]]] = [("M", (points[0],))]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        cross = (corner[0] - before[0]) * (after[1] - corner[1]) - (corner[1] - before[1]) * (after[0] - corner[0])
        if abs(cross) < 1e-6:
            continue
        size = min(radius, math.dist(before, corner) / 2, math.dist(corner, after) / 2)
        commands.append(("L", (_towards(corner, before, size),)))
        commands.append(("Q", (corner, _towards(corner, after, size))))
    return [*commands, ("L", (points[-1],))]


def _arrow_head(start: Point, tip: Point) -> list[tuple[str, tuple[Point, ...]]]:
    length = math.dist(start, tip) or 1.0
    x, y = (tip[0] - start[0]) / length, (tip[1] - start[1]) / length
    corners = [(tip[0] - 5.0 * x + side * 2.6 * y, tip[1] - 5.0 * y - side * 2.6 * x) for side in (1, -1)]
    return [("M", (tip,)), ("L", (corners[0],)), ("L", (corners[1],)), ("Z", ())]


# --- nodes and legend -----------------------------------------------------------------------------------------------


def draw_node(center: Point, node: Node, tooltip: str = "") -> list[Curve | Text]:
    """The symbol of a node; kernels larger than 1 x 1 are written on convolutions."""
    style = _STYLES[node.op]
    outline = _circle(center, style.radius) if style.shape in ("plus", "lines") else _polygon(center, style)
    items: list[Curve | Text] = [Curve(tuple(outline), style.fill, _INK, 0.9, tooltip)]
    if style.shape in ("plus", "lines"):
        items.append(Curve(tuple(_strokes(center, style)), stroke=_INK, width=1.5))
    if style.shape == "square" and (label := _kernel_label(node)):
        size = _LABEL_SIZE if len(label) < 3 else _LABEL_SIZE * 0.74
        items.append(Text(center, label, size, style.ink, bold=True, centered=True))
    return items


def _kernel_label(node: Node) -> str:
    if node.shape is None or len(node.shape) < 4:
        return "1" if node.shape else ""
    height, width = node.shape[-2:]
    return str(height) if height == width else f"{height}\N{MULTIPLICATION SIGN}{width}"


# Corners of the unit shapes; y points down.
_CORNERS: dict[str, tuple[Point, ...]] = {
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "diamond": ((0.0, -1.0), (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)),
    "bar": ((-1.0, -0.45), (1.0, -0.45), (1.0, 0.45), (-1.0, 0.45)),
    "hexagon": ((-0.5, -0.87), (0.5, -0.87), (1.0, 0.0), (0.5, 0.87), (-0.5, 0.87), (-1.0, 0.0)),
    "triangle": ((-1.0, -0.8), (1.0, -0.8), (0.0, 0.95)),
    "house": ((-0.85, -0.75), (0.85, -0.75), (0.85, 0.2), (0.0, 0.95), (-0.85, 0.2)),
    "slanted": ((-0.6, -0.75), (1.1, -0.75), (0.6, 0.75), (-1.1, 0.75)),
}


def _polygon(center: Point, style: _Style) -> list[tuple[str, tuple[Point, ...]]]:
    first, *others = [(center[0] + x * style.radius, center[1] + y * style.radius) for x, y in _CORNERS[style.shape]]
    return [("M", (first,)), *(("L", (corner,)) for corner in others), ("Z", ())]


def _circle(center: Point, radius: float) -> list[tuple[str, tuple[Point, ...]]]:
    x, y = center
    k = 0.5523 * radius  # control points of the cubic curve closest to a quarter of a circle
    return [
        ("M", ((x + radius, y),)),
        ("C", ((x + radius, y + k), (x + k, y + radius), (x, y + radius))),
        ("C", ((x - k, y + radius), (x - radius, y + k), (x - radius, y))),
        ("C", ((x - radius, y - k), (x - k, y - radius), (x, y - radius))),
        ("C", ((x + k, y - radius), (x + radius, y - k), (x + radius, y))),
        ("Z", ()),
    ]


def _strokes(center: Point, style: _Style) -> list[tuple[str, tuple[Point, ...]]]:
    """A plus for sums, two bars for concatenations."""
    x, y = center
    r = 0.55 * style.radius
    if style.shape == "plus":
        return [("M", ((x - r, y),)), ("L", ((x + r, y),)), ("M", ((x, y - r),)), ("L", ((x, y + r),))]
    d = 0.3 * style.radius
    return [("M", ((x - d, y - r),)), ("L", ((x - d, y + r),)), ("M", ((x + d, y - r),)), ("L", ((x + d, y + r),))]


def _legend(graphs: Sequence[Graph], top: float, width: float) -> tuple[list[Curve | Text], float]:
    """Symbols and names of the operators that occur, in lines, and where they end."""
    present = {node.op for graph in graphs for node in graph.nodes}
    labels = [(Node(op), op.value) for op in _STYLES if op in present]
    items: list[Curve | Text] = []
    x, y = _MARGIN + 10.0, top
    for node, label in labels:
        advance = 18.0 + _text_width(label, _LEGEND_SIZE) + 22.0
        if x + advance > width - _MARGIN and x > _MARGIN + 10.0:
            x, y = _MARGIN + 10.0, y + 26.0
        items += [*draw_node((x, y), node), Text((x + 17.0, y), label, _LEGEND_SIZE)]
        x += advance
    for note in ("number: kernel size", "blue: skips levels"):
        advance = _text_width(note, _LEGEND_SIZE)
        if x + advance > width - _MARGIN and x > _MARGIN + 10.0:
            x, y = _MARGIN, y + 26.0
        items.append(Text((x, y), note, _LEGEND_SIZE, _FAINT))
        x += advance
    return items, y + 10.0


def _text_width(text: str, size: float) -> float:
    """Width of a line of text, from above."""
    return 0.6 * size * len(text)


# --- writers --------------------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _path_data(curve: Curve) -> str:
    return "".join(
        letter + " ".join(f"{_number(x)} {_number(y)}" for x, y in points) for letter, points in curve.commands
    )


def _svg_curve(curve: Curve) -> str:
    stroke = f' stroke="{curve.stroke}" stroke-width="{_number(curve.width)}"' if curve.stroke != "none" else ""
    start = f'<path d="{_path_data(curve)}" fill="{curve.fill}"{stroke}'
    return f"{start}><title>{escape(curve.tooltip)}</title></path>" if curve.tooltip else f"{start}/>"


def _svg_text(text: Text) -> str:
    x, y = text.position
    attributes = ' font-weight="bold"' if text.bold else ""
    attributes += ' text-anchor="middle"' if text.centered else ""
    baseline = y + 0.355 * text.size  # half of the height of capital letters
    return (
        f'<text x="{_number(x)}" y="{_number(baseline)}" font-size="{_number(text.size)}" fill="{text.color}"'
        f"{attributes}>{escape(text.text)}</text>"
    )


def _to_png(scene: Scene) -> bytes:
    """The scene as a PNG.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path
    except ImportError as error:
        raise MissingDependencyError(
            "drawing a PNG needs matplotlib: pip install 'timm-ghn[plot]' (an .svg needs nothing)"
        ) from error
    import io

    codes: dict[str, list[Any]] = {
        "M": [Path.MOVETO],
        "L": [Path.LINETO],
        "Q": [Path.CURVE3] * 2,
        "C": [Path.CURVE4] * 3,
    }
    figure = Figure(figsize=(scene.width / 72, scene.height / 72), dpi=72 * _PNG_SCALE, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, scene.width), ylim=(scene.height, 0))
    axes.axis("off")
    for order, item in enumerate(scene.items):
        if isinstance(item, Text):
            axes.text(
                *item.position,
                item.text,
                fontsize=item.size * 0.9,  # DejaVu Sans is wide
                color=item.color,
                fontweight="bold" if item.bold else "normal",
                ha="center" if item.centered else "left",
                va="center_baseline" if not item.centered else "center",
                zorder=order,
            )
            continue
        vertices, kinds = _flattened(item, codes, Path.CLOSEPOLY)
        style = {"facecolor": item.fill, "edgecolor": item.stroke, "linewidth": item.width, "zorder": order}
        axes.add_patch(PathPatch(Path(vertices, kinds), **style))
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)  # type: ignore[no-untyped-call, unused-ignore]
    return buffer.getvalue()


def _flattened(curve: Curve, codes: dict[str, list[Any]], close: Any) -> tuple[list[Point], list[Any]]:
    """Vertices and matplotlib's codes of a curve."""
    vertices: list[Point] = []
    kinds: list[Any] = []
    for letter, points in curve.commands:
        vertices += points or (vertices[-1],)
        kinds += codes.get(letter, [close])
    return vertices, kinds
