"""The graph in the form of ppuda, the reference implementation, so that its own GHN can read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from timm_ghn.errors import MissingDependencyError
from timm_ghn.graph.nodes import Node, Role

PpudaGraph = Any
"""`ppuda.deepnets1m.graph.Graph`; ppuda has no type hints and need not be installed."""


def to_ppuda(
    nodes: Sequence[Node], distances: npt.NDArray[np.int64], distance_matrix: npt.NDArray[np.uint8]
) -> PpudaGraph:
    """A graph as a `ppuda.deepnets1m.graph.Graph`, for `ghn(model, graphs=GraphBatch([g]))`.

    Nodes keep their order. ppuda finds the parameter of a node by the name of its weight, and predicts no second
    parameter but the bias of its own normalization layers: for other models than those that ppuda itself can read,
    its GHN may give up.

    Args:
        nodes: Nodes of the graph.
        distances: Its edges and virtual edges, (M, 3); without the latter for a GHN that has none (GHN-1).
        distance_matrix: The same, (N, N).

    Raises:
        MissingDependencyError: If ppuda, or a package that it needs, is not installed.
    """
    try:
        from ppuda.deepnets1m.graph import Graph as ReferenceGraph
    except ImportError as error:
        raise MissingDependencyError(
            f"Graph.to_ppuda needs ppuda: pip install 'timm-ghn[ppuda]' from a clone of timm-ghn ({error})"
        ) from error
    edges, adjacency = torch.from_numpy(distances), torch.from_numpy(distance_matrix).long()
    operators = torch.tensor([[node.op.row] for node in nodes])
    rows = [_row(index, node) for index, node in enumerate(nodes) if node.shape is not None]
    reference = ReferenceGraph(node_feat=operators, node_info=[rows], A=adjacency, edges=edges)
    reference.n_cells = 1
    reference._param_shapes = [node.shape for node in nodes]  # read by its `visualize`
    return reference


def _row(index: int, node: Node) -> tuple[int, str, str, tuple[int, ...] | None, bool, bool]:
    """ppuda's row of a node with a shape: index, parameter, operator, shape, whether it is a class weight or bias."""
    roles = {target.role for target in node.targets}
    name = node.targets[0].name if node.targets else node.op.value
    return index, name, node.op.value, node.shape, Role.CLASS_WEIGHT in roles, Role.CLASS_BIAS in roles
