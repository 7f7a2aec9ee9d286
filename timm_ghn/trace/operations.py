"""The one table of operations: what a recorded call is, and where its operands stand; and one walk over a trace.

A new operation is one line in the table. Operations without a row are `Kind.OTHER`: they compute with all of their
operands, and nothing else is known of them.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any, TypeVar

from timm_ghn.trace.records import Operation, Trace, Value


class Kind(Enum):
    """What an operation is to those who read a trace."""

    CONVOLUTION = auto()
    LINEAR = auto()
    PRODUCT = auto()
    """A matrix product: a layer if one factor is a parameter."""
    ATTENTION = auto()
    """Fused attention without weights of its own."""
    MULTI_HEAD_ATTENTION = auto()
    """Attention with the weights that lead to it and away from it."""
    RECURRENT = auto()
    NORM = auto()
    """Normalization by a statistic of the activations, then an elementwise weight and bias."""
    SUM = auto()
    SCALED_SUM = auto()
    """A sum with an elementwise product."""
    OTHER_SUM = auto()
    """A sum of another form: a difference, or an addition to some places."""
    CONCATENATION = auto()
    MULTIPLICATION = auto()
    DIVISION = auto()
    SOFTMAX = auto()
    NORMALIZE = auto()
    """Division by a norm of each vector."""
    MAX_POOL = auto()
    AVG_POOL = auto()
    ADAPTIVE_MAX_POOL = auto()
    ADAPTIVE_AVG_POOL = auto()
    MEAN = auto()
    TOTAL = auto()
    """A sum over some dimensions of one operand."""
    REDUCTION = auto()
    """Another number in place of all along some dimensions."""
    MAXIMUM = auto()
    """The larger of two operands, elementwise."""
    VIEW = auto()
    """The same numbers in another shape or type."""
    PART = auto()
    """Some of the numbers, by their place."""
    LOOKUP = auto()
    """Some of the numbers, by an index."""
    BLANK = auto()
    """A new tensor of another's shape or type."""
    ACTIVATION = auto()
    """An elementwise function of one operand."""
    OTHER = auto()


@dataclass(frozen=True, slots=True)
class Row:
    """What the table says of an operation.

    Attributes:
        kind: What it is.
        rank: Spatial dimensions of a kernel.
        weight: Position of the argument "weight", the bias being the next one; None without such arguments.
        is_transposed: Whether a kernel has its input channels first.
        is_added_to: Whether the first argument is added to a matrix product.
        is_per_position: Whether a norm looks at the channels of one position, as layer norms do.
        is_spread: Whether it measures how far numbers spread, or divides by that.
        is_transposition: Whether a view changes the order of dimensions.
        is_like_another: Whether all operands but the first only lend their shape or type.
        is_hard_gate: Whether it is one of the activations behind which ppuda looks for gates.
        is_bounded: Whether results stay within bounds however large the operands are.
        is_flat: Whether results are the same for all operands below some number.
        exponent: The power of its operand as which a result grows.
    """

    kind: Kind = Kind.OTHER
    rank: int = 0
    weight: int | None = None
    is_transposed: bool = False
    is_added_to: bool = False
    is_per_position: bool = False
    is_spread: bool = False
    is_transposition: bool = False
    is_like_another: bool = False
    is_hard_gate: bool = False
    is_bounded: bool = False
    is_flat: bool = False
    exponent: float = 1.0


def _rows(row: Row, *names: str) -> dict[str, Row]:
    return dict.fromkeys(names, row)


TABLE: Mapping[str, Row] = {
    **{f"conv{rank}d": Row(Kind.CONVOLUTION, rank, weight=1) for rank in (1, 2, 3)},
    **{f"conv_transpose{rank}d": Row(Kind.CONVOLUTION, rank, weight=1, is_transposed=True) for rank in (1, 2, 3)},
    "linear": Row(Kind.LINEAR, weight=1),
    **_rows(Row(Kind.PRODUCT), "matmul", "mm", "bmm", "einsum", "tensordot"),
    **_rows(Row(Kind.PRODUCT, is_added_to=True), "addmm", "baddbmm", "addbmm"),
    "scaled_dot_product_attention": Row(Kind.ATTENTION),
    "multi_head_attention_forward": Row(Kind.MULTI_HEAD_ATTENTION),
    **_rows(Row(Kind.RECURRENT), "lstm", "gru", "rnn_tanh", "rnn_relu"),
    # Norms.
    "batch_norm": Row(Kind.NORM, weight=3, is_spread=True),
    "instance_norm": Row(Kind.NORM, weight=3, is_spread=True, is_bounded=True),
    "group_norm": Row(Kind.NORM, weight=2, is_spread=True, is_bounded=True),
    **_rows(Row(Kind.NORM, weight=2, is_per_position=True, is_spread=True, is_bounded=True), "layer_norm", "rms_norm"),
    # Elementwise operations on several operands.
    "add": Row(Kind.SUM),
    "addcmul": Row(Kind.SCALED_SUM),
    **_rows(Row(Kind.OTHER_SUM), "sub", "index_add"),
    **_rows(Row(Kind.CONCATENATION), "cat", "concat", "concatenate", "stack", "hstack", "vstack"),
    **_rows(Row(Kind.MULTIPLICATION), "mul", "multiply"),
    "div": Row(Kind.DIVISION),
    # Elementwise functions.
    "softmax": Row(Kind.SOFTMAX, is_bounded=True),
    "normalize": Row(Kind.NORMALIZE, is_spread=True, is_bounded=True),
    **_rows(Row(Kind.ACTIVATION, is_bounded=True), "sigmoid", "tanh"),
    **_rows(Row(Kind.ACTIVATION, is_bounded=True, is_flat=True), "hardtanh", "relu6", "sign"),
    **_rows(Row(Kind.ACTIVATION), "clamp", "clip"),  # Bounded, and flat, as their arguments say.
    "hardsigmoid": Row(Kind.ACTIVATION, is_hard_gate=True, is_bounded=True, is_flat=True),
    "hardswish": Row(Kind.ACTIVATION, is_hard_gate=True, is_flat=True),
    "relu": Row(Kind.ACTIVATION, is_flat=True),
    "square": Row(Kind.ACTIVATION, exponent=2.0),
    "sqrt": Row(Kind.ACTIVATION, exponent=0.5),
    "rsqrt": Row(Kind.ACTIVATION, exponent=-0.5),
    "reciprocal": Row(Kind.ACTIVATION, exponent=-1.0),
    # Pooling and other reductions.
    **{f"max_pool{rank}d": Row(Kind.MAX_POOL, rank) for rank in (1, 2, 3)},
    **{f"avg_pool{rank}d": Row(Kind.AVG_POOL, rank) for rank in (1, 2, 3)},
    **{f"adaptive_max_pool{rank}d": Row(Kind.ADAPTIVE_MAX_POOL, rank) for rank in (1, 2, 3)},
    **{f"adaptive_avg_pool{rank}d": Row(Kind.ADAPTIVE_AVG_POOL, rank) for rank in (1, 2, 3)},
    "mean": Row(Kind.MEAN),
    "sum": Row(Kind.TOTAL),
    "maximum": Row(Kind.MAXIMUM),
    **_rows(Row(Kind.REDUCTION), "amax", "max", "logsumexp"),
    **_rows(Row(Kind.REDUCTION, is_spread=True), "std", "std_mean", "norm", "vector_norm"),
    **_rows(Row(Kind.REDUCTION, is_spread=True, exponent=2.0), "var", "var_mean"),
    # What only moves numbers.
    **_rows(
        Row(Kind.VIEW),
        "float", "half", "bfloat16", "type", "contiguous", "clone", "view", "reshape", "flatten", "unflatten",
        "unsqueeze", "squeeze", "expand",
    ),
    **_rows(Row(Kind.VIEW, is_like_another=True), "to", "expand_as", "view_as", "reshape_as", "type_as"),
    **_rows(Row(Kind.VIEW, is_transposition=True), "t", "T", "mT", "transpose", "permute", "swapaxes", "movedim"),
    **_rows(Row(Kind.PART), "split", "chunk", "tensor_split", "unbind", "getitem", "narrow"),
    **_rows(Row(Kind.LOOKUP), "embedding", "index_select", "gather", "take", "grid_sample", "index"),
    **_rows(
        Row(Kind.BLANK),
        "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like",
        "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor",
    ),
}  # fmt: skip

_OTHER = Row()
LAYERS = frozenset({Kind.CONVOLUTION, Kind.LINEAR})
"""Kinds of operations that multiply with a weight, their second argument."""


def row_of(operation: Operation) -> Row:
    """What the table says of an operation."""
    if operation.name == "einsum" and _is_elementwise(operation.args[0]):
        return TABLE["mul"]
    row = TABLE.get(operation.name, _OTHER)
    if operation.name in ("clamp", "clip"):
        has_minimum = operation.argument(1, "min") is not None
        return replace(row, is_bounded=has_minimum and operation.argument(2, "max") is not None, is_flat=has_minimum)
    return row


def _is_elementwise(equation: Any) -> bool:
    """Whether an equation of `torch.einsum` sums over no index that two operands share: "bnc,c->bnc"."""
    if not isinstance(equation, str):
        return False
    operands, arrow, result = equation.replace("...", "").replace(" ", "").partition("->")
    shared = {index for index in operands if index != "," and sum(index in part for part in operands.split(",")) > 1}
    return bool(arrow) and shared <= set(result)


def kind_of(operation: Operation) -> Kind:
    """What an operation is."""
    return row_of(operation).kind


def operands(operation: Operation) -> tuple[Value, ...]:
    """The values that an operation computes with; not those that it only takes a shape or type from."""
    row = row_of(operation)
    if row.is_like_another:
        return operation.inputs[:1]
    return () if row.kind is Kind.BLANK else operation.inputs


def weight_and_bias(operation: Operation) -> tuple[Value | None, Value | None]:
    """The weight and the bias of a convolution, linear layer or norm; None for what it does not have."""
    position = row_of(operation).weight
    if position is None:
        return None, None
    weight, bias = operation.argument(position, "weight"), operation.argument(position + 1, "bias")
    return weight if isinstance(weight, Value) else None, bias if isinstance(bias, Value) else None


def factors(operation: Operation) -> tuple[Value, ...]:
    """The two factors of a matrix product; fewer if they are vectors."""
    return tuple(value for value in operation.inputs if len(value.shape) >= 2)[-2:]


def reduced_dims(operation: Operation) -> tuple[int, ...]:
    """The dimensions that a reduction leaves out, from 0; empty for all of them, or if that is not known."""
    keyword = "dim" if "dim" in operation.kwargs else "axis"
    dims = operation.argument(2 if operation.name in ("norm", "vector_norm") else 1, keyword)
    dims = (dims,) if isinstance(dims, int) else dims
    if not isinstance(dims, (list, tuple)) or not all(isinstance(dim, int) for dim in dims):
        return ()
    rank = len(operation.inputs[0].shape)
    return tuple(sorted(dim % rank for dim in dims))


def exponent_of(operation: Operation) -> float:
    """The power of its only operand as which the result of an elementwise operation grows."""
    exponent = operation.argument(1, "exponent") if operation.name == "pow" else row_of(operation).exponent
    return exponent if isinstance(exponent, (int, float)) else 1.0


def swaps_last_dims(operation: Operation) -> bool:
    """Whether an operation swaps the two dimensions of a matrix."""
    rank = len(operation.inputs[0].shape) if operation.inputs else 0
    if not row_of(operation).is_transposition or rank < 2:
        return False
    order = [item % rank for item in flat(operation.args[1:]) if isinstance(item, int)]
    if operation.name == "permute":
        return order[-2:] == [rank - 1, rank - 2]
    return operation.name not in ("transpose", "swapaxes") or sorted(order) == [rank - 2, rank - 1]


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether more than one dimension is longer than 1."""
    return sum(size > 1 for size in shape) > 1


def flat(items: Any) -> list[Any]:
    """The leaves of nested lists and tuples; a single item as a list of one."""
    if isinstance(items, (list, tuple)):
        return [leaf for item in items for leaf in flat(item)]
    return [items]


# --- one walk for all analyses: what is known of the inputs is carried forward, operation by operation --------------

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
