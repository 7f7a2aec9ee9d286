"""A sweep over hyperparameters, initializations, architectures and seeds, on Ray Tune.

    python benchmarks/sweep.py --models resnet18 --inits rand ghn-orth --lrs 0.003 0.01 0.03 --epochs 30 \\
        --data data --out results/sweep
    python benchmarks/sweep.py ... --gpus-per-trial 0.25             # four trials share a GPU
    python benchmarks/sweep.py ... --address auto                    # on a running Ray cluster
    python benchmarks/sweep.py ... --early-stopping                  # ASHA: bad trials end after a few epochs

The grid of section 4 of arXiv 2207.10049: optimizer, epochs, learning rate, weight decay, image size, beta and L, each
a list. Accuracy is that on held-out training images; `--split test` measures on the test images instead. Finished runs
are those of benchmarks/finetune.py, in the same folder layout: the same command goes on where it stopped, and a trial
that fails or is killed leaves the others alone. `--out` also gets `trials.jsonl`: a line for each trial with its
settings, status, accuracy, and error.

Needs `pip install "timm-ghn[sweep]"`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fashion_mnist import CHOICES, load_dataset
from protocol import PaperConfig

from timm_ghn.cli.common import add_model_kwargs, exit_status
from timm_ghn.errors import FineTuneError, MissingDependencyError
from timm_ghn.finetune import Execution, Job, ResultStore, run_jobs
from timm_ghn.finetune.run import Point
from timm_ghn.storage.atomic import write_atomically

try:
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
except ImportError as error:
    raise MissingDependencyError(
        f"the sweep needs Ray Tune ({error}): pip install 'timm-ghn[sweep]', or pip install 'ray[tune]'"
    ) from error

_AXES: tuple[tuple[str, str, type, str], ...] = (
    ("models", "model", str, "timm models"),
    ("inits", "init", str, "initializations"),
    ("optimizers", "optimizer", str, "sgd, adamw"),
    ("epochs", "epochs", int, "passes over the training images"),
    ("lrs", "lr", float, "learning rates"),
    ("weight_decays", "weight_decay", float, "weight decays"),
    ("image_sizes", "image_size", int, "sides of the network's input"),
    ("noises", "noise", float, "values of beta"),
    ("start_layers", "start_layer", int, "values of L"),
)


@dataclass(frozen=True)
class Workload:
    """What a trial needs besides its settings; plain data, so that any worker can rebuild it.

    Attributes:
        dataset: Name for `load_dataset`.
        data: Its path.
        stored_size: Side that images are kept at.
        out: Folder of results.
        device: Where to compute.
        threads: Threads a trial.
        evaluate_every: Epochs between reports to the scheduler.
    """

    dataset: str
    data: str | None
    stored_size: int
    out: str
    device: str
    threads: int
    evaluate_every: int


def configurations(args: argparse.Namespace) -> Iterator[PaperConfig]:
    """Every point of the grid; beta and L only where there is something that reads them."""
    axes = [(field, getattr(args, name)) for name, field, _, _ in _AXES if getattr(args, name)]
    seen = set()
    for values in product(*(choices for _, choices in axes)):
        settings = dict(zip((field for field, _ in axes), values, strict=True))
        if settings["init"] not in ("ghn-orth", "ghn_orth"):
            settings.pop("noise", None)
        if settings["init"] not in ("ghn-orth", "ghn_orth", "orth"):
            settings.pop("start_layer", None)
        config = PaperConfig(
            **settings,
            model_kwargs=dict(args.model_kwargs),
            split=args.split,
            stem=args.stem,
            batch_size=args.batch_size,
            labels_per_class=args.labels or None,
            ghn=args.ghn,
        )
        text = json.dumps(config.to_dict(), sort_keys=True)
        if text not in seen:
            seen.add(text)
            yield config


def train_trial(trial: Mapping[str, Any], work: Workload) -> None:
    """One trial, in a process of Ray's: the run of `finetune.py`, with reports to the scheduler."""
    import torch

    torch.set_num_threads(work.threads)
    config, seed = PaperConfig.from_dict(trial["config"]), int(trial["seed"])
    data = load_dataset(work.dataset, work.data, size=work.stored_size)

    def report(point: Point) -> None:
        if point.accuracy is not None and point.epoch < config.epochs:
            tune.report({"accuracy": point.accuracy, "epoch": point.epoch})

    execution = Execution(work.device, evaluate_every=work.evaluate_every, report=report)
    results = run_jobs([Job(config, seed)], data, ResultStore(work.out, PaperConfig), execution)
    if not results:
        raise FineTuneError("another process works on this run")
    tune.report({"accuracy": results[0].accuracy, "epoch": config.epochs, "key": results[0].key, "finished": True})


def sweep(
    trials: Sequence[Mapping[str, Any]],
    work: Workload,
    *,
    cpus: float = 1,
    gpus: float = 0,
    early_stopping: bool = False,
    address: str | None = None,
    run_trial: Callable[[Mapping[str, Any], Workload], None] = train_trial,
) -> list[dict[str, Any]]:
    """Run trials; those that fail are reported with their error.

    Args:
        trials: Settings ("config") and seeds ("seed") of runs.
        work: Data and folders.
        cpus: CPUs a trial.
        gpus: GPUs a trial; a fraction lets several share one.
        early_stopping: Whether ASHA ends trials that are behind.
        address: Ray cluster to join; None for this machine.
        run_trial: What a trial does.

    Returns:
        A row for each trial.
    """
    if not ray.is_initialized():
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    longest = max(trial["config"]["epochs"] for trial in trials)
    asha = ASHAScheduler(time_attr="epoch", max_t=longest, grace_period=max(1, longest // 8), reduction_factor=3)
    trainable = tune.with_resources(
        tune.with_parameters(_as_trainable, work=work, run_trial=run_trial),
        {"cpu": cpus, **({"gpu": gpus} if gpus else {})},
    )
    storage, name = Path(work.out).resolve() / "ray", _name(trials)
    if tune.Tuner.can_restore(storage / name):
        tuner = tune.Tuner.restore(str(storage / name), trainable, resume_unfinished=True, restart_errored=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={"trial": tune.grid_search(list(trials))},
            tune_config=tune.TuneConfig(metric="accuracy", mode="max", scheduler=asha if early_stopping else None),
            run_config=tune.RunConfig(name=name, storage_path=str(storage), verbose=0),
        )
    return [_row(result) for result in tuner.fit()]


def _as_trainable(
    config: Mapping[str, Any], work: Workload, run_trial: Callable[[Mapping[str, Any], Workload], None]
) -> None:
    run_trial(config["trial"], work)


def _name(trials: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(list(trials), sort_keys=True).encode()).hexdigest()[:12]


def _row(result: Any) -> dict[str, Any]:
    """A line of the table."""
    trial = result.config["trial"]
    metrics = result.metrics or {}
    status = "failed" if result.error else "finished" if metrics.get("finished") else "stopped early"
    return {
        **trial["config"],
        "seed": trial["seed"],
        "status": status,
        "accuracy": metrics.get("accuracy"),
        "epoch": metrics.get("epoch", 0),
        "run": metrics.get("key"),
        "seconds": metrics.get("time_total_s"),
        "error": str(result.error).strip().splitlines()[-1] if result.error else None,
    }


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write JSON Lines, which `pandas.read_json(path, lines=True)` reads."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def make_parser() -> argparse.ArgumentParser:
    """All arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, _, kind, text in _AXES:
        needed = name in ("models", "inits")
        parser.add_argument(f"--{name.replace('_', '-')}", nargs="+", type=kind, required=needed, help=text)
    add_model_kwargs(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--stem", choices=("auto", "adjusted", "original"), default="auto")
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--labels", type=int, default=100, help="training images a class; 0 for all")
    parser.add_argument("--ghn", help="GHN by name or path")
    parser.add_argument("--dataset", choices=CHOICES, default="cifar10")
    parser.add_argument("--data", metavar="PATH")
    parser.add_argument("--stored-size", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("results/sweep"))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--cpus-per-trial", type=float, default=1)
    parser.add_argument("--gpus-per-trial", type=float, default=0)
    parser.add_argument("--threads", type=int, default=1, help="threads a trial")
    parser.add_argument("--evaluate-every", type=int, default=10, metavar="EPOCHS")
    parser.add_argument("--early-stopping", action="store_true")
    parser.add_argument("--address", help="of a Ray cluster, such as auto or ray://host:10001")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep; the exit status is 1 if a trial failed, 2 if nothing could be run."""
    args = make_parser().parse_args(argv)
    return exit_status("sweep.py", lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Run all trials, and print and write what they came to."""
    configs = list(configurations(args))
    # Missing data are told once, here.
    load_dataset(args.dataset, args.data, size=args.stored_size)
    trials = [{"config": config.to_dict(), "seed": seed} for config in configs for seed in args.seeds]
    device = "cuda" if args.gpus_per_trial else args.device
    data = None if args.data is None else str(Path(args.data).expanduser().resolve())
    work = Workload(
        args.dataset, data, args.stored_size, str(args.out.resolve()), device, args.threads, args.evaluate_every
    )
    rows = sweep(
        trials,
        work,
        cpus=args.cpus_per_trial,
        gpus=args.gpus_per_trial,
        early_stopping=args.early_stopping,
        address=args.address,
    )
    rows.sort(key=lambda row: -(row["accuracy"] or 0))
    write_table(rows, args.out / "trials.jsonl")
    for row in rows:
        accuracy = "-" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f} %"
        note = f": {row['error']}" if row["error"] else ""
        print(f"{row['model']} {row['init']} lr {row['lr']:g} seed {row['seed']}: {accuracy}, {row['status']}{note}")
    failed = sum(row["status"] == "failed" for row in rows)
    print(f"{len(rows)} trials, {failed} failed; {args.out / 'trials.jsonl'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
