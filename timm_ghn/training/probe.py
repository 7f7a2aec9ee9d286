"""A quick look at an initialization: logistic regression on a network's features before any training of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_ghn.errors import TrainingError
from timm_ghn.training.data import ImageSet, normalize
from timm_ghn.training.evaluate import call_with_features


def few_labels(data: ImageSet, shots: int, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Some images of every class that is present, and the others.

    Args:
        data: Images.
        shots: Images a class in the first part.
        seed: Decides which.

    Raises:
        TrainingError: If a class has no more than `shots` images.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(data), dtype=torch.bool)
    for label in torch.unique(data.labels).tolist():
        members = torch.nonzero(data.labels == label).flatten()
        if len(members) <= shots:
            raise TrainingError(f"class {data.classes[label]} has {len(members)} images, {shots} + 1 are needed")
        chosen[members[torch.randperm(len(members), generator=generator)[:shots]]] = True
    return data.subset(chosen), data.subset(~chosen)


@torch.no_grad()
def frozen_features(model: nn.Module, images: Tensor, batch_size: int = 250) -> Tensor:
    """What the last linear layer of a network reads, (N, D); batch norms use the statistics of each batch."""
    was_training = model.training
    statistics = [(name, buffer.clone()) for name, buffer in model.named_buffers()]
    model.train()
    try:
        parts = [call_with_features(model, {}, normalize(part))[1] for part in torch.split(images, batch_size)]
    finally:
        model.train(was_training)
        buffers = dict(model.named_buffers())
        for name, value in statistics:
            buffers[name].copy_(value)
    return torch.cat(parts)


def probe(
    model: nn.Module, train: ImageSet, test: ImageSet, *, penalties: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
) -> float:
    """Accuracy of logistic regression on frozen features.

    Args:
        model: Network with a linear classifier; left as it was.
        train: Images with labels to fit on, a few of each class.
        test: Other images.
        penalties: L2 penalties; the best on a fifth of `train` is taken.

    Returns:
        Share of the test images whose class is right.
    """
    features = frozen_features(model, torch.cat([train.images, test.images]))
    features = (features - features.mean(0)) / (features.std(0) + 1e-6)
    classes, target = torch.unique(train.labels, return_inverse=True)
    x, held = features[: len(train)], torch.arange(len(train)) % 5 == 0
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    x, target = x[order], target[order]
    scores = [_accuracy(_fit(x[~held], target[~held], penalty), x[held], target[held]) for penalty in penalties]
    layer = _fit(x, target, penalties[scores.index(max(scores))])
    return _accuracy(layer, features[len(train) :], torch.searchsorted(classes, test.labels))


def _fit(x: Tensor, target: Tensor, penalty: float) -> nn.Linear:
    layer = nn.Linear(x.shape[1], int(target.max()) + 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(layer(x), target) + penalty * layer.weight.square().sum()
        torch.autograd.backward(value)
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return layer


@torch.no_grad()
def _accuracy(layer: nn.Linear, x: Tensor, target: Tensor) -> float:
    return float((layer(x).argmax(1) == target).float().mean())
