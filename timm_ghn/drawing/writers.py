"""Scenes as SVG, without dependencies, and as PNG, through matplotlib."""

from __future__ import annotations

import io
from typing import Any
from xml.sax.saxutils import escape

from timm_ghn.drawing.scene import Curve, Point, Scene, Text
from timm_ghn.errors import MissingDependencyError

_PNG_SCALE = 1.8


def scene_to_svg(scene: Scene) -> str:
    """The scene as an SVG document."""
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


def to_png(scene: Scene) -> bytes:
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
