"""Depthwise kernels drawn from a Gaussian of structured covariance, after Trockman, Willmott, Kolter 2022.

"Understanding the Covariance Structure of Convolutional Filters" (arXiv 2210.03651): trained depthwise kernels have
similar covariances over the positions of the kernel in many networks. Neighbouring positions are alike, the center
varies most, and kernels become wider with depth. A closed form with one width `sigma` per layer imitates that.

Applies to depthwise convolutions in two dimensions with odd kernels of 3 x 3 or more. All other parameters are left
alone.

What is ours: the authors' code was not at hand, and the paper fits its schedule of widths to each architecture. Here
the width grows linearly with depth from `WIDTHS[0] k` to `WIDTHS[1] k`, and kernels keep the mean square that the
weights had before, so that only their structure changes.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

from timm_ghn.baselines.setting import Computation, Setting, names_of
from timm_ghn.seeding import derived_seed

WIDTHS = (0.1, 0.35)
"""Width `sigma` of the first and the last depthwise layer, in sides of the kernel."""


def kernel_covariance(side: int, sigma: float) -> Tensor:
    """Covariance of the positions of a square kernel.

    With `z` a Gaussian bump at the center and `C` a Gaussian of the distance between two positions, it is the positive
    part of the symmetrized `(z z^T) * (C - S / 2)`, where each row of `S` is the bump itself: positions near the center
    vary most and together, and what all kernels have in common is reduced.

    Args:
        side: k, odd.
        sigma: Width in pixels.

    Returns:
        float64 (k^2, k^2), symmetric, positive semidefinite, of trace 1.
    """
    line = torch.arange(side, dtype=torch.float64) - side // 2
    rows, columns = (part.flatten() for part in torch.meshgrid(line, line, indexing="ij"))
    bump = torch.exp(-(rows**2 + columns**2) / (2 * sigma**2))
    distance = (rows[:, None] - rows) ** 2 + (columns[:, None] - columns) ** 2
    raw = torch.outer(bump, bump) * (torch.exp(-distance / (2 * sigma**2)) - bump / 2)
    values, vectors = torch.linalg.eigh((raw + raw.T) / 2)
    values = values.clamp(min=0)
    covariance: Tensor = (vectors * (values / values.sum())) @ vectors.T
    return covariance


def sample_kernels(count: int, covariance: Tensor, generator: torch.Generator) -> Tensor:
    """Draw K kernels of a covariance (D, D), from a generator on the CPU: float64 (K, D)."""
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt()
    kernels: Tensor = torch.randn(count, len(covariance), dtype=torch.float64, generator=generator) @ root.T
    return kernels


def is_structured(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a module is a depthwise convolution that this applies to."""
    return (
        isinstance(module, nn.Conv2d)
        and module.groups == module.in_channels > 1
        and module.kernel_size[0] == module.kernel_size[1]
        and module.kernel_size[0] >= 3
        and module.kernel_size[0] % 2 == 1
    )


def covariance(setting: Setting) -> Computation:
    """Kernels of all depthwise convolutions.

    Raises:
        InitError: If there are none.
    """
    names = names_of(setting.model)
    weights = [m.weight for m in setting.model.modules() if is_structured(m) and id(m.weight) in names]
    return setting.computation(
        (names[id(weight)] for weight in weights),
        lambda: (
            (names[id(weight)], _kernels(weight, i, len(weights), setting.seed)) for i, weight in enumerate(weights)
        ),
        "it has no depthwise convolutions with odd kernels of 3 x 3 or more",
    )


@torch.no_grad()
def _kernels(weight: Tensor, index: int, count: int, seed: int) -> Tensor:
    """Kernels for one of `count` depthwise layers, of the mean square that its weight has."""
    side = weight.shape[-1]
    low, high = WIDTHS
    kernel = kernel_covariance(side, side * (low + (high - low) * index / max(1, count - 1)))
    generator = torch.Generator().manual_seed(derived_seed("covariance", seed, index, tuple(weight.shape)))
    scale = weight.double().cpu().square().sum((1, 2, 3)).mean().sqrt()
    return (sample_kernels(weight.shape[0], kernel, generator) * scale).view_as(weight)
