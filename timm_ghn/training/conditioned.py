"""The kernels that users get, inside of the training: orthogonalized from layer L on, with gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timm_ghn.orthogonalization import PostProcess, WeightLayer, postprocess_tensor


class _Orthogonal(torch.autograd.Function):
    """Equations 1 and 2, and for the gradient those of a rotation: what the GHN emits is nearly orthogonal already.

    A GHN emits blocks; of a kernel of more channels than a block, the vectors behind the first block get their
    directions from the noise alone, so that there is no gradient for them.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, layer: WeightLayer, settings: PostProcess, block: int) -> Tensor:
        result = postprocess_tensor(weight, layer, settings)
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
    predicted: Mapping[str, Tensor], layers: Mapping[str, WeightLayer], block: int, seed: int
) -> dict[str, Tensor]:
    """Predicted parameters with the kernels of some layers orthogonalized, as `ghn-orth` does.

    Args:
        predicted: Parameters by name.
        layers: The layers that are orthogonalized, by name of the weight.
        block: Channels after which predicted kernels repeat.
        seed: Seed of the noise.

    Returns:
        All parameters; differentiable.
    """
    settings = PostProcess(seed=seed)
    return {
        name: _Orthogonal.apply(tensor, layers[name], settings, block)  # type: ignore[no-untyped-call]
        if name in layers
        else tensor
        for name, tensor in predicted.items()
    }
