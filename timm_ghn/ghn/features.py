"""What a GHN reads of a node: its operator and the shape of its parameter (arXiv 2110.13100, appendix B.1).

State-dict names and the table of known sizes follow ppuda (github.com/facebookresearch/ppuda at 4673a42,
ppuda/ghn/layers.py), so that its checkpoints load unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from timm_ghn.errors import GraphError
from timm_ghn.graph.nodes import Node, Shape

_SMALL, _MEDIUM, _LARGE = 64, 4096, 8192
"""Channels are known in steps of 8 below 64, of 16 below 4096 and of 32 up to 8192."""


class SizeTable:
    """The sizes of one kind of dimension that a GHN knows; any other is read as the nearest of them.

    Args:
        known: Known sizes.
        aliases: Sizes whose index is that of another one, whatever is nearest.
    """

    def __init__(self, known: Iterable[int], aliases: dict[int, int]) -> None:
        self.known: npt.NDArray[np.int64] = np.unique(np.fromiter(known, dtype=np.int64))
        self._aliases = aliases

    def __len__(self) -> int:
        return len(self.known)

    def index(self, size: int) -> int:
        """Row of the embedding for a size: the nearest known one, the smaller of two, the largest beyond the table."""
        size = self._aliases.get(size, size)
        if size < 1 or size >= self.known[-1]:
            return len(self.known) - 1
        return int(np.argmin(np.abs(self.known - size)))


def channel_sizes(num_classes: int) -> SizeTable:
    """Known numbers of channels; 4 to 7 are read as 8."""
    known = [1, 3, num_classes, *range(8, _SMALL, 8), *range(_SMALL, _MEDIUM, 16), *range(_MEDIUM, _LARGE + 1, 32)]
    return SizeTable(known, dict.fromkeys(range(4, 8), 8))


def kernel_sizes(largest: int) -> SizeTable:
    """Known kernel sides; 2 is read as 3."""
    return SizeTable([*range(1, max(12, largest), 2), 14, 16], {2: 3})


def shape_4d(shape: Shape) -> Shape:
    """A parameter's shape as (K, C, kh, kw).

    A vector is (K, 1, 1, 1) and a matrix (K, C, 1, 1). A table of tokens (1, n, C) is (1, C, s, s) with
    s = floor(sqrt(n)); any other (K, C, k) is (K, C, k, 1).

    Raises:
        GraphError: If there are no dimensions or more than four.
    """
    if len(shape) == 3 and shape[0] == 1 and min(shape[1:]) > 1:
        side = math.isqrt(shape[1])
        return (1, shape[2], side, side)
    if not 1 <= len(shape) <= 4:
        raise GraphError(f"a GHN reads shapes of one to four dimensions, not {shape}")
    return (*shape, *(1,) * (4 - len(shape)))


class ShapeEncoder(nn.Module):
    """Embedding of the shape of a node's parameter, a quarter of the features for each of its four dimensions.

    Args:
        hid: Size of a node's features.
        num_classes: Classes of the data set that the GHN was trained on, one of the known channel sizes.
        largest_kernel: Side of the largest kernel that the GHN emits.
    """

    def __init__(self, hid: int, num_classes: int, largest_kernel: int) -> None:
        super().__init__()
        self.channels = channel_sizes(num_classes)
        self.kernels = kernel_sizes(largest_kernel)
        # The last row of each table stands for a node without a shape.
        self.embed_spatial = nn.Embedding(len(self.kernels) + 1, hid // 4)
        self.embed_channel = nn.Embedding(len(self.channels) + 1, hid // 4)

    def indices(self, shape: Shape | None) -> tuple[int, ...]:
        """Rows of the two tables: out and in channels, height and width."""
        tables = (self.channels, self.channels, self.kernels, self.kernels)
        if shape is None:
            return tuple(len(table) for table in tables)
        return tuple(table.index(size) for table, size in zip(tables, shape_4d(shape), strict=True))

    def forward(self, nodes: Iterable[Node]) -> Tensor:
        """Shape embeddings (N, hid) of the nodes.

        Raises:
            GraphError: If a shape has no dimensions or more than four.
        """
        shapes = [node.shape for node in nodes]
        rows = {shape: self.indices(shape) for shape in set(shapes)}
        index = torch.tensor([rows[shape] for shape in shapes], device=self.embed_channel.weight.device)
        channels = self.embed_channel(index[:, :2]).flatten(1)
        return torch.cat([channels, self.embed_spatial(index[:, 2:]).flatten(1)], dim=1)
