"""Fine-tune a network on your own folder of images, from GHN-orth weights, and look at the curve.

    python examples/finetune_folder.py FOLDER [--model NAME] [--epochs N]

FOLDER has one sub-folder a class (or `train` and `test` with those). A fifth of each class are test images then. To
compare initializations with each other, use the command `timm-ghn compare`.
"""

import argparse
import sys
from pathlib import Path

import torch

from timm_ghn.errors import TimmGhnError
from timm_ghn.finetune import Execution, FineTuneConfig, Job, ResultStore, load_benchmark, run_jobs


def main() -> None:
    """Train once, print the curve."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder with one sub-folder a class")
    parser.add_argument("--model", default="resnet18", help="name of a timm model (default: resnet18)")
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    data = load_benchmark(str(args.folder), size=64)
    config = FineTuneConfig(args.model, "ghn-orth", image_size=64, labels_per_class=None, epochs=args.epochs)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = Path(f"{args.folder}-results")
    (result,) = run_jobs([Job(config, seed=0)], data, ResultStore(results), Execution(device))
    for point in result.curve:
        if point.accuracy is not None:
            print(f"epoch {point.epoch}: loss {point.train_loss:.3f}, test accuracy {100 * point.accuracy:.1f} %")
    print(f"{len(data.train)} training images, {result.images_per_second:.0f} images/s; {results} has it all")


if __name__ == "__main__":
    try:
        main()
    except TimmGhnError as error:
        sys.exit(f"finetune_folder.py: error: {error}")
