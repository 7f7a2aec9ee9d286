"""Decoders: from node features to blocks of kernels (arXiv 2110.13100, section 3.2 and appendix B.1).

State-dict names and shapes follow ppuda (github.com/facebookresearch/ppuda at 4673a42, ppuda/ghn/decoder.py). Where
ppuda emits a whole block and cuts it, these emit the part that is needed, with the same values.

Shapes: N nodes, K out channels, C in channels, h x w kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_ghn.ghn.config import GHNConfig
from timm_ghn.ghn.layout import Block, Tiles, join, signs_at, tilings

_CODE_STD = 0.7
"""Standard deviation of the codes of an untrained GHN, by which the blocks of a kernel differ."""

Window = tuple[range, ...]
"""A part of a grid: for each dimension, where it lies."""

SLAB_BYTES = 64 * 2**20
"""Upper bound of the weights of the last layer that are copied at once; for GHN-2, all of them are 4 MiB."""


@dataclass(frozen=True, slots=True)
class ConvParts:
    """The parts of a `ConvDecoder`'s layers that emit blocks of one size.

    Attributes:
        block: Their size.
        places: Weight and bias of the first layer for the places of an h x w kernel.
        channels: Weights (k, C, hidden) and biases (k, C) of the last layer, for a few out channels each.
    """

    block: Block
    places: tuple[Tensor, Tensor]
    channels: Sequence[tuple[Tensor, Tensor]]

    def blocks(self, hidden: Tensor, *, bias: bool = True) -> Tensor:
        """What the last layer makes (..., k, C, h, w) of features (..., h * w, hidden), contiguous."""
        slabs = [
            F.linear(hidden, weight.flatten(0, 1), values.flatten() if bias else None)
            for weight, values in self.channels
        ]
        emitted = torch.cat(slabs, dim=-1) if len(slabs) > 1 else slabs[0]
        return emitted.transpose(-1, -2).reshape(*hidden.shape[:-2], *self.block)


class ConvDecoder(nn.Module):
    """A linear layer that emits an h x w map, and 1x1 convolutions that emit K * C values at each of its places."""

    def __init__(self, config: GHNConfig) -> None:
        super().__init__()
        self.max_shape, self.is_centred, self.has_signs = config.max_shape, config.cut == "centre", config.signs
        out_channels, in_channels, height, width = config.max_shape
        middle = 4 * config.hid
        self.fc = nn.Sequential(nn.Linear(config.hid, middle * height * width), nn.ReLU())
        self.conv = nn.Sequential(
            nn.Conv2d(middle, 2 * middle, 1), nn.ReLU(), nn.Conv2d(2 * middle, out_channels * in_channels, 1)
        )
        self.class_layer_predictor = nn.Sequential(nn.ReLU(), nn.Conv2d(out_channels, config.num_classes, 1))
        if config.tiles > 1:
            self.out_codes = nn.Embedding(config.tiles - 1, 2 * middle)
            self.in_codes = nn.Embedding(config.tiles - 1, 2 * middle)
            for codes in (self.out_codes, self.in_codes):
                nn.init.normal_(codes.weight, std=_CODE_STD)

    def cut(self, blocks: Iterable[Block]) -> dict[Block, ConvParts]:
        """What emits blocks of these sizes, for `forward`; cut together, they have one gradient for each layer."""
        sizes = list(dict.fromkeys(blocks))
        places, last = cast(nn.Linear, self.fc[0]), cast(nn.Conv2d, self.conv[2])
        grid, pairs = (4 * places.in_features, *self.max_shape[2:]), self.max_shape[:2]
        windows = [(range(grid[0]), *self._window(block)) for block in sizes]
        corners = [tuple(map(range, block[:2])) for block in sizes]
        cuts = zip(
            sizes,
            _cut_all(places.weight, grid, windows),
            _cut_all(places.bias, grid, windows),
            _cut_all(last.weight.flatten(1), pairs, corners),
            _cut_all(_bias(last), pairs, corners),
            strict=True,
        )
        parts = {}
        for size, place_weight, place_bias, weight, bias in cuts:
            count = max(1, SLAB_BYTES // (4 * weight[0].numel()))
            slabs = list(zip(torch.split(weight, count), torch.split(bias, count), strict=True))
            parts[size] = ConvParts(size, (place_weight.flatten(0, 2), place_bias.flatten()), slabs)
        return parts

    def _window(self, block: Block) -> Window:
        """Where the h x w places of a smaller kernel lie in a block: in its corner, or around its centre."""
        sizes, limits = block[2:], self.max_shape[2:]
        starts = [limit // 2 - size // 2 if self.is_centred else 0 for size, limit in zip(sizes, limits, strict=True)]
        return tuple(range(start, start + size) for start, size in zip(starts, sizes, strict=True))

    def forward(self, x: Tensor, tiles: Tiles, parts: ConvParts | None = None) -> Tensor:
        """Blocks (N, A, B, K, C, h, w), contiguous, for node features (N, hid).

        Args:
            x: Features of the nodes.
            tiles: Which blocks of their kernels, A x B of one size.
            parts: What `cut` gave for this size; cut here if it is missing.
        """
        block = tiles.block
        height, width = block[2:]
        parts = parts or self.cut([block])[block]
        first = cast(nn.Conv2d, self.conv[0])
        maps = F.relu(F.linear(x, *parts.places)).view(len(x), -1, height * width)

        # 1x1 convolutions as matrix products: rows are the places of all nodes.
        hidden = F.relu(F.linear(maps.transpose(1, 2), first.weight.flatten(1), first.bias))
        if tiles.is_first:
            blocks = parts.blocks(hidden)[:, None, None]
        else:  # hidden * (1 + row + column) for each block: the last layer is linear, so A + B - 1 products do
            rows, columns = self._codes(tiles)
            blocks = parts.blocks(hidden[:, None] * (1 + rows + columns[0])[:, None])[:, :, None]
            if len(columns) > 1:
                changes = parts.blocks(hidden[:, None] * (columns[1:] - columns[0])[:, None], bias=False)
                blocks = torch.cat([blocks, blocks + changes[:, None]], dim=2)
        if self.has_signs and tiles.rows.stop > 1 and tiles.columns.stop > 1:
            signs = signs_at(tiles.rows, tiles.columns).to(blocks)
            blocks = blocks * signs.view(*signs.shape, *(1 for _ in block))
        return blocks

    def _codes(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        """Codes (A, hidden) and (B, hidden) of rows and columns of blocks: 0 for the first of a kernel."""
        codes = (F.pad(table.weight, (0, 0, 1, 0)) for table in (self.out_codes, self.in_codes))
        rows, columns = (table[list(places)] for table, places in zip(codes, (tiles.rows, tiles.columns), strict=True))
        return rows, columns

    def class_weights(self, x: Tensor, in_channels: int) -> Tensor:
        """Class weights (N, num_classes, C) for node features (N, hid): classes replace the out channels."""
        tiles = tilings((self.max_shape[0], in_channels, 1, 1), self.max_shape)
        kernels = join([self(x, part) for part in tiles], tiles).flatten(2)
        predictor = cast(nn.Conv2d, self.class_layer_predictor[1])
        return predictor.weight.flatten(1) @ F.relu(kernels) + _bias(predictor)[:, None]


def _slices(window: Window) -> tuple[slice, ...]:
    return tuple(slice(part.start, part.stop) for part in window)


class _Windows(torch.autograd.Function):
    """Several parts of one grid. The gradient is summed in place, not in a tensor of the grid's size for each."""

    @staticmethod
    def forward(ctx: Any, grid: Tensor, windows: tuple[Window, ...]) -> tuple[Tensor, ...]:
        ctx.windows, ctx.shape = windows, grid.shape
        return tuple(grid[_slices(window)].contiguous().clone() for window in windows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        given = [(window, grad) for window, grad in zip(ctx.windows, grads, strict=True) if grad is not None]
        if not given:
            return None, None
        total = given[0][1].new_zeros(ctx.shape)
        for window, grad in given:
            total[_slices(window)] += grad
        return total, None


def _cut_all(rows: Tensor, shape: tuple[int, ...], windows: Sequence[Window]) -> list[Tensor]:
    """The rows of a layer whose outputs, seen as `shape`, lie in each of some windows, as (*window, ...)."""
    grid = rows.view(*shape, *rows.shape[1:])
    if not torch.is_grad_enabled():
        return [grid[_slices(window)] for window in windows]
    distinct = tuple(dict.fromkeys(windows))
    found = dict(zip(distinct, _Windows.apply(grid, distinct), strict=True))  # type: ignore[no-untyped-call]
    return [found[window] for window in windows]


def _bias(layer: nn.Conv2d) -> Tensor:
    return cast(Tensor, layer.bias)


_POLYNOMIAL = (3.4445, -4.7750, 2.0315)
"""Coefficients of an odd quintic that moves singular values from (0, 1] towards 0.7 to 1.2 (the Muon optimizer's)."""

_STEPS = 5
"""How often it is applied: singular values above 1 / 100 of a block's norm become nearly equal."""


def even_factor(gram: Tensor) -> Tensor:
    """Polynomials F of Gram matrices G = X X^T (N, m, m) that bring the singular values of F X near 1.

    Those above 1 / 100 of X's norm end between 0.7 and 1.2, smaller ones below.
    """
    a, b, c = _POLYNOMIAL
    trace = gram.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-24)[:, None, None]
    gram = gram / trace
    constant = a * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    total = gram
    for step in range(_STEPS):
        factor = torch.baddbmm(torch.add(constant, gram, alpha=b), gram, gram, alpha=c)
        total = factor @ total if step else factor
        if step < _STEPS - 1:
            gram = factor @ gram @ factor
    return total * trace.rsqrt()


def make_orthogonal(blocks: Sequence[Tensor]) -> list[Tensor]:
    """Bring emitted blocks to a common scale, and their singular values near each other.

    Args:
        blocks: Any number of batches (N, K, ...) of blocks, each block a matrix of K rows.

    Returns:
        Blocks of the same shapes, whose root mean squares are 1. Differentiable.
    """
    matrices = [block.flatten(2) for block in blocks]
    wide = [matrix if matrix.shape[1] <= matrix.shape[2] else matrix.transpose(1, 2) for matrix in matrices]
    factors = _evening_factors([matrix @ matrix.transpose(1, 2) for matrix in wide])
    even = [math.sqrt(matrix[0].numel()) * factor @ matrix for factor, matrix in zip(factors, wide, strict=True)]
    turned = [x if x.shape == matrix.shape else x.transpose(1, 2) for x, matrix in zip(even, matrices, strict=True)]
    return [matrix.reshape(block.shape) for matrix, block in zip(turned, blocks, strict=True)]


_BUCKETS = (4, 16, 32)
"""Sizes that small Gram matrices are filled up to, so that those of many groups make one batch."""

_TOGETHER_BYTES = 2**20
"""Size of the Gram matrices that a CPU treats at once: what is computed from them then stays in its cache."""


def _evening_factors(grams: Sequence[Tensor]) -> list[Tensor]:
    """For batches of Gram matrices G = X X^T: F for which F X has norm 1 and nearly equal singular values."""
    buckets: dict[int, list[int]] = {}
    for index, gram in enumerate(grams):
        side = gram.shape[1]
        buckets.setdefault(next((size for size in _BUCKETS if side <= size), side), []).append(index)
    factors = list(grams)
    for size, members in buckets.items():
        padding = [size - grams[index].shape[1] for index in members]
        padded = torch.cat([F.pad(grams[index], (0, pad, 0, pad)) for index, pad in zip(members, padding, strict=True)])
        count = max(1, _TOGETHER_BYTES // (4 * size**2)) if padded.device.type == "cpu" else len(padded)
        factor = torch.cat([_evening_factor(some) for some in torch.split(padded, count)])
        for index, part in zip(members, torch.split(factor, [len(grams[index]) for index in members]), strict=True):
            side = grams[index].shape[1]
            factors[index] = part[:, :side, :side]
    return factors


def _evening_factor(gram: Tensor) -> Tensor:
    """`even_factor`, scaled so that F X has norm 1."""
    factor = even_factor(gram)
    return factor * (factor * (factor @ gram)).sum((1, 2), keepdim=True).clamp_min(1e-24).rsqrt()


def kernel_scale(shape: tuple[int, ...], is_table: bool) -> float:
    """Factor that scales a predicted kernel by its fan-in (arXiv 2110.13100, section 4.2; ppuda's `GHN._normalize`).

    Args:
        shape: Shape of the whole kernel, (K, C) or (K, C, kh, kw): its rank matters.
        is_table: Whether it is a table of positional encodings, which keeps its scale from a side of 11.

    Returns:
        sqrt(beta / fan-in), beta being 1 for depthwise and wide kernels, which ReLUs seldom follow.
    """
    if is_table and len(shape) > 2 and shape[0] == 1 and shape[2] >= 11:
        return 1.0
    without_relu = len(shape) == 4 and (shape[1] == 1 or shape[2] < shape[3])
    fan_in = math.prod(shape[1:])
    beta = 1.0 if without_relu else 2.0
    return math.sqrt(beta / fan_in)
