"""What a GHN is worth: small timm models fine-tuned with few labels from its weights, beside a floor and an oracle.

    python benchmarks/bundled_ghn.py --data ../shared/data --out results/bundled                 # the whole table
    python benchmarks/bundled_ghn.py --data ../shared/data --tasks held-out --inits ghn-orth --ghn run/ghn.safetensors

Tasks: CIFAR-10 with 100 labels a class, Fashion-MNIST with as many, and 20 labels of each of the 50 classes of
Tiny-ImageNet that the GHN never saw. Learning rates are chosen for each initialization on held-out training images of
the task (5,000 of CIFAR-10), never on its test images. Beside the methods of `init=` there are two that bound them:

- `untrained`: GHN-orth by a GHN as it is before its first step, the floor;
- `oracle`: the same network trained directly, with all labels, on the images that the GHN was trained on.

Results are files in `--out`; what is there is not computed again, and several processes may share the folder.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from timm_ghn.errors import TimmGhnError
from timm_ghn.finetune import (
    Benchmark,
    Execution,
    FineTuneConfig,
    Grid,
    Job,
    ResultStore,
    RunResult,
    compare,
    load_benchmark,
    part_of,
    run_jobs,
    summarize,
    tune,
)
from timm_ghn.ghn import GHNConfig, load_ghn
from timm_ghn.ghn.checkpoint import write_safetensors
from timm_ghn.training.cli import new_ghn
from timm_ghn.training.config import PRESETS

_SMALL = {"stem": "original", "optimizer": "adamw", "weight_decay": 0.05, "batch_size": 48, "epochs": 20, "lr": 2e-3}
MODELS: dict[str, FineTuneConfig] = {
    "resnet": FineTuneConfig("resnet18", model_kwargs={"channels": (32, 64, 128, 256)}, **_SMALL),
    "convnext": FineTuneConfig(
        "convnext_atto",
        model_kwargs={"patch_size": 2, "dims": (24, 48, 96, 192), "depths": (2, 2, 4, 2)},
        **_SMALL,
    ),
    "vit": FineTuneConfig(
        "vit_tiny_patch16_224",
        model_kwargs={"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4},
        **_SMALL,
    ),
}
"""timm models of 1.1 to 2.8 million parameters at 32 x 32; their depths and widths are in no training architecture."""

LRS = {"resnet": (1e-3, 3e-3, 1e-2), "convnext": (3e-4, 1e-3, 3e-3), "vit": (3e-4, 1e-3, 3e-3)}
"""Learning rates to choose from."""

INITS = ("rand", "orth", "untrained", "ghn", "ghn-orth", "oracle")
TASKS = ("cifar10", "held-out", "fashion-mnist")
MARKS = (0.1, 0.3, 1.0)
"""Shares of the epochs after which accuracy is measured."""
_SHARDS = "tinyimagenet32"


class Bench:
    """Everything that the runs have in common.

    Args:
        args: Arguments of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.store = ResultStore(args.out)
        self.images: dict[str, Benchmark] = {}
        self.execution = Execution(evaluate_every=0, evaluate_at=marks(args.epochs))

    def data(self, task: str) -> Benchmark:
        """Images of a task; "oracle" for those of the classes that the GHN was trained on."""
        if task not in self.images:
            if task in ("held-out", "oracle"):
                tiny = load_benchmark("shards", self.args.data / _SHARDS, progress=False)
                self.images[task] = part_of(tiny, "held-out" if task == "held-out" else "trained")
            else:
                self.images[task] = load_benchmark(task, self.args.data, progress=False)
        return self.images[task]

    def config(self, task: str, model: str, init: str) -> FineTuneConfig:
        """Settings of the runs of one line, before the learning rate is chosen."""
        labels = 20 if task == "held-out" else 100
        config = replace(MODELS[model], epochs=self.args.epochs, labels_per_class=labels)
        if init == "oracle":
            return replace(config, init="rand", init_file=str(self.oracle(model)))
        if init == "untrained":
            return replace(config, init="ghn-orth", ghn=str(self.untrained()))
        if init in ("ghn", "ghn-orth"):
            return replace(config, init=init, ghn=self.args.ghn)
        return replace(config, init=init)

    def oracle(self, model: str) -> Path:
        """File of a network trained directly on the GHN's images."""
        config = replace(
            MODELS[model], init="rand", labels_per_class=None, epochs=self.args.oracle_epochs, batch_size=64
        )
        execution = Execution(evaluate_every=0, keep_weights=True)
        (result,) = run_jobs([Job(config, 0)], self.data("oracle"), self.store, execution)
        return self.store.weights(result.key)

    def untrained(self) -> Path:
        """File of a GHN of the preset, as it is before its first step."""
        path = self.args.out / "untrained.safetensors"
        if not path.exists():
            shape = GHNConfig(num_classes=load_ghn(self.args.ghn).config.num_classes, kernels="orthogonal")
            write_safetensors(new_ghn(shape, PRESETS["bundled"], []), path)
        return path

    def line(self, task: str, model: str, init: str) -> tuple[RunResult, ...]:
        """All seeds of a line of the table, with the learning rate that is best on held-out training images."""
        args, data = self.args, self.data(task)
        grid = Grid(lrs=tuple(args.lrs or LRS[model]), seeds=tuple(args.tune_seeds))
        config = tune(self.config(task, model, init), grid, data, self.store, self.execution)
        if args.tune_only:
            return ()
        return run_jobs([Job(config, seed) for seed in range(args.seeds)], data, self.store, self.execution)


def marks(epochs: int) -> tuple[int, ...]:
    """The epochs after which accuracy is measured."""
    return tuple(math.ceil(share * epochs) for share in MARKS)


def row(task: str, model: str, init: str, done: Mapping[str, Sequence[RunResult]]) -> str:
    """A line of the Markdown table, from the results of all initializations so far."""
    results = done[init]
    epochs = results[0].config.epochs
    cells = []
    for mark in marks(epochs):
        values = [100 * point.accuracy for result in results for point in result.curve
                  if point.epoch == mark and point.accuracy is not None]  # fmt: skip
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        cells.append(f"{statistics.fmean(values):.1f} ± {spread:.1f}")
    for reference in ("rand", "orth"):
        if reference == init or reference not in done:
            cells.append("-")
            continue
        found = compare(summarize(results)[0], summarize(done[reference])[0])
        cells.append(f"{100 * found.difference:+.1f} (p = {found.p_value:.2g})")
    return f"| {task} | {model} | {init} | {results[0].config.lr:g} | {' | '.join(cells)} |"


def run(args: argparse.Namespace) -> None:
    """Make all runs, and print a line of the table as soon as its runs are there."""
    bench = Bench(args)
    print("| task | model | init | lr | after 10 % | 30 % | all epochs | less rand, paired by seed | less orth |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for task in args.tasks:
        for model in args.models:
            done: dict[str, Sequence[RunResult]] = {}
            for init in args.inits:
                results = bench.line(task, model, init)
                if results:
                    done[init] = results
                    print(row(task, model, init, done), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 2 after an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the JPEG shards")
    parser.add_argument("--out", type=Path, default=Path("results/bundled"), help="folder of results")
    parser.add_argument("--ghn", default="bundled", help="file or name of the GHN")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=tuple(MODELS))
    parser.add_argument("--inits", nargs="+", default=list(INITS), help="methods of init=, untrained, oracle")
    parser.add_argument("--tasks", nargs="+", default=["cifar10"], choices=TASKS)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--lrs", nargs="+", type=float, help="instead of the model's own grid")
    parser.add_argument("--tune-seeds", nargs="+", type=int, default=[1000])
    parser.add_argument("--tune-only", action="store_true", help="choose learning rates, and no more")
    parser.add_argument("--oracle-epochs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(args.threads)
    try:
        run(args)
    except (TimmGhnError, OSError) as error:
        print(f"bundled_ghn.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
