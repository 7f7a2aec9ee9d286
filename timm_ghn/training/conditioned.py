"""The weights that users get, inside of the training: scaled, and orthogonalized from layer L on, with gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from timm_ghn.ghn.config import GHNConfig
from timm_ghn.ghn.features import shape_4d
from timm_ghn.initialize.plan import Assignment
from timm_ghn.orthogonalization import PostProcess, WeightLayer, postprocess_tensor
from timm_ghn.settings import NOISE

_TINY = 1e-2
"""Noise (beta) up to here does nothing but give directions to vectors that repeat, as the paper's does."""


class _Orthogonal(torch.autograd.Function):
    """Equations 1 and 2, and for the gradient those of a rotation: what the GHN emits is nearly orthogonal already.

    Vectors that repeat others get their directions from tiny noise alone, so that there is no gradient for them. Of
    larger noise there is a part in every vector, and the gradient is that of the rest.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, layer: WeightLayer, settings: PostProcess, config: GHNConfig) -> Tensor:
        is_noisy = settings.noise > _TINY
        predicted = torch.ones(()) if is_noisy else _predicted(weight, config)
        is_needed = is_noisy or not bool(predicted.all())
        result = postprocess_tensor(weight, layer, settings if is_needed else replace(settings, noise=0.0))
        learned = weight * predicted
        ctx.factor = predicted * (result * learned).sum() / learned.square().sum().clamp_min(1e-24)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0] * ctx.factor, None, None, None


def _predicted(weight: Tensor, config: GHNConfig) -> Tensor:
    """1 for the elements of the vectors that do not repeat others, else 0; broadcasts to the weight.

    Without signs, as many as the rank of what the GHN emits. With signs, that for each time that it is in a vector.
    """
    rows, columns = weight.shape[0], weight[0].numel()
    dimension = 0 if rows <= columns else 1
    block = config.emitted(shape_4d(tuple(weight.shape)))
    count = min(block[0], block[1] * columns // weight.shape[1])
    if config.signs and (dimension == 0 or columns == weight.shape[1]):
        count *= math.ceil(weight.shape[1 - dimension] / block[1 - dimension])
    is_first = torch.arange(min(rows, columns), device=weight.device) < count
    shape = (1, *weight.shape[1:]) if dimension else (rows, *(1 for _ in weight.shape[1:]))
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
    results = {}
    for name, assigned in assignments.items():
        tensor = predicted[name]
        if assigned.gains:
            tensor = tensor / tensor.square().mean().sqrt().clamp(1e-6, 1)
        if assigned.factor != 1:
            tensor = tensor * assigned.factor
        if assigned.clamped:
            tensor = tensor.clamp(min=0)
        if assigned.layer is not None:
            tensor = _Orthogonal.apply(tensor, assigned.layer, settings, config)  # type: ignore[no-untyped-call]
        results[name] = tensor
    return results
