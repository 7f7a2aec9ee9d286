"""What the predicted networks are trained for: classes, and groups of classes to begin with.

A GHN that starts on hundreds of classes learns nearly nothing for a long time. Groups of similar classes are learnable
from the first step: the probability of a group is the sum over its classes, so groups and classes share one head and
the weight moves from one to the other without a break.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_ghn.training.data import ImageSet


@dataclass(frozen=True, eq=False)
class Score:
    """Loss and counts of a batch.

    Attributes:
        loss: Mean of the mixed cross-entropy.
        classes: Correctly classified images.
        groups: Images whose group is right.
        count: Images.
    """

    loss: Tensor
    classes: int
    groups: int
    count: int


class Objective:
    """Cross-entropy over the trained classes and over groups of them.

    Args:
        num_classes: Number of logits.
        active: Classes that are trained; the other logits are left out.
        groups: Group of each class (num_classes,).
        smoothing: Label smoothing of the cross-entropy over classes.
        device: Where the logits are.
    """

    def __init__(
        self,
        num_classes: int,
        active: tuple[int, ...],
        groups: Tensor,
        smoothing: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.active = torch.tensor(active, dtype=torch.int64, device=device)
        self.index = torch.full((num_classes,), -1, dtype=torch.int64, device=device)
        self.index[self.active] = torch.arange(len(active), device=device)
        self.groups = groups.to(device)
        self.members = F.one_hot(self.groups[self.active]).float()
        self.smoothing = smoothing

    def __call__(self, logits: Tensor, labels: Tensor, coarse: float = 0.0) -> Score:
        """Score logits (B, num_classes) against labels (B,).

        Args:
            logits: Outputs of a network.
            labels: True classes, all of them active.
            coarse: Weight of the groups, from 0 (classes only) to 1 (groups only).
        """
        log_p = F.log_softmax(logits[:, self.active].float(), dim=1)
        target, group = self.index[labels], self.groups[labels]
        p_group = log_p.exp() @ self.members
        loss = logits.new_zeros((), dtype=torch.float32)
        if coarse < 1:
            loss = loss + (1 - coarse) * F.nll_loss(log_p, target) * (1 - self.smoothing)
            if self.smoothing:
                loss = loss - (1 - coarse) * self.smoothing * log_p.mean()
        if coarse > 0:
            loss = loss + coarse * F.nll_loss(p_group.clamp_min(1e-8).log(), group)
        return Score(
            loss,
            int((log_p.argmax(1) == target).sum()),
            int((p_group.argmax(1) == group).sum()),
            len(labels),
        )


def group_classes(data: ImageSet, count: int, seed: int = 0, limit: int = 100) -> Tensor:
    """Group classes by how their images look: k-means of class means of simple colour and edge features.

    The features are whitened by their scatter within classes, so that classes which a linear classifier can hardly
    tell apart fall into one group.

    Args:
        data: Images; classes without any go into group 0.
        count: Number of groups.
        seed: Seed of k-means.
        limit: Most images a class that are looked at.

    Returns:
        Group of each class, int64 (number of class names,).
    """
    groups = torch.zeros(len(data.classes), dtype=torch.int64)
    present = [int(label) for label in data.labels.unique()]
    means, scatter = [], torch.zeros(())
    for label in present:
        features = image_features(data.images[torch.nonzero(data.labels == label).flatten()[:limit]])
        means.append(features.mean(0))
        centered = features - means[-1]
        scatter = scatter + centered.T @ centered / len(features)
    table = torch.stack(means)
    values, vectors = torch.linalg.eigh(scatter / len(present) + 1e-3 * torch.eye(table.shape[1]))
    table = (table - table.mean(0)) @ (vectors * values.rsqrt())
    groups[torch.tensor(present)] = _k_means(table, min(count, len(present)), seed)
    return groups


def image_features(images: Tensor) -> Tensor:
    """Colours and edge energies of a 4 x 4 grid of cells: bytes (B, 3, S, S) to float32 (B, 112)."""
    pixels = images.float() / 255
    grey = pixels.mean(1, keepdim=True)
    vertical = (grey[..., 1:, :-1] - grey[..., :-1, :-1]).abs()
    horizontal = (grey[..., :-1, 1:] - grey[..., :-1, :-1]).abs()
    diagonal = (grey[..., 1:, 1:] - grey[..., :-1, :-1]).abs()
    cells = [F.adaptive_avg_pool2d(x, 4).flatten(1) for x in (pixels, vertical, horizontal, diagonal)]
    squares = F.adaptive_avg_pool2d(grey.square(), 4).flatten(1)
    return torch.cat([*cells, squares], dim=1)


def _k_means(points: Tensor, count: int, seed: int, rounds: int = 50) -> Tensor:
    """Nearest of `count` centers for every point; the best of several starts."""
    generator = torch.Generator().manual_seed(seed)
    best, best_cost = torch.zeros(len(points), dtype=torch.int64), float("inf")
    for _ in range(10):
        centers = points[torch.randperm(len(points), generator=generator)[:count]]
        for _ in range(rounds):
            assigned = torch.cdist(points, centers).argmin(1)
            centers = torch.stack(
                [points[assigned == k].mean(0) if (assigned == k).any() else centers[k] for k in range(count)]
            )
        distance = torch.cdist(points, centers).min(1)
        cost = float(distance.values.square().sum())
        if cost < best_cost:
            best, best_cost = distance.indices, cost
    return best
