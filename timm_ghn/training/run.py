"""A run from its settings: images, a teacher, networks and a GHN become a trainer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from timm_ghn.errors import TrainingError
from timm_ghn.ghn import load_ghn
from timm_ghn.images import load_images
from timm_ghn.storage.paths import cache_directory
from timm_ghn.training.architectures import evaluation_networks, training_networks
from timm_ghn.training.begin import new_ghn
from timm_ghn.training.checkpoint import Checkpoint
from timm_ghn.training.config import TrainConfig
from timm_ghn.training.data import Splits, split
from timm_ghn.training.loop import Trainer
from timm_ghn.training.teacher import SAMPLE, check_teacher, teacher_targets

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Beginning:
    """What a run begins with.

    Attributes:
        ghn: Name or file of a GHN; None for a new one.
        resume: Whether it goes on from the checkpoint in its folder instead, if there is one.
        teacher: Name of the teacher, see `teacher_targets`; None for none.
        size: Side to which images are brought, in pixels.
    """

    ghn: str | Path | None = None
    resume: bool = False
    teacher: str | None = None
    size: int = 32


def prepare(
    images: Sequence[str | Path], config: TrainConfig, out: Path, processes: Accelerator, beginning: Beginning
) -> Trainer:
    """Check everything, load the images and what the teacher sees in them, and make or restore the trainer.

    Raises:
        TrainingError: If images are missing, the folder holds another run, or the GHN is of another kind.
        CheckpointError, UnknownGhnError, DownloadError: If the GHN cannot be loaded.
        MissingDependencyError: If the teacher's weights are not installed.
    """
    before = _check_folder(out, config, beginning.resume)
    if beginning.teacher is not None:
        check_teacher(beginning.teacher)
    file = beginning.ghn if before is None else out / before.weights
    given = None if file is None else load_ghn(str(file))
    splits = load_splits(images, config, beginning, processes)
    shape = replace(config.ghn, num_classes=splits.num_outputs)
    ghn = new_ghn(shape, config.seed) if given is None else given
    if ghn.config != shape:
        raise TrainingError(f"the GHN of the file is {ghn.config}, the run's is {shape}")
    ghn.info = ghn.seen = None  # of a file; training makes another GHN of it
    trainer = Trainer(ghn, config, splits, training_networks(ghn, config), evaluation_networks(ghn), out, processes)
    if before is not None:
        trainer.resume()
    return trainer


def _check_folder(out: Path, config: TrainConfig, resume: bool) -> Checkpoint | None:
    if not resume and Checkpoint.is_in(out):
        raise TrainingError(f"{out} holds a run already: give --resume, or another folder")
    before = Checkpoint.read(out)
    if before is None:
        return None
    changed = [name for name, value in config.to_dict().items() if before.config.to_dict()[name] != value]
    if changed:
        logger.warning("resuming with other settings than before: %s", ", ".join(changed))
    return before


def load_splits(
    images: Sequence[str | Path], config: TrainConfig, beginning: Beginning, processes: Accelerator
) -> Splits:
    """The images, with the teacher's targets, in training, validation and held-out parts.

    Raises:
        TrainingError: If images are missing.
    """
    first = processes.is_main_process
    data = load_images(images, beginning.size, progress=first)
    if beginning.teacher is not None:
        with processes.main_process_first():  # it computes the targets, the others read them
            components = teacher_targets(data.images, beginning.teacher, cache_directory() / "teacher", progress=first)
        data = replace(data, targets=_whitened(components))
    return split(data, held_out=config.held_out_classes, validation=config.validation, seed=config.seed)


def _whitened(components: Tensor) -> Tensor:
    """Components divided by the square roots of their standard deviations, float16 of moderate size.

    So the largest ones count most, though less than among the teacher's features.
    """
    values = components.float()
    values = values / values[:SAMPLE].std(0).clamp_min(1e-6).sqrt()
    return (values / values[:SAMPLE].square().mean().sqrt()).half()
