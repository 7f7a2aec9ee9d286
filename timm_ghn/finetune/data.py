"""Labelled images to fine-tune on: named data sets, folders of classes, JPEG shards; and which of them are used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision import datasets

from timm_ghn.errors import FineTuneError
from timm_ghn.finetune.config import VALIDATION_IMAGES, FineTuneConfig
from timm_ghn.images import ImageSet, from_dataset, load_images
from timm_ghn.seeding import derived_seed


@dataclass(frozen=True, eq=False)
class Benchmark:
    """A data set with its official division.

    Attributes:
        name: What it is called in results.
        train: All training images, in the order of the data set.
        test: All test images.
        copy: Which copy of the data it is, for the record.
    """

    name: str
    train: ImageSet
    test: ImageSet
    copy: str

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.train.classes)


@dataclass(frozen=True, eq=False)
class Task:
    """The images of a run.

    Attributes:
        train: Images to train on.
        test: Images to measure accuracy on.
        mean: Of the training set, (3,), in units of a byte.
        std: Standard deviation of the training set, (3,), in units of a byte.
        digest: Of all of these; part of a run's identity.
    """

    train: ImageSet
    test: ImageSet
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str


def make_task(data: Benchmark, config: FineTuneConfig) -> Task:
    """Choose images: the first of each class, and the test images or those held out for tuning.

    For tuning, 5,000 training images (a tenth of a smaller set) are held out, drawn from every class, and the first
    images of each class are taken from the others. Test images are not looked at then.

    Raises:
        FineTuneError: If a class has fewer images than are asked for.
    """
    pool, test = data.train, data.test
    if config.split == "validation":
        share = min(VALIDATION_IMAGES / len(pool), 0.1)
        is_held_out = stratified(pool.labels, share, "held out for tuning")
        pool, test = pool.subset(~is_held_out), pool.subset(is_held_out)
    train = pool if config.labels_per_class is None else pool.subset(first_of_each_class(pool, config.labels_per_class))
    mean, std = statistics_of(data.train)
    digest = hashlib.sha256(data.name.encode())
    for tensor in (train.images, train.labels, test.images, test.labels):
        digest.update(tensor.contiguous().numpy().tobytes())
    return Task(train, test, mean, std, digest.hexdigest()[:16])


def stratified(labels: Tensor, share: float, purpose: str) -> Tensor:
    """Draw the same share of every class, the same images each time.

    Args:
        labels: int64 (N,).
        share: In (0, 1). At least one image of every class is drawn, and one is left, where a class has two.
        purpose: Seeds the draw; two purposes draw independently.

    Returns:
        bool (N,): Which images are drawn.

    Raises:
        FineTuneError: If no class has two images.
    """
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.unique(labels).tolist():
        members = torch.nonzero(labels == label).flatten()
        generator = torch.Generator().manual_seed(derived_seed(f"images {purpose}", label))
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        chosen[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    if not chosen.any():
        raise FineTuneError("there are too few images to measure on: at least one class needs two or more")
    return chosen


def classes_in_turn(labels: Tensor, count: int) -> Tensor:
    """Indices of `count` images in which all classes come equally often, as far as possible; always the same ones."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(derived_seed("classes in turn")))
    turn = torch.zeros(len(labels), dtype=torch.int64)
    for label in torch.unique(labels).tolist():
        members = torch.nonzero(labels[order] == label).flatten()
        turn[members] = torch.arange(len(members))
    return order[torch.argsort(turn, stable=True)[:count]]


def first_of_each_class(data: ImageSet, count: int) -> Tensor:
    """Indices of the first `count` images of each class, in the order of the data set.

    Raises:
        FineTuneError: If a class has fewer.
    """
    chosen = []
    for label, name in enumerate(data.classes):
        members = torch.nonzero(data.labels == label).flatten()[:count]
        if len(members) < count:
            raise FineTuneError(
                f"{count} labels a class were asked for, but class {name!r} has {len(members)} training images; ask "
                "for fewer, or for all of them with --labels 0"
            )
        chosen.append(members)
    return torch.cat(chosen).sort().values


def statistics_of(data: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel over all pixels, in units of a byte."""
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for part in torch.split(data.images, 1000):
        values = part.permute(1, 0, 2, 3).reshape(3, -1).float()
        sums += torch.stack([values.sum(1, dtype=torch.float64), values.square().sum(1, dtype=torch.float64)])
    mean, square = sums / (data.images.numel() // 3)
    return tuple(mean.tolist()), tuple((square - mean.square()).clamp(min=1e-6).sqrt().tolist())


# --- loading --------------------------------------------------------------------------------------------------------

_TORCHVISION: dict[str, Callable[[Path, bool, bool], datasets.VisionDataset]] = {
    "cifar10": lambda root, train, download: datasets.CIFAR10(root, train, download=download),
    "cifar100": lambda root, train, download: datasets.CIFAR100(root, train, download=download),
    "svhn": lambda root, train, download: datasets.SVHN(root, "train" if train else "test", download=download),
    "fashion-mnist": lambda root, train, download: datasets.FashionMNIST(root, train, download=download),
}
DATASETS = tuple(_TORCHVISION)
"""Data sets that `load_benchmark` knows by name."""


def load_benchmark(data: str, *, size: int | None = None, download: bool = False) -> Benchmark:
    """Load the data that a user names in one word.

    Args:
        data: One of three:

            - a name of `DATASETS`, as "cifar10" or "cifar10:FOLDER": torchvision's files in that folder ("data" by
              default), or JPEG shards named `cifar10-train*.safetensors` and `cifar10-test*.safetensors` there;
            - a folder with `train` and `test` (or `val`), each with a folder a class; or with the classes themselves,
              of which a fifth of the images of every class are then test images;
            - a prefix such as `data/tinyimagenet32`, for JPEG shards named `PREFIX-train*.safetensors` and
              `PREFIX-test*.safetensors` (or `-val`).
        size: Side in pixels that images are kept at, others are resized and cropped; None for 64 in a folder, and 32
            otherwise.
        download: Whether torchvision may download what is missing.

    Raises:
        FineTuneError: If there are no such data; the message says how to get them.
        ImageError: If an image is damaged.
    """
    name, _, root = data.partition(":")
    path = Path(data).expanduser()
    if name in _TORCHVISION:
        return _named(name, Path(root or "data").expanduser(), size or 32, download)
    if path.is_dir():
        return _from_folder(path, size or 64)
    if _shard_files(path, "train"):
        return _from_shards(path, size or 32)
    raise FineTuneError(
        f"there is no folder {data}, there are no shards {data}-train*.safetensors, and no data set is named so; known "
        f"are {', '.join(DATASETS)}"
    )


def _named(name: str, root: Path, size: int, download: bool) -> Benchmark:
    """torchvision's copy if it is there, else shards, else a download."""
    for fetch in (False, True) if download else (False,):
        try:
            parts = [_TORCHVISION[name](root, train, fetch) for train in (True, False)]
        except RuntimeError:  # torchvision's word for missing and for damaged files
            if _shard_files(root / name, "train"):
                return _from_shards(root / name, size)
            continue
        except OSError as error:
            raise FineTuneError(f"{name} could not be read from or downloaded to {root}: {error}") from error
        train, test = (from_dataset(part, size) for part in parts)
        return Benchmark(name, train, test, "original files, torchvision")
    needs = " (it needs scipy)" * (name == "svhn")
    raise FineTuneError(f"{name} is not in {root}: --download gets it{needs}, or name its folder with --data")


def _from_folder(root: Path, size: int) -> Benchmark:
    """torchvision's ImageFolder layout, divided or not."""
    if not (root / "train").is_dir():
        images = load_images([root], size)
        is_test = stratified(images.labels, 0.2, "to measure on")
        return Benchmark(root.name, images.subset(~is_test), images.subset(is_test), f"folder, fifths: {root.name}")
    other = next((root / name for name in ("test", "val", "validation") if (root / name).is_dir()), None)
    if other is None:
        raise FineTuneError(f"{root} has a folder 'train', but neither 'test' nor 'val' beside it")
    train, test = (load_images([part], size) for part in (root / "train", other))
    if train.classes != test.classes:
        differ = sorted(set(train.classes) ^ set(test.classes))
        raise FineTuneError(f"{root}: train and {other.name} have different classes: {', '.join(differ[:5])}")
    return Benchmark(root.name, train, test, f"folder {root.name}")


def _from_shards(prefix: Path, size: int) -> Benchmark:
    """JPEG shards; a benchmark is called as their prefix."""
    train, test = _shard_files(prefix, "train"), _shard_files(prefix, "test") or _shard_files(prefix, "val")
    if not test:
        raise FineTuneError(f"there are no shards {prefix}-test*.safetensors beside {prefix}-train*.safetensors")
    copy = "JPEG shards (not bit-identical to the original)"
    return Benchmark(prefix.name, load_images(train, size), load_images(test, size), copy)


def _shard_files(prefix: Path, part: str) -> list[Path]:
    return sorted(prefix.parent.glob(f"{prefix.name}-{part}*.safetensors"))
