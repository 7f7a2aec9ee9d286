"""The `train` command: `timm-ghn train --images PATH... --out DIR`."""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from timm_ghn.errors import TrainingError
from timm_ghn.ghn import load_ghn
from timm_ghn.images import HOW_TO_GET_IMAGES
from timm_ghn.training.checkpoint import Checkpoint
from timm_ghn.training.config import PRESETS, TrainConfig
from timm_ghn.training.export import export_run
from timm_ghn.training.families import FAMILIES
from timm_ghn.training.processes import join_processes
from timm_ghn.training.run import prepare
from timm_ghn.training.teacher import PACKAGED

_SETTINGS = {entry.name: entry for entry in fields(TrainConfig) if isinstance(entry.default, (int, float))}
_GHN_SETTINGS = (("hid", "size of the GHN's node features"), ("tiles", "blocks a side that differ in a large kernel"))


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-ghn train`."""
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="PATH",
        help="JPEG shards (safetensors), or one folder with a sub-folder a class",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of checkpoints and metrics")
    parser.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        help="configuration to start from (default: that of the run that is resumed, bundled for a new one)",
    )
    parser.add_argument(
        "--teacher",
        metavar="NAME",
        help=f"trained network to learn from, {PACKAGED} or one of timm; else classes",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, with its settings")
    parser.add_argument("--from-ghn", metavar="GHN", help="begin with this GHN (a name or a file), and its sizes")
    parser.add_argument("--stop-after", type=int, metavar="N", help="stop at this update, to be resumed")
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="begin no update after so long, all told, and evaluate; to be resumed",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    parser.add_argument("--image-size", type=int, default=32, help="side of the images in pixels")
    parser.add_argument(
        "--without-family",
        nargs="+",
        default=[],
        choices=sorted(FAMILIES),
        metavar="FAMILY",
        help=f"families never to train on, for measuring generalization; of {', '.join(sorted(FAMILIES))}",
    )
    for name, entry in _SETTINGS.items():
        text = f"{entry.metadata['text']} (default: the configuration's)"
        parser.add_argument(_option(name), type=type(entry.default), help=text)
    for name, text in _GHN_SETTINGS:
        parser.add_argument(_option(name), type=int, help=f"{text} (default: the configuration's)")
    parser.add_argument(
        "--hypernet",
        choices=("gatedgnn", "graphormer"),
        help="what mixes the features of the nodes (default: the configuration's); a Graphormer has 4 layers, 8 heads",
    )
    parser.add_argument("--evaluate-only", action="store_true", help="do not train: evaluate the checkpoint in --out")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write the final GHN to this file")
    parser.add_argument("--export-only", action="store_true", help="do not train: export the last checkpoint in --out")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def make_config(args: argparse.Namespace) -> TrainConfig:
    """The configuration of the run that is resumed, or a preset, with what the command line changes.

    Raises:
        TrainingError: If a value is out of range, or the checkpoint to resume is damaged.
        CheckpointError, UnknownGhnError, DownloadError: If the GHN to begin with cannot be loaded.
    """
    before = Checkpoint.read(args.out) if args.resume or args.evaluate_only else None
    config = before.config if before is not None and args.preset is None else PRESETS[args.preset or "bundled"]
    changes = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    shape: dict[str, Any] = {name: getattr(args, name) for name, _ in _GHN_SETTINGS if getattr(args, name) is not None}
    if args.hypernet is not None:
        layers, heads = (4, 8) if args.hypernet == "graphormer" else (0, 0)
        shape |= {"hypernet": args.hypernet, "layers": layers, "heads": heads}
    families = {name: share for name, share in config.families.items() if name not in args.without_family}
    ghn = config.ghn
    if args.from_ghn is not None:  # the number of classes follows from images and teacher
        ghn = replace(load_ghn(args.from_ghn).config, num_classes=ghn.num_classes)
    return replace(config, ghn=replace(ghn, **shape), families=families, **changes)


def run_train(args: argparse.Namespace) -> int:
    """Run `timm-ghn train`.

    Returns:
        Exit status.

    Raises:
        TrainingError: If images are missing, the folder holds another run, or training cannot go on.
    """
    started = time.monotonic()
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
        trainer = prepare(
            args.images,
            config,
            args.out,
            processes,
            ghn=args.from_ghn,
            resume=args.resume or args.evaluate_only,
            teacher=args.teacher,
            size=args.image_size,
        )
        if args.evaluate_only:
            result = trainer.evaluate()
            tqdm.write("" if result is None else result.table())
            return 0
        until = None if args.minutes is None else started + 60 * args.minutes
        result = trainer.run(stop_after=args.stop_after, until=until)
        if processes.is_main_process:
            if args.export is not None:
                export_run(args.out, args.export)
            if result is not None:
                tqdm.write(json.dumps({"evaluation": asdict(result)}))
    finally:
        processes.end_training()
    return 0
