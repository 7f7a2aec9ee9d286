"""Which parameters a node predicts, and in which shape the GHN reads them: two-dimensional, output channels first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from timm_ghn.graph.nodes import Layout, Role, Shape, Target
from timm_ghn.trace.operations import Kind, flat, is_matrix, kind_of
from timm_ghn.trace.records import Operation, Trace, Value

Found = tuple[Shape, tuple[Target, ...]]
"""The shape that the GHN reads, and the parameters of that shape."""


def _parameters(trace: Trace, values: Iterable[int], role: Role) -> list[Target]:
    """Parameters by the numbers of their values; of tied ones the first."""
    names = [trace.parameters[index][0] for index in values]
    return [Target(name, trace.parameter_shapes[name], role) for name in names]


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
    parameters = _parameters(trace, values, Role.WEIGHT)
    kernels = [target for target in parameters if is_matrix(target.shape)]
    kernels = kernels or [target for target in parameters if len(target.shape) > 1]
    if not kernels:
        return None
    largest = max(math.prod(target.shape) for target in kernels)
    kernels = [target for target in kernels if math.prod(target.shape) == largest]
    found = [canonical_kernel(target.shape, operand.shape, rank, is_swapped) for target in kernels]
    targets = (replace(target, layout=layout) for target, (_, layout) in zip(kernels, found, strict=True))
    return found[-1][0], tuple(targets)


def bias_targets(trace: Trace, values: Iterable[int], bias: Value) -> Found | None:
    """The vectors that a bias is made from; None if there is none."""
    parameters = _parameters(trace, values, Role.BIAS)
    targets = tuple(target for target in parameters if target.shape and math.prod(target.shape) == max(target.shape))
    return ((max(bias.shape, default=1),), targets) if targets else None


def norm_targets(trace: Trace, values: Iterable[int], role: Role, size: int | None = None) -> tuple[Target, ...]:
    """Parameters of a norm layer that have as many elements as asked for."""
    parameters = _parameters(trace, values, role)
    return tuple(target for target in parameters if size is None or math.prod(target.shape) == size)


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
    tables = [target for target in _parameters(trace, values, Role.POS_ENC) if is_matrix(target.shape)]
    if len(tables) != 1:
        return None
    shape = tables[0].shape
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
    return shape_read, (replace(tables[0], layout=layout),)


def canonical_kernel(shape: Shape, operand: Shape, spatial: int, swapped: bool) -> tuple[Shape, Layout]:
    """Kernel shape (K, C) or (K, C, kh, kw) that the GHN reads for a parameter, and how the parameter stores it.

    Args:
        shape: Shape of the parameter.
        operand: Shape of the tensor that the layer was called with, which may be derived from the parameter.
        spatial: Number of spatial dimensions of the layer; 0 for linear layers.
        swapped: Whether input channels come first.
    """
    if spatial == 0:
        if len(shape) > 2 and math.prod(shape[2:]) > 1:
            shape = (shape[0], math.prod(shape[1:]))
        rows, columns = shape[0], shape[1] if len(shape) > 1 else 1
        return ((columns, rows), Layout.TRANSPOSED) if swapped else ((rows, columns), Layout.PLAIN)
    kernel = operand if len(operand) == spatial + 2 else (1,) * (spatial + 2)
    if math.prod(shape) != math.prod(kernel):
        # An expert of a mixture; grouped mixtures fold the batch (1 here) into the output channels.
        return (*kernel[:2], *_plane(kernel[2:])), Layout.MIXTURE
    if swapped:
        return (kernel[1], kernel[0], *_plane(kernel[2:])), Layout.TRANSPOSED
    return (*kernel[:2], *_plane(kernel[2:])), Layout.DEPTH if spatial == 3 else Layout.PLAIN


def _plane(kernel: Shape) -> tuple[int, int]:
    """The two sides of the closest 2-D kernel."""
    if len(kernel) == 1:
        return kernel[0], 1
    return kernel[-2], kernel[-1]


def pool_shape(operation: Operation) -> Shape:
    """Kernel (1, 1, kh, kw) of a pooling."""
    kernel = [size for size in flat(operation.argument(1, "kernel_size", 1)) if isinstance(size, int)]
    return (1, 1, kernel[-2] if len(kernel) > 1 else kernel[0], kernel[-1])


def adaptive_window(operation: Operation) -> Shape | None:
    """Kernel of an adaptive pooling to a smaller map; None if that is one position, or as large as the map was."""
    if kind_of(operation) is not Kind.ADAPTIVE_AVG_POOL:
        return None
    before, after = operation.inputs[0].shape[2:], operation.outputs[0].shape[2:]
    if after == before or math.prod(after) == 1:
        return None
    window = [max(1, size // kept) for size, kept in zip(before, after, strict=True)]
    return (1, 1, *_plane(tuple(window)))


def token_grid(tokens: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of a table of tokens: the feature map's if it fits, else the largest square."""
    if grid is not None and 0 <= tokens - grid[0] * grid[1] <= 16:
        return grid
    side = math.isqrt(tokens)
    return side, side
