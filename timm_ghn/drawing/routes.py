"""Levels, lanes and routes: where nodes and edges run, and where the snake of levels is folded.

The level of a node is the longest path from the input. The longest path of all is a straight line, the trunk; branches
and skip connections run beside it in lanes. Deep graphs are folded like a snake: down one column, up the next.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from timm_ghn.graph.graph import Graph


@dataclass(frozen=True, slots=True)
class Routes:
    """Where nodes and edges run, before the snake is folded.

    Attributes:
        levels: Level of each node.
        lanes: Lane of each node; 0 is the trunk.
        edges: Pairs of nodes, and the lane in which an edge passes the levels between them.
    """

    levels: tuple[int, ...]
    lanes: tuple[int, ...]
    edges: tuple[tuple[int, int, int], ...]

    @property
    def num_levels(self) -> int:
        """Number of levels."""
        return max(self.levels) + 1

    @classmethod
    def of(cls, graph: Graph) -> Routes:
        """The routes of a graph."""
        levels = _levels(graph)
        lanes = _lanes(graph, levels)
        return cls(tuple(levels), tuple(lanes), tuple(_route(graph, levels, lanes)))


def _levels(graph: Graph) -> list[int]:
    """The graph's levels, with sources other than the input moved to just before where they are read."""
    levels = [0] * len(graph)
    for level, nodes in enumerate(graph.levels):
        for node in nodes:
            levels[node] = level
    readers: dict[int, list[int]] = defaultdict(list)
    has_source = {target for _, target in graph.edges}
    for source, target in graph.edges:
        readers[source].append(levels[target])
    for node in range(1, len(graph)):
        if node not in has_source and readers[node]:
            levels[node] = max(min(readers[node]) - 1, 0)
    return levels


def _lanes(graph: Graph, levels: Sequence[int]) -> list[int]:
    """Lane 0 for the longest path; a branch keeps the lane that it begins in."""
    sources: dict[int, list[int]] = defaultdict(list)
    for source, target in graph.edges:
        sources[target].append(source)
    trunk = _trunk(levels, sources)
    lanes = [0] * len(graph)
    taken: dict[int, set[int]] = defaultdict(set)
    for node in trunk:
        taken[levels[node]].add(0)
    for node in sorted(set(range(len(graph))) - trunk, key=lambda index: (levels[index], index)):
        wanted = [lanes[source] for source in sources[node] if source not in trunk]
        free = (lane for lane in _outwards(wanted[0] if wanted else 1) if lane not in taken[levels[node]])
        lanes[node] = next(free)
        taken[levels[node]].add(lanes[node])
    return lanes


def _trunk(levels: Sequence[int], sources: dict[int, list[int]]) -> set[int]:
    node = max(range(len(levels)), key=lambda index: (levels[index], index))
    trunk = {node}
    while before := [source for source in sources[node] if levels[source] == levels[node] - 1]:
        node = max(before)
        trunk.add(node)
    return trunk


def _outwards(start: int) -> Iterator[int]:
    """Lanes by their distance from one: start, start - 1, start + 1, ..."""
    yield start
    step = 1
    while True:
        yield start - step if start > 0 else start + step
        yield start + step if start > 0 else start - step
        step += 1


def _route(graph: Graph, levels: Sequence[int], lanes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Edges with a lane that is free of nodes, and not full of other edges, where they pass by."""
    taken = {(levels[node], lanes[node]) for node in range(len(graph))}
    busy: Counter[tuple[int, int]] = Counter()
    widest = max(abs(lane) for lane in lanes) + 3
    for source, target in sorted(graph.edges, key=lambda edge: levels[edge[1]] - levels[edge[0]]):
        between = range(levels[source] + 1, levels[target])
        if not between:
            yield source, target, lanes[target]
            continue

        def cost(lane: int, source: int = source, target: int = target, between: range = between) -> float:
            crowd = sum(busy[level, lane] for level in between) / len(between)
            return abs(lane - lanes[source]) + abs(lane - lanes[target]) + 0.6 * min(crowd, 4.0) + 0.01 * (lane > 0)

        free = [n for n in range(-widest, widest + 1) if not any((level, n) in taken for level in between)]
        lane = min(free, key=cost)
        busy.update((level, lane) for level in between)
        yield source, target, lane


def fold(routes: Routes, rows: int) -> tuple[tuple[int, int], ...]:
    """First level of each column and its row; a column begins in the row where the one before ends.

    The snake turns where few things are beside the trunk and no skip connection begins or ends.
    """
    crowd: Counter[int] = Counter(level for level, lane in zip(routes.levels, routes.lanes, strict=True) if lane)
    for source, target, _ in routes.edges:
        if routes.levels[target] > routes.levels[source] + 1:
            crowd.update({routes.levels[source]: 1, routes.levels[target]: 1})
    columns = [(0, 0)]
    while True:
        start, row = columns[-1]
        room = rows - row if len(columns) % 2 else row + 1
        if start + room >= routes.num_levels:
            return tuple(columns)
        lengths = range(max(2, room - rows // 4), room + 1)
        length = min(lengths, key=lambda n: 3 * (crowd[start + n - 1] + crowd[start + n]) + room - n)
        columns.append((start + length, row + length - 1 if len(columns) % 2 else row - length + 1))
