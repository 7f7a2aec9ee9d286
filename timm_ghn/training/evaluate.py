"""Evaluation: networks that a GHN was never trained on, with predicted parameters and no training of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from timm_ghn.errors import TrainingError
from timm_ghn.ghn.model import GHN
from timm_ghn.training.data import BatchSampler, ImageSet, Splits, normalize
from timm_ghn.training.networks import build
from timm_ghn.training.objective import Objective, Score, ridge_loss
from timm_ghn.training.pool import PoolMember


@dataclass(frozen=True)
class Evaluation:
    """What held-out architectures with predicted parameters reach on validation images.

    Attributes:
        loss: Mean cross-entropy over classes.
        accuracy: Share of images whose class is right.
        group_accuracy: Share of images whose group of classes is right.
        few_shot: Accuracy of a linear classifier fitted to six images of each of twenty held-out classes.
        by_family: `few_shot` by family of architectures.
        easy: Accuracy of the predicted classifier on the easy task; None if it was not measured.
    """

    loss: float
    accuracy: float
    group_accuracy: float
    few_shot: float
    by_family: dict[str, float]
    easy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible form, for the metrics file."""
        return {
            "eval_loss": self.loss,
            "eval_accuracy": self.accuracy,
            "eval_group_accuracy": self.group_accuracy,
            "eval_few_shot": self.few_shot,
            "eval_by_family": self.by_family,
            "eval_easy": self.easy,
        }


def predict_and_call(model: nn.Module, predicted: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Logits of a network whose predicted parameters take the place of its own."""
    logits: Tensor = functional_call(model, dict(predicted), (images,))
    return logits


def call_with_features(model: nn.Module, predicted: Mapping[str, Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of a network with predicted parameters, and the features (B, D) that its last linear layer reads.

    Raises:
        TrainingError: If the network has no linear layer.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise TrainingError(f"{type(model).__name__} has no linear classifier")
    caught: list[Tensor] = []
    handle = linear[-1].register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        logits = predict_and_call(model, predicted, images)
    finally:
        handle.remove()
    return logits, caught[-1]


@torch.no_grad()
def evaluate(
    ghn: GHN,
    members: Sequence[PoolMember],
    splits: Splits,
    objective: Objective,
    *,
    num_images: int = 240,
    seed: int = 0,
    device: torch.device | str = "cpu",
    easy: tuple[ImageSet, Objective] | None = None,
) -> Evaluation:
    """Accuracy of architectures with predicted parameters, without any training of them.

    Batch norms use the statistics of the batch. Every architecture sees the same images.

    Args:
        ghn: GHN that predicts; its mode is restored.
        members: Architectures.
        splits: Images: validation images for the predicted classifier, held-out classes (validation images if there
            are none) for classifiers fitted to features.
        objective: What is scored.
        num_images: Images for each architecture and each of the two.
        seed: Decides which.
        device: Where to compute.
        easy: Images of the easy task, and its objective.
    """
    generator = torch.Generator().manual_seed(seed)
    plain = BatchSampler(splits.validation).draw(num_images, 0, generator)
    batch, labels = _on_device(splits.validation, plain, device)
    few_images = splits.held_out or splits.validation
    few_batch, few_labels = _on_device(few_images, BatchSampler(few_images).draw(num_images, 20, generator), device)
    if easy is not None:
        easy_batch, easy_labels = _on_device(easy[0], BatchSampler(easy[0]).draw(num_images, 0, generator), device)
    was_training = ghn.training
    ghn.eval()
    scores: list[Score] = []
    easy_scores: list[Score] = []
    families: dict[str, list[float]] = {}
    try:
        for member in members:
            predicted = ghn([member.graph])[0]
            model = build(member.spec, ghn.config.num_classes).to(device)
            scores.append(objective(predict_and_call(model, predicted, batch), labels))
            if easy is not None:
                logits = predict_and_call(model, predicted, easy_batch)
                easy_scores.append(easy[1](logits, easy[1].active[easy_labels]))
            _, features = call_with_features(model, predicted, few_batch)
            accuracy = ridge_loss(features, few_labels)[1] if bool(torch.isfinite(features).all()) else 0.0
            families.setdefault(member.spec.family, []).append(accuracy)
    finally:
        ghn.train(was_training)
    finite = [float(s.loss) for s in scores if math.isfinite(float(s.loss))]
    count = sum(s.count for s in scores)
    return Evaluation(
        sum(finite) / max(1, len(finite)),
        sum(s.classes for s in scores) / count,
        sum(s.groups for s in scores) / count,
        sum(sum(values) for values in families.values()) / len(scores),
        {name: sum(values) / len(values) for name, values in sorted(families.items())},
        sum(s.classes for s in easy_scores) / sum(s.count for s in easy_scores) if easy_scores else None,
    )


def _on_device(images: ImageSet, chosen: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
    return normalize(images.images[chosen].to(device)), images.labels[chosen].to(device)
