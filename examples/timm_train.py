"""GHN-orth weights as a starting point for timm's own train.py, in two ways.

    python examples/timm_train.py [MODEL] [FOLDER]

Writes the weights as a file that plain timm loads, checks that it does, and prints both command lines. train.py is a
script of timm's repository (https://github.com/huggingface/pytorch-image-models), not of its package.
"""

import sys
import tempfile
from pathlib import Path

import timm
import torch

import timm_ghn
from timm_ghn.storage.folder import save


def main() -> None:
    """Write, load with plain timm, compare."""
    name = sys.argv[1] if len(sys.argv) > 1 else "resnet50"
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp()) / f"{name}.ghn_orth"
    model = timm.create_model(name, init="ghn-orth", num_classes=100)
    save(model, folder)

    timm_ghn.uninstall()  # from here on, this is plain timm
    checkpoint = folder / "model.safetensors"
    loaded = timm.create_model(name, num_classes=100, checkpoint_path=str(checkpoint))
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    print("plain timm loads the same weights:", same)
    print("\n1. train.py does not know of timm-ghn:")
    print(f"   python train.py --data-dir DATA --model {name} --num-classes 100 --initial-checkpoint {checkpoint}")
    print("\n2. train.py runs with init= understood, and no file is written:")
    print(f"   timm-ghn run train.py --data-dir DATA --model {name} --num-classes 100 --model-kwargs init=ghn-orth")


if __name__ == "__main__":
    main()
