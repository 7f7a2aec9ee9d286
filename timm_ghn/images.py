"""Labelled images for training: decoded once, and kept in memory as bytes.

Three sources give the same `ImageSet`: JPEG shards (safetensors files with `jpeg`, `offsets` and `labels`), a folder
of classes (torchvision's ImageFolder layout), and the data sets of torchvision.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torchvision.datasets import VisionDataset
from tqdm import tqdm

from timm_ghn.errors import ImageError

_logger = logging.getLogger(__name__)

_SHARD_TENSORS = ("jpeg", "offsets", "labels")
_IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm"),
    *(".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
_MAX_SAMPLE_VALUE = 281
"""Tag of TIFF files: the largest number that a pixel can have."""
_DARK = 64
_NOT_THE_USERS = ("__MACOSX", "@eaDir")
"""Folders that archives of macOS and Synology's file servers add, with files that look like images."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images and labels in memory.

    Attributes:
        images: uint8 (N, 3, S, S).
        labels: int64 (N,), indices into `classes`.
        classes: Names of the classes.
        targets: What a teacher sees in the images, (N, K); None without a teacher.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    targets: Tensor | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.shape[1] != 3 or self.images.dtype != torch.uint8:
            found = f"{self.images.dtype} {tuple(self.images.shape)}"
            raise ImageError(f"images must be uint8 (N, 3, S, S), not {found}")
        if len(self.labels) != len(self.images):
            raise ImageError(f"{len(self.images)} images have {len(self.labels)} labels")
        if len(self.images) == 0:
            raise ImageError("there are no images")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classes):
            raise ImageError(f"labels run from {low} to {high}, but there are {len(self.classes)} classes")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return int(self.images.shape[-1])

    def subset(self, mask: Tensor) -> ImageSet:
        """The images that a boolean mask or an index tensor selects; labels and class names stay."""
        targets = None if self.targets is None else self.targets[mask]
        return replace(self, images=self.images[mask], labels=self.labels[mask], targets=targets)


HOW_TO_GET_IMAGES = (
    "Tiny-ImageNet-200 is a zip of a folder of classes, http://cs231n.stanford.edu/tiny-imagenet-200.zip: "
    "unpack it and name its 'train' folder; any other folder with one sub-folder a class works too"
)


def load_images(paths: Sequence[str | Path], size: int = 32, *, progress: bool = True) -> ImageSet:
    """Read JPEG shards, or one folder of classes, into memory.

    In a folder, images may lie deeper than in their class, as in Tiny-ImageNet's `class/images/`. Hidden files and
    folders (`.ipynb_checkpoints`, `._00.jpg`) are neither classes nor images. Pixels are those of timm's ImageFolder,
    what PIL converts to RGB: alpha and the orientation in EXIF are ignored, and of animations the first frame counts.

    Args:
        paths: Shard files with the same classes, or a single folder.
        size: Side of the images; others are resized (shorter side) and cropped at the center.
        progress: Whether to show a bar, on a terminal.

    Raises:
        ImageError: If a path is missing, a file is damaged, a class has no images, or the shards disagree.
    """
    files = [Path(path) for path in paths]
    if not files:
        raise ImageError("no images: name JPEG shards or a folder of classes")
    for file in files:
        if not file.exists():
            raise ImageError(f"no such file or folder: {file}. {HOW_TO_GET_IMAGES}")
    if not files[0].is_dir():
        return _from_shards(files, size, progress)
    if len(files) > 1:
        raise ImageError("give one folder of classes, or shards, not several folders")
    return _from_folder(files[0], size, progress)


def _from_shards(paths: Sequence[Path], size: int, progress: bool) -> ImageSet:
    parts = [(path, *_read_shard(path)) for path in paths]
    classes = parts[0][-1]
    for path, *_, own in parts:
        if own != classes:
            raise ImageError(f"{path} has other classes than {paths[0]}")
    all_labels = np.concatenate([labels for _, _, _, labels, _ in parts]).astype(np.int64)
    sources = (
        (io.BytesIO(jpeg[offsets[index] : offsets[index + 1]].tobytes()), f"image {index} of {path}")
        for path, jpeg, offsets, labels, _ in parts
        for index in range(len(labels))
    )
    images = _decode_all(sources, len(all_labels), size, progress)
    return ImageSet(images, torch.from_numpy(all_labels), classes)


def _read_shard(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
    try:
        with safe_open(path, "numpy") as file:
            missing = sorted(set(_SHARD_TENSORS) - set(file.keys()))
            if missing:
                raise ImageError(f"{path} is not a shard of images: it has no tensor named {', '.join(missing)}")
            names = (file.metadata() or {}).get("classes", "").split()
            jpeg, offsets, labels = (file.get_tensor(key) for key in _SHARD_TENSORS)
    except (SafetensorError, OSError) as error:
        raise ImageError(f"cannot read {path} as safetensors: {error}") from error
    if not names:
        raise ImageError(f"{path} names no classes in its metadata")
    if len(offsets) != len(labels) + 1 or np.any(np.diff(offsets) < 0) or offsets[0] < 0 or offsets[-1] > len(jpeg):
        raise ImageError(f"{path} is damaged: its offsets do not match its {len(labels)} labels")
    return jpeg, offsets, labels, tuple(names)


def _from_folder(path: Path, size: int, progress: bool) -> ImageSet:
    classes = tuple(sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not _is_hidden(entry.name)))
    if not classes:
        raise ImageError(f"{path} has no sub-folders: one a class is expected")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        inner = (Path(folder, file) for folder, _, files in os.walk(path / name, followlinks=True) for file in files)
        found = sorted(file for file in inner if _is_image(file.relative_to(path)))
        if not found:
            raise ImageError(f"class folder {path / name} has no images ({' '.join(_IMAGE_SUFFIXES)})")
        files += found
        labels += [label] * len(found)
    images = _decode_all(((file, str(file)) for file in files), len(files), size, progress)
    return ImageSet(images, torch.tensor(labels), classes)


def _decode_all(
    sources: Iterable[tuple[Path | io.BytesIO | Image.Image, str]], count: int, size: int, progress: bool
) -> Tensor:
    """Decode files, and convert images, to uint8 (count, 3, size, size); the text beside each names it in messages."""
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    bar = tqdm(sources, "decoding", count, unit="image", delay=2, leave=False, disable=None if progress else True)
    for index, (source, where) in enumerate(bar):
        try:
            with source if isinstance(source, Image.Image) else Image.open(source) as image:
                images[index] = _to_bytes(image, size)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ImageError(f"cannot decode {where}: {error}") from error
    _warn_of_darkness(images)
    return images


def _warn_of_darkness(images: Tensor) -> None:
    """Say so if nothing is bright: numbers of 10 or 12 bits, of which no file says so, are small ones of 16 bits."""
    brightest = int(images.max()) if images.numel() else 255
    if brightest < _DARK:
        _logger.warning(
            "the brightest pixel of all %d images is %d of 255; if the files hold 10 or 12 bits in 16, scale them up, "
            "or write the largest number into the TIFF tag MaxSampleValue",
            len(images),
            brightest,
        )


def _is_hidden(name: str) -> bool:
    """Whether a file or folder of this name was put there by a program, for itself."""
    return name.startswith(".") or name in _NOT_THE_USERS


def _is_image(path: Path) -> bool:
    """Whether a path, relative to the folder of classes, names an image of the user's."""
    return path.suffix.lower() in _IMAGE_SUFFIXES and not any(map(_is_hidden, path.parts))


def from_dataset(dataset: VisionDataset, size: int = 32) -> ImageSet:
    """Convert a data set of torchvision's, whose items are a PIL image and a label.

    Raises:
        ImageError: If the scale of an image's pixels is not known.
    """
    labels: list[int] = []

    def images() -> Iterator[tuple[Image.Image, str]]:
        for index in range(len(dataset)):
            image, label = dataset[index]
            labels.append(int(label))
            yield image, f"image {index} of the data set"

    decoded = _decode_all(images(), len(dataset), size, progress=True)
    names = getattr(dataset, "classes", None) or range(max(labels, default=0) + 1)
    return ImageSet(decoded, torch.tensor(labels), tuple(map(str, names)))


def _with_8_bits(image: Image.Image) -> Image.Image:
    """The image with bytes for pixels; PIL's own conversion cuts larger numbers off at 255.

    Raises:
        ValueError: If the scale of the numbers is not known.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        white = getattr(image, "tag_v2", {}).get(_MAX_SAMPLE_VALUE, 65535)  # of a TIFF file
        return Image.fromarray(_as_bytes(np.asarray(image), int(np.max(white))))
    if image.mode == "I":
        return Image.fromarray(_as_bytes(np.asarray(image), 255))
    return Image.fromarray(_as_bytes(np.asarray(image), 1)) if image.mode == "F" else image


def _as_bytes(array: np.ndarray, white: int) -> np.ndarray:
    """Scale pixels from 0 to `white` to bytes.

    Raises:
        ValueError: If there are others: nothing says then what is black and what is white.
    """
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= white):
        raise ValueError(f"its pixels run from {low:g} to {high:g}, but 0 is black and {white} is white")
    return np.asarray((array.astype(np.float64) * (255 / white)).round(), dtype=np.uint8)


def _to_bytes(image: Image.Image, size: int) -> Tensor:
    image = _with_8_bits(image).convert("RGB")
    if image.size != (size, size):
        scale = size / min(image.size)
        image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))), 2)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
