"""Normalization that a model spells out: division by a statistic of the activations, then a weight and a bias.

EvoNorm, filter response norm, and the fallbacks of RMS norm call no function of torch that normalizes. They divide
activations by a mean square, a variance or a norm of theirs, or multiply by its inverse, which is what is looked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from timm_ghn.graph.nodes import Op, Shape
from timm_ghn.trace.records import Operation

_STATISTICS = {"mean", "var", "std", "norm", "vector_norm"}
_INVERSES = {"rsqrt", "reciprocal"}
_ANY_OF = {"add", "max", "maximum", "clamp", "clip"}
_UNCHANGED = {
    "to", "float", "half", "bfloat16", "type", "type_as", "contiguous", "clone", "view", "reshape", "flatten",
    "unflatten", "unsqueeze", "squeeze", "expand", "expand_as", "permute", "transpose", "movedim",
}  # fmt: skip


class Power(Enum):
    """How a value depends on a statistic: like it, or like its inverse."""

    DIRECT = 1
    INVERSE = -1


@dataclass(frozen=True, slots=True)
class Statistic:
    """A value made from a statistic of the activations and constants.

    Attributes:
        power: Whether it is the statistic or its inverse.
        op: What a norm that divides by it is in the vocabulary.
    """

    power: Power
    op: Op


def statistic_after(
    operation: Operation, known: Sequence[Statistic | None], dims: tuple[int, ...], channels: int | None
) -> Statistic | None:
    """The statistic in an operation's output.

    Args:
        operation: The operation.
        known: Statistics in those of its operands that depend on the input.
        dims: Dimensions that it reduces.
        channels: Number of channels of its input, if known.
    """
    name = operation.name
    if name in _STATISTICS:
        return Statistic(Power.DIRECT, _kind(operation.inputs[0].shape, dims, channels)) if dims else None
    found = [item for item in known if item is not None]
    if not found or (len(found) < len(known) and name not in _ANY_OF) or (name == "div" and len(found) > 1):
        return None
    if name in _INVERSES or (name == "pow" and _is_negative(operation.argument(1, "exponent"))):
        return Statistic(Power(-found[0].power.value), found[0].op)
    return found[0]


def _kind(shape: Shape, dims: tuple[int, ...], channels: int | None) -> Op:
    """A statistic of the channels of one position makes a layer norm, one over positions what stands for images."""
    size = math.prod(shape[dim] for dim in dims)
    return Op.LN if len(dims) == 1 and (channels is None or size <= channels) else Op.BN


def _is_negative(exponent: object) -> bool:
    return isinstance(exponent, (int, float)) and exponent < 0


def keeps_values(operation: Operation) -> bool:
    """Whether an operation gives back the numbers that it got, in another shape or type."""
    return operation.name in _UNCHANGED


def norm_made_by(operation: Operation, known: Sequence[Statistic | None]) -> Op | None:
    """The norm that a division of activations by a statistic is; None for other operations.

    Args:
        operation: The operation.
        known: Statistics in those of its operands that depend on the input.
    """
    name = operation.name
    if name not in ("mul", "multiply", "div") or len(known) != 2:
        return None
    first, second = known
    if first is None and second is not None and second.power is (Power.DIRECT if name == "div" else Power.INVERSE):
        return second.op
    if name != "div" and second is None and first is not None and first.power is Power.INVERSE:
        return first.op
    return None
