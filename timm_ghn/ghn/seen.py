"""What a GHN has seen: the surroundings of the layers of the networks that it was trained on.

A GHN knows a layer by its operator, its shape and the layers around it. What it predicts in surroundings that no
training network had is a guess, and a bad one may cost more than all good predictions bring. So a trained GHN keeps a
table of all surroundings that it was trained in, and layers in other surroundings start as `init="orth"` starts them.

Surroundings are compared by kind: two layers are in the same if they have the same operator and kernel size, and the
same kinds of operators within `HOPS` edges before and behind them. Pooling does not count, nor do numbers of channels:
a GHN reads these on a scale, and repeats its kernels for wide layers. Equality of kinds needs no threshold, and so,
unlike a distance between embeddings, says the same on every machine. Kernels that read the images are predicted in any
surroundings: all that is predicted behind them expects their features.

Measured on four networks of each of 57 families: of a family that the table is made without, 23 % of the tensors are
in other surroundings (48 % for MambaOut, 56 % for GhostNet, 1 % or less for ResNet, RegNet and ViT); of a new network
of a family that the table has, 1.8 % of the layers. docs/ghns.md compares this with distances between embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from timm_ghn.ghn.features import shape_4d
from timm_ghn.graph.graph import Graph
from timm_ghn.graph.nodes import CONVOLUTIONS, Node, Op

HOPS = 2
"""Edges to the farthest operators that count: a bias stands between a kernel and the norm layer behind it."""
MOST = 2 / 3
"""The share of a network's tensors in other surroundings above which nothing is predicted: a few predictions among
orthogonal layers were worse than none (docs/ghns.md)."""
NEUTRAL = (Op.INPUT, Op.MAX_POOL, Op.AVG_POOL, Op.GLOB_AVG)
"""Operators that do not count: they leave scales as they are."""
_OPS = tuple(Op)
_SIDE = 1 << len(_OPS)
"""Codes of the operators on one side: a bit for each."""


@dataclass(frozen=True, eq=False)
class Seen:
    """The surroundings that a GHN was trained in.

    Attributes:
        codes: Distinct codes of `surroundings`, ascending, int64.
        networks: Number of networks that they are from.
    """

    codes: npt.NDArray[np.int64]
    networks: int

    @classmethod
    def of(cls, graphs: Iterable[Graph]) -> Seen:
        """What a GHN sees in some networks."""
        found = [surroundings(graph) for graph in graphs]
        return cls(np.unique(np.concatenate(found or [np.empty(0, np.int64)])), len(found))

    def __or__(self, other: Seen) -> Seen:
        """What a GHN has seen that was trained on the networks of both."""
        return Seen(np.union1d(self.codes, other.codes), self.networks + other.networks)

    def unseen(self, graph: Graph) -> dict[str, str]:
        """Parameters of a network that are not to be predicted, by name, and why in a line.

        These are the ones whose surroundings are not in the table, but for kernels that read the images. If they are
        more than `MOST` of the network, all are.
        """
        codes = surroundings(graph)
        reads_images = np.array([node.op in CONVOLUTIONS for node in graph.nodes]) & (codes // _SIDE % _SIDE == 0)
        found = {
            target.name: f"{_describe(graph.nodes[index], int(codes[index]))}: 0 of {self.networks:,} training networks"
            for index in np.flatnonzero(~np.isin(codes, self.codes) & ~reads_images)
            for target in graph.nodes[index].targets
        }
        if len(found) <= MOST * len(graph.targets):
            return found
        rest = f"{len(found)} of {len(graph.targets)} tensors of the network are in unknown surroundings"
        return {target.name: found.get(target.name, rest) for target in graph.targets}


def surroundings(graph: Graph) -> npt.NDArray[np.int64]:
    """A code for each node: its operator, kernel size, whether it is depthwise, and the operators before and behind."""
    distances = graph.distance_matrix
    near = ((distances > 0) & (distances <= HOPS)).astype(np.float32)
    kinds = np.zeros((len(graph), len(_OPS)), np.float32)
    kinds[np.arange(len(graph)), [node.op.row for node in graph.nodes]] = 1
    kinds[:, [op.row for op in NEUTRAL]] = 0
    bits = 1 << np.arange(len(_OPS), dtype=np.int64)
    before, behind = ((side @ kinds > 0) @ bits for side in (near.T, near))
    own = np.array([_kind(node) for node in graph.nodes], dtype=np.int64)
    found: npt.NDArray[np.int64] = (own * _SIDE + before) * _SIDE + behind
    return found


def _kind(node: Node) -> int:
    """Operator, kernel size, and whether a kernel reads one channel, as a number. Tables have no size of their own."""
    height, width, depthwise = 1, 1, False
    if node.op in CONVOLUTIONS and node.shape is not None:
        _, channels, height, width = shape_4d(node.shape)
        depthwise = channels == 1
    return ((node.op.row * 256 + min(height, 255)) * 256 + min(width, 255)) * 2 + depthwise


def _describe(node: Node, code: int) -> str:
    """The surroundings in words."""
    sides = code // _SIDE % _SIDE, code % _SIDE
    before, behind = ((", ".join(op.value for op in _OPS if side >> op.row & 1) or "nothing") for side in sides)
    height, width = code // _SIDE**2 // 512 % 256, code // _SIDE**2 // 2 % 256
    size = f" {height}x{width}" if height * width > 1 else ""
    return f"{node.op.value}{size} between {before} and {behind}"
