"""An easy task to begin a training with: which region of a photograph, or which kind of drawing, is this?

A GHN learns nothing for thousands of steps when it starts on hundreds of natural classes. Crops of a few photographs
can be told apart by colour and texture, and drawn shapes in random colours by form alone. The photographs are those in
the wheels of scikit-image and scikit-learn, so that everything is made by this code from freely licensed files.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter
from torch import Tensor

from timm_ghn.errors import TrainingError
from timm_ghn.training.data import ImageSet


@dataclass(frozen=True)
class Photograph:
    """A photograph in the wheel of a package.

    Attributes:
        package: Sub-package that holds it.
        name: File name.
        grid: Rows and columns of regions, each of which is a class.
    """

    package: str
    name: str
    grid: tuple[int, int] = (1, 1)


_SKIMAGE, _SKLEARN = "skimage.data", "sklearn.datasets.images"
PHOTOGRAPHS: tuple[Photograph, ...] = (
    Photograph(_SKIMAGE, "astronaut.png", (2, 2)),
    Photograph(_SKIMAGE, "chelsea.png", (2, 2)),
    Photograph(_SKIMAGE, "coffee.png", (2, 2)),
    Photograph(_SKIMAGE, "motorcycle_left.png", (2, 3)),
    Photograph(_SKIMAGE, "rocket.jpg", (2, 1)),
    Photograph(_SKIMAGE, "retina.jpg", (2, 1)),
    Photograph(_SKIMAGE, "hubble_deep_field.jpg"),
    Photograph(_SKIMAGE, "ihc.png", (2, 1)),
    Photograph(_SKIMAGE, "camera.png", (2, 2)),
    Photograph(_SKIMAGE, "brick.png"),
    Photograph(_SKIMAGE, "cell.png"),
    Photograph(_SKIMAGE, "coins.png"),
    Photograph(_SKIMAGE, "grass.png"),
    Photograph(_SKIMAGE, "gravel.png"),
    Photograph(_SKIMAGE, "moon.png"),
    Photograph(_SKIMAGE, "page.png"),
    Photograph(_SKLEARN, "china.jpg", (3, 2)),
    Photograph(_SKLEARN, "flower.jpg", (2, 1)),
)
"""Photographs of scikit-image and scikit-learn that ship in their wheels."""

_CANVAS = 64
"""Side of drawings before they are reduced to the size of the images."""


def make_pretext(size: int = 32, images_per_class: int = 900, seed: int = 0) -> ImageSet:
    """Crops of photographs labelled by region, and drawings labelled by kind.

    Args:
        size: Side of the images in pixels.
        images_per_class: Images of each class.
        seed: Decides every crop and drawing.

    Raises:
        TrainingError: If scikit-image or scikit-learn is not installed.
    """
    images: list[Tensor] = []
    names: list[str] = []
    for photograph in PHOTOGRAPHS:
        picture = _open(photograph)
        for index, region in enumerate(_regions(picture, photograph.grid)):
            name = f"{photograph.name.partition('.')[0]}-{index}"
            rng = random.Random(f"{seed}/{name}")
            images += [_to_tensor(_crop(region, size, rng)) for _ in range(images_per_class)]
            names.append(name)
    for name, draw in DRAWINGS.items():
        rng = random.Random(f"{seed}/{name}")
        images += [_to_tensor(_drawing(draw, size, rng)) for _ in range(images_per_class)]
        names.append(name)
    labels = torch.arange(len(names)).repeat_interleave(images_per_class)
    return ImageSet(torch.stack(images), labels, tuple(names))


def _open(photograph: Photograph) -> Image.Image:
    try:
        source = files(photograph.package).joinpath(photograph.name)
        with source.open("rb") as stream, Image.open(stream) as image:
            picture: Image.Image = image.convert("RGB")
            return picture
    except (ModuleNotFoundError, OSError) as error:
        raise TrainingError(
            f"cannot read {photograph.name} of {photograph.package} ({error}): pip install 'timm-ghn[train]'"
        ) from error


def _regions(image: Image.Image, grid: tuple[int, int]) -> list[Image.Image]:
    """The cells of a grid of rows and columns over an image."""
    rows, columns = grid
    width, height = image.width // columns, image.height // rows
    return [
        image.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))
        for row in range(rows)
        for column in range(columns)
    ]


def _crop(region: Image.Image, size: int, rng: random.Random) -> Image.Image:
    """A random square of a region, between a quarter and 0.9 of its side, with light changes of colour."""
    longest = 0.9 * min(region.size)
    side = round(math.exp(rng.uniform(math.log(max(size * 0.75, longest / 4)), math.log(longest))))
    left, top = rng.randint(0, region.width - side), rng.randint(0, region.height - side)
    crop = region.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    crop = ImageEnhance.Brightness(crop).enhance(rng.uniform(0.8, 1.2))
    crop = ImageEnhance.Contrast(crop).enhance(rng.uniform(0.8, 1.2))
    return ImageEnhance.Color(crop).enhance(rng.uniform(0.7, 1.3))


Color = tuple[int, int, int]
Drawer = Callable[[ImageDraw.ImageDraw, random.Random, Color], None]


def _drawing(draw: Drawer, size: int, rng: random.Random) -> Image.Image:
    """A drawing in random colours on a random ground, turned, reduced, and with a little noise."""
    ground, color = _two_colors(rng)
    image = Image.new("RGB", (_CANVAS, _CANVAS), ground)
    draw(ImageDraw.Draw(image), rng, color)
    image = image.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR, fillcolor=ground)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.5))).resize((size, size), Image.Resampling.BOX)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(0, 12), (size, size, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def _two_colors(rng: random.Random) -> tuple[Color, Color]:
    """Two colours that can be told apart."""
    while True:
        first, second = (tuple(rng.randrange(256) for _ in range(3)) for _ in range(2))
        if sum(abs(a - b) for a, b in zip(first, second, strict=True)) > 150:
            return (first[0], first[1], first[2]), (second[0], second[1], second[2])


def _polygon(corners: int, inner: float = 1.0) -> Drawer:
    """A regular polygon; a star if every other corner is at `inner` of the radius."""

    def draw(canvas: ImageDraw.ImageDraw, rng: random.Random, color: Color) -> None:
        x, y, radius = _place(rng)
        count = corners * (2 if inner < 1 else 1)
        turn = rng.uniform(0, 2 * math.pi)
        radii = [radius * (inner if inner < 1 and k % 2 else 1.0) for k in range(count)]
        angles = [turn + 2 * math.pi * k / count for k in range(count)]
        canvas.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)], color)

    return draw


def _place(rng: random.Random) -> tuple[float, float, float]:
    radius = rng.uniform(12, 24)
    return rng.uniform(radius, _CANVAS - radius), rng.uniform(radius, _CANVAS - radius), radius


def _box(x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    return (x - radius, y - radius, x + radius, y + radius)


def _disc(canvas: ImageDraw.ImageDraw, rng: random.Random, color: Color) -> None:
    canvas.ellipse(_box(*_place(rng)), color)


def _ring(canvas: ImageDraw.ImageDraw, rng: random.Random, color: Color) -> None:
    canvas.ellipse(_box(*_place(rng)), None, color, rng.randint(4, 7))


def _cross(canvas: ImageDraw.ImageDraw, rng: random.Random, color: Color) -> None:
    x, y, radius = _place(rng)
    half = radius * rng.uniform(0.2, 0.35)
    canvas.rectangle((x - radius, y - half, x + radius, y + half), color)
    canvas.rectangle((x - half, y - radius, x + half, y + radius), color)


def _stripes(angle: float) -> Drawer:
    """Parallel stripes over the whole canvas."""

    def draw(canvas: ImageDraw.ImageDraw, rng: random.Random, color: Color) -> None:
        period, offset = rng.uniform(8, 20), rng.uniform(0, 20)
        dx, dy = math.cos(angle), math.sin(angle)
        for step in range(-12, 24):
            x, y = (step * period + offset) * -dy, (step * period + offset) * dx
            ends = (x - 200 * dx, y - 200 * dy, x + 200 * dx, y + 200 * dy)
            canvas.line(ends, color, max(2, round(period * 0.45)))

    return draw


def _checkers(canvas: ImageDraw.ImageDraw, rng: random.Random, color: Color) -> None:
    cell = rng.randint(6, 14)
    for row in range(-(-_CANVAS // cell)):
        for column in range(row % 2, -(-_CANVAS // cell), 2):
            left, top = column * cell, row * cell
            canvas.rectangle((left, top, left + cell - 1, top + cell - 1), color)


def _dots(canvas: ImageDraw.ImageDraw, rng: random.Random, color: Color) -> None:
    for _ in range(rng.randint(12, 30)):
        canvas.ellipse(_box(rng.uniform(0, _CANVAS), rng.uniform(0, _CANVAS), rng.uniform(2, 4.5)), color)


def _circles(canvas: ImageDraw.ImageDraw, rng: random.Random, color: Color) -> None:
    x, y, _ = _place(rng)
    period = rng.uniform(7, 14)
    for step in range(14):
        canvas.ellipse(_box(x, y, period * (step + 0.5)), None, color, max(2, round(period * 0.4)))


def _segments(canvas: ImageDraw.ImageDraw, rng: random.Random, color: Color) -> None:
    for _ in range(rng.randint(5, 12)):
        canvas.line([rng.uniform(0, _CANVAS) for _ in range(4)], color, rng.randint(2, 4))


def _gradient(canvas: ImageDraw.ImageDraw, rng: random.Random, color: Color) -> None:
    other = [rng.randrange(256) for _ in range(3)]
    for row in range(_CANVAS):
        share = row / (_CANVAS - 1)
        mixed = [round(a + share * (b - a)) for a, b in zip(color, other, strict=True)]
        canvas.line((0, row, _CANVAS, row), (mixed[0], mixed[1], mixed[2]))


def _blocks(canvas: ImageDraw.ImageDraw, rng: random.Random, color: Color) -> None:
    for _ in range(rng.randint(6, 14)):
        x, y = rng.uniform(-8, _CANVAS), rng.uniform(-8, _CANVAS)
        fill = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        canvas.rectangle((x, y, x + rng.uniform(8, 30), y + rng.uniform(8, 30)), fill)


DRAWINGS: dict[str, Drawer] = {
    "disc": _disc,
    "ring": _ring,
    "triangle": _polygon(3),
    "square": _polygon(4),
    "hexagon": _polygon(6),
    "star": _polygon(5, 0.4),
    "cross": _cross,
    "stripes-0": _stripes(0.0),
    "stripes-45": _stripes(math.pi / 4),
    "stripes-90": _stripes(math.pi / 2),
    "checkers": _checkers,
    "dots": _dots,
    "circles": _circles,
    "segments": _segments,
    "gradient": _gradient,
    "blocks": _blocks,
}
"""Kinds of drawings; none of them is the mirror image of another."""


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def class_names() -> Sequence[str]:
    """Names of the classes, in the order of their labels."""
    regions = [f"{p.name.partition('.')[0]}-{i}" for p in PHOTOGRAPHS for i in range(p.grid[0] * p.grid[1])]
    return (*regions, *DRAWINGS)
