"""Residual streams: values that sums `x = x + f(x)` change, without a layer in between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from timm_ghn.scale.steps import Steps
from timm_ghn.trace.operations import Kind, kind_of
from timm_ghn.trace.records import Operation, Value

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value stands.

    Attributes:
        root: Number of the value that it is but for sums and functions of one operand.
        ancestors: The roots of all values that it was computed from, its own among them, as a bit mask: the sets are
            large, and most of what is asked of them is their union.
        stream: The residual stream that it belongs to, by number of the first sum's value; None before a sum.
    """

    root: int
    ancestors: int
    stream: int | None = None

    def leads_to(self, other: Place) -> bool:
        """Whether the other was computed from the same root."""
        return bool(other.ancestors >> self.root & 1)


@dataclass(frozen=True, slots=True)
class ResidualSum:
    """A sum of a stream and a branch.

    Attributes:
        stream: Number of the stream.
        trunk: Which operand, 0 or 1, is the stream before the sum.
        branch: Number of the other operand, which was computed from the stream.
    """

    stream: int
    trunk: int
    branch: int


@dataclass(frozen=True)
class Streams:
    """The residual streams of a forward pass.

    Attributes:
        places: Where values stand, by number.
        sums: The sums, by number of their value.
    """

    places: Mapping[int, Place]
    sums: Mapping[int, ResidualSum]

    @cached_property
    def lengths(self) -> Counter[int]:
        """How many sums each stream has."""
        return Counter(item.stream for item in self.sums.values())

    def before(self, output: Value, known: Sequence[_T | None]) -> _T | None:
        """What is known of the stream before a sum, given what is known of both operands; None for other operations."""
        found = self.sums.get(output.index)
        return None if found is None else known[found.trunk]


def find_streams(steps: Steps) -> Streams:
    """Follow streams from sum to sum."""

    def step(operation: Operation, output: Value, known: Sequence[Place | None]) -> Place:
        found = [place for place in known if place is not None]
        ancestors = 0
        for place in found:
            ancestors |= place.ancestors
        if kind_of(operation) is Kind.SUM and len(found) == 2:
            first, second = found
            if first.leads_to(second) or second.leads_to(first):
                trunk = first if first.leads_to(second) else second
                return Place(trunk.root, ancestors, output.index if trunk.stream is None else trunk.stream)
        if len(found) == 1 and not steps.is_norm(operation) and not steps.layer(operation):
            return Place(found[0].root, ancestors, found[0].stream)
        return Place(output.index, ancestors | 1 << output.index)

    start = {index: Place(index, 1 << index) for index in steps.analyses.trace.inputs}
    places = steps.flow.follow(step, start)
    sums: dict[int, ResidualSum] = {}
    for operation, sources, (output, *_) in steps.flow.steps:
        stream = places[output.index].stream
        if kind_of(operation) is Kind.SUM and len(sources) == 2 and stream is not None:
            trunk = 0 if places[sources[0]].leads_to(places[sources[1]]) else 1
            sums[output.index] = ResidualSum(stream, trunk, sources[1 - trunk])
    return Streams(places, sums)
