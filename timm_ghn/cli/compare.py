"""`timm-ghn compare`: which initialization suits your architecture and your images."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_ghn.cli.common import add_model_kwargs, check_name
from timm_ghn.errors import CommandError, MissingDependencyError

if TYPE_CHECKING:
    from timm_ghn.finetune import FineTuneConfig

HELP = "train your architecture on your images from several initializations, and say which is ahead"
_STEPS = 300
"""Steps of training that the default number of epochs comes to, at least."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments and the handler."""
    parser.description = (
        "Trains MODEL on your images from each initialization, with the same images in the same order for all of them, "
        "and prints accuracies on images that are held out. An interrupted command goes on when it is given again."
    )
    parser.add_argument("model", metavar="MODEL", help="name of a timm model")
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="a folder with one sub-folder a class (or train and test with those); cifar10, cifar100, svhn or "
        "fashion-mnist, with :DIR for where it is; or the prefix of JPEG shards",
    )
    parser.add_argument("--download", action="store_true", help="let torchvision download a data set that is missing")
    parser.add_argument("--inits", nargs="+", default=["rand", "orth", "ghn-orth"], metavar="INIT")
    parser.add_argument("--ghn", help="name, path or hf-hub:organization/name of a GHN")
    parser.add_argument("--epochs", type=int, metavar="N", help=f"default: at least 10, and at least {_STEPS} steps")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs from each initialization (default: 3)")
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-3], metavar="LR",
        help="learning rates of AdamW (default: 0.001); of several, the best is chosen for each initialization on "
        "training images that are held out")  # fmt: skip
    parser.add_argument("--batch-size", type=int, metavar="N", help="default: 48, or an eighth of the images")
    parser.add_argument("--image-size", type=int, metavar="N", help="side in pixels (default: 64, or the data set's)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of results (default: compare-MODEL)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    add_model_kwargs(parser)
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Train, print the table and the sentence, draw the curves."""
    from dataclasses import replace

    import torch

    from timm_ghn.finetune import Execution, Job, ResultStore, load_benchmark, run_jobs, summarize, tune
    from timm_ghn.finetune.verdict import comparison_table, draw_curves, verdict

    check_name(args.model)
    if args.seeds < 1:
        raise CommandError("--seeds must be at least 1")
    for init in args.inits:
        _config(args, init)  # before images are read
    data = load_benchmark(args.data, size=args.image_size, download=args.download)
    configs = [_config(args, init, len(data.train), data.train.size) for init in dict.fromkeys(args.inits)]
    out = args.out or Path(f"compare-{args.model.replace('/', '-')}")
    store = ResultStore(out)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    execution = Execution(device, evaluate_every=math.ceil(configs[0].epochs / 10))
    steps = configs[0].epochs * -(-len(data.train) // configs[0].batch_size)
    length = f"{steps} steps a run, in {configs[0].epochs} epoch{'s' * (configs[0].epochs > 1)}"
    sizes = f"{len(data.train)} images of {data.num_classes} classes to train on, {len(data.test)} to measure on"
    print(f"{sizes}; {length}", flush=True)
    grids = [[replace(config, lr=lr) for lr in args.lrs] for config in configs]
    tuned = [tune(grid, (1000,), data, store, execution) for grid in grids]
    results = run_jobs([Job(config, seed) for config in tuned for seed in range(args.seeds)], data, store, execution)
    summaries = summarize(results)
    if not summaries:
        print("All runs are left to another process that works on them.")
        return 0
    print("\n".join(["", *comparison_table(summaries), "", verdict(summaries, steps)]))
    try:
        draw_curves(results, out / "curves.png")
        print(f"Curves: {out / 'curves.png'}")
    except MissingDependencyError as error:
        print(error)
    return 0


def _config(args: argparse.Namespace, init: str, count: int = 100, size: int = 64) -> FineTuneConfig:
    """Settings of the runs from one initialization; what the user left open follows the images.

    Args:
        args: The arguments of the command.
        init: The initialization.
        count: Number of training images.
        size: Their side in pixels.

    Raises:
        FineTuneError, InitError: If an argument is out of range, or the initialization does not exist.
    """
    from timm_ghn.finetune import FineTuneConfig

    batch_size = min(48, max(8, count // 8)) if args.batch_size is None else args.batch_size
    steps = -(-count // max(batch_size, 1))
    kwargs = dict(args.model_kwargs)
    if _has_fixed_size(args.model):
        kwargs.setdefault("img_size", size)
    return FineTuneConfig(
        args.model,
        init.replace("_", "-").lower(),
        model_kwargs=kwargs,
        ghn=args.ghn,
        image_size=size,
        optimizer="adamw",
        lr=args.lrs[0],
        weight_decay=0.05,
        epochs=max(10, math.ceil(_STEPS / steps)) if args.epochs is None else args.epochs,
        batch_size=batch_size,
        labels_per_class=None,
        settle=True,
    )


def _has_fixed_size(name: str) -> bool:
    """Whether a model has to be told the size of its images, as most transformers."""
    import timm

    cfg: Any = timm.get_pretrained_cfg(name) if ":" not in name else None
    return bool(cfg is not None and cfg.fixed_input_size)
