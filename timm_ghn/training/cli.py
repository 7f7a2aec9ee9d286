"""The `train` command: `timm-ghn train --images PATH... --out DIR`."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from timm_ghn.errors import TrainingError
from timm_ghn.training.config import PRESETS, TrainConfig
from timm_ghn.training.data import HOW_TO_GET_IMAGES
from timm_ghn.training.export import export_run
from timm_ghn.training.processes import join_processes
from timm_ghn.training.run import Beginning, prepare
from timm_ghn.training.sampling import FAMILY_WEIGHTS

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
