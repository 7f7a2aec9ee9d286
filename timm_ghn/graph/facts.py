"""What a value of a recorded forward pass is: derived from the input or from parameters, squeezed, a similarity.

One pass over the operations, in order. The facts decide which products are gates or attention, and which means are
global poolings, before any node of the graph is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from timm_ghn.graph.nodes import Op, Shape
from timm_ghn.graph.norms import Statistic, keeps_values, norm_made_by, statistic_after
from timm_ghn.trace.records import Operation, Trace, Value

CONVOLUTIONS = {f"conv{rank}d": rank for rank in (1, 2, 3)}
TRANSPOSED_CONVOLUTIONS = {f"conv_transpose{rank}d": rank for rank in (1, 2, 3)}
PRODUCTS = {"matmul", "mm", "bmm", "einsum", "tensordot"}
ADDED_PRODUCTS = {"addmm", "baddbmm", "addbmm"}
ADAPTIVE_AVG_POOLS = {"adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"}
_ADAPTIVE_POOLS = ADAPTIVE_AVG_POOLS | {"adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"}
_REDUCTIONS = {"mean", "amax", "max", "norm", "vector_norm", "logsumexp", "std", "var"}
MULTIPLICATIONS = {"mul", "multiply"}
_HARD_GATES = {"hardsigmoid", "hardswish"}
_TRANSPOSITIONS = {"t", "T", "mT", "transpose", "permute", "swapaxes", "movedim"}
_LOOKUPS = {"embedding", "index_select", "gather", "take", "grid_sample", "index"}
_PARTS = {"split", "chunk", "tensor_split", "unbind", "getitem", "narrow"}
_LIKE_ANOTHER = {"to", "expand_as", "view_as", "reshape_as", "type_as"}

LOOKED_UP = "a table looked up by index, as of relative positions"
OVER_CONSTANTS = "a layer over constants (coordinates of positions)"


@dataclass(frozen=True, slots=True)
class Origin:
    """The parameters that a value which does not depend on the input is made from.

    Attributes:
        values: Indices of the parameters' values.
        transposed: Whether the last two dimensions were swapped on the way.
        obstacle: Why they cannot be predicted as a table: entries were picked by an index, as from a table of relative
            positions, or they are the weights of layers that the input does not pass. Empty otherwise.
    """

    values: tuple[int, ...] = ()
    transposed: bool = False
    obstacle: str = ""


@dataclass(frozen=True, slots=True)
class Fact:
    """What the first pass knows of a value.

    Attributes:
        data: Whether it depends on the input.
        origin: What it is made from, if not.
        channels: Number of channels that the layer before gave it; None if unknown.
        squeezes: Operations (by number) that reduced it to one number a channel; empty for a value with positions.
        similarity: Sizes of the two dimensions of a matrix of similarities, else None.
        product: The last product of two activations (by number of its operation) that led to it, if no layer with
            weights came after. Of consecutive products the last is the attention, whatever the order of the factors.
        grid: (h, w) of the last feature map that led to it.
        hard_gate: Operations since a hard sigmoid or swish (ppuda's reading of cse), None if there was none.
        affine: Whether it comes straight from a product with a parameter, or is a part of one, and has no bias yet.
        weighted: Whether it is a product of values with weights from a softmax, so that its sum is attention.
        statistic: The statistic of the activations that it is made from, else None.
        normalized: The norm that it comes straight from, if that was spelled out; None otherwise.
        scaled: The multiplication (by number) that applied the weight of such a norm, if it comes straight from it.
    """

    data: bool = False
    origin: Origin = Origin()
    channels: int | None = None
    squeezes: frozenset[int] = frozenset()
    similarity: tuple[int, int] | None = None
    product: int | None = None
    grid: tuple[int, int] | None = None
    hard_gate: int | None = None
    affine: bool = False
    weighted: bool = False
    statistic: Statistic | None = None
    normalized: Op | None = None
    scaled: int | None = None


@dataclass(slots=True)
class Facts:
    """Result of the first pass: facts by value, and the roles of single operations."""

    by_value: dict[int, Fact] = field(default_factory=dict)
    norms: dict[int, Op] = field(default_factory=dict)  # multiplications that apply the weight of a norm
    gates: set[int] = field(default_factory=set)
    squeezes: set[int] = field(default_factory=set)
    attentions: set[int] = field(default_factory=set)
    mixtures: dict[int, tuple[int, ...]] = field(default_factory=dict)  # by operation that uses the mixed weight
    mixed: set[int] = field(default_factory=set)  # operations that mix weights

    def of(self, value: Value) -> Fact:
        """What is known of a value."""
        return self.by_value.get(value.index, _NOTHING)


_NOTHING = Fact()


def find_facts(trace: Trace) -> Facts:
    """Go through the operations once, and note what every value is."""
    facts = Facts()
    for index in trace.inputs:
        facts.by_value[index] = Fact(data=True)
    for index in trace.parameters:
        facts.by_value[index] = Fact(origin=Origin((index,)))
    makers: dict[int, int] = {}
    for number, operation in enumerate(trace.operations):
        fact = _note(facts, number, operation)
        for output in operation.outputs:
            facts.by_value[output.index] = replace(fact, similarity=_surviving(fact.similarity, output.shape))
            makers[output.index] = number
    for number, operation in enumerate(trace.operations):
        weight = _weight_of(operation)
        if weight is not None and facts.of(weight).data:
            _note_mixture(facts, trace, number, weight, makers)
    return facts


def operands(operation: Operation) -> tuple[Value, ...]:
    """The values that an operation computes with; not those that it only takes a shape or type from."""
    if operation.name in _LIKE_ANOTHER:
        return operation.inputs[:1]
    return () if operation.name.endswith("_like") or operation.name.startswith("new_") else operation.inputs


def _weight_of(operation: Operation) -> Value | None:
    """Second operand of a convolution or linear layer."""
    if operation.name in CONVOLUTIONS or operation.name in TRANSPOSED_CONVOLUTIONS or operation.name == "linear":
        weight = operation.argument(1, "weight")
        return weight if isinstance(weight, Value) else None
    return None


def _note(facts: Facts, number: int, operation: Operation) -> Fact:
    """Fact of an operation's outputs; notes gates, squeezes and attention on the way."""
    values = operands(operation)
    known = [facts.of(value) for value in values]
    data = [fact for fact in known if fact.data]
    if not data:
        return _note_constant(operation, known)
    name, output = operation.name, operation.outputs[0]
    fact = _inherited(operation, data)
    weight = _weight_of(operation)
    if weight is not None:
        grid = output.shape[-2:] if len(output.shape) == 4 and name != "linear" and not fact.squeezes else fact.grid
        affine = operation.argument(2, "bias") is None  # else a vector that is added later is not its bias
        channels = _out_channels(name, weight.shape, output)
        return replace(_after_layer(fact), channels=channels, grid=grid, affine=affine)
    if name in PRODUCTS or name in ADDED_PRODUCTS:
        return _note_product(facts, number, operation, fact)
    if name == "scaled_dot_product_attention":
        return replace(fact, similarity=None, product=None)
    if name == "multi_head_attention_forward":
        return replace(fact, similarity=None, product=None, channels=output.shape[-1])
    if name == "softmax" and len(output.shape) >= 2:
        return replace(fact, similarity=fact.similarity or (output.shape[-2], output.shape[-1]))
    if name in ("sum", "mean") and data[0].weighted:
        facts.attentions.add(number)
        return replace(fact, weighted=False, similarity=None, product=number)
    if _squeezes(operation, data[0]):
        return replace(fact, squeezes=fact.squeezes | {number}, similarity=None)
    if name in MULTIPLICATIONS or (fact.normalized is not None and not keeps_values(operation)):
        return _note_multiplication(facts, number, operation, fact)
    return fact


def _inherited(operation: Operation, data: Sequence[Fact]) -> Fact:
    """What an operation without a meaning of its own passes on from those operands that depend on the input."""
    statistics = [item.statistic for item in data]
    source = operation.inputs[0]
    dims = _reduced_dims(operation, len(source.shape))
    is_same = len(data) == 1 and keeps_values(operation)
    return Fact(
        data=True,
        channels=_agreed([item.channels for item in data]),
        squeezes=frozenset().union(*(item.squeezes for item in data)) if all(i.squeezes for i in data) else frozenset(),
        similarity=next((item.similarity for item in data if item.similarity), None),
        product=max((item.product for item in data if item.product is not None), default=None),
        grid=next((item.grid for item in data if item.grid), None),
        hard_gate=_next_hard_gate(operation, data),
        affine=len(data) == 1 and data[0].affine and (is_same or operation.name in _PARTS),
        weighted=is_same and data[0].weighted,
        statistic=statistic_after(operation, statistics, dims, data[0].channels),
        normalized=data[0].normalized if is_same else norm_made_by(operation, statistics),
        scaled=data[0].scaled if is_same else None,
    )


def _after_layer(fact: Fact) -> Fact:
    """A fact behind a product with weights: what it was before does not matter for what it is."""
    return replace(fact, affine=True, product=None, statistic=None, normalized=None, weighted=False, scaled=None)


def _note_multiplication(facts: Facts, number: int, operation: Operation, fact: Fact) -> Fact:
    """An elementwise product: with a squeezed gate, with weights from a softmax, or with the weight of a norm."""
    known = [facts.of(value) for value in operation.inputs]
    output = operation.outputs[0]
    if fact.normalized is not None:  # by a statistic, which is no pooling
        facts.squeezes |= known[0].squeezes | known[-1].squeezes
    elif len(known) == 2 and all(item.data for item in known):
        squeezed = [bool(item.squeezes) for item in known]
        if squeezed[0] != squeezed[1] and operation.inputs[squeezed[0]].shape == output.shape:
            facts.gates.add(number)
            facts.squeezes |= known[0].squeezes | known[1].squeezes
        weights = [item.similarity is not None for item in known]
        return replace(fact, weighted=weights[0] != weights[1] and not any(squeezed))
    weight = next((value for value, item in zip(operation.inputs, known, strict=True) if item.origin.values), None)
    normalized = next((item.normalized for item in known if item.normalized), None)
    if weight is not None and normalized is not None and max(weight.shape, default=1) == fact.channels:
        facts.norms[number] = normalized
        return replace(fact, scaled=number)
    return fact


def _note_constant(operation: Operation, known: Sequence[Fact]) -> Fact:
    """Fact of a value made from parameters and constants only."""
    if operation.name == "linear" and known[0].origin.values and not known[0].origin.obstacle:
        return Fact(data=True, channels=operation.outputs[0].shape[-1], affine=True)  # a layer over learned tokens
    values = tuple(dict.fromkeys(index for fact in known for index in fact.origin.values))
    transposed = any(fact.origin.transposed for fact in known) != _swaps_last(operation)
    return Fact(origin=Origin(values, transposed, _obstacle(operation, known) if values else ""))


def _obstacle(operation: Operation, known: Sequence[Fact]) -> str:
    """Why a value made from parameters and constants is no table, if so."""
    before = next((fact.origin.obstacle for fact in known if fact.origin.obstacle), "")
    if before:
        return before
    is_layer = operation.name == "linear" or operation.name in CONVOLUTIONS
    if is_layer and not known[0].origin.values:
        return OVER_CONSTANTS
    picks = operation.name == "getitem" and any(isinstance(item, Value) for item in flat(operation.args[1:]))
    is_mix = operation.name in PRODUCTS and not all(fact.origin.values for fact in known)
    return LOOKED_UP if operation.name in _LOOKUPS or picks or is_mix else ""


def flat(items: Any) -> list[Any]:
    """The leaves of nested lists and tuples; a single item as a list of one."""
    if isinstance(items, (list, tuple)):
        return [leaf for item in items for leaf in flat(item)]
    return [items]


def _swaps_last(operation: Operation) -> bool:
    """Whether the operation swaps the two dimensions of a matrix."""
    if operation.name not in _TRANSPOSITIONS or not operation.inputs:
        return False
    rank = len(operation.inputs[0].shape)
    if rank < 2:
        return False
    if operation.name == "permute":
        order = [item % rank for item in flat(operation.args[1:]) if isinstance(item, int)]
        return order[-2:] == [rank - 1, rank - 2]
    if operation.name in ("transpose", "swapaxes"):
        axes = sorted(item % rank for item in flat(operation.args[1:]) if isinstance(item, int))
        return axes == [rank - 2, rank - 1]
    return True


def _agreed(channels: Sequence[int | None]) -> int | None:
    known = {item for item in channels if item is not None}
    return known.pop() if len(known) == 1 else None


def _out_channels(name: str, weight: Shape, output: Value) -> int | None:
    if name == "linear":
        return output.shape[-1]
    rank = CONVOLUTIONS.get(name) or TRANSPOSED_CONVOLUTIONS[name]
    return output.shape[-rank - 1] if len(output.shape) > rank else weight[0]


def _next_hard_gate(operation: Operation, data: Sequence[Fact]) -> int | None:
    if operation.name in _HARD_GATES:
        return 0
    steps = [fact.hard_gate for fact in data if fact.hard_gate is not None]
    return min(steps) + 1 if steps and min(steps) < 2 else None


def _note_product(facts: Facts, number: int, operation: Operation, fact: Fact) -> Fact:
    """A matrix product: a layer if one operand is a parameter, else similarities or attention."""
    operands = [value for value in operation.inputs if len(value.shape) >= 2][-2:]
    known = [facts.of(value) for value in operands]
    output = operation.outputs[0]
    if len(known) < 2 or not all(item.data for item in known):
        channels = output.shape[-1] if output.shape else None
        return replace(_after_layer(fact), channels=channels)
    fact = replace(fact, statistic=None, normalized=None, weighted=False, scaled=None)
    earlier = {item.product for item in known if item.product is not None}
    if earlier or any(item.similarity for item in known):
        facts.attentions -= earlier
        facts.attentions.add(number)
        return replace(fact, similarity=None, product=number)
    sizes = (output.shape[-2], output.shape[-1]) if len(output.shape) >= 2 else None
    return replace(fact, similarity=sizes, product=number)


def _surviving(similarity: tuple[int, int] | None, shape: Shape) -> tuple[int, int] | None:
    """The similarity's sizes if a tensor of that shape still has both of them."""
    if similarity is None:
        return None
    sizes = list(shape)
    for size in similarity:
        if size not in sizes:
            return None
        sizes.remove(size)
    return similarity


def _squeezes(operation: Operation, source: Fact) -> bool:
    """Whether the operation reduces its input to one number a channel."""
    if operation.name in _ADAPTIVE_POOLS:
        return all(size == 1 for size in operation.outputs[0].shape[2:])
    if operation.name not in _REDUCTIONS:
        return False
    shape = operation.inputs[0].shape
    dims = _reduced_dims(operation, len(shape))
    if not dims or 0 in dims or source.similarity is not None:
        return False
    left = [size for dim, size in enumerate(shape) if dim not in dims and dim > 0]
    gone = [size for dim, size in enumerate(shape) if dim in dims]
    if math.prod(left) == source.channels:
        return source.channels not in gone or (len(left) == 1 and dims[0] != len(shape) - 1)
    if source.channels in (*left, *gone):
        return False
    return dims in ((2, 3), (1, 2)) if len(shape) > 3 else dims == (1,)


def _reduced_dims(operation: Operation, rank: int) -> tuple[int, ...]:
    keyword = "dim" if "dim" in operation.kwargs else "axis"
    position = 2 if operation.name in ("norm", "vector_norm") else 1
    dims = operation.argument(position, keyword)
    if isinstance(dims, int):
        dims = (dims,)
    if not isinstance(dims, (list, tuple)) or not all(isinstance(dim, int) for dim in dims):
        return ()
    return tuple(sorted(dim % rank for dim in dims))


def _note_mixture(facts: Facts, trace: Trace, number: int, weight: Value, makers: Mapping[int, int]) -> None:
    """Find the parameters that a weight which depends on the input is mixed from (CondConv and its like)."""
    pending, seen, found = [weight.index], set[int](), list[int]()
    while pending:
        index = pending.pop()
        maker = makers.get(index)
        if maker is None or maker in seen:
            continue
        seen.add(maker)
        operation = trace.operations[maker]
        origins = [origin for value in operation.inputs for origin in facts.of(value).origin.values]
        if origins:
            found.extend(origins)
            facts.mixed.add(maker)
        elif operation.name != "linear":
            pending.extend(value.index for value in operation.inputs if facts.of(value).data)
    facts.mixtures[number] = tuple(dict.fromkeys(found))
    facts.squeezes |= facts.of(weight).squeezes  # as those of gates
