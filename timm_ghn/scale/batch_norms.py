"""Batch norms before any training: in evaluation they do nothing yet, and deep networks overflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from timm_ghn.scale.branches import Scale, is_learned_scale
from timm_ghn.scale.steps import Steps
from timm_ghn.scale.streams import Streams
from timm_ghn.trace.operations import LAYERS, Kind, exponent_of, kind_of, operands, row_of
from timm_ghn.trace.records import Operation, Value

MAX_AFFINE_CHAIN = 96
"""Layers in a row, without a norm but batch norms, beyond which float32 may overflow: each makes values up to 2.5 times
as large."""

MAX_POWER = 2.0
"""Powers of a stream's values that its branches may compute: products of two of them."""


def power_after(operation: Operation, powers: Sequence[float]) -> float:
    """By which power an output grows with the network's input, given that of the operands that depend on it."""
    kind = kind_of(operation)
    if row_of(operation).is_bounded:
        return 0.0
    if kind in (*LAYERS, Kind.PRODUCT, Kind.MULTIPLICATION):
        return sum(powers)
    if kind is Kind.DIVISION and len(powers) == 2:
        return powers[0] - powers[1]
    return max(powers, default=1.0) * exponent_of(operation)


@dataclass(frozen=True, slots=True)
class Growth:
    """How large a value may become in evaluation, before batch norms have learned any statistics.

    Counted from the last norm that is no batch norm, or the last function with bounded results.

    Attributes:
        power: By which power of the network's input the value grows.
        peak: The largest power on the way to it, since it left its residual stream.
        layers: Layers on the longest path.
        streams: Numbers of the residual streams on all paths, also of those before a bounded function.
    """

    power: float = 1.0
    peak: float = 1.0
    layers: int = 0
    streams: frozenset[int] = frozenset()


def find_growth(steps: Steps, streams: Streams) -> Mapping[int, Growth]:
    """How large values may become, by number."""

    def step(operation: Operation, output: Value, known: Sequence[Growth | None]) -> Growth:
        if steps.holds_scale(operation):
            return Growth(0.0, 0.0)
        found = [growth for growth in known if growth is not None]
        power = power_after(operation, [growth.power for growth in found])
        passed = frozenset[int]().union(*(growth.streams for growth in found))
        if row_of(operation).is_bounded:
            return Growth(power, 0.0, 0, passed)
        layers = max((growth.layers for growth in found), default=0) + bool(steps.layer(operation))
        total, trunk = streams.sums.get(output.index), streams.before(output, known)
        if total is not None and trunk is not None:
            return Growth(power, trunk.peak, layers, passed | {total.stream})
        return Growth(power, max([power, *(growth.peak for growth in found)]), layers, passed)

    return steps.flow.follow(step, dict.fromkeys(steps.analyses.trace.inputs, Growth()))


def find_overflowing(steps: Steps, streams: Streams, growths: Mapping[int, Growth]) -> frozenset[int]:
    """Numbers of the streams that overflow, and of those that lead to them."""
    found = frozenset[int]()
    for operation, sources, (output, *_) in steps.flow.steps:
        total, deep = streams.sums.get(output.index), [growths[index] for index in sources]
        if total is not None and growths[total.branch].peak > MAX_POWER:
            found |= growths[output.index].streams
        elif steps.layer(operation) and max((growth.layers for growth in deep), default=0) >= MAX_AFFINE_CHAIN:
            found = found.union(*(growth.streams for growth in deep))
    return found


def find_last_batch_norms(
    steps: Steps, streams: Streams, scales: Mapping[int, Scale], growths: Mapping[int, Growth]
) -> Mapping[int, int]:
    """The last batch norm (by number of its value) on the way to a value.

    None where something after it sets the scale anew: a bound, a product with another activation, or a learned scale
    of unknown size.
    """

    def step(operation: Operation, output: Value, known: Sequence[int | None]) -> int | None:
        if steps.is_norm(operation):
            is_learned = bool(steps.learned(operation.inputs))
            return output.index if is_learned and not steps.holds_scale(operation) else None
        if output.index in streams.sums:
            return streams.before(output, known)
        is_product = kind_of(operation) is Kind.PRODUCT and len(known) == 2
        is_scaled = is_learned_scale(steps, operation, known) and scales[output.index].layers is None
        if is_product or is_scaled:
            return None
        sources = [value.index for value in operands(operation) if value.index in growths]
        growing = [norm for norm, index in zip(known, sources, strict=True) if growths[index].layers]
        return growing[0] if len(growing) == 1 else None

    return steps.flow.follow(step)
