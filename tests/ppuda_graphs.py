"""Our graphs as those of ppuda, which is not on the package index."""

from __future__ import annotations

from typing import Any

import torch

from timm_ghn.graph import Graph, Node, Role


def to_ppuda(graph: Graph) -> Any:
    """The same graph as a `ppuda.deepnets1m.graph.Graph`, for `ghn(model, graphs=GraphBatch([g]))`.

    Nodes keep their order. ppuda finds the parameter of a node by the name of its weight, and predicts no second
    parameter but the bias of its own normalization layers: for other models than those that ppuda itself can read,
    its GHN may give up.
    """
    from ppuda.deepnets1m.graph import Graph as ReferenceGraph

    edges, adjacency = torch.from_numpy(graph.distances), torch.from_numpy(graph.distance_matrix).long()
    operators = torch.tensor([[node.op.row] for node in graph.nodes])
    rows = [_row(index, node) for index, node in enumerate(graph.nodes) if node.shape is not None]
    reference = ReferenceGraph(node_feat=operators, node_info=[rows], A=adjacency, edges=edges)
    reference.n_cells = 1
    reference._param_shapes = [node.shape for node in graph.nodes]  # read by its `visualize`
    return reference


def _row(index: int, node: Node) -> tuple[Any, ...]:
    """ppuda's row of a node with a shape: index, parameter, operator, shape, whether it is a class weight or bias."""
    roles = {target.role for target in node.targets}
    name = node.targets[0].name if node.targets else node.op.value
    return index, name, node.op.value, node.shape, Role.CLASS_WEIGHT in roles, Role.CLASS_BIAS in roles
