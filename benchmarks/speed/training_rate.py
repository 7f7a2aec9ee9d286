"""How fast a GHN is trained, and where the time of a step goes.

    python benchmarks/speed/training_rate.py --images tiny-imagenet-200/train --out rate
    python benchmarks/speed/training_rate.py --images tiny-imagenet-200/train --out rate --device cuda --amp --compile

All arguments of `timm-ghn train` are understood; --out keeps the drawn architectures for the next time. Measured are
the steps after the first few, at --from-step of the schedules (default: where all architectures are in use). The time
of a step is that of this process; its parts are those of `timm_ghn.training.metrics.PARTS`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from tqdm import tqdm

from timm_ghn.errors import TimmGhnError
from timm_ghn.training.cli import add_train_arguments, make_config
from timm_ghn.training.config import TrainConfig
from timm_ghn.training.loop import Trainer
from timm_ghn.training.metrics import PARTS
from timm_ghn.training.processes import join_processes
from timm_ghn.training.run import Beginning, prepare


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_train_arguments(parser)
    parser.add_argument("--measured", type=int, default=40, help="steps that are measured (default: 40)")
    parser.add_argument("--warm", type=int, default=8, help="steps before them (default: 8)")
    return parser.parse_args(arguments)


def measure(trainer: Trainer, warm: int, measured: int) -> dict[str, float]:
    """Rates and shares of some steps, as in a run's metrics."""
    if trainer.config.num_threads is not None:
        torch.set_num_threads(trainer.config.num_threads)
    progress = trainer.progress()
    for step in tqdm(range(warm + measured), desc="steps"):
        if step == warm:
            trainer.reset_meters()
        trainer.train_step(progress)
        trainer.step += 1
    return trainer.clock.summary()


def table(config: TrainConfig, found: dict[str, float]) -> str:
    """What was found, as Markdown."""
    rows = [f"| {config.meta_batch} networks x {config.batch_size} images a step | |", "|---|---|"]
    rows += [
        f"| {name.replace('_', ' ')} | {found[name]:.2f} |"
        for name in ("steps_per_second", "architectures_per_second", "images_per_second")
    ]
    rows += [f"| {part.replace('_', ', ').replace('ghn', 'GHN')} | {found[f'{part}_share']:.0%} |" for part in PARTS]
    return "\n".join([*rows, f"| the GHN and its update together | {found['ghn_share']:.0%} |"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script.

    Returns:
        Exit status: 0, or 2 after an error.
    """
    args = parse(arguments)
    try:
        if not args.images:
            raise TimmGhnError("--images is needed")
        config = make_config(args)
        step = args.from_step or int(config.steps * max(config.pool_full, config.easy_until))
        beginning = Beginning(args.from_ghn, step, hid=args.hid, tiles=args.tiles)
        trainer = prepare(args.images, config, args.out, join_processes(args.device), beginning, workers=args.workers)
        found = measure(trainer, args.warm, args.measured)
    except TimmGhnError as error:
        print(f"training_rate: error: {error}", file=sys.stderr)
        return 2
    print(table(config, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
