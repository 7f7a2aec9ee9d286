"""One walk over a trace for all analyses: what is known of the inputs is carried forward, operation by operation."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from timm_ghn.trace.operations import operands
from timm_ghn.trace.records import Operation, Trace, Value

_T = TypeVar("_T")

Step = Callable[[Operation, Value, Sequence[_T | None]], _T | None]
"""What is known of one output of an operation: given the operation, the output, and what is known of each operand."""


@dataclass(frozen=True, slots=True)
class Flow:
    """The operations that make some values, with those of their operands that are among these values.

    Attributes:
        steps: Operation, numbers of the operands, and outputs, in order.
    """

    steps: tuple[tuple[Operation, tuple[int, ...], tuple[Value, ...]], ...]

    @classmethod
    def of(cls, trace: Trace, values: Container[int] | None = None) -> Flow:
        """The flow of all values of a trace, or of some of them by number."""
        steps = []
        for operation in trace.operations:
            sources = tuple(v.index for v in operands(operation) if values is None or v.index in values)
            outputs = tuple(v for v in operation.outputs if values is None or v.index in values)
            if outputs:
                steps.append((operation, sources, outputs))
        return cls(tuple(steps))

    def follow(self, step: Step[_T], start: Mapping[int, _T] | None = None) -> dict[int, _T]:
        """Carry what is known forward.

        Args:
            step: What is known of an output; None for nothing.
            start: What is known of values that no operation makes.

        Returns:
            What is known, by number of the value.
        """
        found = dict(start or {})
        for operation, sources, outputs in self.steps:
            known = [found.get(index) for index in sources]
            for output in outputs:
                result = step(operation, output, known)
                if result is not None:
                    found[output.index] = result
        return found
