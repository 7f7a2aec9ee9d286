"""Fine-tune timm models from several initializations, with the protocol of arXiv 2207.10049.

    python benchmarks/finetune.py --preset paper-resnet50 --data data --download        # Table 1, ResNet-50, on a GPU
    python benchmarks/finetune.py --model resnet18 --inits rand ghn-orth --epochs 30 --data data
    python benchmarks/finetune.py --model resnet18 --dataset folder --data my_images --labels 0 --image-size 64
    python benchmarks/finetune.py --model resnet18 --data data --measure      # images/s alone

By default: CIFAR-10 with the first 100 images of each class, 32 x 32, random crops and flips, SGD with a cosine over
300 epochs, 5 seeds, accuracy on the 10,000 test images after the last epoch. `--tune-lr` chooses the learning rate for
each initialization on 5,000 held-out training images. Results are files in `--out`; what is there is not computed
again, and several processes may share the folder.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from class_parts import part_of
from cuda_graphs import CapturedStep
from fashion_mnist import CHOICES, load_dataset
from paired import sign_flip_p
from presets import PRESETS
from processes import grid, run_together, tune_together
from protocol import PaperConfig
from throughput import measure_throughput

from timm_ghn.cli.common import add_model_kwargs, exit_status, literal
from timm_ghn.finetune import Execution, Job, ResultStore, differences, spread, summarize
from timm_ghn.finetune.data import make_task
from timm_ghn.finetune.experiment import explained_memory
from timm_ghn.finetune.verdict import comparison_table

INITS = ("rand", "orth", "ghn", "ghn-orth")
_SETTINGS: tuple[tuple[str, type, str], ...] = (
    ("lr", float, "learning rate"),
    ("weight_decay", float, "weight decay"),
    ("epochs", int, "passes over the training images"),
    ("batch_size", int, "images a step"),
    ("image_size", int, "side of the network's input in pixels"),
    ("clip", float, "largest norm of the gradient"),
    ("smoothing", float, "label smoothing"),
    ("padding", int, "border that random crops are taken from, in pixels"),
    ("noise", float, "beta"),
    ("ghn", str, "GHN by name or path"),
    ("init_file", str, "file of weights to start from, instead of --inits"),
)


def make_parser() -> argparse.ArgumentParser:
    """All arguments; what is not given is the preset's, or the protocol's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what")
    what.add_argument("--preset", choices=sorted(PRESETS), help="an experiment of the paper")
    what.add_argument("--model", metavar="NAME", help="timm model")
    add_model_kwargs(what)
    what.add_argument("--inits", nargs="+", default=list(INITS), metavar="INIT", help="methods, or 'pretrained'")
    what.add_argument("--start-layer", type=literal, metavar="L", help="number, share, or name of a module")
    what.add_argument("--rescale", choices=("auto", "off"), help="whether the scale of predictions is kept sane")
    what.add_argument("--stem", choices=("auto", "adjusted", "original"), help="adjust the first layers (up to 64 px)")
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=CHOICES, default="cifar10")
    data.add_argument("--data", type=Path, metavar="PATH", help="folder of the data set, or prefix of shards")
    data.add_argument("--download", action="store_true", help="let torchvision download what is missing")
    data.add_argument("--labels", type=int, metavar="N", help="training images a class (default: 100); 0 for all")
    data.add_argument(
        "--classes",
        choices=("all", "trained", "held-out"),
        default="all",
        help="those that `timm-ghn train` trains on with its default seed, or the 50 that it holds out",
    )
    data.add_argument("--stored-size", type=int, metavar="N", help="side that images are kept at (default: 32)")
    how = parser.add_argument_group("training")
    for name, kind, text in _SETTINGS:
        how.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    how.add_argument("--optimizer", choices=("sgd", "adamw"))
    how.add_argument("--precision", choices=("float32", "bfloat16"), help="default: bfloat16 on CUDA")
    seeds = how.add_mutually_exclusive_group()
    seeds.add_argument("--num-seeds", type=int, default=5, metavar="N", help="train with seeds 0 to N - 1 (default: 5)")
    seeds.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="train with these seeds")
    how.add_argument("--tune-lr", type=float, nargs="+", default=[], metavar="LR", help="learning rates to choose from")
    how.add_argument("--tune-weight-decay", type=float, nargs="+", default=[], metavar="WD", help="weight decays")
    how.add_argument("--tune-seeds", type=int, nargs="+", default=[1000], help="seeds of the trials")
    run = parser.add_argument_group("execution")
    run.add_argument("--out", type=Path, default=Path("results"), help="folder of results (default: results)")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--together", type=int, default=1, help="runs at a time, each in its own process")
    run.add_argument("--threads", type=int, help="threads of a CPU; the last digits depend on them")
    run.add_argument("--evaluate-every", type=int, default=10, metavar="EPOCHS", help="0: after the last one only")
    run.add_argument("--evaluate-at", type=int, nargs="+", default=[], metavar="EPOCH", help="further epochs")
    run.add_argument("--keep-weights", action="store_true", help="keep what runs have learned, for --init-file")
    run.add_argument("--no-capture", action="store_true", help="launch kernels one by one instead of CUDA graphs")
    run.add_argument("--measure", action="store_true", help="only measure images/s of the loop and of the bare step")
    return parser


def make_configs(args: argparse.Namespace) -> list[PaperConfig]:
    """A configuration for each initialization.

    Raises:
        FineTuneError, InitError: If a setting is out of range or an initialization does not exist.
    """
    if args.preset is None and args.model is None:
        raise SystemExit("finetune.py: error: --model or --preset is needed")
    base = PRESETS[args.preset].config if args.preset else PaperConfig(args.model)
    names = {entry.name for entry in fields(PaperConfig)} - {"model_kwargs"}
    changes = {name: value for name, value in vars(args).items() if name in names and value is not None}
    if args.labels is not None:
        changes["labels_per_class"] = args.labels or None
    if args.precision is None and torch.device(args.device).type == "cuda":
        changes["precision"] = "bfloat16"
    if args.model_kwargs:
        changes["model_kwargs"] = dict(args.model_kwargs)
    base = replace(base, **changes)
    return [base] if args.init_file else [replace(base, init=init.replace("_", "-")) for init in args.inits]


def run(args: argparse.Namespace) -> None:
    """Do what the arguments ask for."""
    configs = make_configs(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    stored = args.stored_size or (configs[0].image_size if args.dataset == "folder" else 32)
    data = load_dataset(args.dataset, args.data, size=stored, download=args.download)
    data = part_of(data, args.classes)
    execution = Execution(
        device=args.device,
        evaluate_every=args.evaluate_every,
        evaluate_at=tuple(args.evaluate_at),
        keep_weights=args.keep_weights,
        capture=None if args.no_capture else CapturedStep,
    )
    if args.measure:
        for config in configs[:1]:
            with explained_memory(config):
                found = measure_throughput(config, make_task(data, config), execution)
            print(
                f"{config.model}, batches of {found.batch_size}: loop {found.loop:.1f} images/s, resident batch "
                f"{found.resident:.1f} images/s, ratio {found.ratio:.3f}; a run of {config.epochs} epochs takes "
                f"{found.seconds_per_run:.0f} s"
            )
        return
    store = ResultStore(args.out, PaperConfig)
    grids = [grid(config, args.tune_lr, args.tune_weight_decay) for config in configs]
    tuned = [tune_together(each, args.tune_seeds, data, store, execution, args.together) for each in grids]
    jobs = [Job(config, seed) for config in tuned for seed in args.seeds or range(args.num_seeds)]
    summaries = summarize(run_together(jobs, data, store, execution, args.together))
    if summaries:
        print("\n".join(comparison_table(summaries)))
    for other in summaries[:-1]:
        if gains := differences(summaries[-1], other):
            print(
                f"{summaries[-1].config.starts_from} - {other.config.starts_from}: {100 * statistics.fmean(gains):+.2f}"
                f" ± {100 * spread(gains):.2f} points, p = {sign_flip_p(gains):.3g}"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 2 after an error."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.num_seeds < 1:
        parser.error("--num-seeds must be at least 1")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("timm_ghn").setLevel(logging.INFO)
    return exit_status("finetune.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
