"""Where the nodes and edges of a graph stand on a sheet.

The level of a node is the length of the longest path that leads to it. The longest path of all is a straight line, the
trunk; branches and skip connections run beside it in lanes. A deep graph is folded like a snake: down one column, up
the next.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from timm_ghn.graph.graph import Graph

Edge = tuple[int, int]

# Points (1/72 inch) between levels, between lanes, for edges that turn into the next column, between columns.
ROW, LANE, TURN, GAP = 25.0, 21.0, 20.0, 6.0
_ASPECT = 1.5  # width to height that is aimed at
_MIN_ROWS, _TRIAL_ROWS, _MAX_ROWS = 10, 30, 80


@dataclass(frozen=True, slots=True)
class Layout:
    """Positions in points, float64; y points down; (0, 0) is the leftmost lane of the first level.

    Attributes:
        nodes: Center of each node, (N, 2).
        edges: Line of each edge, (2 + number of levels that the edge passes, 2): from the center of its source to the
            center of its target.
        width: From the leftmost to the rightmost lane.
        height: From the first to the last row.
    """

    nodes: npt.NDArray[np.float64]
    edges: tuple[npt.NDArray[np.float64], ...]
    width: float
    height: float


def arrange(graphs: Sequence[Graph]) -> list[Layout]:
    """Place graphs, in columns so long that, side by side, the graphs make a sheet of about 3:2."""
    width = sum(lay_out(graph, _TRIAL_ROWS).width + LANE for graph in graphs)
    ratio = width / (_TRIAL_ROWS * ROW) / _ASPECT  # falls with the square of the number of rows
    rows = min(max(round(_TRIAL_ROWS * math.sqrt(ratio)), _MIN_ROWS), _MAX_ROWS)
    return [lay_out(graph, rows) for graph in graphs]


def lay_out(graph: Graph, rows: int) -> Layout:
    """Place a graph in columns of at most `rows` levels; the last column may have one more."""
    levels = _levels(graph)
    lanes = _node_lanes(graph, levels)
    passing = _edge_lanes(graph, levels, lanes)
    cells = _fold(levels, lanes, passing, rows)
    sides: dict[int, set[int]] = defaultdict(set)  # the lanes of each column, counted from the trunk to the right
    passed = ((level, lane) for edge, lane in passing.items() for level in _between(levels, edge))
    for level, lane in (*zip(levels, lanes, strict=True), *passed):
        column, _ = cells[level]
        sides[column].add(-lane if column % 2 else lane)
    trunks, width = [], 0.0
    for column in range(len(sides)):
        trunks.append(width - min(sides[column]) * LANE)
        width = trunks[-1] + (max(sides[column]) + 1) * LANE + GAP

    def position(level: int, lane: int, is_node: bool = True) -> tuple[float, float]:
        column, row = cells[level]
        turns = not is_node and cells[level - 1][0] != cells[level + 1][0]
        outwards = max(-TURN, min(TURN, lane * LANE / 2)) if turns else 0.0
        return trunks[column] + (-lane if column % 2 else lane) * LANE, row * ROW - outwards

    nodes = np.array([*map(position, levels, lanes)])
    edges = []
    for edge in graph.edges:
        points = [position(level, passing[edge], is_node=False) for level in _between(levels, edge)]
        edges.append(np.array([nodes[edge[0]], *points, nodes[edge[1]]]))
    return Layout(nodes, tuple(edges), width - LANE - GAP, max(row for _, row in cells) * ROW)


def _levels(graph: Graph) -> list[int]:
    """The level of each node; a node without sources, other than the input, stands just before its first reader."""
    levels: list[int] = graph.levels.tolist()
    for node in set(range(1, len(graph))) - {target for _, target in graph.edges}:
        readers = [levels[target] for source, target in graph.edges if source == node]
        levels[node] = max(min(readers, default=0) - 1, 0)
    return levels


def _between(levels: Sequence[int], edge: Edge) -> range:
    """The levels that an edge passes."""
    return range(levels[edge[0]] + 1, levels[edge[1]])


def _node_lanes(graph: Graph, levels: Sequence[int]) -> list[int]:
    """The lane of each node: 0 for the longest path, and for a branch, if it is free, the lane that it begins in."""
    sources: dict[int, list[int]] = defaultdict(list)
    for source, target in graph.edges:
        sources[target].append(source)
    node = max(range(len(levels)), key=lambda index: (levels[index], index))
    trunk = {node}
    while before := [source for source in sources[node] if levels[source] == levels[node] - 1]:
        node = max(before)
        trunk.add(node)
    lanes = [0] * len(graph)
    taken = {(levels[node], 0) for node in trunk}
    for node in sorted(set(range(len(graph))) - trunk, key=lambda index: (levels[index], index)):
        wanted = next((lanes[source] for source in sources[node] if source not in trunk), 1)
        free = (lane for lane in range(-len(graph), len(graph) + 1) if (levels[node], lane) not in taken)
        lanes[node] = min(free, key=lambda lane: (abs(lane - wanted), abs(lane)))
        taken.add((levels[node], lanes[node]))
    return lanes


def _edge_lanes(graph: Graph, levels: Sequence[int], lanes: Sequence[int]) -> dict[Edge, int]:
    """The lane of each edge that passes levels: free of nodes there, near its ends, and not full of other edges."""
    taken = set(zip(levels, lanes, strict=True))
    busy: Counter[Edge] = Counter()
    widest = max(map(abs, lanes)) + 3
    found = {}
    for edge in sorted(graph.edges, key=lambda edge: len(_between(levels, edge))):
        between = _between(levels, edge)
        if not between:
            continue
        costs = {}
        for lane in range(-widest, widest + 1):
            if taken.isdisjoint((level, lane) for level in between):
                crowd = sum(busy[level, lane] for level in between) / len(between)
                costs[lane] = sum(abs(lane - lanes[end]) for end in edge) + 0.6 * min(crowd, 4.0) + 0.01 * (lane > 0)
        found[edge] = min(costs, key=costs.__getitem__)
        busy.update((level, found[edge]) for level in between)
    return found


def _fold(levels: Sequence[int], lanes: Sequence[int], passing: Iterable[Edge], rows: int) -> list[tuple[int, int]]:
    """The column and row of each level; a column begins in the row in which the one before ends.

    The snake turns where few nodes are beside the trunk and no edge that passes levels begins or ends.
    """
    crowd = Counter(level for level, lane in zip(levels, lanes, strict=True) if lane)
    crowd.update(levels[end] for edge in passing for end in edge)
    cells: list[tuple[int, int]] = []
    column = row = 0
    while left := max(levels) + 1 - len(cells):
        start, step = len(cells), -1 if column % 2 else 1
        room = row + 1 if column % 2 else rows - row
        ends = left <= room + (step > 0)  # one row more is better than a column for the last level
        lengths = [left] if ends else range(max(2, room - rows // 4), room + 1)
        length = min(lengths, key=lambda n: 3 * (crowd[start + n - 1] + crowd[start + n]) + room - n)
        cells += [(column, row + step * k) for k in range(length)]
        column, row = column + 1, cells[-1][1]
    return cells
