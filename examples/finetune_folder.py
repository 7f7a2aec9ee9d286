"""Fine-tune a network on your own folder of images, from GHN-orth weights.

    python examples/finetune_folder.py FOLDER [MODEL] [EPOCHS]

FOLDER has one sub-folder a class (or `train` and `test` with those). Every fifth image is a test image then.
"""

import sys

import torch

from timm_ghn.finetune import Execution, FineTuneConfig, Job, ResultStore, load_benchmark, run_jobs


def main() -> None:
    """Train once, print the curve."""
    folder, model, epochs = (sys.argv[1:] + ["resnet18", "30"][len(sys.argv) - 2 :])[:3]
    data = load_benchmark("folder", folder, size=64)
    config = FineTuneConfig(
        model, "ghn-orth", image_size=64, labels_per_class=None, epochs=int(epochs), lr=0.01, weight_decay=0.01
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    (result,) = run_jobs([Job(config, seed=0)], data, ResultStore(f"{folder}-results"), Execution(device))
    for point in result.curve:
        if point.accuracy is not None:
            print(f"epoch {point.epoch}: loss {point.train_loss:.3f}, test accuracy {100 * point.accuracy:.1f} %")
    print(f"{len(data.train)} training images, {result.images_per_second:.0f} images/s; {folder}-results has it all")


if __name__ == "__main__":
    main()
