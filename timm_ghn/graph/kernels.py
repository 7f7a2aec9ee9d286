"""Kernels in the form that a GHN reads: two-dimensional, output channels first."""

from __future__ import annotations

import math

from timm_ghn.graph.nodes import Layout, Shape
from timm_ghn.trace.operations import Kind, flat, kind_of
from timm_ghn.trace.records import Operation


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
