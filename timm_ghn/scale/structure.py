"""Residual streams, chains without norms and products of activations in a recorded forward pass.

What `timm_ghn.scale.rule` needs to know of a network's structure. Values are followed in the order of the
operations; sets of values are bit masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

from timm_ghn.graph.facts import (
    ADDED_PRODUCTS,
    CONVOLUTIONS,
    MULTIPLICATIONS,
    PRODUCTS,
    TRANSPOSED_CONVOLUTIONS,
    Facts,
    find_facts,
    operands,
)
from timm_ghn.graph.norms import keeps_values
from timm_ghn.scale.rule import MAX_AFFINE_CHAIN, MAX_CHAIN, MAX_POWER, Structure
from timm_ghn.trace.records import Operation, Trace, Value

_NORMS = {"batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"}
_LAYERS = {"linear", *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, *PRODUCTS, *ADDED_PRODUCTS}
_SUMS = {"add"}
_GATES = {*MULTIPLICATIONS, "div", "addcmul"}
_STANDARDIZATIONS = {*_NORMS, "std", "var", "std_mean", "var_mean", "norm", "vector_norm", "normalize"}
_MATRIX_PRODUCTS = {"matmul", "mm", "bmm"}
_PRODUCTS_OF_TWO = {*_MATRIX_PRODUCTS, *MULTIPLICATIONS}
_MULTIPLYING = {*_LAYERS, *MULTIPLICATIONS}
_WEIGHTS = {"softmax", "normalize"}
_BOUNDED = {
    *_WEIGHTS, *(_NORMS - {"batch_norm"}), "sigmoid", "hardsigmoid", "tanh", "hardtanh", "relu6", "clamp", "clip",
    "sign",
}  # fmt: skip
_EXPONENTS = {"square": 2.0, "var": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}

Start = Callable[[str], float | None]
"""What all elements of a parameter that is kept start from, by its name; None if that is not one known number."""


def _unknown(_: str) -> float | None:
    return None


def find_structure(trace: Trace, start: Start = _unknown, *, facts: Facts | None = None) -> Structure:
    """Read residual streams, products of activations and chains without norms from a recorded forward pass.

    Args:
        trace: The forward pass.
        start: Starting values of the parameters that are kept. Learned scales of unknown size count as small.
        facts: What `find_facts` says of it, where that is known already.
    """
    streams = _Streams(trace, facts or find_facts(trace), start)
    for operation in trace.operations:
        streams.add(operation)
    return streams.structure()


@dataclass(frozen=True, slots=True)
class _Product:
    """A product of two activations that nothing has normalized yet, or a sum of such products.

    Attributes:
        layers: Parameters of all layers behind its factors; of a sum, of the one that ends one of them, or both.
        divisor: What makes a sum as large as one of its products, when the layer is divided by it; 1 for a product.
    """

    layers: frozenset[int]
    divisor: float


class _Weights(IntEnum):
    """Whether a value weights a mean.

    A layer that mixes the heads of weights (talking heads) gives weights again; one behind features that weights were
    multiplied with does not.
    """

    NONE = 0
    APPLIED = 1
    PURE = 2


@dataclass(frozen=True, slots=True)
class _Path:
    """What is known of a value that depends on the input. Sets of values are bit masks.

    Attributes:
        ancestors: The values and parameters that it was computed from, itself among them.
        stream: The values that are the same but for sums, views and elementwise functions, itself among them.
        chain: The residual stream that it belongs to, if it has passed a sum.
        streams: All residual streams on the way to it since the last norm layer that is no batch norm.
        scale: The parameters that set its scale last; None if a norm layer or a learned scale of unknown size did.
        gain: What learned scales have multiplied it with since.
        batch_norm: The parameters of the last batch norm on the way to it, if no bound, product with another
            activation, or scale of unknown size follows.
        length: Layers on the longest path to it since the last norm layer.
        affine: Layers on the longest path to it since the last norm layer that is no batch norm.
        layers: Parameters of the layers on all paths to it since the last norm layer, but for what a division cancels.
        weights: Whether it comes from a softmax or a division by a norm, so that it is a mean that it weights.
        products: Products that it was computed from since the last norm layer.
        power: By which power it grows if the input does, batch norms being affine as in evaluation.
        peak: The largest power on the way to it since the last norm layer, or since it left its stream.
    """

    ancestors: int
    stream: int
    chain: int | None = None
    streams: int = 0
    scale: frozenset[int] | None = frozenset()
    gain: float = 1.0
    batch_norm: frozenset[int] = frozenset()
    length: int = 0
    affine: int = 0
    layers: int = 0
    weights: _Weights = _Weights.NONE
    products: frozenset[_Product] = frozenset()
    power: float = 1.0
    peak: float = 1.0


@dataclass(frozen=True, slots=True)
class _End:
    """What sets the scale of a residual branch.

    Attributes:
        chain: Number of its stream.
        parameters: Those of its last layer, if no norm follows, or of its last batch norm.
        gain: What known learned scales multiply it with.
        is_batch_norm: Whether they are a batch norm's.
    """

    chain: int
    parameters: frozenset[int]
    gain: float
    is_batch_norm: bool


@dataclass(slots=True)
class _Streams:
    """Follows the values of a forward pass in the order of the operations."""

    trace: Trace
    facts: Facts
    start: Start
    _paths: dict[int, _Path] = field(default_factory=dict)
    _origins: dict[int, frozenset[int]] = field(default_factory=dict)  # parameters of values without data
    _views: dict[int, int] = field(default_factory=dict)  # the parameter that a value is but for its shape and type
    _sums: list[int] = field(default_factory=list)  # by chain
    _overflowing: int = 0  # chains
    _ends: list[_End] = field(default_factory=list)
    _products: dict[int, float] = field(default_factory=dict)  # by parameter
    _lengths: dict[int, int] = field(default_factory=dict)  # by parameter
    _chained: int = 0
    _standardized: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        for index in self.trace.inputs:
            self._paths[index] = _Path(1 << index, 1 << index)
        for index in self.trace.parameters:
            self._origins[index] = frozenset({index})
            self._views[index] = index

    def add(self, operation: Operation) -> None:
        """Follow one operation."""
        data = [self._paths[value.index] for value in operands(operation) if value.index in self._paths]
        learned = self._learned(operation.inputs)
        if not data:
            self._add_constant(operation, learned)
            return
        path = self._next(operation, data, learned)
        ancestors = path.ancestors | _mask(learned)
        for output in operation.outputs:
            own = 1 << output.index
            self._paths[output.index] = replace(path, ancestors=ancestors | own, stream=path.stream | own)

    def structure(self) -> Structure:
        """What was found, by name."""
        branches: dict[str, float] = {}
        for end in self._ends:
            if self._overflowing >> end.chain & 1 or not end.is_batch_norm:
                for name in self._names(end.parameters):
                    branches[name] = max(branches.get(name, 0), self._sums[end.chain] * end.gain)
        products = {name: count for index, count in self._products.items() for name in self._names({index})}
        chains = {name: length for index, length in self._lengths.items() for name in self._names({index})}
        chained = self._names(index for index in self._lengths if self._chained >> index & 1)
        return Structure(branches, products, chains, frozenset(chained), frozenset(self._names(self._standardized)))

    def _names(self, parameters: Iterable[int]) -> Iterator[str]:
        return (name for index in parameters for name in self.trace.parameters[index])

    def _learned(self, values: Sequence[Value]) -> frozenset[int]:
        return frozenset[int]().union(*(self._origins.get(value.index, ()) for value in values))

    def _add_constant(self, operation: Operation, learned: frozenset[int]) -> None:
        """Follow an operation on parameters and constants alone."""
        if operation.name in _STANDARDIZATIONS:
            self._standardized |= learned
        for output in operation.outputs:
            self._origins[output.index] = learned
            source = self._views.get(operation.inputs[0].index) if operation.inputs else None
            if source is not None and keeps_values(operation):
                self._views[output.index] = source

    def _next(self, operation: Operation, data: Sequence[_Path], learned: frozenset[int]) -> _Path:
        """The path of an operation's outputs, without the outputs themselves."""
        name = operation.name
        path = _merged(operation, data)
        if name in _NORMS or self._is_spelled_norm(operation):
            normed = replace(path, scale=None, gain=1.0, length=0, layers=0, products=frozenset())
            is_batch_norm = name == "batch_norm"
            return (
                replace(normed, batch_norm=learned)
                if is_batch_norm
                else replace(normed, streams=0, batch_norm=frozenset(), affine=0, power=0.0, peak=0.0)
            )
        if name == "multi_head_attention_forward":
            last = [operation.argument(11, "out_proj_weight"), operation.argument(12, "out_proj_bias")]
            return self._layer(replace(path, length=path.length + 1), self._learned(_values(last)))
        if name in _LAYERS and learned:
            return self._layer(path, learned)
        if len(data) == 2 and name in _SUMS:
            return self._sum(data[0], data[1], path)
        path = replace(path, products=path.products | _products(operation, data))
        if len(data) == 2 and name in _MATRIX_PRODUCTS:
            return replace(path, batch_norm=frozenset(), weights=_Weights.NONE)
        if len(data) == 1:
            path = replace(path, stream=data[0].stream, chain=data[0].chain)
            if name in _GATES and learned:
                gain = self._start(operation)
                if gain is None:
                    return replace(path, scale=None, batch_norm=frozenset())
                return replace(path, gain=path.gain * gain)
        return path

    def _is_spelled_norm(self, operation: Operation) -> bool:
        """Whether it is the division by a statistic of the activations that ends a norm layer without a function."""
        is_normalized = self.facts.of(operation.outputs[0]).normalized is not None
        return is_normalized and not keeps_values(operation)

    def _start(self, operation: Operation) -> float | None:
        """The size of the learned scale that an operation multiplies with, as far as is known."""
        sources = [self._views.get(value.index) for value in operation.inputs if value.index in self._origins]
        if operation.name not in MULTIPLICATIONS or len(sources) != 1 or sources[0] is None:
            return None
        value = self.start(self.trace.parameters[sources[0]][0])
        return None if value is None else abs(value)

    def _layer(self, path: _Path, learned: frozenset[int]) -> _Path:
        for index in learned:
            self._lengths[index] = max(self._lengths.get(index, 0), path.length + 1)
        layers = path.layers | _mask(learned)
        if path.length >= MAX_CHAIN:
            self._chained |= layers
        if path.affine >= MAX_AFFINE_CHAIN:
            self._overflowing |= path.streams
        weights = path.weights if path.weights is _Weights.PURE else _Weights.NONE
        return replace(
            path,
            scale=learned,
            gain=1.0,
            length=path.length + 1,
            affine=path.affine + 1,
            layers=layers,
            weights=weights,
        )

    def _sum(self, first: _Path, second: _Path, path: _Path) -> _Path:
        if not first.stream & second.ancestors:
            first, second = second, first
        if not first.stream & second.ancestors:
            return path
        number = first.chain
        if number is None:
            number = len(self._sums)
            self._sums.append(0)
        self._sums[number] += 1
        streams = path.streams | 1 << number
        if second.peak > MAX_POWER:
            self._overflowing |= streams
        if second.scale:
            self._ends.append(_End(number, second.scale, second.gain, is_batch_norm=False))
        if second.batch_norm and not _mask(second.batch_norm) & first.ancestors:
            self._ends.append(_End(number, second.batch_norm, second.gain, is_batch_norm=True))
        for product in second.products:
            for index in product.layers:
                self._products[index] = max(self._products.get(index, 1.0), product.divisor)
        return replace(
            first,
            ancestors=path.ancestors,
            chain=number,
            streams=streams,
            gain=1.0,
            length=path.length,
            affine=path.affine,
            layers=path.layers,
            power=path.power,
        )


def _mask(indices: Iterable[int]) -> int:
    return sum(1 << index for index in indices)


def _bits(mask: int) -> frozenset[int]:
    return frozenset(index for index in range(mask.bit_length()) if mask >> index & 1)


def _values(arguments: Sequence[object]) -> list[Value]:
    return [value for value in arguments if isinstance(value, Value)]


def _merged(operation: Operation, data: Sequence[_Path]) -> _Path:
    """What holds for the output of any operation: a value of its own, made from all of the operands."""
    ancestors = layers = streams = 0
    for path in data:
        ancestors |= path.ancestors
        layers |= path.layers
        streams |= path.streams
    power = _power(operation, [path.power for path in data])
    name = operation.name
    is_bounded = name in _BOUNDED
    is_divided = name == "div" and len(data) == 2
    return _Path(
        ancestors,
        stream=0,
        streams=streams,
        scale=_union(data),
        gain=max(path.gain for path in data),
        layers=data[0].layers & ~data[1].layers if is_divided else layers,
        batch_norm=_last_batch_norm(data),
        length=max(path.length for path in data),
        affine=0 if is_bounded else max(path.affine for path in data),
        weights=_weights(name, [path.weights for path in data]),
        products=frozenset() if is_bounded or is_divided else _all_products(data),
        power=power,
        peak=0.0 if is_bounded else max(power, *(path.peak for path in data)),
    )


def _last_batch_norm(data: Sequence[_Path]) -> frozenset[int]:
    """The batch norm that set the scale of a value made from several: that of the only one which grows."""
    growing = [path for path in data if path.affine]
    return growing[0].batch_norm if len(growing) == 1 else frozenset()


def _weights(name: str, known: Sequence[_Weights]) -> _Weights:
    """Whether an output weights a mean, given the same of the operands that depend on the input."""
    if name in _WEIGHTS:
        return _Weights.PURE
    if len(known) == 1:
        return known[0]
    return _Weights.APPLIED if name in MULTIPLICATIONS and any(known) else min(known)


def _all_products(data: Sequence[_Path]) -> frozenset[_Product]:
    return frozenset[_Product]().union(*(path.products for path in data))


def _products(operation: Operation, data: Sequence[_Path]) -> frozenset[_Product]:
    """The products of activations that an operation computes, of two or of one with itself (squares).

    A factor that a norm layer or a bound holds counts as none: what adds up in phase goes into the other one alone. So
    does a product with a factor that weights a mean.
    """
    if any(path.weights for path in data):
        return frozenset()
    name = operation.name
    counted = {_sum_of_products(operation, data)} if len(data) == 2 and name in _MATRIX_PRODUCTS else set()
    factors = [path for path in data if path.layers and path.affine]
    is_product = len(factors) == 2 and name in _PRODUCTS_OF_TWO
    is_power = len(factors) == 1 and _power(operation, [1.0]) > 1
    layers = _bits(factors[0].layers | factors[-1].layers) if is_product or is_power else frozenset()
    return frozenset(product for product in (*counted, _Product(layers, 1.0)) if product.layers)


def _sum_of_products(operation: Operation, data: Sequence[_Path]) -> _Product:
    """What a matrix product of two activations adds up.

    The factor that is scaled is the one with more layers behind it: what ends there serves nothing else. A layer that
    ends both of them (queries, keys and values in one) counts twice in every product.
    """
    layer = max(data, key=lambda path: path.length).scale or frozenset()
    count = operation.inputs[0].shape[-1]
    is_shared = all(path.scale is not None and layer <= path.scale for path in data)
    return _Product(layer, math.sqrt(count) if is_shared else count)


def _power(operation: Operation, powers: Sequence[float]) -> float:
    """By which power an output grows with the network's input, given that of the operands that depend on it."""
    name = operation.name
    if name in _BOUNDED:
        return 0.0
    if name in _MULTIPLYING:
        return sum(powers)
    if name == "div" and len(powers) == 2:
        return powers[0] - powers[1]
    exponent = operation.argument(1, "exponent") if name == "pow" else _EXPONENTS.get(name, 1.0)
    return max(powers) * (exponent if isinstance(exponent, (int, float)) else 1.0)


def _union(paths: Sequence[_Path]) -> frozenset[int] | None:
    """The parameters that set the scales of several values; None if a norm or a learned scale set one."""
    found: frozenset[int] = frozenset()
    for path in paths:
        if path.scale is None:
            return None
        found |= path.scale
    return found
