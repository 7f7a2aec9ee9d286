"""Norms that a model spells out: division by a statistic of the activations, then a weight and a bias.

EvoNorm, filter response norm, and the fallbacks of RMS norm call no function of torch that normalizes. They divide
activations by a mean square, a variance or a norm of theirs, or multiply by its inverse, which is what is looked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from timm_ghn.graph.extents import UNKNOWN, Extent
from timm_ghn.graph.nodes import Op
from timm_ghn.graph.origins import Origins
from timm_ghn.trace.operations import LAYERS, Kind, exponent_of, kind_of, reduced_dims, row_of
from timm_ghn.trace.records import Operation, Value


class Stage(Enum):
    """How far a norm is spelled out in a value."""

    STATISTIC = auto()
    """A statistic of the activations, with constants."""
    INVERSE = auto()
    """One divided by such a statistic."""
    NORMALIZED = auto()
    """Activations divided by the statistic."""
    SCALED = auto()
    """Normalized activations times a weight."""


@dataclass(frozen=True, slots=True)
class SpelledNorm:
    """A part of a norm.

    Attributes:
        stage: How far it is spelled out.
        op: What the norm is in the vocabulary.
        weighted: Number of the value in which the norm's weight was applied; None before.
    """

    stage: Stage
    op: Op
    weighted: int | None = None


def find_norms(origins: Origins, extents: Mapping[int, Extent]) -> Mapping[int, SpelledNorm]:
    """Parts of spelled-out norms, by number of the value."""

    def step(operation: Operation, output: Value, known: Sequence[SpelledNorm | None]) -> SpelledNorm | None:
        kind = kind_of(operation)
        if len(known) == 1 and kind is Kind.VIEW:
            return known[0]
        source = operation.inputs[0]
        channels = extents.get(source.index, UNKNOWN).channels
        if kind is Kind.MEAN or (kind is Kind.REDUCTION and row_of(operation).is_spread):
            return _statistic(source, reduced_dims(operation), channels)
        if kind in LAYERS or kind is Kind.PRODUCT or all(part is None for part in known):
            return None
        scaled = known[0] if len(known) == 1 and kind is Kind.MULTIPLICATION else None
        if scaled is not None and scaled.stage is Stage.NORMALIZED:
            weight = next((value for value in operation.inputs if origins.of(value).values), None)
            if weight is not None and max(weight.shape, default=1) == extents[output.index].channels:
                return SpelledNorm(Stage.SCALED, scaled.op, output.index)
        return _normalized(kind, known) or _still_a_statistic(operation, known)

    return origins.flow.follow(step)


def _statistic(source: Value, dims: tuple[int, ...], channels: int | None) -> SpelledNorm | None:
    """Statistics of the channels of one position make a layer norm, those over positions what stands for images."""
    if not dims:
        return None
    size = math.prod(source.shape[dim] for dim in dims)
    is_per_position = len(dims) == 1 and (channels is None or size <= channels)
    return SpelledNorm(Stage.STATISTIC, Op.LN if is_per_position else Op.BN)


def _normalized(kind: Kind, known: Sequence[SpelledNorm | None]) -> SpelledNorm | None:
    """Activations divided by a statistic, or multiplied with its inverse."""
    if len(known) != 2 or kind not in (Kind.MULTIPLICATION, Kind.DIVISION):
        return None
    wanted = Stage.STATISTIC if kind is Kind.DIVISION else Stage.INVERSE
    pairs = [known] if kind is Kind.DIVISION else [known, known[::-1]]
    ops = [part.op for whole, part in pairs if not _is_statistic(whole) and part is not None and part.stage is wanted]
    return SpelledNorm(Stage.NORMALIZED, ops[0]) if ops else None


def _still_a_statistic(operation: Operation, known: Sequence[SpelledNorm | None]) -> SpelledNorm | None:
    """A statistic that constants, functions of one operand, and sums and maxima with activations leave one."""
    kind, found = kind_of(operation), [part for part in known if part is not None and _is_statistic(part)]
    is_mixed = len(found) < len(known) and kind not in (Kind.SUM, Kind.MAXIMUM, Kind.REDUCTION)
    if not found or is_mixed or (kind is Kind.DIVISION and len(found) > 1):
        return None
    if exponent_of(operation) >= 0:
        return found[0]
    return SpelledNorm(Stage.INVERSE if found[0].stage is Stage.STATISTIC else Stage.STATISTIC, found[0].op)


def _is_statistic(part: SpelledNorm | None) -> bool:
    return part is not None and part.stage in (Stage.STATISTIC, Stage.INVERSE)
