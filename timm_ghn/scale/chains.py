"""Chains: layers in a row without a norm layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from timm_ghn.scale.steps import Steps
from timm_ghn.trace.operations import Kind, kind_of
from timm_ghn.trace.records import Operation, Value


@dataclass(frozen=True, slots=True)
class Chain:
    """The layers on the way to a value since the last norm layer.

    Attributes:
        length: Their number on the longest path. Residual sums end no chain.
        layers: Numbers of the parameters on all paths, but for what a division cancels.
    """

    length: int = 0
    layers: frozenset[int] = frozenset()


def find_chains(steps: Steps) -> Mapping[int, Chain]:
    """Chains by number of the value at their end."""

    def step(operation: Operation, _: Value, known: Sequence[Chain | None]) -> Chain:
        if steps.is_norm(operation):
            return Chain()
        found = [chain for chain in known if chain is not None]
        length, layer = max((chain.length for chain in found), default=0), steps.layer(operation)
        kind = kind_of(operation)
        if kind is Kind.DIVISION and len(found) == 2:
            return Chain(length, found[0].layers - found[1].layers)
        if kind is Kind.MULTI_HEAD_ATTENTION:
            length += 1  # the layer that leads to the attention
        return Chain(length + bool(layer), layer.union(*(chain.layers for chain in found)))

    return steps.flow.follow(step)
