"""The weights that users get, inside of the training: scaled, and orthogonalized from layer L on, with gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timm_ghn.initialize.plan import Assignment
from timm_ghn.orthogonalization import PostProcess, WeightLayer, postprocess_tensor

_NO_NOISE = PostProcess(noise=0.0)


class _Orthogonal(torch.autograd.Function):
    """Equations 1 and 2, and for the gradient those of a rotation: what the GHN emits is nearly orthogonal already.

    A GHN emits blocks; of a kernel of more channels than a block, the vectors behind the first block get their
    directions from the noise alone, so that there is no gradient for them.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, layer: WeightLayer, settings: PostProcess, block: int) -> Tensor:
        repeats = min(weight.shape[0], weight[0].numel()) > block  # else no vector is decided by the noise
        result = postprocess_tensor(weight, layer, settings if repeats else _NO_NOISE)
        predicted = _predicted(weight, block)
        scale = (result * predicted).norm() / (weight * predicted).norm().clamp_min(1e-12)
        ctx.factor = scale * predicted
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
    predicted: Mapping[str, Tensor], assignments: Mapping[str, Assignment], block: int, seed: int
) -> dict[str, Tensor]:
    """Predicted parameters after the scale rule and the orthogonalization, as `ghn-orth` hands them out.

    Part 1 of the scale rule is left out but for layer norms: the rest of it never applies to conditioned kernels.

    Args:
        predicted: Parameters by name.
        assignments: What each of them goes through; those that are missing are left out.
        block: Channels after which predicted kernels repeat.
        seed: Seed of the noise.

    Returns:
        Parameters by name; differentiable.
    """
    settings = PostProcess(seed=seed)
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
