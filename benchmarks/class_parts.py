"""The classes of a data set that a GHN was trained on, and those that it never saw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from timm_ghn.errors import FineTuneError, TrainingError
from timm_ghn.finetune import Benchmark
from timm_ghn.images import ImageSet
from timm_ghn.training.data import split

ClassPart = Literal["all", "trained", "held-out"]


def part_of(data: Benchmark, part: ClassPart, held_out: int = 50) -> Benchmark:
    """The classes of a data set that a GHN was trained on, or those that it never saw.

    They are those of the division that `timm-ghn train` makes of the same data set (`timm_ghn.training.data.split`).

    Args:
        data: The data set, with all its classes.
        part: Which of them.
        held_out: Classes that were held out.

    Raises:
        FineTuneError: If the data set does not have as many classes.
    """
    if part == "all":
        return data
    try:
        found = split(data.train, held_out=held_out).held_out
    except TrainingError as error:
        raise FineTuneError(f"{data.name}: {error}") from error
    hidden = set() if found is None else set(found.labels.tolist())
    chosen = [label for label in range(data.num_classes) if (label in hidden) == (part == "held-out")]
    return Benchmark(
        f"{data.name}, {part} classes", _with_classes(data.train, chosen), _with_classes(data.test, chosen), data.copy
    )


def _with_classes(data: ImageSet, chosen: Sequence[int]) -> ImageSet:
    """The images of some classes, with new labels in their order."""
    new = torch.full((len(data.classes),), -1, dtype=torch.int64)
    new[list(chosen)] = torch.arange(len(chosen))
    labels = new[data.labels]
    kept = labels >= 0
    return ImageSet(data.images[kept], labels[kept], tuple(data.classes[label] for label in chosen))
