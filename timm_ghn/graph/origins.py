"""What depends on the input, and which parameters all other values are made from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from timm_ghn.trace.operations import LAYERS, Flow, Kind, flat, is_matrix, kind_of, operands, swaps_last_dims
from timm_ghn.trace.records import Operation, Trace, Value

LOOKED_UP = "a table looked up by index, as of relative positions"
OVER_CONSTANTS = "a layer over constants (coordinates of positions)"


@dataclass(frozen=True, slots=True)
class Origin:
    """The parameters that a value which does not depend on the input is made from.

    Attributes:
        values: Numbers of the parameters' values.
        is_transposed: Whether the last two dimensions were swapped on the way.
        obstacle: Why they cannot be predicted as a table: entries were picked by an index, as from a table of relative
            positions, or they are the weights of layers that the input does not pass. Empty otherwise.
        is_spread: Whether vectors alone make the matrix, as by `torch.diag`: a matrix product with it is no layer.
    """

    values: tuple[int, ...] = ()
    is_transposed: bool = False
    obstacle: str = ""
    is_spread: bool = False


_NOTHING = Origin()
_DATA = Origin(obstacle="depends on the input")


@dataclass(frozen=True, slots=True)
class Origins:
    """Where the values of a trace come from.

    Attributes:
        data: Numbers of the values that depend on the input.
        learned: What the others are made from, by number.
        flow: The operations that make `data`.
    """

    data: frozenset[int]
    learned: Mapping[int, Origin]
    flow: Flow

    def is_data(self, value: Value) -> bool:
        """Whether a value depends on the input."""
        return value.index in self.data

    def of(self, value: Value) -> Origin:
        """What a value is made from; nothing for one that depends on the input."""
        return self.learned.get(value.index, _NOTHING)


def find_origins(trace: Trace) -> Origins:
    """Where the values of a trace come from."""
    start = dict.fromkeys(trace.inputs, _DATA) | {index: Origin((index,)) for index in trace.parameters}
    found = Flow.of(trace).follow(_step, start)
    data = frozenset(index for index, origin in found.items() if origin is _DATA)
    learned = {index: origin for index, origin in found.items() if origin is not _DATA and origin.values}
    return Origins(data, learned, Flow.of(trace, data))


def _step(operation: Operation, output: Value, known: Sequence[Origin | None]) -> Origin | None:
    found = [origin for origin in known if origin is not None]
    if any(origin is _DATA for origin in found):
        return _DATA
    if not found:
        return None
    over = known[0]
    if kind_of(operation) is Kind.LINEAR and over is not None and over.values and not over.obstacle:
        return _DATA  # a layer over learned tokens
    values = tuple(dict.fromkeys(index for origin in found for index in origin.values))
    is_transposed = any(origin.is_transposed for origin in found) != swaps_last_dims(operation)
    learned = [(value, origin) for value, origin in zip(operands(operation), known, strict=True) if origin is not None]
    is_spread = all(origin.is_spread or _spreads(operation, value, output) for value, origin in learned)
    return Origin(values, is_transposed, _obstacle(operation, known), is_spread)


def _spreads(operation: Operation, value: Value, output: Value) -> bool:
    """Whether an operation makes a matrix of a vector's numbers and others; vectors side by side are all its own."""
    becomes_matrix = is_matrix(output.shape) and not is_matrix(value.shape)
    is_larger = math.prod(output.shape) > math.prod(value.shape)
    return becomes_matrix and is_larger and kind_of(operation) is not Kind.CONCATENATION


def _obstacle(operation: Operation, known: Sequence[Origin | None]) -> str:
    """Why a value made from parameters and constants is no table, if so."""
    before = next((origin.obstacle for origin in known if origin is not None and origin.obstacle), "")
    if before:
        return before
    kind = kind_of(operation)
    if kind in LAYERS and known[0] is None:
        return OVER_CONSTANTS
    picks = operation.name == "getitem" and any(isinstance(item, Value) for item in flat(operation.args[1:]))
    is_mix = kind is Kind.PRODUCT and None in known
    return LOOKED_UP if kind is Kind.LOOKUP or picks or is_mix else ""
