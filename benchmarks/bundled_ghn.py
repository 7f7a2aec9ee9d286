"""Fine-tune small timm models with few labels from different initializations.

    python benchmarks/bundled_ghn.py --data DIR [--ghn FILE] [--tasks held-out cifar10] [--seeds 3]

The learning rate of each (model, initialization) is chosen on images of Tiny-ImageNet classes that the GHN never saw;
the table is over other images of these classes ("held-out") and over CIFAR-10's test set with 100 labels a class
("cifar10"), which decides nothing. DIR holds the JPEG shards; see docs/training.md for where the images come from.
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

import timm
import torch
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet
from torch import nn
from torch.nn import functional as F

from timm_ghn import init_model
from timm_ghn.ghn import GHN, load_ghn, read
from timm_ghn.training.data import ImageSet, augment, load_images, normalize, split
from timm_ghn.training.probe import few_labels, probe

METHODS = ("rand", "orth", "ghn", "ghn-orth")


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
def held_out_images(data: Path) -> ImageSet:
    """Images of the classes that the GHN never saw."""
    shards = [data / f"tinyimagenet32-train-{part}.safetensors" for part in range(2)]
    held_out = split(load_images(shards, progress=False), held_out=50, validation=0.04).held_out
    if held_out is None:
        raise SystemExit("no class is held out")
    return compact(held_out)


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


def initialized(name: str, method: str, ghn: GHN | None, num_classes: int, seed: int) -> nn.Module:
    """A model of the benchmark with one of the initializations."""
    torch.manual_seed(seed)
    model = MODELS[name](num_classes)
    if method != "rand":
        settings = {"ghn": ghn} if method.startswith("ghn") else {}
        init_model(model, method, input_size=(3, 32, 32), seed=seed, **settings)
    return model


def fine_tune(model: nn.Module, task: Task, epochs: int, lr: float, seed: int) -> dict[int, float]:
    """Train with AdamW and a cosine; accuracy on the test images after 10 %, 30 % and all of the epochs."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    steps = epochs * (len(task.train) // 50)
    marks = {math.ceil(share * steps): int(100 * share) for share in (0.1, 0.3, 1.0)}
    result: dict[int, float] = {}
    order = torch.empty(0, dtype=torch.int64)
    for step in range(1, steps + 1):
        if len(order) < 50:
            order = torch.randperm(len(task.train), generator=generator)
        index, order = order[:50], order[50:]
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, step / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        model.train()
        images = normalize(augment(task.train.images[index], generator))
        optimizer.zero_grad()
        F.cross_entropy(model(images), task.train.labels[index]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step in marks:
            result[marks[step]] = accuracy(model, task.test)
    return result


@torch.no_grad()
def accuracy(model: nn.Module, data: ImageSet) -> float:
    """Share of the images whose class is right; batch norms use their running statistics."""
    model.eval()
    right = 0
    for images, labels in zip(torch.split(data.images, 500), torch.split(data.labels, 500), strict=True):
        right += int((model(normalize(images)).argmax(1) == labels).sum())
    return right / len(data)


def choose_lr(name: str, method: str, ghn: GHN | None, task: Task, epochs: int, rates: list[float]) -> float:
    """The learning rate that does best on the selection task."""
    if len(rates) == 1:
        return rates[0]
    scores = [
        fine_tune(initialized(name, method, ghn, task.num_classes, 0), task, epochs, rate, 0)[100] for rate in rates
    ]
    return rates[scores.index(max(scores))]


def main() -> None:
    """Run the benchmark and print one line for each model, task and initialization."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the JPEG shards")
    parser.add_argument("--ghn", default="bundled", help="file or name of the GHN")
    parser.add_argument("--models", nargs="+", default=["resnet14", "convnext"], choices=sorted(MODELS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--tasks", nargs="+", default=["held-out", "cifar10"], choices=["held-out", "cifar10"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-3, 3e-3])
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--probe", action="store_true", help="also fit a linear classifier to the untrained features")
    parser.add_argument("--probe-only", action="store_true", help="only that: minutes instead of an hour")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ghn = read(args.ghn) if Path(args.ghn).exists() else load_ghn(args.ghn)
    if args.probe_only:
        run_probes(args, ghn)
        return
    rates: dict[tuple[str, str], float] = {}
    for task_name in args.tasks:
        for name in args.models:
            for method in args.methods:
                started = time.time()
                scores, probes = [], []
                for seed in range(args.seeds):
                    held_out, selection = held_out_task(args.data, seed, args.test_images)
                    key = (name, method)
                    if key not in rates:
                        rates[key] = choose_lr(name, method, ghn, selection, args.epochs, args.lrs)
                    task = held_out if task_name == "held-out" else cifar_task(args.data, seed, args.test_images)
                    model = initialized(name, method, ghn, task.num_classes, seed)
                    if args.probe:
                        probes.append(probe(model, task.train, task.test))
                    scores.append(fine_tune(model, task, args.epochs, rates[key], seed))
                row = {
                    "task": task_name,
                    "model": name,
                    "init": method,
                    "lr": rates[key],
                    **{f"{mark}%": _mean([score[mark] for score in scores]) for mark in (10, 30, 100)},
                    "seconds": round(time.time() - started),
                }
                if probes:
                    row["probe"] = _mean(probes)
                print(json.dumps(row), flush=True)


def run_probes(args: argparse.Namespace, ghn: GHN) -> None:
    """Accuracy of linear classifiers on frozen features, paired over seeds with those of random weights."""
    for task_name in args.tasks:
        for name in args.models:
            found: dict[str, list[float]] = {method: [] for method in args.methods}
            for seed in range(args.seeds):
                if task_name == "held-out":
                    task = held_out_task(args.data, seed, args.test_images)[0]
                else:
                    task = cifar_task(args.data, seed, args.test_images)
                for method, values in found.items():
                    model = initialized(name, method, ghn, task.num_classes, seed)
                    values.append(probe(model, task.train, task.test))
            row = {method: _mean(values) for method, values in found.items()}
            print(json.dumps({"task": task_name, "model": name, "ghn": str(args.ghn), **row}), flush=True)


def _mean(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} +- {100 * spread:.1f}"


if __name__ == "__main__":
    main()
