"""Which initialization suits your architecture and data? Trains each for a few epochs, and draws the curves.

    python examples/compare_inits.py DATA [--model NAME] [--inits rand orth ghn-orth lsuv] [--epochs N] [--out FILE]

DATA is a folder with one sub-folder a class. Means and standard deviations are over seeds; `p` is the exact two-sided
p-value of the differences to the first initialization, paired by seed.
"""

import argparse
from pathlib import Path

import torch

from timm_ghn.finetune import (
    Execution,
    FineTuneConfig,
    Job,
    ResultStore,
    compare,
    load_benchmark,
    run_jobs,
    summarize,
)


def main() -> None:
    """Train, compare, plot."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--inits", nargs="+", default=["rand", "orth", "ghn-orth", "lsuv"])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels")
    parser.add_argument("--out", type=Path, default=Path("compare_inits.png"))
    args = parser.parse_args()
    data = load_benchmark("folder", args.data, size=args.size)
    settings = {"image_size": args.size, "labels_per_class": None, "epochs": args.epochs}
    jobs = [Job(FineTuneConfig(args.model, init, **settings), s) for init in args.inits for s in range(args.seeds)]
    execution = Execution("cuda" if torch.cuda.is_available() else "cpu", evaluate_every=max(1, args.epochs // 10))
    results = run_jobs(jobs, data, ResultStore(args.out.with_suffix("")), execution)
    summaries = summarize(results)
    for row in summaries:
        paired = compare(row, summaries[0])
        print(
            f"{row.config.init:10} {100 * row.mean:5.1f} ± {100 * row.std:.1f} %, "
            f"{100 * paired.difference:+.1f} to {summaries[0].config.init}, p = {paired.p_value:.2g}"
        )
    plot(results, args.out)


def plot(results, path: Path) -> None:
    """Test accuracy by epoch, a line for each run, a colour for each initialization."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    inits = list(dict.fromkeys(result.config.init for result in results))
    for result in results:
        points = [(point.epoch, 100 * point.accuracy) for point in result.curve if point.accuracy is not None]
        label = result.config.init if result.seed == 0 else None
        axis.plot(*zip(*points, strict=True), color=f"C{inits.index(result.config.init)}", label=label, marker=".")
    axis.set(xlabel="epoch", ylabel="test accuracy (%)")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)
    print("curves:", path)


if __name__ == "__main__":
    main()
