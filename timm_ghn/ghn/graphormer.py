"""The transformer of GHN-3, which reads a whole graph at once (arXiv 2303.04143, section 3; Graphormer, 2106.05234).

Every node attends to every other. A learned bias on the attention tells how far apart two nodes are, and in which
direction the data flows between them. State-dict names and shapes follow ghn3 (github.com/SamsungSAILMontreal/ghn3 at
b3289ac), so that its checkpoints load.

Shapes: N nodes, H heads, D features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_ghn.graph.graph import Graph

MAX_DEGREE = 100
"""Largest number of incoming or outgoing edges that has an embedding of its own."""
MAX_INPUT_DISTANCE = 1000
"""Largest distance from the input that has an embedding of its own."""
NUM_PAIR_CODES = 257
"""Rows of the table of distances between two nodes. Distance d is in row d + 2; no path counts as distance 0."""
BIAS_BYTES = 64 * 2**20
"""Upper bound of the attention biases that are in memory at once."""


class Graphormer(nn.ModuleList):
    """Layers of self-attention over the nodes of a graph.

    Args:
        features: Size D of a node's features.
        layers: Number of layers.
        heads: Number H of attention heads; divides D.
    """

    def __init__(self, features: int, layers: int, heads: int) -> None:
        super().__init__(_Layer(features, heads) for _ in range(layers))
        first = cast(_Layer, self[0])
        first.attn.read_pairs(features)
        for name, count in (
            ("centrality_embed_in", MAX_DEGREE),
            ("centrality_embed_out", MAX_DEGREE),
            ("input_dist_embed", MAX_INPUT_DISTANCE),
        ):
            table = nn.Embedding(count + 1, features)
            nn.init.trunc_normal_(table.weight, std=features**-0.5)
            first.add_module(name, table)

    def forward(self, x: Tensor, graphs: Sequence[Graph]) -> Tensor:
        """Mix the features of the nodes within each graph.

        Args:
            x: Features (sum of N, D) of the nodes of all graphs, one graph after the other.
            graphs: The graphs.

        Returns:
            Features of the same shape.
        """
        first = cast(_Layer, self[0])
        x = x + torch.cat([first.place_codes(graph) for graph in graphs])
        biases = [_PairBias(graph, first.attn.bias_table(graph.max_distance)) for graph in graphs]
        for layer in self:
            x = layer(x, biases)
        return x


class _Layer(nn.Module):
    """Attention and an MLP, each behind a layer norm and beside a residual connection."""

    centrality_embed_in: nn.Embedding
    centrality_embed_out: nn.Embedding
    input_dist_embed: nn.Embedding

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(features)
        self.attn = _Attention(features, heads)
        self.ln2 = nn.LayerNorm(features)
        # The identity keeps the place of ghn3's dropout in the state dict.
        net = nn.Sequential(
            nn.Linear(features, 4 * features), nn.GELU(), nn.Identity(), nn.Linear(4 * features, features)
        )
        self.ff = nn.ModuleDict({"net": net})

    def place_codes(self, graph: Graph) -> Tensor:
        """Codes (N, D) of where nodes stand: in- and out-degree, and distance from the input (first layer only)."""
        count, device = len(graph), self.ln1.weight.device
        edges = np.asarray(graph.edges, dtype=np.int64).reshape(-1, 2)
        codes = (
            (self.centrality_embed_in, np.bincount(edges[:, 1], minlength=count)),
            (self.centrality_embed_out, np.bincount(edges[:, 0], minlength=count)),
            (self.input_dist_embed, graph.distance_matrix[0].astype(np.int64)),
        )
        found = [
            table(torch.from_numpy(values).clamp(max=table.num_embeddings - 1).to(device)) for table, values in codes
        ]
        return cast(Tensor, found[0] + found[1] + found[2])

    def forward(self, x: Tensor, biases: Sequence[_PairBias]) -> Tensor:
        x = x + self.attn(self.ln1(x), biases)
        return cast(Tensor, x + cast(nn.Sequential, self.ff["net"])(self.ln2(x)))


class _Attention(nn.Module):
    """Multi-head attention among the nodes of each graph."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(features, 3 * features, bias=False)
        self.to_out = nn.Sequential(nn.Linear(features, features))

    def read_pairs(self, features: int) -> None:
        """Add what turns the distances between two nodes into a bias for each head (first layer only)."""
        table = nn.Embedding(NUM_PAIR_CODES, features)
        self.edge_embed = nn.ModuleDict({"embed": table})
        self.proj_e = nn.Sequential(nn.Linear(2 * features, features), nn.ReLU(), nn.Linear(features, self.heads))
        # Sines and cosines, as for positions in a text (arXiv 1706.03762, section 3.5).
        angle = torch.arange(NUM_PAIR_CODES)[:, None] * torch.exp(
            torch.arange(0, features, 2) * (-math.log(10_000.0) / features)
        )
        with torch.no_grad():
            table.weight.copy_(torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1))

    def bias_table(self, max_distance: int) -> Tensor:
        """Bias (H, 2 * max_distance + 1) of an attention head for each signed distance, in ascending order.

        In a directed acyclic graph, data flows between two nodes in one direction at most. A signed distance therefore
        says everything: d > 0 where the attending node comes first, d < 0 where it comes second, and 0 without a path.
        """
        signed = torch.arange(-max_distance, max_distance + 1, device=self.to_qkv.weight.device)
        both = torch.stack([signed.clamp(min=0), (-signed).clamp(min=0)], dim=1) + 2
        codes = self.edge_embed["embed"](both.clamp(max=NUM_PAIR_CODES - 1)).flatten(1)
        return cast(Tensor, self.proj_e(codes)).t()

    def forward(self, x: Tensor, biases: Sequence[_PairBias]) -> Tensor:
        # (3, H, all nodes, D / H)
        qkv = self.to_qkv(x).view(len(x), 3, self.heads, -1).permute(1, 2, 0, 3)
        mixed, start = [], 0
        for bias in biases:
            query, key, value = qkv[:, None, :, start : start + bias.num_nodes]
            mixed += [
                F.scaled_dot_product_attention(query[:, :, rows], key, value, attn_mask=bias.of(rows)[None])
                for rows in bias.chunks
            ]
            start += bias.num_nodes
        return cast(Tensor, self.to_out(torch.cat(mixed, dim=2)[0].transpose(0, 1).flatten(1)))


class _PairBias:
    """What the attention between two nodes of a graph begins with, made for a few attending nodes at a time.

    For N nodes and H heads all biases are N * N * H numbers, which would be 0.6 GB for 3,000 nodes and 16 heads. They
    are looked up again in every layer, so that no more than `BIAS_BYTES` are in memory at once.
    """

    def __init__(self, graph: Graph, table: Tensor) -> None:
        self.num_nodes = len(graph)
        self._distances, self._max_distance, self._table = graph.distance_matrix, graph.max_distance, table
        size = max(1, BIAS_BYTES // (4 * len(table) * self.num_nodes))
        self.chunks = [slice(start, start + size) for start in range(0, self.num_nodes, size)]
        self._whole = self._look_up(self.chunks[0]) if len(self.chunks) == 1 else None

    def of(self, rows: slice) -> Tensor:
        """Biases (H, n, N) of some attending nodes, one of `chunks`, towards all nodes."""
        return self._look_up(rows) if self._whole is None else self._whole

    def _look_up(self, rows: slice) -> Tensor:
        signed = self._distances[rows].astype(np.int64) - self._distances[:, rows].T + self._max_distance
        return self._table[:, torch.from_numpy(signed).to(self._table.device)]
