"""Drawing graphs, side by side as in figure 3 of arXiv 2207.10049: `layout` places them, `figure` draws them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm_ghn.errors import GraphError, MissingDependencyError
from timm_ghn.graph.graph import Graph
from timm_ghn.storage.atomic import save_atomically

__all__ = ["SUFFIXES", "save"]

_UNDATED: dict[str, dict[str, None]] = {".svg": {"Date": None}, ".png": {}, ".pdf": {"CreationDate": None}}
SUFFIXES = tuple(_UNDATED)
"""Kinds of files that `save` writes."""


def save(graphs: Graph | Sequence[Graph], path: str | Path, *, titles: str | Sequence[str] | None = None) -> Path:
    """Draw one graph, or several beside each other, with a legend. The same graphs give the same bytes.

    Args:
        graphs: What to draw.
        path: File to write; its suffix, .svg, .png or .pdf, decides the format.
        titles: A title for each graph.

    Returns:
        The path.

    Raises:
        GraphError: If the suffix is another one, there is no graph, or the number of titles is another one.
        MissingDependencyError: If matplotlib is not installed.
        OSError: If the file cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise GraphError(f"cannot draw a graph as {suffix or 'a file without suffix'!r}: use {' or '.join(SUFFIXES)}")
    try:
        from matplotlib import style

        from timm_ghn.drawing.figure import draw
    except ImportError as error:
        raise MissingDependencyError("drawing a graph needs matplotlib: pip install 'timm-ghn[plot]'") from error
    drawn = [graphs] if isinstance(graphs, Graph) else list(graphs)
    names = [titles] if isinstance(titles, str) else list(titles or [""] * len(drawn))
    with style.context(["default", {"svg.fonttype": "none", "svg.hashsalt": "timm-ghn"}]):
        figure = draw(drawn, names)
        options: dict[str, Any] = {"dpi": 130, "metadata": _UNDATED[suffix], "bbox_inches": "tight", "pad_inches": 0.3}
        save_atomically(path, lambda temporary: figure.savefig(temporary, format=suffix[1:], **options))
    return path
