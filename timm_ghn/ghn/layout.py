"""How small predicted blocks become parameters: tiling for any rank, and the layouts in which layers store kernels.

Two directions share the rules. `tile` and `arrange` build new tensors and are differentiable; `kernel_view` and
`tile_` write a block straight into an existing parameter, without a full-size temporary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from timm_ghn.graph.nodes import Layout, Shape

Block = Shape
"""Size (K, C, h, w) of a part of the largest block that a decoder emits."""


def tile(block: Tensor, shape: Shape) -> Tensor:
    """Repeat a block along every dimension until it covers `shape`, and crop what is too much.

    Args:
        block: Tensor of the rank of `shape`, of any size.
        shape: Shape of the result.

    Returns:
        A tensor of that shape: element i along a dimension is element i mod b of a block of size b. Differentiable.
    """
    counts = [math.ceil(size / length) for size, length in zip(shape, block.shape, strict=True)]
    if any(count > 1 for count in counts):
        repeated = [size for pair in zip(counts, block.shape, strict=True) for size in pair]
        split = [size for length in block.shape for size in (1, length)]
        covered = [count * length for count, length in zip(counts, block.shape, strict=True)]
        block = block.reshape(split).expand(repeated).reshape(covered)
    return block if tuple(block.shape) == tuple(shape) else block[tuple(slice(size) for size in shape)]


def tile_(destination: Tensor, block: Tensor) -> None:
    """Write `tile(block, destination.shape)` into `destination`, in one copy if the block fits a whole number of times.

    Args:
        destination: Tensor, or strided view of one, of any type and device.
        block: Tensor of the same rank.
    """
    counts = [divmod(size, length) for size, length in zip(destination.shape, block.shape, strict=True)]
    if any(rest for _, rest in counts):
        destination.copy_(tile(block, tuple(destination.shape)))
        return
    split = [n for (count, _), length in zip(counts, block.shape, strict=True) for n in (count, length)]
    destination.view(split).copy_(block.reshape([n for length in block.shape for n in (1, length)]))


# Kernels that are put together from blocks that differ


@dataclass(frozen=True, slots=True)
class Tiles:
    """Blocks of one size in a kernel that is put together from several.

    Attributes:
        rows: Their places along the out channels.
        columns: Their places along the in channels.
        block: Their size.
    """

    rows: range
    columns: range
    block: Block

    @property
    def is_first(self) -> bool:
        """Whether it is the first block of a kernel alone."""
        return self.rows == self.columns == range(1)


def tilings(kernel: Block, largest: Block) -> list[Tiles]:
    """The blocks that make up a kernel, by size: row by row, each row from left to right.

    Args:
        kernel: Size of the kernel, in space not larger than a block.
        largest: Size of the largest block.
    """
    rows, columns = (_places(size, limit) for size, limit in zip(kernel[:2], largest[:2], strict=True))
    return [Tiles(a, b, (height, width, *kernel[2:])) for a, height in rows for b, width in columns]


def _places(size: int, limit: int) -> list[tuple[range, int]]:
    """Places of the blocks along a dimension and their length: the whole ones, then the rest."""
    count, rest = divmod(size, limit)
    whole = [(range(count), limit)] if count else []
    return [*whole, (range(count, count + 1), rest)] if rest else whole


def join(parts: Sequence[Tensor], tiles: Sequence[Tiles]) -> Tensor:
    """Kernels (N, K, C, h, w) from the blocks of `tilings`, each (N, A, B, k, c, h, w)."""
    regions = [part.permute(0, 1, 3, 2, 4, 5, 6).flatten(3, 4).flatten(1, 2) for part in parts]
    if len(regions) == 1:
        return regions[0]
    rows = dict.fromkeys(tile.rows for tile in tiles)
    pairs = list(zip(tiles, regions, strict=True))
    return torch.cat([torch.cat([region for tile, region in pairs if tile.rows == row], 2) for row in rows], 1)


def signs_at(rows: range, columns: range) -> Tensor:
    """Entries (A, B) of Sylvester's Hadamard matrix, 1 in its first row and column.

    Its first a rows and a columns have full rank for every a, so that equal blocks of full rank, times their signs,
    make a square kernel of full rank.
    """
    bits = torch.tensor(rows)[:, None] & torch.tensor(columns)
    for shift in (8, 4, 2, 1):  # their parity
        bits = bits ^ bits >> shift
    return 1.0 - 2.0 * (bits & 1)


def signs(shape: Shape, sides: Shape) -> Tensor:
    """Signs (K, C, 1, ...) of a kernel's elements: `signs_at` the places of its blocks.

    Args:
        shape: Shape of the kernel, (K, C, ...).
        sides: Out and in channels of a block.
    """
    found = signs_at(*(range(math.ceil(size / side)) for size, side in zip(shape[:2], sides, strict=True)))
    for dimension, (size, side) in enumerate(zip(shape[:2], sides, strict=True)):
        found = found.repeat_interleave(side, dimension).narrow(dimension, 0, size)
    return found.reshape(*shape[:2], *(1 for _ in shape[2:]))


# Layouts


def is_consistent(kernel: Shape, shape: Shape, layout: Layout) -> bool:
    """Whether a parameter of `shape` can store a kernel of that shape in that layout."""
    if layout is Layout.DEPTH:
        return len(shape) == 5 and len(kernel) == 4 and (*shape[:2], *shape[3:]) == kernel
    if layout is Layout.MIXTURE:
        return len(shape) >= 2 and math.prod(shape[1:]) == math.prod(kernel)
    if layout is Layout.TOKENS:
        tokens = len(shape) >= 2 and len(kernel) == 4 and shape[-1] == kernel[1] and kernel[0] == 1
        return tokens and shape[-2] >= kernel[2] * kernel[3] and math.prod(shape[:-2]) == 1
    if layout is Layout.CHANNELS_LAST:
        return len(kernel) == 4 and shape in ((1, *kernel[2:], kernel[1]), (*kernel[2:], kernel[1])) and kernel[0] == 1
    if layout is Layout.TRANSPOSED:
        return len(shape) >= 2 and len(kernel) >= 2 and _groups(kernel, shape) is not None
    return math.prod(shape) == math.prod(kernel)


def _groups(kernel: Shape, shape: Shape) -> int | None:
    """Groups of a transposed convolution whose weight is (C, K / groups, ...) for a (K, C / groups, ...) kernel.

    One group also stands for kernels that list the input channels of all groups, (K / groups, C, ...), and for
    transposed matrices (all dimensions but the first make one): a plain swap. None if the shapes do not fit.
    """
    if math.prod(kernel) != math.prod(shape):
        return None
    if math.prod(kernel[2:]) == 1:
        shape = (shape[0], math.prod(shape[1:]))
    if (kernel[1], kernel[0]) == shape[:2]:
        return 1
    groups = kernel[0] // shape[1]
    return groups if groups * shape[1] == kernel[0] and groups * kernel[1] == shape[0] else None


def arrange(kernel: Tensor, shape: Shape, layout: Layout) -> Tensor:
    """Lay a full-size kernel out as a parameter of `shape` stores it.

    Args:
        kernel: The predicted kernel: (K,), (K, C) or (K, C, kh, kw), or (1, C, h, w) for positional encodings.
        shape: Shape of the parameter.
        layout: How the parameter stores it.

    Returns:
        A tensor of `shape`, possibly a view of `kernel`; prefix rows of `Layout.TOKENS` are zero. Differentiable.
    """
    if layout is Layout.PLAIN:
        return kernel.reshape(shape)
    if layout is Layout.TRANSPOSED:
        groups = _groups(tuple(kernel.shape), shape) or 1
        return kernel.reshape(groups, -1, *kernel.shape[1:]).transpose(1, 2).reshape(shape)
    made = kernel.new_zeros(shape)
    cast(Tensor, kernel_view(made, tuple(kernel.shape), layout)).copy_(kernel)
    return made


def kernel_view(destination: Tensor, kernel: Shape, layout: Layout) -> Tensor | None:
    """The elements of a parameter in the order of its kernel: the inverse of `arrange`, without a copy.

    Args:
        destination: The parameter.
        kernel: Shape of the predicted kernel.
        layout: How the parameter stores it.

    Returns:
        A view of shape `kernel`, with one dimension for the copies in front for `Layout.DEPTH` and
        `Layout.MIXTURE`; None if the strides of the parameter allow no such view.
    """
    try:
        if layout is Layout.DEPTH:
            return destination.movedim(2, 0)
        if layout is Layout.MIXTURE:
            return destination.view(destination.shape[0], *kernel)
        if layout is Layout.TOKENS:
            rows = token_rows(destination, kernel)
            return rows.view(*kernel[2:], kernel[1]).permute(2, 0, 1).unsqueeze(0)
        if layout is Layout.CHANNELS_LAST:
            return destination.view(1, *kernel[2:], kernel[1]).permute(0, 3, 1, 2)
        if layout is Layout.TRANSPOSED:
            if _groups(kernel, tuple(destination.shape)) != 1:
                return None
            matrix = destination.view(kernel[1], kernel[0]) if math.prod(kernel[2:]) == 1 else destination
            destination = matrix.transpose(0, 1)
        return destination if destination.shape == kernel else destination.view(kernel)
    except RuntimeError:  # torch: "view size is not compatible with input tensor's size and stride"
        return None


def token_rows(table: Tensor, kernel: Shape) -> Tensor:
    """View of the rows of a table (1, prefix + h * w, C) or (prefix + h * w, C) that a (1, C, h, w) kernel fills."""
    count = kernel[2] * kernel[3]
    return table.narrow(-2, table.shape[-2] - count, count)
