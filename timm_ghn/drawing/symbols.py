"""How the operators look: a symbol for each, its outline, and the legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from timm_ghn.drawing.scene import FAINT, INK, Command, Curve, Point, Text, text_width
from timm_ghn.graph.graph import Graph
from timm_ghn.graph.nodes import Node, Op

MARGIN = 24.0
LEGEND_SIZE, LABEL_SIZE = 13.0, 8.5


@dataclass(frozen=True, slots=True)
class Style:
    """How an operator looks."""

    shape: str
    fill: str
    radius: float = 8.0
    ink: str = "#ffffff"


STYLES = {
    Op.INPUT: Style("house", "#24292f", 9.5),
    Op.CONV: Style("square", "#2f6fd0"),
    Op.SEP_CONV: Style("square", "#0e9384"),
    Op.DIL_CONV: Style("square", "#7a3fc4"),
    Op.BIAS: Style("diamond", "#b79df2", 5.5),
    Op.BN: Style("bar", "#f2bf2c", 8.5),
    Op.LN: Style("bar", "#93c83d", 8.5),
    Op.MSA: Style("hexagon", "#d6336c", 9.0),
    Op.CSE: Style("hexagon", "#ec7a08", 9.0),
    Op.SUM: Style("plus", "#ffffff", 7.0, INK),
    Op.CONCAT: Style("lines", "#ffffff", 7.0, INK),
    Op.MAX_POOL: Style("triangle", "#e03131", 8.5),
    Op.AVG_POOL: Style("triangle", "#ff9d9d", 8.5),
    Op.GLOB_AVG: Style("triangle", "#8c1d1d", 10.0),
    Op.POS_ENC: Style("slanted", "#cf6fe3", 7.0),
}


def draw_node(center: Point, node: Node, tooltip: str = "") -> list[Curve | Text]:
    """The symbol of a node; kernels larger than 1 x 1 are written on convolutions."""
    style = STYLES[node.op]
    outline = _circle(center, style.radius) if style.shape in ("plus", "lines") else _polygon(center, style)
    items: list[Curve | Text] = [Curve(tuple(outline), style.fill, INK, 0.9, tooltip)]
    if style.shape in ("plus", "lines"):
        items.append(Curve(tuple(_strokes(center, style)), stroke=INK, width=1.5))
    if style.shape == "square" and (label := _kernel_label(node)):
        size = LABEL_SIZE if len(label) < 3 else LABEL_SIZE * 0.74
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


def _polygon(center: Point, style: Style) -> list[Command]:
    first, *others = [(center[0] + x * style.radius, center[1] + y * style.radius) for x, y in _CORNERS[style.shape]]
    return [("M", (first,)), *(("L", (corner,)) for corner in others), ("Z", ())]


def _circle(center: Point, radius: float) -> list[Command]:
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


def _strokes(center: Point, style: Style) -> list[Command]:
    """A plus for sums, two bars for concatenations."""
    x, y = center
    r = 0.55 * style.radius
    if style.shape == "plus":
        return [("M", ((x - r, y),)), ("L", ((x + r, y),)), ("M", ((x, y - r),)), ("L", ((x, y + r),))]
    d = 0.3 * style.radius
    return [("M", ((x - d, y - r),)), ("L", ((x - d, y + r),)), ("M", ((x + d, y - r),)), ("L", ((x + d, y + r),))]


def boundary(center: Point, origin: Point, style: Style) -> Point:
    """Where a line from `origin` to the center of a symbol meets the box around the symbol."""
    corners = _CORNERS.get(style.shape, ((1.0, 1.0),))
    x, y = origin[0] - center[0], origin[1] - center[1]
    half_width = max(abs(corner[0]) for corner in corners) * style.radius + 0.5
    half_height = max(abs(corner[1]) for corner in corners) * style.radius + 0.5
    scale = min(half_width / abs(x) if x else math.inf, half_height / abs(y) if y else math.inf, 0.9)
    return center[0] + x * scale, center[1] + y * scale


def legend(graphs: Sequence[Graph], top: float, width: float) -> tuple[list[Curve | Text], float]:
    """Symbols and names of the operators that occur, in lines, and where they end."""
    present = {node.op for graph in graphs for node in graph.nodes}
    labels = [(Node(op), op.value) for op in STYLES if op in present]
    items: list[Curve | Text] = []
    x, y = MARGIN + 10.0, top
    for node, label in labels:
        advance = 18.0 + text_width(label, LEGEND_SIZE) + 22.0
        if x + advance > width - MARGIN and x > MARGIN + 10.0:
            x, y = MARGIN + 10.0, y + 26.0
        items += [*draw_node((x, y), node), Text((x + 17.0, y), label, LEGEND_SIZE)]
        x += advance
    for note in ("number: kernel size", "blue: skips levels"):
        advance = text_width(note, LEGEND_SIZE)
        if x + advance > width - MARGIN and x > MARGIN + 10.0:
            x, y = MARGIN, y + 26.0
        items.append(Text((x, y), note, LEGEND_SIZE, FAINT))
        x += advance
    return items, y + 10.0
