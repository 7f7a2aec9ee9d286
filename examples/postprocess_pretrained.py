"""Post-processing alone: orthogonalize the later layers of a torchvision model, pretrained or not.

    python examples/postprocess_pretrained.py [--pretrained] [--model NAME] [--start-layer L] [--out FILE]

No GHN is involved. The paper (arXiv 2207.10049, section 4) tried this on weights that were trained on ImageNet:
`--pretrained` downloads such weights; without it, the model has torchvision's random ones. `--out` writes the result as
safetensors, for example for `benchmarks/finetune.py --init-file`.
"""

import argparse
from pathlib import Path

import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

import timm_ghn


def distance_from_orthogonal(weight: Tensor) -> float:
    """Largest entry of Q^T Q - I, for the matrix K x CHW of a weight or its transpose."""
    matrix = weight.detach().flatten(1)
    matrix = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    return float((matrix.T @ matrix - torch.eye(matrix.shape[1])).abs().max())


def main() -> None:
    """Orthogonalize, and show a layer before and after."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="resnet18", help="name of a torchvision model (default: resnet18)")
    parser.add_argument("--pretrained", action="store_true", help="begin with torchvision's ImageNet weights")
    parser.add_argument("--start-layer", type=int, default=15, metavar="L", help="first layer to change (default: 15)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the weights there, as safetensors")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = torchvision.models.get_model(args.model, weights="DEFAULT" if args.pretrained else None)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    changed = timm_ghn.orthogonalize_(model, start_layer=args.start_layer, noise=3e-5, seed=0)

    print(f"{args.model}, L = {args.start_layer}")
    for name in changed:
        old, new = distance_from_orthogonal(before[name]), distance_from_orthogonal(model.get_parameter(name))
        print(f"{name}: max |Q^T Q - I| {old:.2g} before, {new:.1g} after")
    if args.out is not None:
        save_file(model.state_dict(), args.out, {"format": "pt"})
        print(f"{args.out}: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
