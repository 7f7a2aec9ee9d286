"""A forward pass as the scale rule sees it: layers, norms, chains of layers without a norm, and everything else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from timm_ghn.graph.analyses import Analyses
from timm_ghn.graph.norms import Stage
from timm_ghn.trace.operations import LAYERS, Flow, Kind, kind_of, row_of
from timm_ghn.trace.records import Operation, Value

_NONE = frozenset[int]()


@dataclass(frozen=True)
class Steps:
    """What the analyses of the scale ask of an operation.

    Attributes:
        analyses: Those of the graph.
    """

    analyses: Analyses

    @property
    def flow(self) -> Flow:
        """The operations on values that depend on the input."""
        return self.analyses.origins.flow

    def learned(self, values: Iterable[Value]) -> frozenset[int]:
        """Numbers of the parameters that values are made from."""
        return frozenset(index for value in values for index in self.analyses.origins.of(value).values)

    def layer(self, operation: Operation) -> frozenset[int]:
        """Numbers of the parameters of a layer; of an attention with weights, of its last layer. Empty for no layer."""
        return self._layers.get(operation.outputs[0].index, _NONE)

    def is_norm(self, operation: Operation) -> bool:
        """Whether an operation is a norm layer, or the division that normalizes in one that is spelled out."""
        kind, norm = kind_of(operation), self.analyses.norms.get(operation.outputs[0].index)
        is_spelled = norm is not None and norm.stage is Stage.NORMALIZED
        return kind is Kind.NORM or (is_spelled and kind is not Kind.VIEW)

    @cached_property
    def _layers(self) -> dict[int, frozenset[int]]:
        return {output.index: self._layer(operation) for operation, _, (output, *_) in self.flow.steps}

    def _layer(self, operation: Operation) -> frozenset[int]:
        kind = kind_of(operation)
        if kind is Kind.MULTI_HEAD_ATTENTION:
            last = (operation.argument(11, "out_proj_weight"), operation.argument(12, "out_proj_bias"))
            return self.learned(value for value in last if isinstance(value, Value))
        return self.learned(operation.inputs) if kind in LAYERS or kind is Kind.PRODUCT else _NONE

    def holds_scale(self, operation: Operation) -> bool:
        """Whether it is a norm that normalizes before any training as well, which batch norms do not."""
        return self.is_norm(operation) and operation.name != "batch_norm"

    @cached_property
    def renamed(self) -> dict[int, int]:
        """The parameter that a value is but for its shape and type, by number."""
        flow = Flow.of(self.analyses.trace, self.analyses.origins.learned)
        start = {index: index for index in self.analyses.trace.parameters}
        return flow.follow(lambda operation, _, known: known[0] if kind_of(operation) is Kind.VIEW else None, start)

    @cached_property
    def standardized(self) -> frozenset[int]:
        """Numbers of the parameters that are divided by their own spread, or norm, when they are used."""
        origins = self.analyses.origins
        return frozenset(
            index
            for operation in self.analyses.trace.operations
            if row_of(operation).is_spread and not any(origins.is_data(value) for value in operation.outputs)
            for index in self.learned(operation.inputs)
        )


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
