"""The computational graph that a GHN reads: frozen nodes, edges and shortest-path distances."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from timm_ghn.errors import GraphError
from timm_ghn.graph.nodes import Node, Target

MAX_DISTANCE = 50
"""Hops beyond which two nodes are not joined by a virtual edge (arXiv 2110.13100, section 4.1)."""


@dataclass(frozen=True)
class Graph:
    """An immutable directed acyclic graph of a network, in topological order.

    Attributes:
        nodes: Operators; every edge goes from a lower to a higher index.
        edges: Sorted pairs (source, target) of node indices.
        max_distance: Longest distance, in hops, that `distances` lists.
        unused: Names and reasons of parameters that no node predicts.

    Raises:
        GraphError: If an edge is out of range or goes backwards, or if there is no node.
    """

    nodes: tuple[Node, ...]
    edges: tuple[tuple[int, int], ...]
    max_distance: int = MAX_DISTANCE
    unused: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not self.nodes:
            raise GraphError("a graph needs at least one node")
        count = len(self.nodes)
        for source, target in self.edges:
            if not 0 <= source < target < count:
                raise GraphError(f"edge ({source}, {target}) is not in topological order of {count} nodes")
        if list(self.edges) != sorted(set(self.edges)):
            raise GraphError("edges must be sorted and distinct")

    def __len__(self) -> int:
        return len(self.nodes)

    @cached_property
    def distance_matrix(self) -> npt.NDArray[np.uint8]:
        """Shortest-path lengths, uint8 (N, N): [u, v] for u -> v; 0 where v is not within `max_distance` of u.

        One pass in topological order: the distances to v are those to its predecessors plus one.
        """
        count = len(self.nodes)
        far = self.max_distance + 1
        # Row v holds the distances from every node to v, so that each step works on contiguous memory.
        to_node = np.full((count, count), far, dtype=np.uint8)
        predecessors: list[list[int]] = [[] for _ in range(count)]
        for source, target in self.edges:
            predecessors[target].append(source)
        for node, sources in enumerate(predecessors):
            row = to_node[node, :node]
            for source in sources:
                np.minimum(row[:source], to_node[source, :source] + 1, out=row[:source])
                row[source] = 1
        to_node[to_node >= far] = 0
        return np.ascontiguousarray(to_node.T)

    @cached_property
    def distances(self) -> npt.NDArray[np.int64]:
        """Edges and virtual edges, int64 (M, 3): rows (source, target, shortest-path distance), sorted."""
        sources, targets = np.nonzero(self.distance_matrix)
        return np.stack([sources, targets, self.distance_matrix[sources, targets].astype(np.int64)], axis=1)

    @cached_property
    def levels(self) -> npt.NDArray[np.int64]:
        """Length (N,) of the longest path that leads to each node: no two nodes of a level see each other."""
        level = [0] * len(self.nodes)
        for source, target in self.edges:  # sorted by source, and sources precede targets
            level[target] = max(level[target], level[source] + 1)
        return np.array(level, dtype=np.int64)

    @property
    def targets(self) -> tuple[Target, ...]:
        """All parameters that the nodes predict, in node order."""
        return tuple(target for node in self.nodes for target in node.targets)

    @property
    def operators(self) -> Counter[str]:
        """Number of nodes by operator."""
        return Counter(node.op.value for node in self.nodes)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the graph's JSON form: equal for equal graphs on every machine."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible form."""
        return {
            "max_distance": self.max_distance,
            "nodes": [node.to_dict() for node in self.nodes],
            "edges": [list(edge) for edge in self.edges],
            "unused": [list(item) for item in self.unused],
        }

    def to_json(self) -> str:
        """The graph as JSON text."""
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        operators = ", ".join(f"{name} {count}" for name, count in self.operators.most_common())
        return f"Graph of {len(self.nodes)} nodes and {len(self.edges)} edges: {operators}"

    def to_text(self) -> str:
        """One line a node: index, operator, shape, parameter and the nodes that it reads."""
        incoming: list[list[int]] = [[] for _ in self.nodes]
        for source, target in self.edges:
            incoming[target].append(source)
        lines = [str(self)]
        for index, node in enumerate(self.nodes):
            shape = "" if node.shape is None else "x".join(str(size) for size in node.shape)
            names = " ".join(target.name for target in node.targets)
            sources = ", ".join(str(source) for source in incoming[index])
            lines.append(f"{index:5d}  {node.op.value:<9s} {shape:<16s} {names:<48s} <- {sources}".rstrip(" <-"))
        return "\n".join(lines)
