"""Activations of initialized networks beside those of timm's own initialization, on noise images.

    python benchmarks/activation_scale.py --models resnet18 vit_tiny_patch16_224 --ghn bundled --json scale.jsonl

Without `--models`: the smallest model of every timm module, which takes minutes to find. Images are as small as the
model allows (64, 96 or 128 pixels, else its own size). Everything is predicted (`fallback="off"`). A line of JSON for
each model and setting of `rescale`, and a summary for networks with batch statistics (as in training) and with running
statistics (as in evaluation).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from zoo_survey.activations import Activations, activation_ratio, measure_activations

import timm_ghn
from timm_ghn.errors import CaptureError

BANDS = (10, 30)


def smallest_of_each_module() -> Iterator[str]:
    """The model with the fewest parameters of every timm module."""
    for module in timm.list_modules():
        sizes: dict[str, int] = {}
        for name in timm.list_models(module=module):
            with torch.device("meta"):
                sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
        if sizes:
            yield min(sizes, key=sizes.__getitem__)


def smallest_input(model: nn.Module) -> tuple[int, ...] | None:
    """The first image size that the model runs on; None for its own."""
    for side in (64, 96, 128):
        try:
            measure_activations(model, input_size=(3, side, side), batch_statistics=True)
        except CaptureError:
            continue
        return (3, side, side)
    return None


def measure(name: str, method: str, ghn: str) -> Iterator[dict[str, Any]]:
    """A row for each setting of `rescale`."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    size = smallest_input(model)

    def activations() -> dict[str, Activations]:
        return {
            mode: measure_activations(model, input_size=size, batch_statistics=mode == "batch")
            for mode in ("batch", "eval")
        }

    reference = activations()
    for rescale in ("off", "auto"):
        model.load_state_dict(start)
        timm_ghn.init_model(model, method, ghn=ghn, rescale=rescale, fallback="off")
        row: dict[str, Any] = {"model": name, "method": method, "ghn": ghn, "rescale": rescale, "input_size": size}
        for mode, found in activations().items():
            row[mode] = {
                **activation_ratio(found, reference[mode]).to_dict(),
                "logits_std": found.logits_std,
                "timm_logits_std": reference[mode].logits_std,
            }
        yield row


def summary(rows: list[dict[str, Any]]) -> str:
    """How many networks are finite and within the bands, and the median of the farthest ratio."""
    lines = ["| statistics | rescale | networks | finite | within 10 | within 30 | median of the farthest ratio |"]
    lines.append("|---|---|---|---|---|---|---|")
    for mode in ("batch", "eval"):
        for rescale in ("off", "auto"):
            found = [row[mode] for row in rows if row["rescale"] == rescale]
            finite = sum(item["finite"] for item in found)
            within = [sum(item["distance"] <= band for item in found) for band in BANDS]
            middle = statistics.median(item["distance"] for item in found) if found else float("nan")
            lines.append(f"| {mode} | {rescale} | {len(found)} | {finite} | {within[0]} | {within[1]} | {middle:.3g} |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--method", default="ghn-orth")
    parser.add_argument("--ghn", default="bundled", help="name or path of the GHN")
    parser.add_argument("--json", type=Path, help="append all figures here")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models or smallest_of_each_module():
        for row in measure(name, arguments.method, arguments.ghn):
            rows.append(row)
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        farthest = [f"{mode} x {rows[-1][mode]['distance']:.3g}" for mode in ("batch", "eval")]
        print(f"{name}: {', '.join(farthest)}", flush=True)
    print(summary(rows))


if __name__ == "__main__":
    main()
