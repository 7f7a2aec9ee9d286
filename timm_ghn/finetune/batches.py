"""Batches made on the device: images stay there as bytes, and one small table says what an epoch makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.nn import functional as F

from timm_ghn.finetune.config import PRETRAINED, FineTuneConfig
from timm_ghn.finetune.data import Task
from timm_ghn.images import ImageSet
from timm_ghn.seeding import derived_seed


def memory_layout(device: torch.device) -> torch.memory_format:
    """Channels last on a GPU, where convolutions are faster so.

    Not on a CPU: in torch 2.14.1 the backward pass of some networks (a FastViT at 64 x 64) then writes beyond its
    memory in oneDNN, and the process ends.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def epoch_picks(config: FineTuneConfig, count: int, seed: int, epoch: int) -> Tensor:
    """Which image comes when in an epoch, and how it is cropped and mirrored.

    The table depends on the settings, the seed and the epoch alone, neither on the device nor on what ran before.

    Args:
        config: Settings of the augmentation.
        count: Number of training images.
        seed: Seed of the run.
        epoch: Epoch, from 0.

    Returns:
        int64 (4, N) on the CPU: index of the image, top and left of the crop, and whether it is mirrored.
    """
    generator = torch.Generator().manual_seed(derived_seed("fine-tuning epoch", seed, epoch))
    order = torch.randperm(count, generator=generator)
    corners = torch.randint(0, 2 * config.padding + 1, (2, count), generator=generator)
    mirrored = torch.randint(0, 2, (1, count), generator=generator) * int(config.flip)
    return torch.cat([order[None], corners, mirrored])


@dataclass(frozen=True, eq=False)
class DeviceImages:
    """Images on the device where they are used.

    Attributes:
        images: uint8 (N, 3, S + 2 P, S + 2 P) with a black border of P pixels.
        labels: int64 (N,).
        padding: P.
        side: Side of the network's input; crops of S pixels are enlarged or reduced to it.
        mean: float32 (1, 3, 1, 1), in units of a byte.
        std: float32 (1, 3, 1, 1), in units of a byte.
    """

    images: Tensor
    labels: Tensor
    padding: int
    side: int
    mean: Tensor
    std: Tensor

    @classmethod
    def of(
        cls, data: ImageSet, task: Task, config: FineTuneConfig, device: torch.device, padding: int = 0
    ) -> DeviceImages:
        """Move images to a device.

        Args:
            data: The images.
            task: The task whose statistics they may be normalized with.
            config: Settings of the run.
            device: Where they go.
            padding: Width of their black border in pixels.
        """
        statistics = task.mean, task.std
        if config.init == PRETRAINED or config.image_size != data.size:  # as ppuda
            statistics = tuple(255 * x for x in IMAGENET_DEFAULT_MEAN), tuple(255 * x for x in IMAGENET_DEFAULT_STD)
        mean, std = (torch.tensor(x, dtype=torch.float32, device=device).view(1, 3, 1, 1) for x in statistics)
        images = F.pad(data.images, (padding,) * 4).to(device)
        return cls(images, data.labels.to(device), padding, config.image_size, mean, std)

    def __len__(self) -> int:
        return len(self.labels)

    def augmented(self, picks: Tensor) -> tuple[Tensor, Tensor]:
        """A training batch.

        Args:
            picks: (4, B) on the device, columns of `epoch_picks`.

        Returns:
            Normalized float32 images (B, 3, side, side), and labels (B,).
        """
        index, top, left, mirrored = picks.unbind()
        size = self.images.shape[-1] - 2 * self.padding
        span = torch.arange(size, device=picks.device)
        rows = top[:, None] + span
        columns = left[:, None] + torch.where(mirrored[:, None] > 0, size - 1 - span, span)
        channels = torch.arange(3, device=picks.device)
        crops = self.images[
            index[:, None, None, None], channels[None, :, None, None], rows[:, None, :, None], columns[:, None, None, :]
        ]
        return self._as_input(crops), self.labels[index]

    def plain(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Images as they are, with labels, for measuring; they must have no border."""
        return self._as_input(self.images[start:stop]), self.labels[start:stop]

    def _as_input(self, images: Tensor) -> Tensor:
        batch = (images.float() - self.mean) / self.std
        if batch.shape[-1] != self.side:
            batch = F.interpolate(batch, (self.side, self.side), mode="bilinear", antialias=batch.shape[-1] > self.side)
        return batch.contiguous(memory_format=memory_layout(batch.device))
