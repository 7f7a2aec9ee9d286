"""What a recorded forward pass is made of. Tensors are referred to by number, so a `Trace` holds none of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor at one moment of the forward pass: an in-place operation makes a new value.

    Attributes:
        index: Number of the value in its trace.
        shape: Shape of the tensor.
    """

    index: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Operation:
    """One recorded call.

    Attributes:
        name: Name of the function without the marks of methods, operators and in-place variants: "add" stands for
            `torch.add`, `Tensor.add_`, `Tensor.__radd__` and so on.
        args: Positional arguments, with a `Value` in place of every tensor.
        kwargs: Keyword arguments, likewise.
        inputs: The values among the arguments, in order.
        outputs: The values that the call made or changed.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]

    def argument(self, position: int, keyword: str, default: Any = None) -> Any:
        """The argument that was passed at a position or by its keyword."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(keyword, default)


@dataclass(frozen=True, slots=True)
class Trace:
    """What a forward pass did.

    Attributes:
        operations: Recorded calls, in order.
        inputs: Indices of the values that are the model's input.
        outputs: Indices of the values that the model returned, in order.
        parameters: Names of the parameters by the index of their value (several for tied parameters).
        parameter_shapes: Shape by name of every parameter of the model, also of those that the pass did not use.
    """

    operations: tuple[Operation, ...]
    inputs: frozenset[int]
    outputs: tuple[int, ...]
    parameters: Mapping[int, tuple[str, ...]]
    parameter_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
