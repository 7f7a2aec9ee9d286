"""A run from its settings: images, architectures and a GHN become a trainer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from timm_ghn.errors import TrainingError
from timm_ghn.ghn.checkpoint import read
from timm_ghn.ghn.config import GHNConfig
from timm_ghn.training.begin import compile_parts, new_ghn, with_tiles
from timm_ghn.training.checkpoint import Checkpoint
from timm_ghn.training.config import TrainConfig
from timm_ghn.training.data import ImageSet, Splits, load_images, split
from timm_ghn.training.loop import Trainer
from timm_ghn.training.pool import ArchitecturePool, PoolConfig
from timm_ghn.training.pretext import make_pretext

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Beginning:
    """What a run begins with.

    Attributes:
        ghn: File of a GHN; None for a new one.
        step: Step of the schedules.
        resume: Whether it goes on from the checkpoint in its folder instead, if there is one.
        hid: Size of a new GHN's node features; a GHN from a file keeps its own.
        tiles: Blocks a side that differ in a large kernel. A GHN from a file without them gets new codes.
    """

    ghn: Path | None = None
    step: int = 0
    resume: bool = False
    hid: int = 32
    tiles: int = 1


def prepare(
    images: Sequence[str | Path],
    config: TrainConfig,
    out: Path,
    processes: Accelerator,
    beginning: Beginning,
    *,
    workers: int = 1,
) -> Trainer:
    """Load images and architectures, and make or restore the trainer.

    Raises:
        TrainingError: If images are missing, or the folder holds another run.
    """
    _check_folder(out, config, beginning.resume)
    first = processes.is_main_process
    data = load_images(images, config.sampler.input_size, progress=first)
    splits = split(data, held_out=config.held_out_classes, validation=config.validation, seed=config.seed)
    with processes.main_process_first():  # it builds the pools, the others read them
        pool, eval_pool = _pools(out, config, workers, first)
    return make_trainer(config, splits, pool, eval_pool, out, processes, beginning)


def _check_folder(out: Path, config: TrainConfig, resume: bool) -> None:
    if not resume:
        if Checkpoint.is_in(out):
            raise TrainingError(f"{out} holds a run already: give --resume, or another folder")
        return
    before = Checkpoint.read(out)
    if before is None:
        return
    values = [(entry.name, getattr(before.config, entry.name), getattr(config, entry.name)) for entry in fields(config)]
    changed = [name for name, old, new in values if old != new]
    if changed:
        logging.getLogger(__name__).warning("resuming with other settings than before: %s", ", ".join(changed))


def _pools(out: Path, config: TrainConfig, workers: int, progress: bool) -> tuple[ArchitecturePool, ArchitecturePool]:
    # Evaluation has as many architectures of each family.
    every_family = replace(config.sampler, families=dict.fromkeys(config.sampler.all_families, 1.0))
    held_out = ArchitecturePool.load_or_build(
        out / "pool-evaluation.jsonl.gz",
        PoolConfig(config.eval_pool_size, config.seed, "evaluation", every_family),
        workers=workers,
        progress=progress,
    )
    pool = ArchitecturePool.load_or_build(
        out / "pool-train.jsonl.gz",
        PoolConfig(config.pool_size, config.seed, "train", config.sampler),
        exclude=held_out,
        workers=workers,
        progress=progress,
    )
    return pool, held_out


def easy_images(config: TrainConfig) -> ImageSet | None:
    """Images of the easy task to begin with; None for clusters of the training images.

    Raises:
        TrainingError: If packages are missing.
    """
    if config.easy != "pretext":
        return None
    return make_pretext(config.sampler.input_size, config.pretext_images, config.seed)


def make_trainer(
    config: TrainConfig,
    splits: Splits,
    pool: ArchitecturePool,
    eval_pool: ArchitecturePool,
    out: Path,
    processes: Accelerator,
    beginning: Beginning,
) -> Trainer:
    """A trainer with a new GHN at a good scale, or with that of a file or of the folder's checkpoint.

    Raises:
        CheckpointError: If the file is no GHN.
        TrainingError: If it is one of another kind.
    """
    before = Checkpoint.read(out) if beginning.resume else None
    file = beginning.ghn if before is None else out / before.weights
    if file is not None:
        ghn = read(file)
        ghn.info = None  # of the file; training makes another GHN of it
        if ghn.config.kernels != config.kernels:
            raise TrainingError(f"{file} has '{ghn.config.kernels}' kernels, the run '{config.kernels}' ones")
        ghn = with_tiles(ghn, beginning.tiles, config.seed)
    else:
        shape = GHNConfig(
            num_classes=len(splits.train.classes), hid=beginning.hid, kernels=config.kernels, tiles=beginning.tiles
        )
        ghn = new_ghn(shape, config, [member.graph for member in pool[:32]])
    if config.compile:
        compile_parts(ghn.to(processes.device))
    trainer = Trainer(ghn, config, splits, pool, eval_pool, out, processes, easy_images(config))
    trainer.step = beginning.step
    if before is not None:
        trainer.resume()
    return trainer
