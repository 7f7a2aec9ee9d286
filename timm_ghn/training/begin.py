"""The GHN that training begins with: an untrained one at a good scale, or one that is trained further."""

from __future__ import annotations

import math

import torch

from timm_ghn.ghn.config import GHNConfig
from timm_ghn.ghn.model import GHN

_SHARE = 0.5
"""Scale of the node features against the bias of the decoder's first layer, which the kernels of all nodes share."""


def new_ghn(shape: GHNConfig, seed: int) -> GHN:
    """A GHN as training begins with it: embeddings of sizes that vary slowly, and kernels that nodes share.

    Args:
        shape: Its hyperparameters.
        seed: Seed of its weights.
    """
    torch.manual_seed(seed)
    ghn = GHN(shape)
    smooth_sizes(ghn, seed)
    share_decoder(ghn, seed)
    return ghn


@torch.no_grad()
def smooth_sizes(ghn: GHN, seed: int = 0) -> None:
    """Let the channel embeddings of a new GHN vary slowly with the logarithm of the size.

    Independent random rows, torch's default, make neighbouring widths as different as any two.

    Args:
        ghn: GHN; changed in place. The row of the number of classes and that of "no shape" stay.
        seed: Seed of the random waves.
    """
    encoder = ghn.shape_enc
    known = encoder.channels.known
    weight = encoder.embed_channel.weight
    generator = torch.Generator().manual_seed(seed)
    size = torch.from_numpy(known).double().log2()
    columns = weight.shape[1]
    frequency = torch.rand(columns, generator=generator, dtype=torch.float64) * 0.2 + 0.05  # waves of 4 to 20 octaves
    phase = torch.rand(columns, generator=generator, dtype=torch.float64) * 2 * math.pi
    waves = math.sqrt(2) * torch.sin(2 * math.pi * size[:, None] * frequency + phase)
    keep = torch.from_numpy(known == ghn.config.num_classes)
    rows = torch.nonzero(~keep).flatten()
    weight[rows.to(weight.device)] = waves[rows].to(weight)


@torch.no_grad()
def share_decoder(ghn: GHN, seed: int = 0) -> None:
    """Let an untrained GHN predict nearly the same kernels for all nodes: a network of shared weights.

    Classes can be learned only if the channels of the last layer mean the same in all networks. With torch's default
    initialization the kernels of different nodes have next to nothing in common.

    Args:
        ghn: The GHN; changed in place.
        seed: Seed of that bias.
    """
    parameters = dict(ghn.named_parameters())
    bias, weight = parameters["decoder.fc.0.bias"], parameters["decoder.fc.0.weight"]
    generator = torch.Generator().manual_seed(seed)
    deviation = float(weight.std()) * math.sqrt(weight.shape[1])
    bias.copy_(torch.randn(bias.shape, generator=generator) * deviation)
    weight.mul_(_SHARE)
