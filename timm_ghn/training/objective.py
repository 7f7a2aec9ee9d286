"""What the predicted networks are trained for: to see images as a teacher does, or to name classes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from timm_ghn.training.data import Batch, Splits


class Objective:
    """The loss of one network's outputs, of which the teacher's components come first, then the classes.

    With a teacher, it is 1 less the cosine of outputs and components; without one, the cross-entropy of the classes.

    Args:
        splits: Which components and classes there are.
        device: Where the outputs are.
    """

    def __init__(self, splits: Splits, device: torch.device | str = "cpu") -> None:
        self.num_components = 0 if splits.train.targets is None else splits.train.targets.shape[1]
        is_trained = torch.isin(torch.arange(len(splits.train.classes)), splits.train.labels)
        self._unused = torch.nonzero(~is_trained).flatten().to(device)

    def __call__(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss, and what of it is worth a line in the metrics.

        Args:
            outputs: Of the network, (B, components + classes).
            batch: Images, labels and targets.
        """
        outputs = outputs.float()
        if self.num_components:
            cosine = F.cosine_similarity(outputs[:, : self.num_components], batch.targets).mean()
            return 1 - cosine, {"cosine": float(cosine.detach()), "loss": 1 - float(cosine.detach())}
        logits = outputs.index_fill(1, self._unused, -torch.inf)
        loss = F.cross_entropy(logits, batch.labels)
        accuracy = float((logits.argmax(1) == batch.labels).float().mean())
        return loss, {"accuracy": accuracy, "loss": float(loss.detach())}


def linear_accuracy(features: Tensor, labels: Tensor, penalty: float = 0.3) -> float:
    """Accuracy of a linear classifier that is fitted, in closed form, to one half of a batch and tested on the other.

    It measures how well features tell new classes apart with few labels, whatever the predicted classifier is.

    Args:
        features: Inputs of the classifier, (B, D).
        labels: Classes, (B,); both halves of the batch hold the same ones.
        penalty: Ridge penalty relative to the features' mean square.

    Returns:
        Share of images whose class is right, over both ways round.
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
        gram = x @ x.T + penalty * torch.eye(len(x), device=x.device)
        outputs.append(features[test] @ (x.T @ torch.linalg.solve(gram, y - y.mean(0))) + y.mean(0))
    return float((torch.cat(outputs).argmax(1) == target).float().mean())
