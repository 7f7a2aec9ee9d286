"""The `train` command: `timm-ghn train --images PATH... --out DIR`."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from timm_ghn.errors import TrainingError
from timm_ghn.ghn.checkpoint import read
from timm_ghn.ghn.config import GHNConfig
from timm_ghn.ghn.model import GHN
from timm_ghn.graph.graph import Graph
from timm_ghn.training.architectures import FAMILY_WEIGHTS
from timm_ghn.training.config import PRESETS, TrainConfig
from timm_ghn.training.data import HOW_TO_GET_IMAGES, ImageSet, Splits, load_images, split
from timm_ghn.training.export import export_run, smooth_sizes
from timm_ghn.training.loop import Trainer, rescale_decoder, share_decoder
from timm_ghn.training.pool import ArchitecturePool, PoolConfig
from timm_ghn.training.pretext import make_pretext
from timm_ghn.training.processes import join_processes

if TYPE_CHECKING:
    from accelerate import Accelerator

_OVERRIDES = (
    ("steps", int, "updates of the GHN"),
    ("stop_after", int, "end at this step, with the schedules of --steps"),
    ("minutes", float, "let the schedules follow the clock, and stop after so many minutes"),
    ("meta_batch", int, "architectures a step, over all processes"),
    ("batch_size", int, "images an architecture"),
    ("optimizer", str, "adamw, or muon: orthogonalized updates of matrices"),
    ("lr", float, "peak learning rate"),
    ("cooldown", float, "share of the run at its end over which a constant learning rate falls to zero"),
    ("kernels", str, "what the GHN does to the kernels that it emits: raw, normalized or orthogonal"),
    ("easy", str, "task to begin with: pretext (photographs and drawings) or clusters (of the images)"),
    ("pool_size", int, "distinct architectures to train on"),
    ("eval_pool_size", int, "other architectures to evaluate on"),
    ("held_out_classes", int, "classes that are kept for measuring"),
    ("groups", int, "groups of classes that training begins with"),
    ("eval_every", int, "steps between evaluations"),
    ("save_every", int, "steps between checkpoints"),
    ("log_every", int, "steps between lines in metrics.jsonl"),
    ("seed", int, "seed of everything drawn"),
    ("num_threads", int, "threads a process"),
    ("amp", bool, "networks in bfloat16"),
    ("compile", bool, "torch.compile for the conditioning of kernels"),
)


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-ghn train`."""
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="PATH",
        help="JPEG shards (safetensors), or one folder with a sub-folder a class",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of checkpoints and metrics")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="bundled", help="configuration to start from")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--from-ghn", type=Path, metavar="FILE", help="begin with the weights of this GHN")
    parser.add_argument("--from-step", type=int, default=0, metavar="N", help="step of the schedules to begin at")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    parser.add_argument("--workers", type=int, default=1, help="processes that record graphs before training")
    parser.add_argument("--hid", type=int, default=32, help="size of the GHN's node features")
    parser.add_argument("--tiles", type=int, default=1, help="blocks a side that differ in a large kernel")
    parser.add_argument("--image-size", type=int, default=32, help="side of the images in pixels")
    parser.add_argument(
        "--without-family",
        nargs="+",
        default=[],
        choices=sorted(FAMILY_WEIGHTS),
        help="families of architectures never to train on, for measuring generalization",
    )
    for name, kind, text in _OVERRIDES:
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"{text} (default: the preset's)", **how)
    parser.add_argument("--export", type=Path, metavar="FILE", help="write the final GHN to this file")
    parser.add_argument("--export-only", action="store_true", help="do not train: export the last checkpoint in --out")


def make_config(args: argparse.Namespace) -> TrainConfig:
    """The preset with the overrides of the command line.

    Raises:
        TrainingError: If a value is out of range.
    """
    config = PRESETS[args.preset]
    changes = {name: getattr(args, name) for name, _, _ in _OVERRIDES if getattr(args, name) is not None}
    families = {k: w for k, w in config.sampler.families.items() if k not in args.without_family}
    sampler = replace(config.sampler, families=families, input_size=args.image_size)
    return replace(config, sampler=sampler, **changes)


def run_train(args: argparse.Namespace) -> int:
    """Run `timm-ghn train`.

    Returns:
        Exit status.

    Raises:
        TrainingError: If images are missing, the folder holds another run, or training cannot go on.
    """
    if args.export_only:
        if args.export is None:
            raise TrainingError("--export-only needs --export FILE")
        export_run(args.out, args.export)
        return 0
    if not args.images:
        raise TrainingError(f"--images is needed: JPEG shards or a folder of classes. {HOW_TO_GET_IMAGES}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    config = make_config(args)
    processes = join_processes(args.device)
    try:
        beginning = Beginning(args.from_ghn, args.from_step, resume=args.resume, hid=args.hid, tiles=args.tiles)
        trainer = prepare(args.images, config, args.out, processes, beginning, workers=args.workers)
        result = trainer.run()
        if processes.is_main_process:
            if args.export is not None:
                export_run(args.out, args.export)
            tqdm.write(json.dumps(result.to_dict()))
    finally:
        processes.end_training()
    return 0


@dataclass(frozen=True)
class Beginning:
    """What a run begins with.

    Attributes:
        ghn: File of a GHN; None for a new one.
        step: Step of the schedules.
        resume: Whether it goes on from the checkpoint in its folder instead, if there is one.
        hid: Size of a new GHN's node features.
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
    latest = out / "latest.json"
    if not latest.exists():
        return
    if not resume:
        raise TrainingError(f"{out} holds a run already: give --resume, or another folder")
    try:
        before = TrainConfig.from_dict(json.loads(latest.read_text())["config"])
    except (ValueError, KeyError) as error:
        raise TrainingError(f"{latest} is damaged: {error}") from error
    changed = [entry.name for entry in fields(config) if getattr(before, entry.name) != getattr(config, entry.name)]
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


def new_ghn(shape: GHNConfig, config: TrainConfig, graphs: Sequence[Graph]) -> GHN:
    """A GHN as training begins with it: embeddings of sizes that vary slowly, kernels that nodes share, He's scale.

    Args:
        shape: Its hyperparameters.
        config: The run.
        graphs: Architectures on which the scale of raw kernels is measured.
    """
    torch.manual_seed(config.seed)
    ghn = GHN(shape)
    smooth_sizes(ghn, config.seed)
    if shape.decoder == "conv":
        share_decoder(ghn, config.share, config.seed)
        if shape.kernels == "raw":
            rescale_decoder(ghn, graphs)
    return ghn


def with_tiles(ghn: GHN, tiles: int, seed: int) -> GHN:
    """A GHN whose large kernels are put together from more blocks, with codes as of an untrained one.

    Args:
        ghn: GHN to take weights from; itself if it has as many already, or 1 is asked for.
        tiles: Blocks a side.
        seed: Seed of the codes.

    Raises:
        TrainingError: If it has others.
    """
    if tiles in (1, ghn.config.tiles):
        return ghn
    if ghn.config.tiles > 1:
        raise TrainingError(f"the GHN has {ghn.config.tiles} tiles, the run {tiles}")
    torch.manual_seed(seed)
    extended = GHN(replace(ghn.config, tiles=tiles))
    extended.load_state_dict({**extended.state_dict(), **ghn.state_dict()})
    return extended


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
    if beginning.ghn is not None:
        ghn = read(beginning.ghn)
        ghn.info = None  # of the file; training makes another GHN of it
        if ghn.config.kernels != config.kernels:
            raise TrainingError(f"{beginning.ghn} has '{ghn.config.kernels}' kernels, the run '{config.kernels}' ones")
        ghn = with_tiles(ghn, beginning.tiles, config.seed)
    else:
        shape = GHNConfig(
            num_classes=len(splits.train.classes), hid=beginning.hid, kernels=config.kernels, tiles=beginning.tiles
        )
        ghn = new_ghn(shape, config, [member.graph for member in pool[:32]])
    trainer = Trainer(ghn, config, splits, pool, eval_pool, out, processes, easy_images(config))
    trainer.step = beginning.step
    if beginning.resume:
        trainer.resume()
    return trainer
