"""What the predicted networks are trained for: to see images as a teacher does, and to tell classes apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from timm_ghn.training.config import TrainConfig
from timm_ghn.training.data import Batch


class Objective:
    """The loss of one network's outputs: the teacher's components come first among them, then the classes.

    Args:
        config: Weights of the losses.
        num_components: Components of the teacher; 0 without one.
        num_classes: Classes.
        active: Classes that are trained; the outputs of the others are left out.
        device: Where the outputs are.
    """

    def __init__(
        self,
        config: TrainConfig,
        num_components: int,
        num_classes: int,
        active: tuple[int, ...],
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.num_components = num_components
        self.active = torch.tensor(active, dtype=torch.int64, device=device)
        self.index = torch.full((num_classes,), -1, dtype=torch.int64, device=device)
        self.index[self.active] = torch.arange(len(active), device=device)

    def __call__(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss, and what of it is worth a line in the metrics.

        Args:
            outputs: Of the network, (B, components + classes).
            batch: Images, labels and targets.
        """
        config = self.config
        outputs = outputs.float()
        loss = outputs.new_zeros(())
        seen: dict[str, float] = {}
        if config.components and self.num_components:
            cosine = F.cosine_similarity(outputs[:, : self.num_components], batch.targets).mean()
            loss = loss + config.components * (1 - cosine)
            seen["cosine"] = float(cosine.detach())
        if config.classes:
            logits = outputs[:, self.num_components :][:, self.active]
            target = self.index[batch.labels]
            loss = loss + config.classes * F.cross_entropy(logits, target)
            seen["accuracy"] = float((logits.argmax(1) == target).float().mean())
        seen["loss"] = float(loss.detach())
        return loss, seen


_SHARPNESS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


def ridge_loss(features: Tensor, labels: Tensor, penalty: float = 0.3) -> tuple[Tensor, float]:
    """Cross-entropy of a linear classifier that is fitted, in closed form, to half of a batch and tested on the rest.

    It measures features by how well new classes can be told apart with few labels, whatever the predicted classifier
    is. (The differentiable closed-form solver of arXiv 1805.08136; the factor from regression outputs to logits is the
    best of a few for each batch.)

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
