"""How much arithmetic a recorded forward pass is."""

from __future__ import annotations

import math
from collections.abc import Callable

from timm_ghn.trace.records import Operation, Trace


def multiplications(trace: Trace) -> int:
    """Multiplications in the convolutions and matrix products of a trace; all else is small beside them."""
    return sum(_COUNTS[operation.name](operation) for operation in trace.operations if operation.name in _COUNTS)


def _result(operation: Operation) -> tuple[int, ...]:
    return operation.outputs[0].shape if operation.outputs else ()


def _convolution(operation: Operation) -> int:
    """Every output needs a kernel (C / groups, ...)."""
    return math.prod(_result(operation)) * math.prod(operation.inputs[1].shape[1:])


def _transposed_convolution(operation: Operation) -> int:
    """Every input meets a kernel (K / groups, ...)."""
    return math.prod(operation.inputs[0].shape) * math.prod(operation.inputs[1].shape[1:])


def _product(operation: Operation) -> int:
    """Every output is a sum over the last dimension of the first factor."""
    shape = operation.inputs[0].shape
    return math.prod(_result(operation)) * (shape[-1] if shape else 1)


def _attention(operation: Operation) -> int:
    """Similarities (queries, keys, C) and a weighted sum of as many products."""
    query, key = operation.inputs[:2]
    return 2 * math.prod(query.shape) * key.shape[-2]


_COUNTS: dict[str, Callable[[Operation], int]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed_convolution),
    **dict.fromkeys(("linear", "matmul", "bmm", "addmm", "baddbmm"), _product),
    "scaled_dot_product_attention": _attention,
}
