"""Which parameters a node predicts, and in which shape the GHN reads them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from timm_ghn.graph.kernels import canonical_kernel, token_grid
from timm_ghn.graph.nodes import Layout, Role, Shape, Target
from timm_ghn.trace.records import Trace, Value

Found = tuple[Shape, tuple[Target, ...]]
"""The shape that the GHN reads, and the parameters of that shape."""


def parameter_name(trace: Trace, index: int) -> str:
    """Name of a parameter by the number of its value; of tied ones the first."""
    return trace.parameters[index][0]


def parameter_shape(trace: Trace, index: int) -> Shape:
    """Shape of a parameter by the number of its value."""
    return trace.parameter_shapes[parameter_name(trace, index)]


def weight_targets(
    trace: Trace, values: Sequence[int], operand: Value, *, rank: int = 0, is_swapped: bool = False
) -> Found | None:
    """The largest parameters of those that the weight of a layer is made from; None if they are vectors.

    Args:
        trace: The forward pass.
        values: Numbers of the parameters that the weight is made from.
        operand: The weight that the layer was called with.
        rank: Spatial dimensions of the layer.
        is_swapped: Whether input channels come first.
    """
    shapes = {index: parameter_shape(trace, index) for index in values}
    kernels = [index for index in values if _is_matrix(shapes[index])]
    kernels = kernels or [index for index in values if len(shapes[index]) > 1]
    if not kernels:
        return None
    largest = max(math.prod(shapes[index]) for index in kernels)
    kernels = [index for index in kernels if math.prod(shapes[index]) == largest]
    found = [canonical_kernel(shapes[index], operand.shape, rank, is_swapped) for index in kernels]
    pairs = zip(kernels, found, strict=True)
    targets = [Target(parameter_name(trace, index), shapes[index], Role.WEIGHT, layout) for index, (_, layout) in pairs]
    return found[-1][0], tuple(targets)


def bias_targets(trace: Trace, values: Iterable[int], bias: Value) -> Found | None:
    """The vectors that a bias is made from; None if there is none."""
    shapes = {index: parameter_shape(trace, index) for index in values}
    vectors = [index for index, shape in shapes.items() if shape and math.prod(shape) == max(shape)]
    targets = tuple(Target(parameter_name(trace, index), shapes[index], Role.BIAS) for index in vectors)
    return ((max(bias.shape, default=1),), targets) if targets else None


def norm_targets(trace: Trace, values: Iterable[int], role: Role, size: int | None = None) -> tuple[Target, ...]:
    """Parameters of a norm layer that have as many elements as asked for."""
    shapes = {index: parameter_shape(trace, index) for index in values}
    kept = [index for index, shape in shapes.items() if size is None or math.prod(shape) == size]
    return tuple(Target(parameter_name(trace, index), shapes[index], role) for index in kept)


def table_target(
    trace: Trace, values: Sequence[int], data: Value, channels: int | None, grid: tuple[int, int] | None
) -> Found | None:
    """The table of positions that is added to activations, to be read as (1, C, h, w); None if it is not one.

    Args:
        trace: The forward pass.
        values: Numbers of the parameters that the table is made from.
        data: The activations.
        channels: Their channels, if known.
        grid: (h, w) of the feature map that they come from, if there was one.
    """
    tables = [index for index in values if _is_matrix(parameter_shape(trace, index))]
    if len(tables) != 1:
        return None
    name, shape = parameter_name(trace, tables[0]), parameter_shape(trace, tables[0])
    if len(shape) == 4 and shape[0] == 1:
        channels = data.shape[-1] if len(data.shape) == 3 else channels
        if shape[-1] == channels != shape[1]:
            shape_read, layout = (1, shape[3], shape[1], shape[2]), Layout.CHANNELS_LAST
        else:
            shape_read, layout = shape, Layout.PLAIN
    elif (len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)) and shape[-1] == data.shape[-1]:
        shape_read, layout = (1, shape[-1], *token_grid(shape[-2], grid)), Layout.TOKENS
    else:
        return None
    return shape_read, (Target(name, shape, Role.POS_ENC, layout),)


def _is_matrix(shape: Shape) -> bool:
    """Whether more than one dimension is longer than 1."""
    return sum(size > 1 for size in shape) > 1
