"""What sets the scale of a residual branch: its last layer, unless a norm or a small learned scale follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from timm_ghn.scale.steps import Steps
from timm_ghn.scale.streams import Streams
from timm_ghn.trace.operations import Kind, kind_of
from timm_ghn.trace.records import Operation, Value

Start = Callable[[str], float | None]
"""The size of the number that all elements of a kept parameter start from, by its name; None if that is not known."""


@dataclass(frozen=True, slots=True)
class Scale:
    """What sets the scale of a value.

    Attributes:
        layers: Numbers of the parameters of the layers that did last; None if a norm or a learned scale of unknown
            size did.
        gain: What learned scales of known size have multiplied it with since.
    """

    layers: frozenset[int] | None = frozenset()
    gain: float = 1.0


def find_scales(steps: Steps, streams: Streams, start: Start) -> Mapping[int, Scale]:
    """What sets the scale of values, by number."""

    def step(operation: Operation, output: Value, known: Sequence[Scale | None]) -> Scale:
        if steps.is_norm(operation):
            return Scale(None)
        layer, trunk = steps.layer(operation), streams.before(output, known)
        if layer:
            return Scale(layer)
        if trunk is not None:
            return Scale(trunk.layers)
        merged = _merged([scale for scale in known if scale is not None])
        if not is_learned_scale(steps, operation, known):
            return merged
        gain = learned_gain(steps, operation, start)
        return Scale(None) if gain is None else Scale(merged.layers, merged.gain * gain)

    return steps.flow.follow(step)


def is_learned_scale(steps: Steps, operation: Operation, known: Sequence[object]) -> bool:
    """Whether an operation multiplies one value with parameters elementwise."""
    is_product = kind_of(operation) in (Kind.MULTIPLICATION, Kind.DIVISION, Kind.SCALED_SUM)
    return is_product and len(known) == 1 and bool(steps.learned(operation.inputs))


def learned_gain(steps: Steps, operation: Operation, start: Start) -> float | None:
    """The size that a learned scale starts from; None if that is not known."""
    factors = [value for value in operation.inputs if not steps.analyses.origins.is_data(value)]
    parameter = steps.renamed.get(factors[0].index) if len(factors) == 1 else None
    if kind_of(operation) is not Kind.MULTIPLICATION or parameter is None:
        return None
    return start(steps.analyses.trace.parameters[parameter][0])


def _merged(found: Sequence[Scale]) -> Scale:
    layers = [scale.layers for scale in found if scale.layers is not None]
    is_known = len(layers) == len(found)
    gain = max((scale.gain for scale in found), default=1.0)
    return Scale(frozenset[int]().union(*layers) if is_known else None, gain)
