"""Images for training a GHN: divided into training, validation and held-out classes, augmented in batches."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from timm_ghn.errors import TrainingError
from timm_ghn.images import ImageSet


@dataclass(frozen=True, eq=False)
class Splits:
    """Disjoint parts of the images.

    Attributes:
        train: Images that the GHN is trained on.
        validation: Other images of the same classes.
        held_out: Images of classes that are in neither of them; None if no class is held out.
    """

    train: ImageSet
    validation: ImageSet
    held_out: ImageSet | None

    @property
    def num_outputs(self) -> int:
        """Outputs of a network that names the teacher's components and the classes."""
        return len(self.train.classes) + (0 if self.train.targets is None else self.train.targets.shape[1])


def split(data: ImageSet, *, held_out: int = 0, validation: float = 0.05) -> Splits:
    """Divide images into training images, validation images of the same classes, and held-out classes.

    The same images are divided in the same way in every run, whatever its seed: what one run holds out, a GHN that is
    trained further by another has not seen.

    Args:
        data: All images.
        held_out: How many classes to hold out.
        validation: Share of every training class's images that validate.

    Raises:
        TrainingError: If nothing is left to train on.
    """
    if not 0 <= held_out < len(data.classes):
        raise TrainingError(
            f"--held-out-classes: {held_out} of {len(data.classes)} classes cannot be held out; 0 holds out none"
        )
    # 0 was the seed of the runs before, so that the bundled GHN's classes stay held out.
    chosen = sorted(random.Random("timm-ghn split 0").sample(range(len(data.classes)), held_out))
    is_held_out = torch.isin(data.labels, torch.tensor(chosen, dtype=torch.int64))
    is_validation = torch.zeros(len(data), dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
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
    )


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


def draw_classes(labels: Tensor, count: int, ways: int, generator: torch.Generator) -> Tensor:
    """Indices (count,) of images of a few classes: the first half has as many of each class as the second.

    Args:
        labels: Classes of all images, (N,).
        count: Images.
        ways: Classes.
        generator: CPU generator that every draw comes from.
    """
    order = torch.argsort(labels, stable=True)
    counts = torch.unique(labels, return_counts=True)[1]
    starts = torch.cumsum(counts, 0) - counts
    chosen = torch.randperm(len(counts), generator=generator)[:ways]
    chosen = chosen.repeat(-(-count // len(chosen)))[:count]
    place = (torch.rand(count, generator=generator, dtype=torch.float64) * counts[chosen]).long()
    return order[starts[chosen] + place]


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
    data: ImageSet, index: Tensor, device: torch.device | str, generator: torch.Generator | None = None
) -> Batch:
    """Some images, normalized by ImageNet's mean and deviation as timm's models expect, with labels and targets.

    Args:
        data: Images.
        index: Which, (B,).
        device: Where the batch goes.
        generator: If given, the images are augmented, and every draw comes from this generator of the CPU.
    """
    images = data.images[index]
    if generator is not None:
        images = augment(images, generator)
    # Not in channels_last, though a quarter faster on CPUs: the backward pass of some drawn networks (a FastViT at 64 x
    # 64) then writes beyond its memory in torch 2.14.1's oneDNN.
    mean, std = (
        255 * torch.tensor(x, device=device).view(3, 1, 1) for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    images = (images.to(device).float() - mean) / std
    targets = torch.empty(len(index), 0) if data.targets is None else data.targets[index].float()
    return Batch(images, data.labels[index].to(device), targets.to(device))
