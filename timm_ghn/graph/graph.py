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
import torch

from timm_ghn.errors import GraphError, MissingDependencyError
from timm_ghn.graph.nodes import Layout, Node, Op, Role, Shape, Target

__all__ = ["MAX_DISTANCE", "Graph", "Layout", "Node", "Op", "Role", "Shape", "Target"]

PpudaGraph = Any
"""`ppuda.deepnets1m.graph.Graph`; ppuda has no type hints and need not be installed."""

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
        """JSON-compatible form; `from_dict` reads it back."""
        return {
            "max_distance": self.max_distance,
            "nodes": [node.to_dict() for node in self.nodes],
            "edges": [list(edge) for edge in self.edges],
            "unused": [list(item) for item in self.unused],
        }

    def to_json(self, indent: int | None = None) -> str:
        """The graph as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Graph:
        """Build a graph from `to_dict`'s form.

        Raises:
            GraphError: If the data is not of that form.
        """
        try:
            nodes = tuple(Node.from_dict(node) for node in data["nodes"])
            edges = tuple((int(source), int(target)) for source, target in data["edges"])
            unused = tuple((str(name), str(reason)) for name, reason in data["unused"])
            return cls(nodes, edges, int(data["max_distance"]), unused)
        except GraphError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise GraphError(f"not a graph in timm-ghn's JSON form: {error!r}") from error

    @classmethod
    def from_json(cls, text: str) -> Graph:
        """Build a graph from `to_json`'s text.

        Raises:
            GraphError: If the text is not JSON of that form.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise GraphError(f"not JSON: {error}") from error
        return cls.from_dict(data)

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

    def to_ppuda(self) -> PpudaGraph:
        """The same graph as a `ppuda.deepnets1m.graph.Graph`, for `ghn(model, graphs=GraphBatch([g]))`.

        Nodes keep their order. ppuda finds the parameter of a node by the name of its weight, and predicts no second
        parameter but the bias of its own normalization layers: for other models than those that ppuda itself can read,
        its GHN may give up. For a GHN without virtual edges (GHN-1), make the graph with `max_distance=1`.

        Raises:
            MissingDependencyError: If ppuda, or a package that it needs, is not installed.
        """
        try:
            from ppuda.deepnets1m.graph import Graph as ReferenceGraph
        except ImportError as error:
            raise MissingDependencyError(
                f"Graph.to_ppuda needs ppuda: pip install 'timm-ghn[ppuda]' from a clone of timm-ghn ({error})"
            ) from error
        edges, adjacency = torch.from_numpy(self.distances), torch.from_numpy(self.distance_matrix).long()
        operators = torch.tensor([[node.op.row] for node in self.nodes])
        rows = [_ppuda_row(index, node) for index, node in enumerate(self.nodes) if node.shape is not None]
        reference = ReferenceGraph(node_feat=operators, node_info=[rows], A=adjacency, edges=edges)
        reference.n_cells = 1
        reference._param_shapes = [node.shape for node in self.nodes]  # read by its `visualize`
        return reference


def _ppuda_row(index: int, node: Node) -> tuple[int, str, str, Shape | None, bool, bool]:
    """ppuda's row of a node with a shape: index, parameter, operator, shape, whether it is a class weight or bias."""
    roles = {target.role for target in node.targets}
    name = node.targets[0].name if node.targets else node.op.value
    return index, name, node.op.value, node.shape, Role.CLASS_WEIGHT in roles, Role.CLASS_BIAS in roles
