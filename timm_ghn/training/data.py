"""Labelled images for training a GHN: decoded once, kept in memory as bytes, augmented in batches.

Three sources give the same `ImageSet`: JPEG shards (safetensors files with `jpeg`, `offsets` and `labels`), a folder
of classes (torchvision's ImageFolder layout), and any map-style data set of (image, label) pairs.
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from tqdm import tqdm

from timm_ghn.errors import TrainingError

_SHARD_TENSORS = ("jpeg", "offsets", "labels")
_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}
_NOT_THE_USERS = ("__MACOSX", "@eaDir")
"""Folders that archives of macOS and Synology's file servers add, with files that look like images."""


class MapDataset(Protocol):
    """What torchvision's data sets are: a length and (image, label) items."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


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
            raise TrainingError(f"images must be uint8 (N, 3, S, S), not {found}")
        if len(self.labels) != len(self.images):
            raise TrainingError(f"{len(self.images)} images have {len(self.labels)} labels")
        if len(self.images) == 0:
            raise TrainingError("there are no images")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classes):
            raise TrainingError(f"labels run from {low} to {high}, but there are {len(self.classes)} classes")

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


@dataclass(frozen=True, eq=False)
class Splits:
    """Disjoint parts of the images.

    Attributes:
        train: Images that the GHN is trained on.
        validation: Other images of the same classes.
        held_out: Images of classes that are in neither of them; None if no class is held out.
        held_out_classes: Indices of those classes.
    """

    train: ImageSet
    validation: ImageSet
    held_out: ImageSet | None
    held_out_classes: tuple[int, ...]

    @property
    def num_outputs(self) -> int:
        """Outputs of a network that names the teacher's components and the classes."""
        return len(self.train.classes) + (0 if self.train.targets is None else self.train.targets.shape[1])

    @property
    def train_classes(self) -> tuple[int, ...]:
        """Indices of the classes that the GHN is trained on."""
        return tuple(int(label) for label in torch.unique(self.train.labels))


def load_images(paths: Sequence[str | Path], size: int = 32, *, progress: bool = True) -> ImageSet:
    """Read JPEG shards, or one folder of classes, into memory.

    Args:
        paths: Shard files with the same classes, or a single folder.
        size: Side of the images; others are resized (shorter side) and cropped at the center.
        progress: Whether to show a bar.

    Raises:
        TrainingError: If a path is missing, a file is damaged, or the shards disagree.
    """
    files = [Path(path) for path in paths]
    if not files:
        raise TrainingError("no images: name JPEG shards or a folder of classes")
    for file in files:
        if not file.exists():
            raise TrainingError(f"no such file or folder: {file}. {HOW_TO_GET_IMAGES}")
    if files[0].is_dir():
        if len(files) > 1:
            raise TrainingError("give one folder of classes, or shards, not several folders")
        return load_folder(files[0], size, progress=progress)
    return load_shards(files, size, progress=progress)


HOW_TO_GET_IMAGES = (
    "Tiny-ImageNet-200 is a zip of a folder of classes, http://cs231n.stanford.edu/tiny-imagenet-200.zip: "
    "unpack it and name its 'train' folder; any other folder with one sub-folder a class works too"
)


def load_shards(paths: Sequence[Path], size: int = 32, *, progress: bool = True) -> ImageSet:
    """Decode safetensors shards of JPEG files.

    Raises:
        TrainingError: If a shard is damaged, an image cannot be decoded, or the classes differ between shards.
    """
    parts = [_read_shard(path) for path in paths]
    classes = parts[0][3]
    for path, part in zip(paths, parts, strict=True):
        if part[3] != classes:
            raise TrainingError(f"{path} has other classes than {paths[0]}")
    total = sum(len(part[2]) for part in parts)
    images = torch.empty(total, 3, size, size, dtype=torch.uint8)
    position = 0
    with tqdm(total=total, desc="decoding", unit="image", disable=not progress, leave=False) as bar:
        for path, (jpeg, offsets, labels, _) in zip(paths, parts, strict=True):
            for index in range(len(labels)):
                data = jpeg[offsets[index] : offsets[index + 1]].tobytes()
                images[position] = _decode(io.BytesIO(data), size, f"image {index} of {path}")
                position += 1
                if position % 500 == 0:
                    bar.update(500)
    all_labels = np.concatenate([part[2] for part in parts]).astype(np.int64)
    return ImageSet(images, torch.from_numpy(all_labels), classes)


def _read_shard(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
    try:
        with safe_open(path, "numpy") as file:
            missing = sorted(set(_SHARD_TENSORS) - set(file.keys()))
            if missing:
                raise TrainingError(f"{path} is not a shard of images: it has no tensor named {', '.join(missing)}")
            names = (file.metadata() or {}).get("classes", "").split()
            jpeg, offsets, labels = (file.get_tensor(key) for key in _SHARD_TENSORS)
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"cannot read {path} as safetensors: {error}") from error
    if not names:
        raise TrainingError(f"{path} names no classes in its metadata")
    if len(offsets) != len(labels) + 1 or np.any(np.diff(offsets) < 0) or offsets[0] < 0 or offsets[-1] > len(jpeg):
        raise TrainingError(f"{path} is damaged: its offsets do not match its {len(labels)} labels")
    return jpeg, offsets, labels, tuple(names)


def load_folder(path: Path, size: int = 32, *, progress: bool = True) -> ImageSet:
    """Decode a folder with one sub-folder a class (images may lie deeper, as in Tiny-ImageNet's `class/images/`).

    Hidden files and folders (`.ipynb_checkpoints`, `._00.jpg`) are neither classes nor images.

    Raises:
        TrainingError: If there are no classes, a class has no images, or an image cannot be decoded.
    """
    classes = tuple(sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not _is_hidden(entry.name)))
    if not classes:
        raise TrainingError(f"{path} has no sub-folders: one a class is expected")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(file for file in (path / name).rglob("*") if _is_image(file.relative_to(path)))
        if not found:
            raise TrainingError(f"class folder {path / name} has no images")
        files += found
        labels += [label] * len(found)
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for index, file in enumerate(tqdm(files, desc="decoding", unit="image", disable=not progress, leave=False)):
        images[index] = _decode(file, size, str(file))
    return ImageSet(images, torch.tensor(labels), classes)


def _is_hidden(name: str) -> bool:
    """Whether a file or folder of this name was put there by a program, for itself."""
    return name.startswith(".") or name in _NOT_THE_USERS


def _is_image(path: Path) -> bool:
    """Whether a path, relative to the folder of classes, names an image of the user's."""
    return path.suffix.lower() in _IMAGE_SUFFIXES and not any(map(_is_hidden, path.parts))


def from_dataset(dataset: MapDataset, size: int = 32, *, progress: bool = True) -> ImageSet:
    """Decode a map-style data set of (PIL image or tensor, label) pairs, such as torchvision's.

    Raises:
        TrainingError: If an item is something else.
    """
    images = torch.empty(len(dataset), 3, size, size, dtype=torch.uint8)
    labels: list[int] = []
    for index in tqdm(range(len(dataset)), desc="decoding", unit="image", disable=not progress, leave=False):
        try:
            image, label = dataset[index]
            labels.append(int(label))
            images[index] = _to_bytes(_as_image(image), size)
        except (TypeError, ValueError) as error:
            raise TrainingError(f"item {index} of the data set is not an (image, label) pair: {error}") from error
    names = getattr(dataset, "classes", None) or [str(label) for label in range(max(labels, default=0) + 1)]
    return ImageSet(images, torch.tensor(labels, dtype=torch.int64), tuple(str(name) for name in names))


def _as_image(image: object) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Tensor) and image.ndim == 3 and image.shape[0] in (1, 3):
        tensor = image.detach().cpu()
        array = (tensor.double() if tensor.is_floating_point() else tensor).expand(3, -1, -1).permute(1, 2, 0).numpy()
        return Image.fromarray(_as_bytes(array, 1 if array.dtype.kind in "fb" else 255))
    raise ValueError(f"neither a PIL image nor a (3, H, W) tensor, but {type(image)}")


def _decode(source: Path | io.BytesIO, size: int, where: str) -> Tensor:
    try:
        with Image.open(source) as image:
            return _to_bytes(image, size)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise TrainingError(f"cannot decode {where}: {error}") from error


def _with_8_bits(image: Image.Image) -> Image.Image:
    """The image with bytes for pixels; PIL's own conversion cuts larger numbers off at 255.

    Raises:
        ValueError: If the scale of the numbers is not known.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray(_as_bytes(np.asarray(image), 65535))
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


def split(data: ImageSet, *, held_out: int | Sequence[str] = 0, validation: float = 0.05, seed: int = 0) -> Splits:
    """Divide images into training images, validation images of the same classes, and held-out classes.

    Args:
        data: All images.
        held_out: Names of the classes to hold out, or how many to draw.
        validation: Share of every training class's images that validate.
        seed: Decides which classes and images are drawn.

    Raises:
        TrainingError: If a class does not exist, or if nothing is left to train on.
    """
    rng = random.Random(f"timm-ghn split {seed}")
    if isinstance(held_out, int):
        if not 0 <= held_out < len(data.classes):
            raise TrainingError(
                f"--held-out-classes: {held_out} of {len(data.classes)} classes cannot be held out; 0 holds out none"
            )
        chosen = sorted(rng.sample(range(len(data.classes)), held_out))
    else:
        unknown = sorted(set(held_out) - set(data.classes))
        if unknown:
            raise TrainingError(f"classes to hold out that do not exist: {', '.join(unknown[:5])}")
        chosen = sorted(data.classes.index(name) for name in set(held_out))
    is_held_out = torch.isin(data.labels, torch.tensor(chosen, dtype=torch.int64))
    is_validation = torch.zeros(len(data), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for label in range(len(data.classes)):
        members = torch.nonzero((data.labels == label) & ~is_held_out).flatten()
        order = members[torch.randperm(len(members), generator=generator)]
        is_validation[order[: round(len(members) * validation)]] = True
    is_train = ~is_held_out & ~is_validation
    if not is_train.any() or not is_validation.any():
        raise TrainingError("too few images: every class needs some to train on and some to validate")
    return Splits(
        train=data.subset(is_train),
        validation=data.subset(is_validation),
        held_out=data.subset(is_held_out) if chosen else None,
        held_out_classes=tuple(chosen),
    )


def normalize(images: Tensor) -> Tensor:
    """Bytes (B, 3, S, S) to float32 with ImageNet's mean and deviation, as timm's models expect."""
    mean = torch.tensor(IMAGENET_DEFAULT_MEAN, device=images.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(IMAGENET_DEFAULT_STD, device=images.device).view(1, 3, 1, 1) * 255
    return (images.float() - mean) / std


def augment(images: Tensor, generator: torch.Generator, padding: int = 2) -> Tensor:
    """Flip half of the images and move each by up to `padding` pixels (edges reflected), as one gather.

    Args:
        images: Bytes (B, 3, S, S).
        generator: CPU generator that every draw comes from.
        padding: Largest shift in pixels.

    Returns:
        Bytes of the same shape.
    """
    count, _, height, width = images.shape
    shift = torch.randint(-padding, padding + 1, (2, count, 1), generator=generator)
    flip = torch.rand(count, 1, generator=generator) < 0.5
    rows = _reflect(torch.arange(height) + shift[0], height)
    columns = _reflect(torch.arange(width) + shift[1], width)
    columns = torch.where(flip, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    batch = torch.arange(count, device=images.device)
    channels = torch.arange(3, device=images.device)
    return images[
        batch[:, None, None, None], channels[None, :, None, None], rows[:, None, :, None], columns[:, None, None, :]
    ]


def _reflect(index: Tensor, size: int) -> Tensor:
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)


class BatchSampler:
    """Draws batches of a few classes with equally many images each.

    Args:
        data: Images.
    """

    def __init__(self, data: ImageSet) -> None:
        self.data = data
        self._order = torch.argsort(data.labels, stable=True)
        self._classes, self._counts = torch.unique(data.labels, return_counts=True)
        self._starts = torch.cumsum(self._counts, 0) - self._counts

    def draw(self, count: int, ways: int, generator: torch.Generator) -> Tensor:
        """Indices (count,) of images: the first half has as many images of each drawn class as the second.

        Args:
            count: Images.
            ways: Classes; 0 draws images of any class, one by one.
            generator: CPU generator that every draw comes from.
        """
        if not ways:
            return torch.randint(len(self.data), (count,), generator=generator)
        chosen = torch.randperm(len(self._classes), generator=generator)[:ways]
        chosen = chosen.repeat(-(-count // len(chosen)))[:count]
        place = (torch.rand(count, generator=generator, dtype=torch.float64) * self._counts[chosen]).long()
        return self._order[self._starts[chosen] + place]


@dataclass(frozen=True, eq=False)
class Batch:
    """Images and what is known of them.

    Attributes:
        images: Normalized, (B, 3, S, S).
        labels: Classes, int64 (B,).
        targets: What the teacher sees in them, float32 (B, K); K is 0 without a teacher.
    """

    images: Tensor
    labels: Tensor
    targets: Tensor


def take_batch(
    data: ImageSet,
    index: Tensor,
    device: torch.device | str,
    generator: torch.Generator | None = None,
    padding: int = 0,
) -> Batch:
    """Some images, normalized, with labels and targets.

    Args:
        data: Images.
        index: Which, (B,).
        device: Where the batch goes.
        generator: If given, the images are augmented, and every draw comes from this generator of the CPU.
        padding: Largest shift of augmented images.
    """
    images = data.images[index]
    if generator is not None:
        images = augment(images, generator, padding)
    # Convolutions of few channels are a quarter faster in this layout on a CPU.
    images = normalize(images.to(device)).contiguous(memory_format=torch.channels_last)
    targets = torch.empty(len(index), 0) if data.targets is None else data.targets[index].float()
    return Batch(images, data.labels[index].to(device), targets.to(device))
