"""What is drawn: a list of paths and texts on a plane whose y axis points down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]
Command = tuple[str, tuple[Point, ...]]
"""A letter of SVG's paths, and its points in absolute coordinates: M, L, Q, C or Z."""

INK, FAINT = "#1f2328", "#57606a"


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

    commands: tuple[Command, ...]
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
    color: str = INK
    bold: bool = False
    centered: bool = False


@dataclass(frozen=True, slots=True)
class Scene:
    """A drawing: its size, and what is on it from back to front."""

    width: float
    height: float
    items: tuple[Curve | Text, ...]


def towards(start: Point, end: Point, distance: float) -> Point:
    """The point at a distance from `start` on the way to `end`."""
    length = math.dist(start, end) or 1.0
    share = min(distance / length, 0.9)
    return start[0] + (end[0] - start[0]) * share, start[1] + (end[1] - start[1]) * share


def rounded(points: Sequence[Point], radius: float = 9.0) -> list[Command]:
    """A line through points with rounded corners."""
    commands: list[Command] = [("M", (points[0],))]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        cross = (corner[0] - before[0]) * (after[1] - corner[1]) - (corner[1] - before[1]) * (after[0] - corner[0])
        if abs(cross) < 1e-6:
            continue
        size = min(radius, math.dist(before, corner) / 2, math.dist(corner, after) / 2)
        commands.append(("L", (towards(corner, before, size),)))
        commands.append(("Q", (corner, towards(corner, after, size))))
    return [*commands, ("L", (points[-1],))]


def arrow_head(start: Point, tip: Point) -> list[Command]:
    """A triangle at the end of a line."""
    length = math.dist(start, tip) or 1.0
    x, y = (tip[0] - start[0]) / length, (tip[1] - start[1]) / length
    corners = [(tip[0] - 5.0 * x + side * 2.6 * y, tip[1] - 5.0 * y - side * 2.6 * x) for side in (1, -1)]
    return [("M", (tip,)), ("L", (corners[0],)), ("L", (corners[1],)), ("Z", ())]


def text_width(text: str, size: float) -> float:
    """Width of a line of text, from above."""
    return 0.6 * size * len(text)
