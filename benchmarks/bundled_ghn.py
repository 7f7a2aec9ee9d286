"""What a GHN is worth: small timm models fine-tuned with few labels from its weights, beside a floor and an oracle.

    python benchmarks/bundled_ghn.py --data data --out results/bundled                 # the whole table
    python benchmarks/bundled_ghn.py --data data --tasks held-out --inits ghn-orth --ghn run/ghn.safetensors

Tasks: CIFAR-10 with 100 labels a class, Fashion-MNIST with as many, and 20 labels of each of the 50 classes of
Tiny-ImageNet that the GHN never saw. Learning rates are chosen for each initialization on held-out training images of
the task (5,000 of CIFAR-10), never on its test images. `--inits` takes the methods of `init=`, with settings after an @
(`ghn-orth@noise=0`, `ghn-orth@start_layer=0.5`), and:

- `untrained`: GHN-orth by a GHN as it is before its first step, the floor;
- `oracle`: the same network trained directly, with all labels, on the images that the GHN was trained on;
- `oracle-orth`: the oracle, post-processed as predicted weights are;
- `noise-only`: predicted weights with the noise of post-processing, without orthogonalization.

Results are files in `--out`; what is there is not computed again, and several processes may share the folder (a line of
the table belongs to one of them). `--table` computes nothing and prints all lines that are there.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from class_parts import part_of
from cuda_graphs import CapturedStep
from fashion_mnist import load_dataset
from paired import sign_flip_p
from processes import grid, run_together, tune_together
from protocol import PaperConfig
from safetensors.torch import save

import timm_ghn
from timm_ghn.cli.common import exit_status, key_value
from timm_ghn.errors import FineTuneError
from timm_ghn.finetune import (
    Benchmark,
    Execution,
    Job,
    ResultStore,
    RunResult,
    differences,
    run_jobs,
    spread,
    summarize,
)
from timm_ghn.ghn import content_hash, load_ghn
from timm_ghn.ghn.checkpoint import write_safetensors
from timm_ghn.storage.atomic import write_atomically
from timm_ghn.training.begin import new_ghn

_SMALL = {"stem": "original", "optimizer": "adamw", "weight_decay": 0.05, "batch_size": 48, "epochs": 20, "lr": 2e-3}
MODELS: dict[str, PaperConfig] = {
    "resnet": PaperConfig("resnet18", model_kwargs={"channels": (32, 64, 128, 256)}, **_SMALL),
    "convnext": PaperConfig(
        "convnext_atto",
        model_kwargs={"patch_size": 2, "dims": (24, 48, 96, 192), "depths": (2, 2, 4, 2)},
        **_SMALL,
    ),
    "vit": PaperConfig(
        "vit_tiny_patch16_224",
        model_kwargs={"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4},
        **_SMALL,
    ),
}
"""timm models of 1.1 to 2.8 million parameters at 32 x 32; their depths and widths are in no training architecture."""

LRS = {"resnet": (1e-3, 3e-3, 1e-2), "convnext": (3e-4, 1e-3, 3e-3), "vit": (3e-4, 1e-3, 3e-3)}
"""Learning rates to choose from."""

INITS = ("rand", "orth", "untrained", "ghn", "ghn-orth", "oracle")
FILES = ("oracle", "oracle-orth", "noise-only")
"""Those of `--inits` whose weights are made first, and kept in a file."""
LABELS = {"cifar10": 100, "held-out": 20, "fashion-mnist": 100}
"""The tasks, with the labels a class that are trained on."""
MARKS = (0.1, 0.3, 1.0)
"""Shares of the epochs after which accuracy is measured."""
_SHARDS = "tinyimagenet32"


@dataclass(frozen=True)
class Line:
    """A finished line of the table.

    Attributes:
        task: What was learned.
        model: Key of `MODELS`.
        init: As given to `--inits`.
        ghn: Name of the GHN's file, and the first digits of its hash; empty without one.
        keys: Names of the runs, one a seed.
        commit: Of this repository, when the line was finished; no part of what the line is.
    """

    task: str
    model: str
    init: str
    ghn: str
    keys: tuple[str, ...]
    commit: str = field(default="unknown", compare=False)


class Bench:
    """Everything that the runs have in common.

    Args:
        args: Arguments of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.store = ResultStore(args.out, PaperConfig)
        self.images: dict[str, Benchmark] = {}
        self.execution = Execution(args.device, evaluate_every=0, evaluate_at=marks(args.epochs), capture=CapturedStep)

    def data(self, task: str) -> Benchmark:
        """Images of a task; "oracle" for those of the classes that the GHN was trained on."""
        if task not in self.images:
            if task in ("held-out", "oracle"):
                tiny = load_dataset("shards", self.args.data / _SHARDS)
                self.images[task] = part_of(tiny, "held-out" if task == "held-out" else "trained")
            else:
                self.images[task] = load_dataset(task, self.args.data)
        return self.images[task]

    def config(self, task: str, model: str, init: str) -> PaperConfig:
        """Settings of the runs of one line, before the learning rate is chosen."""
        base = replace(MODELS[model], epochs=self.args.epochs, labels_per_class=LABELS[task])
        method, settings = parse_init(init)
        if method in FILES:
            return replace(base, init="rand", init_file=str(self.weights(base, model, method)))
        if method == "untrained":
            return replace(base, init="ghn-orth", ghn=str(self.untrained()), **settings)
        ghn = self.args.ghn if method in ("ghn", "ghn-orth") else None
        return replace(base, init=method, ghn=ghn, **settings)

    def weights(self, base: PaperConfig, model: str, method: str) -> Path:
        """File of the weights that a line starts from."""
        if method == "oracle":
            return self.oracle(model)
        predicted = method == "noise-only"
        name = f"{method}-{content_hash(load_ghn(self.args.ghn))[:12]}" if predicted else method
        path = self.args.out / f"{name}-{model}.safetensors"
        if not path.exists():
            start = {"init": "ghn", "ghn": self.args.ghn} if predicted else {"init_file": str(self.oracle(model))}
            module = replace(base, **start).build(self.data("cifar10").num_classes, 0)
            timm_ghn.orthogonalize_(module, orthogonal=not predicted)
            write_atomically(path, save(module.state_dict(), {"format": "pt"}))
        return path

    def oracle(self, model: str) -> Path:
        """File of a network trained directly on the GHN's images."""
        config = replace(
            MODELS[model], init="rand", labels_per_class=None, epochs=self.args.oracle_epochs, batch_size=64
        )
        execution = Execution(device=self.args.device, evaluate_every=0, keep_weights=True, capture=CapturedStep)
        (result,) = run_jobs([Job(config, 0)], self.data("oracle"), self.store, execution)
        return self.store.path(result.key, "weights")

    def untrained(self) -> Path:
        """File of a GHN of the preset, as it is before its first step."""
        path = self.args.out / "untrained.safetensors"
        if not path.exists():
            write_safetensors(new_ghn(load_ghn(self.args.ghn).config, seed=0), path)
        return path

    def line(self, task: str, model: str, init: str) -> tuple[Line, tuple[RunResult, ...]]:
        """All seeds of a line of the table, with the rates that are best on held-out training images.

        Returns:
            The line, and its runs: none with `--tune-only`, not all if other processes work on some.
        """
        args, data = self.args, self.data(task)
        candidates = grid(self.config(task, model, init), args.lrs or LRS[model], args.weight_decays)
        config = tune_together(candidates, args.tune_seeds, data, self.store, self.execution, args.together)
        jobs = [] if args.tune_only else [Job(config, seed) for seed in range(args.seeds)]
        results = run_together(jobs, data, self.store, self.execution, args.together)
        line = Line(task, model, init, ghn_label(config.ghn), tuple(result.key for result in results), commit())
        if results and len(results) == len(jobs) and line not in self.lines():
            self.keep(line)
        return line, results

    def keep(self, line: Line) -> None:
        """Write down which runs make up a line."""
        text = json.dumps(asdict(line), indent=1)
        write_atomically(self.store.folder / "lines" / f"{line.keys[0]}.json", text.encode())

    def lines(self) -> dict[Line, tuple[RunResult, ...]]:
        """All finished lines of the folder, with their runs."""
        found = {}
        for path in sorted((self.store.folder / "lines").glob("*.json")):
            values = json.loads(path.read_text())
            line = Line(**{**values, "keys": tuple(values["keys"])})
            results = tuple(result for key in line.keys if (result := self.store.read(key)) is not None)
            if len(results) == len(line.keys):
                found[line] = results
        return found


def commit() -> str:
    """The commit of this repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def ghn_label(ghn: str | None) -> str:
    """How a table names a GHN."""
    return f"{Path(ghn).stem} ({content_hash(load_ghn(ghn))[:12]})" if ghn is not None else ""


def parse_init(text: str) -> tuple[str, dict[str, Any]]:
    """`ghn-orth@noise=0@start_layer=1` as the method and its settings."""
    method, *settings = text.split("@")
    return method, dict(key_value(setting) for setting in settings)


def known_init(text: str) -> str:
    """A value of `--inits` whose settings can be read.

    Raises:
        argparse.ArgumentTypeError: If they cannot.
    """
    unknown = set(parse_init(text)[1]) - {entry.name for entry in fields(PaperConfig)}
    if unknown:
        raise argparse.ArgumentTypeError(f"{text!r}: there is no setting {', '.join(sorted(unknown))}")
    return text


def marks(epochs: int) -> tuple[int, ...]:
    """The epochs after which accuracy is measured."""
    return tuple(math.ceil(share * epochs) for share in MARKS)


HEADER = """\
| task | model | init | GHN | lr | decay | after 10 % | 30 % | all epochs | less rand, paired by seed | less orth |
|---|---|---|---|---|---|---|---|---|---|---|"""


def row(line: Line, done: Mapping[str, Sequence[RunResult]]) -> str:
    """A line of the Markdown table, from the results of all initializations so far."""
    results = done[line.init]
    measured = (f"{mean:.1f} ± {std:.1f}" for mean, std in accuracies(results))
    compared = []
    for reference in ("rand", "orth"):
        if reference == line.init or reference not in done:
            compared.append("-")
        else:
            gains = differences(summarize(results)[0], summarize(done[reference])[0])
            compared.append(f"{100 * statistics.fmean(gains):+.1f} (p = {sign_flip_p(gains):.2g})")
    chosen = (f"{results[0].config.lr:g}", f"{results[0].config.weight_decay:g}")
    cells = (line.task, line.model, line.init, line.ghn or "-", *chosen, *measured, *compared)
    return f"| {' | '.join(cells)} |"


def accuracies(results: Sequence[RunResult]) -> list[tuple[float, float]]:
    """Mean and standard deviation over seeds, in percent, after each share of the epochs."""
    found = []
    for mark in marks(results[0].config.epochs):
        values = [100 * point.accuracy for result in results for point in result.curve
                  if point.epoch == mark and point.accuracy is not None and not result.diverged]  # fmt: skip
        found.append((statistics.fmean(values), spread(values)) if values else (math.nan, 0.0))
    return found


def print_tables(bench: Bench) -> None:
    """Print all lines that are there, then a table of their ends for each task; write their runs if asked to."""
    found = {line: results for line, results in bench.lines().items() if results[0].config.epochs == bench.args.epochs}
    places = sorted(found, key=lambda line: (list(LABELS).index(line.task), line.model, *place(line.init, line.ghn)))
    lines = {line: found[line] for line in places}
    if not lines:
        raise FineTuneError(f"{bench.store.folder} has no finished lines of {bench.args.epochs} epochs")
    print(HEADER)
    for line in lines:
        print(row(line, {**references(lines, line), line.init: lines[line]}))
    for task in dict.fromkeys(line.task for line in lines):
        print(f"\n{task}\n\n{ends({line: results for line, results in lines.items() if line.task == task})}")
    if bench.args.jsonl is not None:
        rows = [record(line, result) for line in lines for result in lines[line]]
        write_atomically(bench.args.jsonl, "".join(f"{json.dumps(values)}\n" for values in rows).encode())


def place(init: str, ghn: str) -> tuple[int, str, str]:
    """Where a line stands in a table: what every table has comes first."""
    return (INITS.index(init) if init in INITS else len(INITS), init, ghn)


def references(lines: Mapping[Line, Sequence[RunResult]], line: Line) -> dict[str, Sequence[RunResult]]:
    """The results of the other initializations of a line's network on its task."""
    return {other.init: lines[other] for other in lines if (other.task, other.model) == (line.task, line.model)}


def ends(lines: Mapping[Line, Sequence[RunResult]]) -> str:
    """Accuracies after the last epoch as a Markdown table, networks side by side, with the difference to orth."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for line, results in lines.items():
        mean, std = accuracies(results)[-1]
        orth = references(lines, line).get("orth")
        gain = f" ({mean - accuracies(orth)[-1][0]:+.1f})" if orth and line.init != "orth" else ""
        cells.setdefault((line.init, line.ghn or "-"), {})[line.model] = f"{mean:.1f} ± {std:.1f}{gain}"
    head = f"| init | GHN | {' | '.join(MODELS)} |\n|---|---|{'---|' * len(MODELS)}"
    keys = sorted(cells, key=lambda key: place(*key))
    body = (f"| {' | '.join((*key, *(cells[key].get(model, '-') for model in MODELS)))} |" for key in keys)
    return "\n".join((head, *body))


def record(line: Line, result: RunResult) -> dict[str, Any]:
    """What is published of a run."""
    measured = {point.epoch: point.accuracy for point in result.curve if point.accuracy is not None}
    return {
        **{name: value for name, value in asdict(line).items() if name != "keys"},
        "lr": result.config.lr,
        "weight_decay": result.config.weight_decay,
        "seed": result.seed,
        "epochs": result.config.epochs,
        "accuracy": measured,
        "seconds": round(result.seconds, 1),
        "data": result.data["digest"],
        **{name: result.environment.get(name) for name in ("torch", "timm", "device")},
        "commit": result.environment.get("commit", line.commit),  # runs of earlier versions name their own
    }


def run(args: argparse.Namespace) -> None:
    """Make all runs, and print a line of the table as soon as its runs are there."""
    bench = Bench(args)
    if args.table:
        print_tables(bench)
        return
    print(HEADER, flush=True)
    for task in args.tasks:
        for model in args.models:
            done: dict[str, Sequence[RunResult]] = {}
            for init in args.inits:
                line, results = bench.line(task, model, init)
                if results:
                    done[init] = results
                    print(row(line, done), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 2 after an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets, or of JPEG shards")
    parser.add_argument("--out", type=Path, default=Path("results/bundled"), help="folder of results")
    parser.add_argument("--ghn", default="bundled", help="file or name of the GHN")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=tuple(MODELS))
    parser.add_argument("--inits", nargs="+", type=known_init, default=list(INITS), metavar="INIT", help="see above")
    parser.add_argument("--tasks", nargs="+", default=["cifar10"], choices=tuple(LABELS))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--lrs", nargs="+", type=float, help="instead of the model's own grid")
    parser.add_argument("--weight-decays", nargs="+", type=float, default=[], help="tuned as well (default: 0.05)")
    parser.add_argument("--tune-seeds", nargs="+", type=int, default=[1000])
    parser.add_argument("--tune-only", action="store_true", help="choose learning rates, and no more")
    parser.add_argument("--oracle-epochs", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="compute nothing, print the lines of --epochs in --out")
    parser.add_argument("--jsonl", type=Path, metavar="FILE", help="with --table: write the runs of the lines there")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--together", type=int, default=1, help="runs at a time, each in its own process")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(args.threads)
    return exit_status("bundled_ghn.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
