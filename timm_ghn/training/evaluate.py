"""Evaluation: networks that a GHN was never trained on, with predicted parameters and no training of their own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

import torch
from tqdm import tqdm

from timm_ghn.ghn.model import GHN
from timm_ghn.text import table
from timm_ghn.training.architectures import Network
from timm_ghn.training.conditioned import as_users_get
from timm_ghn.training.config import TrainConfig
from timm_ghn.training.data import Splits, draw_classes, take_batch
from timm_ghn.training.objective import Objective, linear_accuracy


@dataclass(frozen=True)
class Evaluation:
    """What networks with predicted parameters reach on validation images.

    Attributes:
        values: Means over all networks: what the objective sees (`cosine`, `accuracy`, `loss` ...), and `few_shot`,
            the accuracy of a linear classifier that is fitted to six images of each of twenty held-out classes.
        families: The same by family of networks.
    """

    values: dict[str, float]
    families: dict[str, dict[str, float]]

    def table(self) -> str:
        """One line a family."""
        rows = [(family, *found.values()) for family, found in [*sorted(self.families.items()), ("all", self.values)]]
        return "\n".join(table(("family", *self.values), rows))


@torch.no_grad()
def evaluate(
    ghn: GHN,
    networks: Iterable[Network],
    splits: Splits,
    objective: Objective,
    config: TrainConfig,
    *,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """What networks with predicted parameters reach, without any training of them.

    Batch norms use the statistics of the batch. Every network sees the same images.

    Args:
        ghn: GHN that predicts; its mode is restored.
        networks: One network of each family that is measured.
        splits: Images: validation images for the predicted outputs, held-out classes (validation images if there are
            none) for classifiers fitted to features.
        objective: What is scored.
        config: How many images there are. They are the same in all runs.
        device: Where to compute.
    """
    generator = torch.Generator().manual_seed(0)
    count, few_of = config.eval_images, splits.held_out or splits.validation
    plain = take_batch(splits.validation, torch.randint(len(splits.validation), (count,), generator=generator), device)
    few = take_batch(few_of, draw_classes(few_of.labels, count, 20, generator), device)
    was_training = ghn.training
    ghn.eval()
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    try:
        for network in tqdm(networks, desc="evaluating", unit="network", delay=2, leave=False):
            raw = ghn([network.graph])[0]
            predicted = as_users_get(raw, network.assignments, ghn.config, 0)
            _, values = objective(network(predicted, plain.images)[0], plain)
            features = torch.nan_to_num(network(predicted, few.images)[1].float())
            values["few_shot"] = linear_accuracy(features, few.labels)
            found[network.architecture.family].append(values)
    finally:
        ghn.train(was_training)
    means = {family: _mean(rows) for family, rows in found.items()}
    return Evaluation(_mean([row for rows in found.values() for row in rows]), means)


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(fmean(row[name] for row in rows), 4) for name in rows[0]}
