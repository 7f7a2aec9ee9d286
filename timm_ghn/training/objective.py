"""What the predicted networks are trained for: classes, and groups of classes to begin with.

A GHN that starts on hundreds of classes learns nearly nothing for a long time. Groups of similar classes are learnable
from the first step: the probability of a group is the sum over its classes, so groups and classes share one head and
the weight moves from one to the other without a break.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

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
        is_member = F.one_hot(self.groups[self.active]).bool().T
        self.outside = torch.zeros(is_member.shape, device=device).masked_fill_(~is_member, -1e4)
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
        log_group = torch.logsumexp(log_p[:, None] + self.outside, dim=2)
        loss = logits.new_zeros((), dtype=torch.float32)
        if coarse < 1:
            loss = loss + (1 - coarse) * F.nll_loss(log_p, target) * (1 - self.smoothing)
            if self.smoothing:
                loss = loss - (1 - coarse) * self.smoothing * log_p.mean()
        if coarse > 0:
            loss = loss + coarse * F.nll_loss(log_group, group)
        return Score(
            loss,
            int((log_p.argmax(1) == target).sum()),
            int((log_group.argmax(1) == group).sum()),
            len(labels),
        )


_SHARPNESS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


def ridge_loss(features: Tensor, labels: Tensor, penalty: float = 0.3) -> tuple[Tensor, float]:
    """Cross-entropy of a linear classifier that is fitted, in closed form, to half of a batch and tested on the rest.

    It rewards features from which new classes can be told apart with few labels, whatever the predicted classifier is:
    what a user who fine-tunes the network gets. (The differentiable closed-form solver of arXiv 1805.08136; the factor
    from regression outputs to logits is the best of a few for each batch.)

    Args:
        features: Inputs of the classifier, (B, D).
        labels: Classes, (B,); both halves of the batch hold the same ones.
        penalty: Ridge penalty relative to the features' mean square.

    Returns:
        Mean loss over both ways round, and the share of images whose class is right.
    """
    features = features.float()
    features = features - features.mean(0)
    features = features / (features.square().sum(1).mean().sqrt() + 1e-6)
    classes, target = torch.unique(labels, return_inverse=True)
    one_hot = F.one_hot(target, len(classes)).float()
    half = len(labels) // 2
    outputs = []
    for fit, test in ((slice(half, None), slice(0, half)), (slice(0, half), slice(half, None))):
        x, y = features[fit], one_hot[fit]
        mean = y.mean(0)
        gram = x @ x.T + penalty * torch.eye(len(x), device=x.device)
        outputs.append(features[test] @ (x.T @ torch.linalg.solve(gram, y - mean)) + mean)
    logits = torch.cat(outputs)
    with torch.no_grad():
        losses = [float(F.cross_entropy(factor * logits, target)) for factor in _SHARPNESS]
    factor = _SHARPNESS[losses.index(min(losses))] if all(map(math.isfinite, losses)) else 1.0
    right = int((logits.argmax(1) == target).sum())
    return F.cross_entropy(factor * logits, target), right / len(labels)


def kernel_penalties(predicted: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Two measures of how far predicted kernels are from a good initialization.

    Args:
        predicted: Tensors of one network by name; those with less than two dimensions do not count.

    Returns:
        Mean squared logarithm of a kernel's root mean square over He's (sqrt(2 / fan-in)), and the mean squared
        cosine between its channels (rows or columns, whichever are fewer; the first 64 of them).
    """
    scales, cosines = [], []
    for tensor in predicted.values():
        if tensor.ndim < 2 or tensor.shape[0] == 1:
            continue
        matrix = tensor.flatten(1)
        fan_in = matrix.shape[1]
        scales.append((matrix.square().mean() * (fan_in / 2) + 1e-8).log() / 2)
        block = matrix[:64] if tensor.ndim > 2 else matrix[:64, :64]
        if block.shape[0] > block.shape[1]:
            block = block.T
        rows = block / (block.norm(dim=1, keepdim=True) + 1e-8)
        side = len(rows)
        if side > 1:
            gram = rows @ rows.T
            cosines.append((gram.square().sum() - side) / (side * (side - 1)))
    zero = torch.zeros(())
    return (
        torch.stack(scales).square().mean() if scales else zero,
        torch.stack(cosines).mean() if cosines else zero,
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
    present = [int(label) for label in torch.unique(data.labels)]
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


def cluster_images(data: ImageSet, count: int, seed: int = 0, dims: int = 24, sample: int = 4000) -> ImageSet:
    """The same images labelled by how they look: k-means of whitened colour and edge features.

    An easy task to begin with: the label follows from a few low-level features of the image.

    Args:
        data: Images.
        count: Number of clusters.
        seed: Seed of k-means.
        dims: Principal components that are kept.
        sample: Images on which k-means runs.
    """
    table = torch.cat([image_features(part) for part in torch.split(data.images, 4096)])
    table = table - table.mean(0)
    _, scale, axes = torch.linalg.svd(table[:20_000], full_matrices=False)
    kept = min(dims, int((scale > 1e-4 * scale[0]).sum()))
    # Square root of the usual whitening: large variations count more, but not all that much more.
    table = table @ (axes[:kept].T / scale[:kept].sqrt())
    generator = torch.Generator().manual_seed(seed)
    points = table[torch.randperm(len(table), generator=generator)[:sample]]
    centers = points[:count]
    for _ in range(20):
        nearest = torch.cdist(points, centers).argmin(1)
        centers = torch.stack(
            [points[nearest == k].mean(0) if (nearest == k).any() else centers[k] for k in range(len(centers))]
        )
    labels = torch.cat([torch.cdist(part, centers).argmin(1) for part in torch.split(table, 8192)])
    return ImageSet(data.images, labels, tuple(f"cluster {k}" for k in range(len(centers))))


def _k_means(points: Tensor, count: int, seed: int, rounds: int = 30) -> Tensor:
    """Group of every point: k-means with groups of at most 1.5 times the mean size; the best of several starts."""
    generator = torch.Generator().manual_seed(seed)
    capacity = math.ceil(1.5 * len(points) / count)
    best, best_cost = torch.zeros(len(points), dtype=torch.int64), float("inf")
    for _ in range(10):
        centers = points[torch.randperm(len(points), generator=generator)[:count]]
        for _ in range(rounds):
            assigned = _assign(torch.cdist(points, centers), capacity)
            centers = torch.stack(
                [points[assigned == k].mean(0) if (assigned == k).any() else centers[k] for k in range(count)]
            )
        cost = float((points - centers[assigned]).square().sum())
        if cost < best_cost:
            best, best_cost = assigned, cost
    return best


def _assign(distances: Tensor, capacity: int) -> Tensor:
    """Nearest center with room for every point, the closest pairs first."""
    points, centers = distances.shape
    assigned = [-1] * points
    room = [capacity] * centers
    for pair in distances.flatten().argsort().tolist():
        point, center = divmod(pair, centers)
        if assigned[point] < 0 and room[center] > 0:
            assigned[point] = center
            room[center] -= 1
    return torch.tensor(assigned, dtype=torch.int64)
