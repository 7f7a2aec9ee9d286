"""Fine-tune small timm models with few labels from different initializations.

    python benchmarks/bundled_ghn.py --data DIR --out rows.jsonl [--ghn FILE] [--tasks held-out cifar10] [--seeds 3]

The learning rate of each (model, initialization) is chosen on images of Tiny-ImageNet classes that the GHN never saw;
the table is over other images of these classes ("held-out") and over CIFAR-10's test set with 100 labels a class
("cifar10"), which decides nothing. Beside random, orthogonal, GHN and GHN-orth weights stand those of an untrained GHN
(the floor) and of the same network trained directly on the GHN's own images (the oracle). DIR holds the JPEG shards;
see docs/training.md for where the images come from. Runs that `--out` holds already are not repeated.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet
from torch import nn
from torch.nn import functional as F

from timm_ghn import init_model
from timm_ghn.ghn import GHN, content_hash, load_ghn, read
from timm_ghn.graph import to_graph
from timm_ghn.training.cli import new_ghn
from timm_ghn.training.config import PRESETS
from timm_ghn.training.data import ImageSet, Splits, augment, load_images, normalize, split
from timm_ghn.training.probe import few_labels, probe

METHODS = ("rand", "orth", "ghn", "ghn-orth", "untrained-ghn", "untrained-ghn-orth", "oracle")
MARKS = (0.1, 0.3, 1.0)
"""Shares of the epochs after which the accuracy is measured."""


def resnet14(num_classes: int) -> nn.Module:
    """A ResNet of timm's basic blocks for 32 x 32 images: deep stem of stride 2, three stages, 24 to 96 channels."""
    model = ResNet(
        BasicBlock, (2, 2, 2), channels=(24, 48, 96), stem_type="deep", stem_width=12, num_classes=num_classes
    )
    model.maxpool = model.layer4 = nn.Identity()
    return model


def convnext(num_classes: int) -> nn.Module:
    """A small ConvNeXt for 32 x 32 images: patches of 2, four stages of 7 x 7 kernels, 24 to 192 channels."""
    return ConvNeXt(depths=(2, 2, 4, 2), dims=(24, 48, 96, 192), patch_size=2, num_classes=num_classes)


def vit(num_classes: int) -> nn.Module:
    """A small ViT for 32 x 32 images: patches of 4, six blocks of 96 channels."""
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=96, depth=6, num_heads=3, num_classes=num_classes
    )


MODELS: dict[str, Callable[[int], nn.Module]] = {"resnet14": resnet14, "convnext": convnext, "vit": vit}


@dataclass(frozen=True)
class Task:
    """Few labelled images, images to choose the learning rate on, and images for the table."""

    name: str
    train: ImageSet
    test: ImageSet
    num_classes: int


def compact(data: ImageSet) -> ImageSet:
    """Labels renumbered to the classes that are present."""
    classes, labels = torch.unique(data.labels, return_inverse=True)
    return ImageSet(data.images, labels, tuple(data.classes[label] for label in classes.tolist()))


@functools.cache
def splits(data: Path) -> Splits:
    """Tiny-ImageNet as the training of the bundled GHN divides it."""
    shards = [data / f"tinyimagenet32-train-{part}.safetensors" for part in range(2)]
    return split(load_images(shards, progress=False), held_out=50, validation=0.04)


@functools.cache
def held_out_images(data: Path) -> ImageSet:
    """Images of the classes that the GHN never saw."""
    held_out = splits(data).held_out
    if held_out is None:
        raise SystemExit("no class is held out")
    return compact(held_out)


def trained_images(data: Path) -> ImageSet:
    """Images that the GHN was trained on."""
    return splits(data).train


@functools.cache
def cifar_images(data: Path, part: str) -> ImageSet:
    """CIFAR-10's training or test images."""
    return load_images([data / f"cifar10-{part}.safetensors"], progress=False)


def held_out_task(data: Path, seed: int, limit: int) -> tuple[Task, Task]:
    """20 labels of each class that the GHN never saw: the table's task, and one of other images for selection."""
    selection, final = few_labels(held_out_images(data), 200, seed=1234)
    tasks = []
    for name, images in (("held-out", final), ("selection", selection)):
        train, test = few_labels(images, 20, seed)
        tasks.append(Task(name, train, shorten(test, limit), 50))
    return tasks[0], tasks[1]


def cifar_task(data: Path, seed: int, limit: int) -> Task:
    """CIFAR-10 with 100 labels a class, tested on its test set."""
    train, _ = few_labels(cifar_images(data, "train"), 100, seed)
    return Task("cifar10", train, shorten(cifar_images(data, "test"), limit), 10)


def shorten(data: ImageSet, limit: int) -> ImageSet:
    """At most `limit` images, drawn once and for all."""
    return data.subset(torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:limit])


@dataclass(frozen=True)
class Sources:
    """Where weights come from.

    Attributes:
        ghn: The GHN.
        untrained: One of the same configuration, as it was before its first step.
        data: Folder of the JPEG shards, for the oracle.
        oracle_steps: Steps of the oracle's training.
        cache: Folder that keeps oracles.
    """

    ghn: GHN
    untrained: GHN
    data: Path
    oracle_steps: int
    cache: Path


def initialized(name: str, method: str, sources: Sources, num_classes: int, seed: int) -> nn.Module:
    """A model of the benchmark with one of the initializations."""
    torch.manual_seed(seed)
    model = MODELS[name](num_classes)
    if method == "oracle":
        weights = oracle_weights(name, sources)
        own = model.state_dict()
        kept = {key: value for key, value in weights.items() if own[key].shape == value.shape}
        model.load_state_dict({**own, **kept})
    elif method != "rand":
        untrained, plain = method.startswith("untrained-"), method.removeprefix("untrained-")
        ghn = sources.untrained if untrained else sources.ghn
        settings = {"ghn": ghn} if plain.startswith("ghn") else {}
        init_model(model, plain, input_size=(3, 32, 32), seed=seed, **settings)
    return model


def oracle_weights(name: str, sources: Sources) -> dict[str, torch.Tensor]:
    """Weights of a network trained on the classes that the GHN was trained on, by AdamW with a cosine."""
    path = sources.cache / f"oracle-{name}-{sources.oracle_steps}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        images = compact(trained_images(sources.data))
        model = MODELS[name](len(images.classes))
        train(model, images, sources.oracle_steps, 64, 2e-3, torch.Generator().manual_seed(0))
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), path)
    return load_file(path)


def untrained_like(ghn: GHN) -> GHN:
    """A GHN of the same configuration as training begins with it."""
    graphs = [to_graph(make(ghn.config.num_classes), input_size=(3, 32, 32)) for make in MODELS.values()]
    return new_ghn(ghn.config, PRESETS["bundled"], graphs).eval()


def train(
    model: nn.Module,
    images: ImageSet,
    steps: int,
    batch_size: int,
    lr: float,
    generator: torch.Generator,
    after: Callable[[int], None] = lambda _: None,
) -> None:
    """Train with AdamW, a short warm-up and a cosine; `after` is called with the number of each finished step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(1, steps + 1):
        if len(order) < batch_size:
            order = torch.randperm(len(images), generator=generator)
        index, order = order[:batch_size], order[batch_size:]
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, step / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        model.train()
        batch = normalize(augment(images.images[index], generator)).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        F.cross_entropy(model(batch), images.labels[index]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        after(step)


def fine_tune(model: nn.Module, task: Task, epochs: int, lr: float, seed: int) -> list[float]:
    """Train on a task; accuracy on its test images after each of `MARKS` of the epochs."""
    steps = epochs * (len(task.train) // 50)
    marks = [math.ceil(share * steps) for share in MARKS]
    found: list[float] = []

    def measure(step: int) -> None:
        if step in marks:
            found.append(accuracy(model, task.test))

    train(model, task.train, steps, 50, lr, torch.Generator().manual_seed(seed), measure)
    return found


@torch.no_grad()
def accuracy(model: nn.Module, data: ImageSet) -> float:
    """Share of the images whose class is right; batch norms use their running statistics."""
    model.eval()
    right = 0
    for images, labels in zip(torch.split(data.images, 500), torch.split(data.labels, 500), strict=True):
        right += int((model(normalize(images)).argmax(1) == labels).sum())
    return right / len(data)


class Results:
    """Rows of a JSON-lines file by what was run; a run whose row is there is not repeated."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows = {_key(row): row for row in map(json.loads, lines)}

    def get(self, run: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of a run, computed and written if it is missing."""
        if _key(run) not in self.rows:
            started = time.process_time()
            row = {**run, **compute(), "cpu_seconds": round(time.process_time() - started, 1)}
            self.rows[_key(run)] = row
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        return self.rows[_key(run)]


_IDENTITY = ("kind", "task", "model", "init", "ghn", "seed", "lr", "epochs", "test_images")


def _key(row: dict[str, Any]) -> str:
    return json.dumps([row.get(name) for name in _IDENTITY])


def measure(args: argparse.Namespace, sources: Sources, results: Results, task: str, name: str, method: str) -> None:
    """All seeds of one line of the table, at the learning rate that does best on the selection task."""
    own = method.endswith(("ghn", "ghn-orth")) and not method.startswith("untrained")
    base = {"model": name, "init": method, "epochs": args.epochs, "test_images": args.test_images}
    base["ghn"] = content_hash(sources.ghn)[:12] if own else None

    def run(kind: str, chosen: Task, seed: int, lr: float) -> dict[str, Any]:
        def compute() -> dict[str, Any]:
            model = initialized(name, method, sources, chosen.num_classes, seed)
            row = {"probe": probe(model, chosen.train, chosen.test)} if args.probe else {}
            return {**row, "accuracy": fine_tune(model, chosen, args.epochs, lr, seed)}

        return results.get({"kind": kind, "task": chosen.name, "seed": seed, "lr": lr, **base}, compute)

    def tuned(lr: float) -> float:
        rows = [
            run("selection", held_out_task(args.data, seed, args.test_images)[1], seed, lr)
            for seed in range(args.selection_seeds)
        ]
        return statistics.mean(row["accuracy"][-1] for row in rows)

    lr = args.lrs[0] if len(args.lrs) == 1 else max(args.lrs, key=tuned)
    if task == "selection":
        return
    rows = []
    for seed in range(args.seeds):
        held_out = task == "held-out"
        chosen = (held_out_task(args.data, seed, args.test_images)[0] if held_out
                  else cifar_task(args.data, seed, args.test_images))  # fmt: skip
        rows.append(run("final", chosen, seed, lr))
    cells = [_mean([row["accuracy"][mark] for row in rows]) for mark in range(len(MARKS))]
    probes = _mean([row["probe"] for row in rows]) if args.probe else "-"
    print(f"| {task} | {name} | {method} | {lr:g} | {probes} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Run the benchmark and print one line for each model, task and initialization."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the JPEG shards")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one for each run")
    parser.add_argument("--ghn", default="bundled", help="file or name of the GHN")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=sorted(MODELS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument(
        "--tasks", nargs="+", default=["held-out", "cifar10"], choices=["held-out", "cifar10", "selection"]
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--selection-seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-3, 3e-3])
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--oracle-steps", type=int, default=2000)
    parser.add_argument("--probe", action="store_true", help="also fit a linear classifier to the untrained features")
    parser.add_argument("--probe-only", action="store_true", help="only that: minutes instead of an hour")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ghn = read(args.ghn) if Path(args.ghn).exists() else load_ghn(args.ghn)
    sources = Sources(ghn, untrained_like(ghn), args.data, args.oracle_steps, args.out.parent / "oracles")
    if args.probe_only:
        run_probes(args, sources)
        return
    results = Results(args.out)
    for task in args.tasks:
        for name in args.models:
            for method in args.methods:
                measure(args, sources, results, task, name, method)


def run_probes(args: argparse.Namespace, sources: Sources) -> None:
    """Accuracy of linear classifiers on frozen features."""
    for task_name in args.tasks:
        for name in args.models:
            found: dict[str, list[float]] = {method: [] for method in args.methods}
            for seed in range(args.seeds):
                if task_name == "cifar10":
                    task = cifar_task(args.data, seed, args.test_images)
                else:
                    task = held_out_task(args.data, seed, args.test_images)[task_name == "selection"]
                for method, values in found.items():
                    model = initialized(name, method, sources, task.num_classes, seed)
                    values.append(probe(model, task.train, task.test))
            row = {method: _mean(values) for method, values in found.items()}
            print(json.dumps({"task": task_name, "model": name, "ghn": str(args.ghn), **row}), flush=True)


def _mean(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * spread:.1f}"


if __name__ == "__main__":
    main()
