"""Where `create_model(init="ghn-orth")` spends its processor time, without a cache: a table, and a picture with --png.

    python benchmarks/speed/profile_init.py [MODEL ...] [--repeats 3] [--seeds 20] [--png profile.png]

The last column is what many seeds of a model cost one after the other, as a share of as many calls that know nothing
of the model. Seconds are processor time with one thread, and each part is without the parts that it calls. Of the
repeats, the one with the least total counts, because other load on a machine adds time and never takes any.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import timm
import torch

import timm_ghn

MODELS = (
    "resnet18", "mobilenetv3_small_100", "efficientnet_b0", "resnet50", "convnext_base", "vit_base_patch16_224",
    "swin_base_patch4_window7_224", "eva02_large_patch14_448",
)  # fmt: skip
PARTS = {
    "capture": ["timm_ghn.initialize.outline:capture"],
    "condense": ["timm_ghn.initialize.outline:condense", "timm_ghn.initialize.plan:find_structure"],
    "GNN": ["timm_ghn.ghn.gnn:GatedGNN.forward", "timm_ghn.ghn.graphormer:Graphormer.forward"],
    "decoding": ["timm_ghn.ghn.model:GHN._emit"],
    "writing": ["timm_ghn.ghn.model:Prediction.write_"],
    "correlations": ["timm_ghn.orthogonalization.run:correlation_std"],
    "noise": ["timm_ghn.orthogonalization.run:add_normal_"],
    "projections": ["timm_ghn.orthogonalization.orthogonal:_project_"],
    "panels": ["timm_ghn.orthogonalization.orthogonal:_orthogonalize_panel_"],
    "reflections": ["timm_ghn.orthogonalization.orthogonal:_householder_"],
    "other QR": [
        "timm_ghn.orthogonalization.run:orthogonal_factor_",
        "timm_ghn.orthogonalization.run:orthogonalize_tiled_",
        "timm_ghn.orthogonalization.run:orthogonalize_kronecker_",
    ],
}
"""Functions of a part, as module:name."""
REST = "build and rest"


class Times:
    """Processor seconds of the parts, each without the parts that it calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._local = threading.local()

    def watch(self, part: str, function: str) -> None:
        """Replaces a function by one that counts its time."""
        module, _, path = function.partition(":")
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        original = getattr(owner, name)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            inner, self._local.inner = getattr(self._local, "inner", 0.0), 0.0
            start = time.thread_time()
            try:
                return original(*args, **kwargs)
            finally:
                spent = time.thread_time() - start
                self.seconds[part] += spent - self._local.inner
                self._local.inner = inner + spent

        setattr(owner, name, timed)


def create(model: str, seeds: int = 1) -> float:
    """Returns the seconds of initializations with some seeds; at first, nothing is known of the model."""
    timm_ghn.uninstall()
    timm_ghn.install()
    start = time.process_time()
    for seed in range(seeds):
        timm.create_model(model, init=timm_ghn.Init("ghn-orth", ghn="bundled", seed=seed, cache=False))
    return time.process_time() - start


def measure(model: str, times: Times, repeats: int) -> tuple[float, dict[str, float]]:
    """Returns the seconds of plain `create_model`, and those of each part of an initialization."""
    plain, best = float("inf"), {REST: float("inf")}
    for _ in range(repeats + 1):
        start = time.process_time()
        timm.create_model(model)
        plain = min(plain, time.process_time() - start)
        times.seconds.clear()
        total = create(model)
        if total < sum(best.values()):
            best = {**times.seconds, REST: total - sum(times.seconds.values())}
    return plain, best


def draw(rows: dict[str, tuple[float, dict[str, float]]], path: Path) -> None:
    """Draws a bar of stacked parts for each model, in multiples of plain `create_model`."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.5 * len(rows) + 1.5), layout="constrained")
    left = [0.0] * len(rows)
    for index, part in enumerate([REST, *PARTS]):
        widths = [parts.get(part, 0.0) / plain for plain, parts in rows.values()]
        axes.barh(list(rows), widths, left=left, label=part, color=plt.get_cmap("tab20")(index))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("processor time, in multiples of plain create_model")
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=20, help="how many seeds of a model make the last column")
    parser.add_argument("--png", type=Path, help="where the picture goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    times = Times()
    for part, functions in PARTS.items():
        for function in functions:
            times.watch(part, function)
    rows = {model: measure(model, times, arguments.repeats) for model in arguments.models}
    print("| model | plain | ghn-orth | " + " | ".join([REST, *PARTS]) + f" | {arguments.seeds} seeds |")
    print("|" + "---|" * (len(PARTS) + 5))
    for model, (plain, parts) in rows.items():
        cells = " | ".join(f"{parts.get(part, 0):.3f}" for part in [REST, *PARTS])
        total = sum(parts.values())
        share = create(model, arguments.seeds) / (arguments.seeds * total)
        print(f"| {model} | {plain:.3f} | {total:.3f} | {cells} | {share:.2f} |")
    if arguments.png:
        draw(rows, arguments.png)


if __name__ == "__main__":
    main()
