"""The networks that the reference outputs started from, and the samples of a tensor that they hold."""

from __future__ import annotations

import zlib

import numpy as np
import torch
import torchvision
from torch import Tensor, nn


def starting_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """float32: the parameter that a reference network started from, normal with scale 0.02, seeded by its name."""
    rng = np.random.default_rng(zlib.crc32(f"init:{name}".encode()))
    return torch.from_numpy((rng.standard_normal(shape) * 0.02).astype(np.float32))


def starting_model(model: str) -> nn.Module:
    """A torchvision network with its starting weights; the global generator is left alone."""
    with torch.device("meta"):
        network: nn.Module = torchvision.models.get_model(model)
    network.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(starting_weight(name, tuple(parameter.shape)))
        for buffer in network.buffers():
            buffer.zero_()
    return network


def samples(tensor: Tensor) -> Tensor:
    """Up to 8 values at evenly spaced flat indices."""
    flat = tensor.detach().flatten()
    return flat[torch.from_numpy(np.linspace(0, flat.numel() - 1, min(flat.numel(), 8)).astype(int))]
