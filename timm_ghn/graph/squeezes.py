"""Values that are squeezed to one number a channel, and the products in which they gate the channels of others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from timm_ghn.graph.extents import UNKNOWN, Extent
from timm_ghn.graph.mixtures import Mixtures
from timm_ghn.graph.norms import SpelledNorm, Stage
from timm_ghn.graph.origins import Origins
from timm_ghn.trace.operations import Kind, kind_of, reduced_dims, row_of
from timm_ghn.trace.records import Operation, Value

Squeezes = Mapping[int, frozenset[int]]
"""Values with one number a channel, and the values in which they were squeezed."""

_ADAPTIVE = (Kind.ADAPTIVE_AVG_POOL, Kind.ADAPTIVE_MAX_POOL)
_NONE = frozenset[int]()


@dataclass(frozen=True, slots=True)
class Gates:
    """Products with squeezed values.

    Attributes:
        products: Numbers of the products of a value with positions and a squeezed one.
        squeezes: Numbers of the squeezed values that serve them, a norm or a mixture of kernels. None of these is a
            global pooling.
    """

    products: Set[int]
    squeezes: Set[int]


def find_squeezes(origins: Origins, extents: Mapping[int, Extent]) -> Squeezes:
    """Squeezed values."""

    def step(operation: Operation, output: Value, known: Sequence[frozenset[int] | None]) -> frozenset[int] | None:
        before = frozenset[int]().union(*(item or () for item in known)) if all(known) else _NONE
        channels = extents.get(operation.inputs[0].index, UNKNOWN).channels
        return (before | {output.index} if _squeezes(operation, channels) else before) or None

    return origins.flow.follow(step)


def find_gates(origins: Origins, squeezes: Squeezes, norms: Mapping[int, SpelledNorm], mixtures: Mixtures) -> Gates:
    """Gates, and the squeezes that are part of gates, norms and mixtures of kernels."""
    products = set[int]()
    used = set[int]().union(*(squeezes.get(kernel, _NONE) for kernel in mixtures.experts))
    for operation, sources, (output, *_) in origins.flow.steps:
        if len(sources) != 2 or kind_of(operation) not in (Kind.MULTIPLICATION, Kind.DIVISION):
            continue
        first, second = (squeezes.get(index, _NONE) for index in sources)
        norm = norms.get(output.index)
        if norm is not None and norm.stage is Stage.NORMALIZED:
            used |= first | second
        elif kind_of(operation) is Kind.MULTIPLICATION and bool(first) != bool(second):
            gated = operation.inputs[1 if first else 0]
            if gated.shape == output.shape:
                products.add(output.index)
                used |= first | second
    return Gates(products, used)


def _squeezes(operation: Operation, channels: int | None) -> bool:
    """Whether an operation reduces its operand of so many channels to one number a channel."""
    kind = kind_of(operation)
    if kind in _ADAPTIVE:
        return all(size == 1 for size in operation.outputs[0].shape[2:])
    if kind not in (Kind.MEAN, Kind.REDUCTION):
        return False
    shape, dims = operation.inputs[0].shape, reduced_dims(operation)
    if not dims or 0 in dims:
        return False
    left = [size for dim, size in enumerate(shape) if dim not in dims and dim > 0]
    gone = [size for dim, size in enumerate(shape) if dim in dims]
    if math.prod(left) == channels:
        return channels not in gone or (len(left) == 1 and dims[0] != len(shape) - 1)
    if channels in (*left, *gone):
        return False
    return dims in ((2, 3), (1, 2)) if len(shape) > 3 else dims == (1,)


def find_hard_gates(origins: Origins) -> Set[int]:
    """Numbers of the products that ppuda takes for gates: one other operation lies between a hard gate and them."""

    def step(operation: Operation, _: Value, known: Sequence[int | None]) -> int | None:
        if row_of(operation).is_hard_gate:
            return 0
        nearest = min((steps for steps in known if steps is not None), default=2)
        return nearest + 1 if nearest < 2 else None

    steps = origins.flow.follow(step)
    products = (item for item in origins.flow.steps if kind_of(item[0]) is Kind.MULTIPLICATION)
    return {output.index for _, sources, (output, *_) in products if any(steps.get(index) == 1 for index in sources)}
