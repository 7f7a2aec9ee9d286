"""The scale of predicted parameters: a rule of three parts that reads operators, graph structure and shapes, no names.

**Part 1, single tensors.** GHNs aim at a nominal scale: kernels at `sqrt(2 / fan-in)` (`sqrt(1 / fan-in)` for
depthwise and wide ones), norm weights, biases and tables of positions at about 1 or less. A tensor whose root mean
square lies within a band around it is left as it is; one outside is brought back to the nominal scale. A GHN that was
trained well stays within the band, so that nothing is changed.

**Part 2, residual branches.** Where a stream `x = x + f(x)` passes through n such sums without a layer in between,
and f ends in a layer whose output nothing normalizes or gates, the predicted weight and bias of that layer are divided
by n. A GHN gives similar blocks similar weights, so that what they add has the same direction and the stream grows like
n (not like sqrt(n), as with independent weights): the sum of n branches is then about as large as one of them. Branches
that end in a norm layer, or in a product with a learned scale (layer scale, skip gain), are left as they are, and so
are weights that are orthogonalized: a Q is a Q.

**Part 3, chains without norms.** If the longest path to a layer, since the last norm layer, has n > 8 layers (residual
sums do not end it), nobody corrects what has added up. The layer's predicted bias is divided by n. A kernel that is
standardized when it is used has no scale to correct, but its repeated tiles answer to repeated channels in phase, which
multiplies activations with every layer; where such a kernel has n > 8, a method that orthogonalizes does so with all
standardized kernels of the network, before L as well.

All of it depends on graph and prediction alone: neither on what the model held before, nor on data, nor on the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from timm_ghn.ghn import Prediction
from timm_ghn.ghn.layout import repeats
from timm_ghn.graph.facts import (
    ADDED_PRODUCTS,
    CONVOLUTIONS,
    MULTIPLICATIONS,
    PRODUCTS,
    TRANSPOSED_CONVOLUTIONS,
)
from timm_ghn.graph.nodes import Layout, Role, Target
from timm_ghn.graph.trace import Operation, Trace, Value

KERNEL_BAND = 3.0
"""Largest factor between the root mean square of a predicted kernel and its nominal scale that is left as it is."""

NORM_BAND = 10.0
"""The same for weights of norm layers."""

MAX_CHAIN = 8
"""Layers in a row without a norm layer that are left as they are: more than a block of any kind has."""

_NORMS = {"batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"}
_LAYERS = {"linear", *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, *PRODUCTS, *ADDED_PRODUCTS}
_SUMS = {"add"}
_GATES = {*MULTIPLICATIONS, "div", "addcmul"}
_STANDARDIZATIONS = {*_NORMS, "std", "var", "std_mean", "var_mean", "norm", "vector_norm", "normalize"}


# --- single tensors -------------------------------------------------------------------------------------------------


def bounded(prediction: Prediction) -> Prediction:
    """Part 1 of the rule: the prediction itself, or one of nominal scale if its scale is out of the band."""
    factor = bounding_factor(prediction)
    return prediction if factor == 1 else replace(prediction, block=prediction.block * factor)


def bounding_factor(prediction: Prediction) -> float:
    """What a prediction is multiplied with so that its scale is sane; 1 for most."""
    rms = float(torch.linalg.vector_norm(prediction.block, dtype=torch.float64)) / math.sqrt(prediction.block.numel())
    nominal = nominal_scale(prediction)
    if rms == 0 or not math.isfinite(rms):
        return 1.0
    role = prediction.target.role
    if role in (Role.WEIGHT, Role.CLASS_WEIGHT):
        is_sane = nominal / KERNEL_BAND <= rms <= nominal * KERNEL_BAND
    elif role is Role.NORM_WEIGHT:
        is_sane = nominal / NORM_BAND <= rms <= nominal * NORM_BAND
    else:  # what is added may be as small as it likes
        is_sane = rms <= nominal * KERNEL_BAND
    return 1.0 if is_sane else nominal / rms


def nominal_scale(prediction: Prediction) -> float:
    """The root mean square that a decoder aims at (arXiv 2110.13100, section 4.2): 1 but for kernels."""
    if prediction.target.role not in (Role.WEIGHT, Role.CLASS_WEIGHT):
        return 1.0
    kernel = prediction.kernel
    without_relu = len(kernel) == 4 and (kernel[1] == 1 or kernel[2] < kernel[3])
    nominal = math.sqrt((1.0 if without_relu else 2.0) / math.prod(kernel[1:]))
    if prediction.target.layout is Layout.DEPTH:
        nominal /= repeats(kernel, prediction.target.shape, Layout.DEPTH)
    return nominal


# --- structure ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Structure:
    """What the rule reads from a forward pass, by name of parameter.

    Attributes:
        branches: Parameters of layers that end a residual branch without a norm or a learned scale: the number of sums
            that their stream passes.
        chains: Parameters of layers: the number of layers on the longest path to them, themselves included, without a
            norm layer.
        standardized: Parameters of which standardized copies are used.
    """

    branches: Mapping[str, int]
    chains: Mapping[str, int]
    standardized: frozenset[str]

    def factors(self, predicted: Iterable[Target]) -> dict[str, float]:
        """What predictions are multiplied with, by name; 1 for all others.

        Args:
            predicted: Parameters that are predicted and not orthogonalized.
        """
        found = {}
        for target in predicted:
            count = self.branches.get(target.name, 1)
            if target.role is Role.BIAS and self.chains.get(target.name, 0) > MAX_CHAIN:
                count = max(count, self.chains[target.name])
            if count > 1:
                found[target.name] = 1 / count
        return found

    def needs_orthogonal(self, name: str) -> bool:
        """Whether a layer's weight is orthogonalized wherever it is."""
        return name in self.standardized and any(self.chains.get(other, 0) > MAX_CHAIN for other in self.standardized)


def describe_factor(factors: Mapping[str, float], name: str) -> str:
    """How a prediction was scaled, for the report; empty if it was not."""
    factor = factors.get(name, 1.0)
    return "" if factor == 1 else f"divided by {round(1 / factor)}: so many add up without a norm layer"


def find_structure(trace: Trace) -> Structure:
    """Read residual streams and chains without norms from a recorded forward pass."""
    streams = _Streams(trace)
    for operation in trace.operations:
        streams.add(operation)
    return streams.structure()


@dataclass(frozen=True, slots=True)
class _Path:
    """What is known of a value that depends on the input. Sets of values are bit masks.

    Attributes:
        ancestors: The values that it was computed from, itself among them.
        stream: The values that are the same but for sums, views and elementwise functions, itself among them.
        chain: The residual stream that it belongs to, if it has passed a sum.
        scale: The parameters that set its scale last; None if a norm layer or a learned scale did.
        length: Layers on the longest path to it since the last norm layer.
    """

    ancestors: int
    stream: int
    chain: int | None = None
    scale: frozenset[int] | None = frozenset()
    length: int = 0


@dataclass(slots=True)
class _Streams:
    """Follows the values of a forward pass in the order of the operations."""

    trace: Trace
    _paths: dict[int, _Path] = field(default_factory=dict)
    _origins: dict[int, frozenset[int]] = field(default_factory=dict)  # parameters of values without data
    _sums: list[int] = field(default_factory=list)  # by chain
    _ends: list[tuple[int, frozenset[int]]] = field(default_factory=list)  # chain, and parameters of a branch's end
    _lengths: dict[int, int] = field(default_factory=dict)  # by parameter
    _standardized: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        for index in self.trace.inputs:
            self._paths[index] = _Path(1 << index, 1 << index)
        for index in self.trace.parameters:
            self._origins[index] = frozenset({index})

    def add(self, operation: Operation) -> None:
        """Follow one operation."""
        data = [self._paths[value.index] for value in operation.inputs if value.index in self._paths]
        learned = self._learned(operation.inputs)
        if not data:
            if operation.name in _STANDARDIZATIONS:
                self._standardized |= learned
            for output in operation.outputs:
                self._origins[output.index] = learned
            return
        path = self._next(operation, data, learned)
        for output in operation.outputs:
            own = 1 << output.index
            self._paths[output.index] = replace(path, ancestors=path.ancestors | own, stream=path.stream | own)

    def structure(self) -> Structure:
        """What was found, by name."""
        branches: dict[str, int] = {}
        for chain, parameters in self._ends:
            for name in self._names(parameters):
                branches[name] = max(branches.get(name, 0), self._sums[chain])
        chains = {name: length for index, length in self._lengths.items() for name in self._names({index})}
        return Structure(branches, chains, frozenset(self._names(self._standardized)))

    def _names(self, parameters: Iterable[int]) -> Iterator[str]:
        return (name for index in parameters for name in self.trace.parameters[index])

    def _learned(self, values: Sequence[Value]) -> frozenset[int]:
        return frozenset[int]().union(*(self._origins.get(value.index, ()) for value in values))

    def _next(self, operation: Operation, data: Sequence[_Path], learned: frozenset[int]) -> _Path:
        """The path of an operation's outputs, without the outputs themselves."""
        ancestors = 0
        for path in data:
            ancestors |= path.ancestors
        length = max(path.length for path in data)
        name = operation.name
        if name in _NORMS:
            return _Path(ancestors, 0, scale=None)
        if name == "multi_head_attention_forward":
            last = [operation.argument(11, "out_proj_weight"), operation.argument(12, "out_proj_bias")]
            return self._layer(ancestors, self._learned([v for v in last if isinstance(v, Value)]), length + 1)
        if name in _LAYERS and learned:
            return self._layer(ancestors, learned, length)
        if len(data) == 2 and name in _SUMS:
            return self._sum(data[0], data[1], ancestors, length)
        if len(data) == 1:
            scale = None if name in _GATES and learned else data[0].scale
            return _Path(ancestors, data[0].stream, data[0].chain, scale, length)
        return _Path(ancestors, 0, scale=_union(data), length=length)

    def _layer(self, ancestors: int, learned: frozenset[int], length: int) -> _Path:
        for index in learned:
            self._lengths[index] = max(self._lengths.get(index, 0), length + 1)
        return _Path(ancestors, 0, scale=learned, length=length + 1)

    def _sum(self, first: _Path, second: _Path, ancestors: int, length: int) -> _Path:
        if not first.stream & second.ancestors:
            first, second = second, first
        if not first.stream & second.ancestors:
            return _Path(ancestors, 0, scale=_union([first, second]), length=length)
        chain = first.chain
        if chain is None:
            chain = len(self._sums)
            self._sums.append(0)
        self._sums[chain] += 1
        if second.scale:
            self._ends.append((chain, second.scale))
        return _Path(ancestors, first.stream, chain, first.scale, length)


def _union(paths: Sequence[_Path]) -> frozenset[int] | None:
    """The parameters that set the scales of several values; None if a norm or a learned scale set one."""
    found: frozenset[int] = frozenset()
    for path in paths:
        if path.scale is None:
            return None
        found |= path.scale
    return found
