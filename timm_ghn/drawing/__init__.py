"""Drawing graphs, side by side as in figure 3 of arXiv 2207.10049: SVG without dependencies, PNG through matplotlib.

graph -> levels and lanes (`routes`) -> positions (`panel`, `symbols`) -> paths and texts (`scene`) -> file (`writers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from timm_ghn.drawing.panel import SUBTITLE_SIZE, TITLE_SIZE, Panel, choose_rows, subtitle
from timm_ghn.drawing.routes import Routes
from timm_ghn.drawing.scene import Curve, Scene, Text, text_width
from timm_ghn.drawing.symbols import MARGIN, legend
from timm_ghn.drawing.writers import scene_to_svg, to_png
from timm_ghn.errors import GraphError
from timm_ghn.graph.graph import Graph
from timm_ghn.storage.atomic import write_atomically

__all__ = ["SUFFIXES", "Curve", "Scene", "Text", "save", "to_scene", "to_svg"]

SUFFIXES = (".svg", ".png")
"""Kinds of files that `save` writes."""

_PANEL_GAP = 46.0


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
    routes = [Routes.of(graph) for graph in drawn]
    rows = choose_rows([route.num_levels for route in routes])
    panels = [Panel(graph, route, rows) for graph, route in zip(drawn, routes, strict=True)]
    head = max(panel.turn_room for panel in panels)
    items: list[Curve | Text] = []
    left, bottom = MARGIN, 0.0
    for graph, panel, name in zip(drawn, panels, names, strict=True):
        items += panel.items((left, MARGIN), head, name)
        left += max(panel.width, text_width(name, TITLE_SIZE), text_width(subtitle(graph), SUBTITLE_SIZE))
        left += _PANEL_GAP
        bottom = max(bottom, MARGIN + head + panel.height)
    width = max(left - _PANEL_GAP + MARGIN, 380.0)
    below, bottom = legend(drawn, bottom + 30.0, width)
    return Scene(width, bottom + MARGIN, (*items, *below))


def to_svg(graphs: Graph | Sequence[Graph], *, titles: str | Sequence[str] | None = None) -> str:
    """Draw one graph, or several beside each other, as an SVG document.

    Args:
        graphs: What to draw.
        titles: A title for each graph.

    Raises:
        GraphError: If there is no graph, or the number of titles is another one.
    """
    return scene_to_svg(to_scene(graphs, titles=titles))


def save(graphs: Graph | Sequence[Graph], path: str | Path, *, titles: str | Sequence[str] | None = None) -> Path:
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
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise GraphError(
            f"cannot draw a graph as {path.suffix or 'a file without suffix'!r}: use {' or '.join(SUFFIXES)}"
        )
    if path.suffix.lower() == ".svg":
        write_atomically(path, to_svg(graphs, titles=titles).encode())
    else:
        write_atomically(path, to_png(to_scene(graphs, titles=titles)))
    return path
