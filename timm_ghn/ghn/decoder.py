"""Decoders: from node features to blocks of kernels (arXiv 2110.13100, section 3.2 and appendix B.1).

State-dict names and shapes follow ppuda (github.com/facebookresearch/ppuda at 4673a42, ppuda/ghn/decoder.py). Where
ppuda emits a whole block and cuts it, these emit the part that is needed, with the same values.

Shapes: N nodes, K out channels, C in channels, h x w kernel.
"""

from __future__ import annotations

import math
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from timm_ghn.ghn.config import GHNConfig
from timm_ghn.ghn.gnn import MLP

Block = tuple[int, int, int, int]
"""A part (K, C, h, w) of the largest block."""


class ConvDecoder(nn.Module):
    """A linear layer that emits an h x w map, and 1x1 convolutions that emit K * C values at each of its places."""

    def __init__(self, config: GHNConfig) -> None:
        super().__init__()
        self.max_shape = config.max_shape
        out_channels, in_channels, height, width = config.max_shape
        middle = 4 * config.hid
        self.fc = nn.Sequential(nn.Linear(config.hid, middle * height * width), nn.ReLU())
        self.conv = nn.Sequential(
            nn.Conv2d(middle, 2 * middle, 1), nn.ReLU(), nn.Conv2d(2 * middle, out_channels * in_channels, 1)
        )
        self.class_layer_predictor = nn.Sequential(nn.ReLU(), nn.Conv2d(out_channels, config.num_classes, 1))

    def forward(self, x: Tensor, block: Block) -> Tensor:
        """Kernels (N, K, C, h, w), contiguous, for node features (N, hid)."""
        out_channels, in_channels, height, width = block
        places, first, last = cast(nn.Linear, self.fc[0]), cast(nn.Conv2d, self.conv[0]), cast(nn.Conv2d, self.conv[2])
        weight = _cut(places.weight, (-1, *self.max_shape[2:]), (None, height, width))
        bias = _cut(places.bias, (-1, *self.max_shape[2:]), (None, height, width))
        maps = F.relu(F.linear(x, weight, bias)).view(len(x), -1, height * width)

        # 1x1 convolutions as matrix products: rows are the places of all nodes.
        hidden = F.relu(F.linear(maps.transpose(1, 2), first.weight.flatten(1), first.bias))
        weight = _cut(last.weight.flatten(1), self.max_shape[:2], (out_channels, in_channels))
        bias = _cut(_bias(last), self.max_shape[:2], (out_channels, in_channels))
        kernels = F.linear(hidden, weight, bias).transpose(1, 2)
        return kernels.reshape(len(x), *block)

    def class_weights(self, x: Tensor, in_channels: int) -> Tensor:
        """Class weights (N, num_classes, C) for node features (N, hid): classes replace the out channels."""
        kernels = self(x, (self.max_shape[0], in_channels, 1, 1)).flatten(2)
        predictor = cast(nn.Conv2d, self.class_layer_predictor[1])
        return predictor.weight.flatten(1) @ F.relu(kernels) + _bias(predictor)[:, None]


class MLPDecoder(nn.Module):
    """Two linear layers that emit the whole block (GHN-1's ablation)."""

    def __init__(self, config: GHNConfig) -> None:
        super().__init__()
        self.max_shape = config.max_shape
        out_channels, in_channels, height, width = config.max_shape
        middle = 2 * config.hid
        self.mlp = MLP(config.hid, (middle, out_channels * in_channels * height * width), last_activation=False)
        self.class_layer_predictor = nn.Sequential(nn.ReLU(), nn.Linear(middle, config.num_classes * out_channels))

    def forward(self, x: Tensor, block: Block) -> Tensor:
        """Kernels (N, K, C, h, w), contiguous, for node features (N, hid)."""
        first, last = self.mlp.linear(0), self.mlp.linear(1)
        weight, bias = _cut(last.weight, self.max_shape, block), _cut(last.bias, self.max_shape, block)
        return F.linear(F.relu(first(x)), weight, bias).view(len(x), *block)

    def class_weights(self, x: Tensor, in_channels: int) -> Tensor:
        """Class weights (N, num_classes, C) for node features (N, hid)."""
        weights: Tensor = self.class_layer_predictor(self.mlp.linear(0)(x))
        return weights.view(len(x), -1, self.max_shape[1])[:, :, :in_channels]


def _cut(rows: Tensor, shape: tuple[int, ...], sizes: tuple[int | None, ...]) -> Tensor:
    """The rows of a layer whose outputs, seen as `shape`, lie in the corner of `sizes` (None: all)."""
    grid = rows.view(*shape, *rows.shape[1:])
    return grid[tuple(slice(size) for size in sizes)].reshape(-1, *rows.shape[1:])


def _bias(layer: nn.Conv2d) -> Tensor:
    return cast(Tensor, layer.bias)


def make_decoder(config: GHNConfig) -> ConvDecoder | MLPDecoder:
    """The decoder that the configuration names."""
    return ConvDecoder(config) if config.decoder == "conv" else MLPDecoder(config)


def vector_decoder(config: GHNConfig) -> MLP:
    """MLP whose output (2 * max(K, C)) is a norm weight, then a norm bias or any other bias."""
    return MLP(config.hid, (2 * config.hid, 2 * max(config.max_shape[:2])), last_activation=False)


def class_bias_layer(config: GHNConfig) -> nn.Sequential:
    """Layers that turn a predicted bias into one of `num_classes` values."""
    return nn.Sequential(nn.ReLU(), nn.Linear(max(config.max_shape[:2]), config.num_classes))


def scale(block: Tensor, shape: tuple[int, ...], is_table: bool) -> Tensor:
    """Scale a predicted kernel by its fan-in (arXiv 2110.13100, section 4.2; ppuda's `GHN._normalize`).

    Args:
        block: Any part of the kernel.
        shape: Shape of the whole kernel, (K, C) or (K, C, kh, kw): its rank matters.
        is_table: Whether it is a table of positional encodings, which keeps its scale from a side of 11.

    Returns:
        The block times sqrt(beta / fan-in), beta being 1 for depthwise and wide kernels, which ReLUs seldom follow.
    """
    if is_table and len(shape) > 2 and shape[0] == 1 and shape[2] >= 11:
        return block
    without_relu = len(shape) == 4 and (shape[1] == 1 or shape[2] < shape[3])
    fan_in = math.prod(shape[1:])
    beta = 1.0 if without_relu else 2.0
    return block * math.sqrt(beta / fan_in)
