"""What GHN-orth does to one layer: singular values and correlations of its channels, step by step.

    python examples/one_layer.py [MODEL] [LAYER]

1. A GHN predicts a block of at most 64 x 64 kernels and repeats it: many channels are copies of each other.
2. Noise of size beta * sigma(r), Eq. 1 of arXiv 2207.10049, makes them differ by a millionth of their size.
3. Orthogonalization, Eq. 2, makes what differs as large as what they have in common.
"""

import sys

import timm
import torch

import timm_ghn
from timm_ghn.orthogonalization import PostProcess, postprocess_tensor, weight_layers
from timm_ghn.orthogonalization.noise import correlation_std


def describe(step: str, weight: torch.Tensor) -> None:
    """Print what the paper looks at."""
    matrix = weight.detach().double().flatten(1)
    values = torch.linalg.svdvals(matrix)
    rank = int((values > 1e-9 * values[0]).sum())
    condition = float(values[0] / values[-1].clamp(min=1e-300))
    copies = len(matrix) - len(torch.unique(matrix, dim=0))
    print(
        f"{step:42} singular values {values[-1]:.1e} to {values[0]:.1e} (rank {rank} of {len(values)}, condition "
        f"{condition:.0e}); sigma of correlations {correlation_std(weight.flatten(1)):.3f}; {copies} copies"
    )


def main() -> None:
    """Follow the last layer before the classifier, or the one that is named."""
    name = sys.argv[1] if len(sys.argv) > 1 else "resnet50"
    random = timm.create_model(name)
    predicted = timm.create_model(name, init="ghn")
    layers = [layer for layer in weight_layers(predicted) if not layer.is_classifier]
    chosen = next((layer for layer in layers if len(sys.argv) > 2 and sys.argv[2] in layer.parameter), layers[-1])
    print(f"{name}, layer {chosen.number}: {chosen.parameter}")

    describe("timm's random weights", random.get_parameter(chosen.parameter))
    weight = predicted.get_parameter(chosen.parameter).detach()
    describe("1. predicted by the GHN", weight)
    noisy = postprocess_tensor(weight, chosen, PostProcess(noise=3e-5, orthogonal=False))
    describe("2. with noise (Eq. 1)", noisy)
    orthogonal = postprocess_tensor(weight, chosen, PostProcess(noise=3e-5))
    describe("3. orthogonalized (Eq. 2)", orthogonal)
    describe("   without noise first: arbitrary directions", postprocess_tensor(weight, chosen, PostProcess(noise=0)))

    overlap = (weight.flatten() @ orthogonal.flatten()) / (weight.norm() * orthogonal.norm())
    print(f"cosine of the prediction and the result: {overlap:.3f}")
    whole = timm.create_model(name, init=timm_ghn.Init("ghn-orth", start_layer=chosen.number))
    difference = (whole.get_parameter(chosen.parameter) - orthogonal).abs().max()
    print(f"the same as init='ghn-orth' gives, up to {difference:.0e}")


if __name__ == "__main__":
    main()
