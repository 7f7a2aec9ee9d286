"""The gated graph network that propagates node features along a graph, one topological level at a time.

Equations 3 and 4 of arXiv 2110.13100 (GHN-1's are those of arXiv 1810.05749). ppuda updates one node after the
other; the nodes of a level do not see each other, so here a level is one batch with the same result.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_ghn.graph.graph import Graph

IntArray = npt.NDArray[np.int64]
Messages = Callable[[Tensor], Tensor]
"""From features (n, hid) of nodes to the messages that they send."""


class MLP(nn.Module):
    """Linear layers with a ReLU between them, and one behind the last unless it is an output layer.

    Args:
        in_features: Size of the input.
        sizes: Outputs of the layers.
        last_activation: Whether a ReLU follows the last layer.
    """

    def __init__(self, in_features: int, sizes: Sequence[int], last_activation: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise([in_features, *sizes]):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.fc = nn.Sequential(*(layers if last_activation else layers[:-1]))

    def linear(self, index: int) -> nn.Linear:
        """A linear layer, counted from 0."""
        return cast(nn.Linear, self.fc[2 * index])

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers to the last dimension."""
        out: Tensor = self.fc(x)
        return out


@dataclass(frozen=True, slots=True)
class Push:
    """What the nodes of one level send to the nodes that come after them in the direction of a pass.

    Positions count the nodes of all graphs, sorted by level.

    Attributes:
        start: First position of the level.
        stop: Position behind the level.
        first: First position that receives a message from the level.
        last: Position behind the last receiver.
        weights: (last - first, (stop - start) * kinds) matrix: 1 for an edge, and if there are two kinds of messages
            1 / distance for a virtual edge, the kinds of one sender side by side.
    """

    start: int
    stop: int
    first: int
    last: int
    weights: Tensor


def make_schedule(graphs: Sequence[Graph], virtual_edges: bool, like: Tensor) -> tuple[Tensor, list[Push], list[Push]]:
    """Merge the levels of the graphs and write the messages between them as banded matrices.

    Args:
        graphs: At least one graph.
        virtual_edges: Whether messages travel along virtual edges as well.
        like: Tensor whose type and device the matrices get.

    Returns:
        Position of every node, int64 (N,): nodes of all graphs by level, level i of all graphs together. Then the
        levels from the inputs to the outputs, and back. Their matrices hold the distances between a level and the nodes
        in reach, so their size is bounded by N^2 and is far less for deep networks, where only `max_distance` levels
        are in reach.
    """
    level = np.concatenate([graph.levels for graph in graphs])
    by_level = np.argsort(level, kind="stable")
    position = np.empty_like(by_level)
    position[by_level] = np.arange(len(by_level))
    starts = np.concatenate([[0], np.cumsum(np.bincount(level))])

    offsets = np.cumsum([0, *(len(graph) for graph in graphs)])
    pairs = [_reachable(graph, virtual_edges) for graph in graphs]
    ends = np.concatenate([pair[:, :2] + offset for pair, offset in zip(pairs, offsets[:-1], strict=True)])
    sources, targets = position[ends].T
    distances = np.concatenate([pair[:, 2] for pair in pairs])
    forward = _pushes(sources, targets, distances, starts, virtual_edges, like)
    backward = _pushes(targets, sources, distances, starts, virtual_edges, like)
    return torch.from_numpy(position).to(like.device), forward, backward[::-1]


def _reachable(graph: Graph, virtual_edges: bool) -> IntArray:
    """Source, target and distance (M, 3) of all pairs of nodes between which a message travels."""
    if virtual_edges:
        return graph.distances
    edges = np.asarray(graph.edges, dtype=np.int64).reshape(-1, 2)
    return np.pad(edges, ((0, 0), (0, 1)), constant_values=1)


def _pushes(
    senders: IntArray, receivers: IntArray, distances: IntArray, starts: IntArray, virtual_edges: bool, like: Tensor
) -> list[Push]:
    """One `Push` a level, from its first; the matrices of all levels share one flat buffer."""
    kinds = 2 if virtual_edges else 1
    level = np.searchsorted(starts, senders, side="right") - 1
    widths = np.diff(starts) * kinds
    first = np.full(len(widths), starts[-1], dtype=np.int64)
    last = np.zeros(len(widths), dtype=np.int64)
    np.minimum.at(first, level, receivers)
    np.maximum.at(last, level, receivers + 1)
    first = np.minimum(first, last)  # levels that send nothing
    begin = np.concatenate([[0], np.cumsum((last - first) * widths)])

    flat = np.zeros(begin[-1], dtype=np.float32)
    cell = begin[level] + (receivers - first[level]) * widths[level] + (senders - starts[level]) * kinds
    flat[cell[distances == 1]] = 1.0
    if virtual_edges:
        flat[cell + 1] = np.float32(1.0) / distances.astype(np.float32)
    buffer = torch.from_numpy(flat).to(like)
    bounds = zip(starts[:-1].tolist(), starts[1:].tolist(), first.tolist(), last.tolist(), strict=True)
    return [Push(*bound, buffer[begin[i] : begin[i + 1]].view(-1, int(widths[i]))) for i, bound in enumerate(bounds)]


class GatedGNN(nn.Module):
    """One pass over a graph from its inputs to its outputs, and one back.

    Args:
        features: Size of a node's features.
        virtual_edges: Whether nodes also receive 1 / distance times a message from all nodes in reach.
    """

    def __init__(self, features: int, virtual_edges: bool) -> None:
        super().__init__()
        self.virtual_edges = virtual_edges
        self.mlp = MLP(features, (features // 2 if virtual_edges else features, features))
        if virtual_edges:
            self.mlp_ve = MLP(features, (features // 2, features))
        self.gru = nn.GRUCell(features, features)

    def forward(self, x: Tensor, graphs: Sequence[Graph]) -> Tensor:
        """Propagate node features.

        Args:
            x: Features (N, hid) of the nodes of all graphs, one graph after the other.
            graphs: The graphs.

        Returns:
            Features (N, hid) after both passes.
        """
        if torch.is_grad_enabled():
            return self._propagate(x, graphs)
        with torch.inference_mode():  # thousands of small operations, of which autograd's bookkeeping is a fifth
            hidden = self._propagate(x, graphs)
        return hidden.clone()  # an ordinary tensor

    def _propagate(self, x: Tensor, graphs: Sequence[Graph]) -> Tensor:
        order, forward, backward = make_schedule(graphs, self.virtual_edges, x)
        messages = _fuse([self.mlp, self.mlp_ve] if self.virtual_edges else [self.mlp])
        hidden = torch.empty_like(x).index_copy(0, order, x)
        hidden = self._traverse(hidden, forward, messages)
        hidden = self._traverse(hidden, backward, messages, reverse=True)
        return hidden[order]

    def _traverse(self, hidden: Tensor, pushes: Sequence[Push], messages: Messages, reverse: bool = False) -> Tensor:
        """Update level after level; each level then adds its messages to the inboxes of the nodes that it reaches."""
        gru = self.gru
        inbox = torch.zeros_like(hidden)
        with_grad = torch.is_grad_enabled()
        updated: list[Tensor] = []
        for push in pushes:
            rows = slice(push.start, push.stop)
            # Autograd keeps what the GRU reads while later levels still write to the inbox.
            received = inbox[rows].clone() if with_grad else inbox[rows]
            state = torch.gru_cell(received, hidden[rows], gru.weight_ih, gru.weight_hh, gru.bias_ih, gru.bias_hh)
            updated.append(state)
            if push.first < push.last:
                inbox[push.first : push.last].addmm_(push.weights, messages(state))
        return torch.cat(updated[::-1] if reverse else updated)


def _fuse(mlps: Sequence[MLP]) -> Messages:
    """MLPs of two layers side by side, as two matrix products: messages (n * kinds, hid), one node after the other."""
    firsts, seconds = [mlp.linear(0) for mlp in mlps], [mlp.linear(1) for mlp in mlps]
    blocks: Tensor = torch.block_diag(*[layer.weight for layer in seconds])  # type: ignore[no-untyped-call]
    first = torch.cat([layer.weight for layer in firsts]).t(), torch.cat([layer.bias for layer in firsts])
    second = blocks.t(), torch.cat([layer.bias for layer in seconds])

    def messages(state: Tensor) -> Tensor:
        middle = F.relu(torch.addmm(first[1], state, first[0]))
        return F.relu(torch.addmm(second[1], middle, second[0])).view(-1, state.shape[1])

    return messages
