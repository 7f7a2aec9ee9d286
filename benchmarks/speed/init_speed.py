"""Time and memory of `timm.create_model` with and without `init='ghn-orth'`, in one run.

    python benchmarks/speed/init_speed.py                        # convnext_base, resnet50, vit_base_patch16_224
    python benchmarks/speed/init_speed.py --models resnet18 --repeats 9 --json out.json
    python benchmarks/speed/init_speed.py --ppuda                # also ppuda, where it is importable

Every repeat times all variants in turn in one process (plain, ghn-orth with an empty cache, ghn-orth from the cache),
so that ratios are taken between neighbours; medians are reported. Peak memory is that of a fresh process that creates
one model. Weights come from the bundled GHN unless `--ghn` names another; the time does not depend on its weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODELS = ("convnext_base", "resnet50", "vit_base_patch16_224")
VARIANTS = ("plain", "ghn-orth", "cached")
TWINS = {"convnext_base": "convnext_base", "resnet50": "resnet50", "resnet18": "resnet18"}
START_LAYERS = {"convnext_base": 94, "resnet50": 37, "resnet18": 14}


def create(model: str, variant: str, ghn: str) -> None:
    """Create a model once; the variant "ghn-orth" starts from an empty cache, and knows nothing of the model."""
    import timm

    import timm_ghn

    if variant == "plain":
        timm.create_model(model)
        return
    if variant == "ghn-orth":
        shutil.rmtree(os.environ["TIMM_GHN_CACHE"] + "/weights", ignore_errors=True)
        timm_ghn.uninstall()
        timm_ghn.install()
    timm.create_model(model, init=timm_ghn.Init("ghn-orth", ghn=ghn))


def run_ppuda(model: str) -> dict[str, float]:
    """Seconds that ppuda takes on torchvision's twin, by step, with a GHN-2 of random weights."""
    import contextlib
    import io

    import torch
    import torchvision
    from ppuda.ghn.nn import GHN
    from ppuda.utils.init import init

    config = {"max_shape": (64, 64, 11, 11), "num_classes": 1000, "weight_norm": True, "ve": True, "layernorm": True}
    hypernetwork = GHN(**config).eval()
    start = time.perf_counter()
    network = getattr(torchvision.models, TWINS[model])().eval()
    created = time.perf_counter()
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()), torch.enable_grad():
        network = hypernetwork(network, bn_train=False)
    predicted = time.perf_counter()
    init(network, orth=True, beta=3e-5, layer=START_LAYERS[model])
    done = time.perf_counter()
    return {"create": created - start, "predict": predicted - created, "postprocess": done - predicted}


def timed(function: Callable[[], object]) -> float:
    """Wall-clock seconds of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure_times(model: str, repeats: int, ghn: str, ppuda: bool) -> dict[str, list[float]]:
    """Seconds of every variant, once a repeat, after one round that is not counted."""
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for repeat in range(repeats + 1):
        for variant in VARIANTS:
            elapsed = timed(lambda variant=variant: create(model, variant, ghn))  # type: ignore[misc]
            if repeat:
                seconds[variant].append(elapsed)
        if ppuda and model in TWINS and repeat:
            for step, elapsed in run_ppuda(model).items():
                seconds.setdefault(f"ppuda {step}", []).append(elapsed)
    return seconds


def measure_memory(model: str, variant: str, ghn: str) -> float:
    """Peak resident memory, in MB, of a process that creates the model once."""
    code = f"import init_speed; init_speed.create({model!r}, {variant!r}, {ghn!r}); init_speed.print_peak()"
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    return float(output.stdout.split()[-1])


def print_peak() -> None:
    """Print the peak resident memory of this process, in MB.

    Linux counts what the parent had before it started this one in `ru_maxrss`, but not in VmHWM.
    """
    status = Path("/proc/self/status")
    if status.exists():
        print(next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) / 1024)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measure(model: str, repeats: int, ghn: str, ppuda: bool) -> dict[str, Any]:
    """All figures of one model."""
    import timm
    import torch

    seconds = measure_times(model, repeats, ghn, ppuda)
    with torch.device("meta"):
        size = sum(p.numel() * p.element_size() for p in timm.create_model(model).parameters()) / 1e6
    memory = {variant: measure_memory(model, variant, ghn) for variant in VARIANTS}
    ratios = {
        variant: statistics.median(a / b for a, b in zip(seconds[variant], seconds["plain"], strict=True))
        for variant in VARIANTS[1:]
    }
    return {"model": model, "parameter_mb": size, "seconds": seconds, "ratios": ratios, "peak_mb": memory}


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| model | plain | ghn-orth, nothing cached | cached | peak memory: plain, ghn-orth, cached | 1.5 P + 600 |",
        "|---|---|---|---|---|---|",
    ]
    for row in results:
        median = {variant: statistics.median(times) for variant, times in row["seconds"].items()}
        peaks = ", ".join(f"{row['peak_mb'][variant]:.0f}" for variant in VARIANTS)
        lines.append(
            f"| {row['model']} | {median['plain']:.2f} s | {median['ghn-orth']:.2f} s "
            f"({row['ratios']['ghn-orth']:.2f} x plain) | {median['cached']:.2f} s ({row['ratios']['cached']:.2f} x) "
            f"| {peaks} MB | {1.5 * row['parameter_mb'] + 600:.0f} MB |"
        )
        steps = {step: value for step, value in median.items() if step.startswith("ppuda")}
        if steps:
            parts = ", ".join(f"{step.removeprefix('ppuda ')} {value:.2f} s" for step, value in steps.items())
            lines.append(f"| ppuda on torchvision's | {sum(steps.values()):.2f} s in all ({parts}) | | | | |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ghn", default="bundled", help="name or path of the GHN")
    parser.add_argument("--ppuda", action="store_true", help="also time ppuda (the extra 'ppuda')")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ.update(TIMM_GHN_CACHE=cache, HF_HUB_OFFLINE="1")
        results = [measure(model, arguments.repeats, arguments.ghn, arguments.ppuda) for model in arguments.models]
    import torch

    import timm_ghn

    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, "
    )
    print(f"timm-ghn {timm_ghn.__version__}; medians of {arguments.repeats}\n")
    print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
