"""Kernels that are mixed from several by the input (CondConv and its like)."""

from __future__ import annotations

from collections.abc import Mapping, Set
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
    """Mixed kernels: go back from each to the operations that parameters enter."""
    makers = {output.index: operation for operation, _, outputs in origins.flow.steps for output in outputs}
    experts, mixed = dict[int, tuple[int, ...]](), set[int]()
    for operation, _, _ in origins.flow.steps:
        weight, _ = weight_and_bias(operation)
        if kind_of(operation) in LAYERS and weight is not None and origins.is_data(weight):
            experts[weight.index] = _experts(weight, origins, makers, mixed)
    return Mixtures(experts, mixed)


def _experts(weight: Value, origins: Origins, makers: Mapping[int, Operation], mixed: set[int]) -> tuple[int, ...]:
    pending, found = [weight.index], dict[int, None]()
    seen = set[int]()
    while pending:
        maker = makers.get(pending.pop())
        if maker is None or maker.outputs[0].index in seen:
            continue
        seen.add(maker.outputs[0].index)
        learned = [index for value in operands(maker) for index in origins.of(value).values]
        if learned:
            found.update(dict.fromkeys(learned))
            mixed.update(output.index for output in maker.outputs)
        elif kind_of(maker) is not Kind.LINEAR:
            pending.extend(value.index for value in maker.inputs if origins.is_data(value))
    return tuple(found)
