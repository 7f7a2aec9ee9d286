"""Graphs as a figure of matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path

from timm_ghn.drawing.layout import LANE, TURN, Layout, arrange
from timm_ghn.errors import GraphError
from timm_ghn.graph.graph import Graph
from timm_ghn.graph.nodes import CONVOLUTIONS, Node, Op

Vector = npt.NDArray[np.float64]

_INK, _FAINT, _EDGE, _SKIP = "#1f2328", "#57606a", "#5c6370", "#3f8fbf"
_TITLE, _TEXT, _LABEL = 17.0, 11.5, 7.5  # sizes of fonts
_HEAD = TURN + 14.0  # from the line under a title to the first level
_PANEL_GAP, _LEGEND_COLUMN = 46.0, 88.0

# Symbols that matplotlib does not have; y points up.
_HOUSE = Path([(-0.9, 0.8), (0.9, 0.8), (0.9, -0.2), (0, -1), (-0.9, -0.2), (-0.9, 0.8)], closed=True)
_BAR = Path([(-1, -0.45), (1, -0.45), (1, 0.45), (-1, 0.45), (-1, -0.45)], closed=True)
_SLANTED = Path([(-1, -0.7), (0.5, -0.7), (1, 0.7), (-0.5, 0.7), (-1, -0.7)], closed=True)
_PLUS = Path.make_compound_path(Path.unit_circle(), Path([(-0.6, 0), (0.6, 0)]), Path([(0, -0.6), (0, 0.6)]))
_LINES = Path.make_compound_path(Path.unit_circle(), Path([(-0.3, -0.6), (-0.3, 0.6)]), Path([(0.3, -0.6), (0.3, 0.6)]))
_STYLES: dict[Op, tuple[Any, str, float]] = {  # symbol, color, size in points
    Op.INPUT: (_HOUSE, "#24292f", 19.0),
    Op.CONV: ("s", "#2f6fd0", 14.5),
    Op.SEP_CONV: ("s", "#0e9384", 14.5),
    Op.DIL_CONV: ("s", "#7a3fc4", 14.5),
    Op.BIAS: ("D", "#b79df2", 8.0),
    Op.BN: (_BAR, "#f2bf2c", 17.0),
    Op.LN: (_BAR, "#93c83d", 17.0),
    Op.MSA: ("H", "#d6336c", 17.0),
    Op.CSE: ("H", "#ec7a08", 17.0),
    Op.SUM: (_PLUS, "#ffffff", 14.5),
    Op.CONCAT: (_LINES, "#ffffff", 14.5),
    Op.MAX_POOL: ("v", "#e03131", 16.0),
    Op.AVG_POOL: ("v", "#ff9d9d", 16.0),
    Op.GLOB_AVG: ("v", "#8c1d1d", 19.0),
    Op.POS_ENC: (_SLANTED, "#cf6fe3", 15.0),
}


def draw(graphs: Sequence[Graph], titles: Sequence[str]) -> Figure:
    """Draw graphs beside each other, with a legend.

    Args:
        graphs: What to draw.
        titles: A title for each graph.

    Returns:
        A figure with one axes, whose units are points (1/72 inch). The nodes of one operator of one graph are a
        collection with the operator's name as its label. The legend lies below the figure's lower edge: save the figure
        with `bbox_inches="tight"`.

    Raises:
        GraphError: If there is no graph, or the number of titles is another one.
    """
    if not graphs or len(titles) != len(graphs):
        raise GraphError(f"cannot draw {len(graphs)} graphs with {len(titles)} titles")
    figure = Figure()
    axes = figure.add_axes((0, 0, 1, 1))
    layouts = arrange(graphs)
    left = 0.0
    for graph, layout, title in zip(graphs, layouts, titles, strict=True):
        subtitle = f"{len(graph):,} nodes, {len(graph.edges):,} edges"
        axes.text(left - LANE / 2, -_HEAD - 16, title, size=_TITLE, weight="bold", color=_INK, parse_math=False)
        axes.text(left - LANE / 2, -_HEAD, subtitle, size=_TEXT, color=_FAINT)
        _draw_edges(axes, graph, layout, left)
        _draw_nodes(axes, graph, layout, left)
        # A letter is, on average, at most 0.7 times as wide as its font is high.
        left += max(layout.width + LANE, 0.7 * _TITLE * len(title), 0.7 * _TEXT * len(subtitle)) + _PANEL_GAP
    width, height = max(left - _PANEL_GAP, 380.0), max(layout.height for layout in layouts) + TURN
    figure.set_size_inches(width / 72, (height + _HEAD) / 72)
    axes.set(xlim=(-LANE / 2, width - LANE / 2), ylim=(height, -_HEAD))
    axes.axis("off")
    _draw_legend(axes, width)
    return figure


def _draw_edges(axes: Axes, graph: Graph, layout: Layout, left: float) -> None:
    """Draw arrows that end at the border of their target's symbol; `left` is the x of the leftmost lane."""
    reach = {}
    for op, (symbol, _, size) in _STYLES.items():
        marker = MarkerStyle(symbol)
        box = marker.get_path().get_extents(marker.get_transform())
        reach[op] = np.array([box.width, box.height]) * size / 2 + 0.5
    style: dict[str, Any] = {"arrowstyle": "-|>,head_length=4,head_width=2", "mutation_scale": 1, "linewidth": 1.2}
    for (_, target), points in zip(graph.edges, layout.edges, strict=True):
        line = points + np.array([left, 0.0])
        way = line[-2] - line[-1]
        line[-1] += way * min(0.9, *(reach[graph.nodes[target].op][way != 0] / abs(way[way != 0])))
        color, order = (_EDGE, 2) if len(line) == 2 else (_SKIP, 1)
        axes.add_patch(FancyArrowPatch(path=_rounded(line), color=color, zorder=order, **style))


def _draw_nodes(axes: Axes, graph: Graph, layout: Layout, left: float) -> None:
    """Draw symbols, with the size of the kernel on convolutions; `left` is the x of the leftmost lane."""
    x, y = layout.nodes.T + np.array([[left], [0.0]])
    border: dict[str, Any] = {"edgecolors": _INK, "linewidths": 0.9, "zorder": 3, "clip_on": False}
    for op, (symbol, color, size) in _STYLES.items():
        if at := [index for index, node in enumerate(graph.nodes) if node.op is op]:
            axes.scatter(x[at], y[at], s=size**2, c=color, marker=symbol, label=op.value, **border)
    font: dict[str, Any] = {"weight": "bold", "color": "white", "ha": "center", "va": "center_baseline", "zorder": 4}
    for index, node in enumerate(graph.nodes):
        if label := _kernel(node):
            axes.text(x[index], y[index], label, size=_LABEL if len(label) < 3 else 0.74 * _LABEL, **font)


def _draw_legend(axes: Axes, width: float) -> None:
    """Name the symbols that occur, in lines of at most this width, below the axes."""
    symbols = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    handles = [symbols[op.value] for op in _STYLES if op.value in symbols]
    handles.append(Line2D([], [], linestyle="", marker="$1$", color=_INK, label="size of kernel"))
    handles.append(Line2D([], [], color=_SKIP, label="skips levels"))
    columns = math.ceil(len(handles) / math.ceil(len(handles) * _LEGEND_COLUMN / width))
    spaces = {"labelspacing": 0.8, "columnspacing": 1.5, "handlelength": 1.5, "handletextpad": 0.4, "borderpad": 0}
    font = {"fontsize": _TEXT, "labelcolor": _INK}
    place: dict[str, Any] = {"bbox_to_anchor": (0, 0), "ncols": columns, "frameon": False}
    axes.legend(handles=handles, loc="upper left", **place, **font, **spaces)


def _kernel(node: Node) -> str:
    """The size of a convolution's kernel."""
    if node.op not in CONVOLUTIONS or not node.shape:
        return ""
    height, width = node.shape[2:] or (1, 1)
    return str(height) if height == width else f"{height}\N{MULTIPLICATION SIGN}{width}"


def _rounded(line: Vector) -> Path:
    """A line through points, (N, 2), with rounded corners: quadratic curves between the middles of its pieces."""
    x, y = np.diff(line, axis=0).T
    corners = 1 + np.flatnonzero(abs(x[:-1] * y[1:] - y[:-1] * x[1:]) > 1e-6)
    kept = line[sorted({0, len(line) - 1, *corners - 1, *corners, *corners + 1})]  # no more than is needed
    vertices = np.empty((2 * len(kept) - 1, 2))
    vertices[::2], vertices[1::2] = kept, (kept[:-1] + kept[1:]) / 2
    return Path(vertices, [Path.MOVETO, Path.LINETO, *[Path.CURVE3] * (2 * len(kept) - 4), Path.LINETO])
