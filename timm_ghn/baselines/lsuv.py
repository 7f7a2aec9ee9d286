"""Layer-sequential unit variance (Mishkin & Matas 2016, arXiv 1511.06422).

Every convolutional and fully-connected weight becomes orthonormal and is then scaled so that the outputs of its layer
have variance 1 on a batch, layer after layer in the order in which they run. Outputs are linear in the weight, so one
scaling is exact and a single pass sets all layers; the paper's loop over steps of one layer would stop after its first.

Applies to every convolution and linear layer whose output follows its weight: weights that a module standardizes
itself get the orthonormal matrix only. Biases become 0, as in the paper. Norm layers normalize by the batch meanwhile;
dropout and stochastic depth are off. Of a module that is used several times, the first use counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from timm_ghn.orthogonalization.orthogonal import orthogonal_factor_
from timm_ghn.seeding import derived_seed

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_LARGEST_ERROR = 0.1
"""Of the variance, as the paper's tolerance. A layer that does not reach it does not follow its weight."""


@torch.no_grad()
def lsuv_(model: nn.Module, images: Tensor, seed: int) -> tuple[str, ...]:
    """Initialize all layers.

    Args:
        model: The model; its mode and buffers stay as they are.
        images: A batch of inputs, on the model's device.
        seed: Seed of the orthonormal matrices.

    Returns:
        Names of the parameters that changed.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _LAYERS)}
    changed: list[str] = []
    for number, (name, layer) in enumerate(layers.items()):
        changed += [f"{name}.{part}" for part, _ in layer.named_parameters(recurse=False) if part in ("weight", "bias")]
        _draw_(layer, derived_seed("lsuv", seed, number, tuple(layer.weight.shape)))
    done: set[int] = set()

    def rescale(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if id(layer) in done:
            return None
        done.add(id(layer))
        return _scale_(layer, inputs, output)

    handles = [layer.register_forward_hook(rescale) for layer in layers.values()]
    try:
        with _measuring(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(changed)


def _draw_(layer: nn.Module, seed: int) -> None:
    """Make a weight orthonormal, and a bias 0."""
    weight = layer.get_parameter("weight")
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    orthogonal_factor_(drawn.view(drawn.shape[0], -1), "weight")
    weight.copy_(drawn)
    if isinstance(getattr(layer, "bias", None), nn.Parameter):
        layer.get_parameter("bias").zero_()


def _scale_(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """Scale a weight for outputs of variance 1.

    Returns:
        The new outputs; None if the weight was left as it was.
    """
    variance = float(output.float().var())
    if not (math.isfinite(variance) and variance > 0):
        return None
    weight = layer.get_parameter("weight")
    before = weight.clone()
    weight.div_(math.sqrt(variance))
    result: Tensor = layer.forward(*inputs)
    if abs(float(result.float().var()) - 1) > _LARGEST_ERROR:
        weight.copy_(before)
        return None
    return result


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Norm layers normalize by the batch, nothing random happens, and afterwards all is as before."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = True
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for buffer, value in buffers:
            buffer.copy_(value)
