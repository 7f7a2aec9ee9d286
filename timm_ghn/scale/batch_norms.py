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
class Power:
    """How a value grows with the network's input, batch norms being affine as in evaluation.

    Attributes:
        power: By which power.
        peak: The largest power on the way to it since the last other norm, or since it left its stream.
    """

    power: float = 1.0
    peak: float = 1.0


def find_powers(steps: Steps, streams: Streams) -> Mapping[int, Power]:
    """Powers of values, by number."""

    def step(operation: Operation, output: Value, known: Sequence[Power | None]) -> Power:
        if steps.holds_scale(operation):
            return Power(0.0, 0.0)
        found = [power for power in known if power is not None]
        power = power_after(operation, [item.power for item in found])
        trunk = streams.before(output, known)
        if trunk is not None:
            return Power(power, trunk.peak)
        is_bounded = row_of(operation).is_bounded
        return Power(power, 0.0 if is_bounded else max(power, *(item.peak for item in found)))

    return steps.flow.follow(step, dict.fromkeys(steps.analyses.trace.inputs, Power()))


@dataclass(frozen=True, slots=True)
class Depth:
    """The way to a value since the last norm that is no batch norm.

    Attributes:
        layers: Layers on the longest path.
        streams: Numbers of the residual streams on all paths.
    """

    layers: int = 0
    streams: frozenset[int] = frozenset()


def find_depths(steps: Steps, streams: Streams) -> Mapping[int, Depth]:
    """Depths of values, by number."""

    def step(operation: Operation, output: Value, known: Sequence[Depth | None]) -> Depth:
        if steps.holds_scale(operation):
            return Depth()
        found = [depth for depth in known if depth is not None]
        passed = frozenset[int]().union(*(depth.streams for depth in found))
        total = streams.sums.get(output.index)
        if total is not None:
            passed |= {total.stream}
        if row_of(operation).is_bounded:
            return Depth(0, passed)
        layers = max((depth.layers for depth in found), default=0)
        return Depth(layers + bool(steps.layer(operation)), passed)

    return steps.flow.follow(step)


def find_overflowing(steps: Steps, streams: Streams, depths: Mapping[int, Depth]) -> frozenset[int]:
    """Numbers of the streams that overflow, and of those that lead to them."""
    powers = find_powers(steps, streams)
    found: set[int] = set()
    for operation, sources, (output, *_) in steps.flow.steps:
        total = streams.sums.get(output.index)
        if total is not None and powers[total.branch].peak > MAX_POWER:
            found |= depths[output.index].streams
        elif steps.layer(operation):
            deep = [depths[index] for index in sources if index in depths]
            if max((depth.layers for depth in deep), default=0) >= MAX_AFFINE_CHAIN:
                found = found.union(*(depth.streams for depth in deep))
    return frozenset(found)


def find_last_batch_norms(
    steps: Steps, streams: Streams, scales: Mapping[int, Scale], depths: Mapping[int, Depth]
) -> Mapping[int, int]:
    """The last batch norm (by number of its value) on the way to a value.

    None where something after it sets the scale anew: a bound, a product with another activation, or a learned scale
    of unknown size.
    """

    def step(operation: Operation, output: Value, known: Sequence[int | None]) -> int | None:
        if steps.is_norm(operation):
            is_learned = bool(steps.learned(operation.inputs))
            return output.index if is_learned and not steps.holds_scale(operation) else None
        total = streams.sums.get(output.index)
        if total is not None:
            return known[total.trunk]
        is_product = kind_of(operation) is Kind.PRODUCT and len(known) == 2
        is_scaled = is_learned_scale(steps, operation, known) and scales[output.index].layers is None
        if is_product or is_scaled:
            return None
        sources = [value.index for value in operands(operation) if value.index in depths]
        growing = [norm for norm, index in zip(known, sources, strict=False) if depths[index].layers]
        return growing[0] if len(growing) == 1 else None

    return steps.flow.follow(step)
