"""A run from its settings: images, a teacher, networks and a GHN become a trainer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from timm_ghn.errors import TrainingError
from timm_ghn.ghn import load_ghn
from timm_ghn.images import load_images
from timm_ghn.storage.paths import cache_directory
from timm_ghn.training.architectures import evaluation_networks, training_networks
from timm_ghn.training.begin import new_ghn
from timm_ghn.training.checkpoint import LATEST, Checkpoint
from timm_ghn.training.config import TrainConfig
from timm_ghn.training.data import split
from timm_ghn.training.loop import Trainer
from timm_ghn.training.teacher import SAMPLE, check_teacher, teacher_targets

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


def prepare(
    images: Sequence[str | Path],
    config: TrainConfig,
    out: Path,
    processes: Accelerator,
    *,
    ghn: str | Path | None = None,
    resume: bool = False,
    teacher: str | None = None,
    size: int = 32,
) -> Trainer:
    """Check everything, load the images and what the teacher sees in them, and make or restore the trainer.

    Args:
        images: Shards, or a folder of classes.
        config: The run.
        out: Its folder.
        processes: What `join_processes` gives.
        ghn: Name or file of the GHN to begin with; None for a new one.
        resume: Whether to go on from the checkpoint in the folder instead, if there is one.
        teacher: Name of the teacher, see `teacher_targets`; None for none.
        size: Side to which images are brought, in pixels.

    Raises:
        TrainingError: If the folder holds another run, the teacher does not exist, or the GHN is of another kind.
        ImageError: If images are missing or damaged.
        CheckpointError, UnknownGhnError, DownloadError: If the GHN cannot be loaded.
        MissingDependencyError: If the teacher's weights are not installed.
    """
    before = _check_folder(out, config, resume)
    if teacher is not None:
        check_teacher(teacher)
    file = ghn if before is None else out / before.weights
    given = None if file is None else load_ghn(str(file))  # before the images, which take longer
    first = processes.is_main_process
    data = load_images(images, size, progress=first)
    if teacher is not None:
        with processes.main_process_first():  # it computes the targets, the others read them
            components = teacher_targets(data.images, teacher, cache_directory() / "teacher", progress=first)
        data = replace(data, targets=_whitened(components))
    splits = split(data, held_out=config.held_out_classes, validation=config.validation)
    shape = replace(config.ghn, num_classes=splits.num_outputs)
    trained = new_ghn(shape, config.seed) if given is None else given
    if trained.config != replace(shape, num_classes=trained.config.num_classes):
        raise TrainingError(f"the GHN of the file is {trained.config}, the run's is {shape}")
    trained.info = None  # of a file; training makes another GHN of it, that has seen what this one has
    networks = training_networks(trained, config), cache(partial(evaluation_networks, trained))
    trainer = Trainer(trained, config, splits, *networks, out, processes)
    if before is not None:
        trainer.resume()
    return trainer


def _check_folder(out: Path, config: TrainConfig, resume: bool) -> Checkpoint | None:
    if not resume and (out / LATEST).exists():
        raise TrainingError(f"{out} holds a run already: give --resume, or another folder")
    before = Checkpoint.read(out)
    if before is None:
        return None
    changed = [name for name, value in config.to_dict().items() if before.config.to_dict()[name] != value]
    if changed:
        logger.warning("resuming with other settings than before: %s", ", ".join(changed))
    return before


def _whitened(components: Tensor) -> Tensor:
    """Components divided by the square roots of their standard deviations, float16 of moderate size.

    So the largest ones count most, though less than among the teacher's features.
    """
    values = components.float()
    values = values / values[:SAMPLE].std(0).clamp_min(1e-6).sqrt()
    return (values / values[:SAMPLE].square().mean().sqrt()).half()
