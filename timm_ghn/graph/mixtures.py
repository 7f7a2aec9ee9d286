"""Kernels that are mixed from several by the input (CondConv and its like)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from timm_ghn.graph.origins import Origins
from timm_ghn.trace.operations import LAYERS, Kind, kind_of, operands, weight_and_bias
from timm_ghn.trace.records import Operation, Value


@dataclass(frozen=True, slots=True)
class Mixtures:
    """Kernels that depend on the input.

    Attributes:
        experts: Numbers of the parameters that a kernel is mixed from, by number of the kernel's value.
        mixed: Numbers of the values in which parameters are mixed.
    """

    experts: Mapping[int, tuple[int, ...]]
    mixed: Set[int]


def find_mixtures(origins: Origins) -> Mixtures:
    """Mixed kernels: the last parameters that entered each of them, and the values in which they did."""

    def step(operation: Operation, output: Value, known: Sequence[dict[int, int] | None]) -> dict[int, int] | None:
        """The value in which each parameter entered, by number of the parameter."""
        learned = [index for value in operands(operation) for index in origins.of(value).values]
        if learned or kind_of(operation) is Kind.LINEAR:
            return dict.fromkeys(learned, output.index)
        return {index: value for entered in known if entered for index, value in entered.items()}

    entered = origins.flow.follow(step)
    weights = (weight_and_bias(operation)[0] for operation, _, _ in origins.flow.steps if kind_of(operation) in LAYERS)
    kernels = {value.index: entered[value.index] for value in weights if value is not None and origins.is_data(value)}
    mixed = {value for found in kernels.values() for value in found.values()}
    return Mixtures({kernel: tuple(found) for kernel, found in kernels.items()}, mixed)
