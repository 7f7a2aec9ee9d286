"""The weights that users get, inside of the training: scaled, and orthogonalized from layer L on, with gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from timm_ghn.ghn.config import GHNConfig
from timm_ghn.initialize.plan import Assignment
from timm_ghn.orthogonalization import PostProcess, WeightLayer, postprocess_tensor
from timm_ghn.settings import NOISE

_TINY = 1e-2
"""Noise (beta) up to here does nothing but give directions to vectors that repeat, as the paper's does."""


class _Orthogonal(torch.autograd.Function):
    """Equations 1 and 2, and for the gradient those of a rotation: what the GHN emits is nearly orthogonal already.

    A GHN emits blocks; of a kernel of more channels than a block, the vectors behind the first block get their
    directions from tiny noise alone, so that there is no gradient for them. Of larger noise there is a part in every
    vector, and the gradient is that of the rest.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, layer: WeightLayer, settings: PostProcess, block: int) -> Tensor:
        is_noisy, repeats = settings.noise > _TINY, min(weight.shape[0], weight[0].numel()) > block
        result = postprocess_tensor(weight, layer, settings if is_noisy or repeats else replace(settings, noise=0.0))
        predicted = torch.ones(()) if is_noisy else _predicted(weight, block)
        learned = weight * predicted
        ctx.factor = predicted * (result * learned).sum() / learned.square().sum().clamp_min(1e-24)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0] * ctx.factor, None, None, None


def _predicted(weight: Tensor, block: int) -> Tensor:
    """1 for the elements of the vectors that are not repeated, else 0; broadcasts to the weight."""
    rows, columns = weight.shape[0], weight[0].numel()
    dimension = 0 if rows <= columns else 1
    is_first = torch.arange(weight.shape[dimension], device=weight.device) < block
    shape = [1] * weight.dim()
    shape[dimension] = -1
    return is_first.view(shape).to(weight.dtype)


def as_users_get(
    predicted: Mapping[str, Tensor], assignments: Mapping[str, Assignment], config: GHNConfig, seed: int
) -> dict[str, Tensor]:
    """Predicted parameters after the scale rule and the orthogonalization, as `ghn-orth` hands them out.

    Part 1 of the scale rule is left out but for layer norms: the rest of it never applies to conditioned kernels.

    Args:
        predicted: Parameters by name.
        assignments: What each of them goes through; those that are missing are left out.
        config: Hyperparameters of the GHN: its noise, and after how many channels kernels repeat.
        seed: Seed of the noise.

    Returns:
        Parameters by name; differentiable.
    """
    settings = PostProcess(noise=NOISE if config.noise is None else config.noise, seed=seed)
    block = config.largest_kernel[0]
    results = {}
    for name, assigned in assignments.items():
        tensor = predicted[name]
        if assigned.gains:
            tensor = tensor / tensor.square().mean().sqrt().clamp(1e-6, 1)
        if assigned.factor != 1:
            tensor = tensor * assigned.factor
        if assigned.layer is not None:
            tensor = _Orthogonal.apply(tensor, assigned.layer, settings, block)  # type: ignore[no-untyped-call]
        results[name] = tensor
    return results
