"""Which layers of a graph make the logits."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import replace

from timm_ghn.graph.nodes import Node, Op, Role

BEHIND_LOGITS = frozenset({Op.BIAS, Op.SUM, Op.CONCAT, Op.GLOB_AVG})
"""What may be computed from logits before they are returned."""


def mark_classifiers(
    nodes: Sequence[Node], edges: Sequence[tuple[int, int]], counts: set[int], behind: Set[Op] = BEHIND_LOGITS
) -> list[Node]:
    """Give classifier roles to the linear layers that make the logits.

    These are weights with one row a class behind which there are only biases, and sums, concatenations and means of
    logits alone.
    """
    successors: list[list[int]] = [[] for _ in nodes]
    predecessors: list[list[int]] = [[] for _ in nodes]
    for source, target in edges:
        successors[source].append(target)
        predecessors[target].append(source)
    heads: list[bool] = []  # what is made of such weights alone, unlike the sum behind a residual branch
    for node, sources in zip(nodes, predecessors, strict=True):
        if node.op is Op.CONV and node.shape and math.prod(node.shape) == math.prod(node.shape[:2]):
            heads.append(node.shape[0] in counts)
        else:
            heads.append(node.op in behind and bool(sources) and all(heads[source] for source in sources))
    marked = list(nodes)
    last = [True] * len(nodes)
    for index in reversed(range(len(nodes))):
        last[index] = all(last[n] and heads[n] and nodes[n].op is not Op.CONV for n in successors[index])
        if last[index] and heads[index] and nodes[index].op is Op.CONV:
            marked[index] = _with_role(nodes[index], Role.CLASS_WEIGHT)
            for follower in successors[index]:
                if nodes[follower].op is Op.BIAS:
                    marked[follower] = _with_role(nodes[follower], Role.CLASS_BIAS)
    return marked


def _with_role(node: Node, role: Role) -> Node:
    return replace(node, targets=tuple(replace(target, role=role) for target in node.targets))
