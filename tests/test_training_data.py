"""Images for training a GHN: dividing, augmenting, drawing batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from timm_ghn.errors import TrainingError
from timm_ghn.images import ImageSet
from timm_ghn.training.data import augment, draw_classes, split, take_batch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (120, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.arange(120) % 6, ("ant", "bee", "cow", "dog", "elk", "fox"))


def test_splits_are_disjoint_and_repeatable(images: ImageSet) -> None:
    first, second = (split(images, held_out=2, validation=0.2) for _ in range(2))
    assert first.held_out is not None
    assert second.held_out is not None
    held_out = set(first.held_out.labels.tolist())
    assert held_out == set(second.held_out.labels.tolist())
    assert len(held_out) == 2
    assert not held_out & set(first.train.labels.tolist())
    assert len(first.train) + len(first.validation) + len(first.held_out) == len(images)
    assert torch.bincount(first.validation.labels).max() == 4
    assert torch.equal(first.train.images, second.train.images)
    with pytest.raises(TrainingError, match="--held-out-classes: 6 of 6"):
        split(images, held_out=6)


def test_targets_follow_their_images(images: ImageSet) -> None:
    seen = replace(images, targets=images.labels[:, None].half() * torch.tensor([1.0, -1.0]).half())
    parts = split(seen, held_out=2, validation=0.2)
    assert parts.num_outputs == 8
    for part in (parts.train, parts.validation, parts.held_out):
        assert part is not None
        assert part.targets is not None
        assert torch.equal(part.targets[:, 1], -part.labels.half())
    batch = take_batch(parts.train, torch.tensor([5, 2]), "cpu")
    assert batch.targets.dtype == torch.float32
    assert batch.targets[:, 0].tolist() == parts.train.labels[[5, 2]].tolist()


def test_augmentation_flips_and_shifts(images: ImageSet) -> None:
    batch = images.images[:64]
    generator = torch.Generator().manual_seed(0)
    kept = augment(batch, generator, padding=0)
    same = (kept == batch).flatten(1).all(1)
    flipped = (kept == batch.flip(3)).flatten(1).all(1)
    assert bool((same | flipped).all())
    assert 10 < int(same.sum()) < 54
    moved = augment(batch, generator, padding=3)
    assert moved.shape == batch.shape
    assert not torch.equal(moved, kept)


def test_batches_have_equal_halves(images: ImageSet) -> None:
    generator = torch.Generator().manual_seed(0)
    index = draw_classes(images.labels, 24, 3, generator)
    batch = take_batch(images, index, "cpu", generator)
    pixels, labels = batch.images, images.labels[index]
    assert torch.equal(batch.labels, labels)
    assert batch.targets.shape == (24, 0)
    assert pixels.shape == (24, 3, 32, 32)
    assert len(labels.unique()) == 3
    assert torch.equal(labels[:12].bincount(), labels[12:].bincount())
    assert abs(float(pixels.mean())) < 3
