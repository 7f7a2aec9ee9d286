"""Traces built by hand, an operation a line."""

from __future__ import annotations

from typing import Any

from timm_ghn.trace.records import Operation, Trace, Value


class TraceBuilder:
    """Writes down calls as the recorder does.

    t = TraceBuilder()
    x, w = t.input(1, 4), t.parameter("w", 8, 4)
    trace = t.trace(t.call("linear", x, w, shape=(1, 8)))
    """

    def __init__(self) -> None:
        self._count = 0
        self._operations: list[Operation] = []
        self._inputs: set[int] = set()
        self._parameters: dict[int, tuple[str, ...]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def value(self, *shape: int) -> Value:
        """A value that no operation makes: a constant."""
        self._count += 1
        return Value(self._count - 1, shape)

    def input(self, *shape: int) -> Value:
        """An input of the model."""
        value = self.value(*shape)
        self._inputs.add(value.index)
        return value

    def parameter(self, name: str, *shape: int) -> Value:
        """A parameter of the model."""
        value = self.value(*shape)
        self._parameters[value.index] = (name,)
        self._shapes[name] = shape
        return value

    def call(self, name: str, *args: Any, shape: tuple[int, ...] | None = None, **kwargs: Any) -> Value:
        """The output of an operation, of the shape of the first value if none is given."""
        inputs = tuple(item for item in (*args, *kwargs.values()) if isinstance(item, Value))
        output = self.value(*(inputs[0].shape if shape is None else shape))
        self._operations.append(Operation(name, args, kwargs, inputs, (output,)))
        return output

    def trace(self, *outputs: Value) -> Trace:
        """All that was called."""
        indices = tuple(value.index for value in outputs)
        return Trace(tuple(self._operations), frozenset(self._inputs), indices, self._parameters, self._shapes)
