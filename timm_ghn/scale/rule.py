"""The scale of predicted parameters: what a prediction is multiplied with. docs/scale.md lists the parts.

A GHN gives similar layers similar weights, and a kernel with more channels than a block repeats it, r times along the
input channels. So terms of a sum are in phase: n of them add up to n times one of them, where random weights give
sqrt(n) times. Where no norm layer follows, predictions are divided by what makes up for that.

Kernels that are orthogonalized are left as they are. The factors depend on graph, prediction, and the starting values
of learned scales. They do not depend on data, on the device, or on what else the model held before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from timm_ghn.ghn import Prediction
from timm_ghn.ghn.decoder import kernel_scale
from timm_ghn.graph.analyses import Analyses
from timm_ghn.graph.graph import Graph
from timm_ghn.graph.nodes import Layout, Op, Role, Target
from timm_ghn.scale.batch_norms import Growth, find_growth, find_last_batch_norms, find_overflowing
from timm_ghn.scale.branches import Scale, Start, find_scales
from timm_ghn.scale.products import find_products
from timm_ghn.scale.silent import find_silencing
from timm_ghn.scale.steps import Steps, find_chains
from timm_ghn.scale.streams import Streams, find_streams
from timm_ghn.trace.records import Trace

KERNEL_BAND = 3.0
"""Largest factor between the root mean square of a predicted kernel and its nominal scale that is left as it is."""

NORM_BAND = 10.0
"""The same for weights of norm layers that are too large."""

SMALLEST_NORM = 1e-3
"""Root mean square of weights of norm layers that is left as it is: residual branches may start near zero."""

MAX_CHAIN = 8
"""Layers in a row without a norm layer that are left as they are: more than a block of any kind has."""

# --- single tensors -------------------------------------------------------------------------------------------------


def gaining_norms(graph: Graph) -> frozenset[str]:
    """Weights of layer norms that do not end a branch: the output of each goes to more than sums."""
    readers: dict[int, set[Op]] = {}
    for source, target in graph.edges:
        readers.setdefault(source, set()).add(graph.nodes[target].op)
    nodes = [node for index, node in enumerate(graph.nodes) if node.op is Op.LN and readers.get(index) != {Op.SUM}]
    return frozenset(target.name for node in nodes for target in node.targets if target.role is Role.NORM_WEIGHT)


def bounding_factor(prediction: Prediction, gains: bool = False) -> float:
    """What a prediction is multiplied with so that its scale is sane; 1 for most.

    Args:
        prediction: Any prediction.
        gains: Whether it is one of `gaining_norms`.

    Returns:
        The factor; NaN if not all values of the prediction are finite.
    """
    rms = float(torch.linalg.vector_norm(prediction.block, dtype=torch.float64)) / math.sqrt(prediction.block.numel())
    nominal = nominal_scale(prediction)
    if rms == 0 or not math.isfinite(rms):
        return 1.0 if rms == 0 else math.nan
    role = prediction.target.role
    if role in (Role.WEIGHT, Role.CLASS_WEIGHT):
        is_sane = nominal / KERNEL_BAND <= rms <= nominal * KERNEL_BAND
    elif role is Role.NORM_WEIGHT:
        is_sane = (0.999 * nominal if gains else SMALLEST_NORM) <= rms <= nominal * NORM_BAND
    else:  # what is added may be as small as it likes
        is_sane = rms <= nominal * KERNEL_BAND
    return 1.0 if is_sane else nominal / rms


def nominal_scale(prediction: Prediction) -> float:
    """The root mean square that a decoder aims at (arXiv 2110.13100, section 4.2): 1 but for kernels."""
    if prediction.target.role not in (Role.WEIGHT, Role.CLASS_WEIGHT):
        return 1.0
    nominal = kernel_scale(prediction.kernel, is_table=False)
    if prediction.target.layout is Layout.DEPTH:
        nominal /= prediction.target.shape[2]
    return nominal


# --- structure ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Structure:
    """What the rule reads from a forward pass, by name of parameter.

    Attributes:
        branches: n g for the parameters of the layer, or overflowing batch norm, that ends a residual branch: the
            number of sums of the stream times what learned scales multiply the branch with.
        products: For parameters of layers behind a product of activations: the number of products that are added up,
            for the layer that ends a factor of a matrix product; its root, for one that ends both; else 1.
        chains: For parameters of layers: the length of the longest chain that ends in the layer.
        chained: Parameters of layers in chains of more than `MAX_CHAIN` layers.
        standardized: Parameters that are standardized when they are used.
        silencing: Biases of batch norms that could silence a channel for another batch norm: none may be negative.
    """

    branches: Mapping[str, float]
    products: Mapping[str, float]
    chains: Mapping[str, float]
    chained: frozenset[str]
    standardized: frozenset[str]
    silencing: frozenset[str]

    def factors(self, predicted: Iterable[Target], block: int) -> dict[str, float]:
        """What predictions are multiplied with, by name; 1 for all others.

        Args:
            predicted: Parameters that are predicted and not orthogonalized.
            block: Channels after which predicted kernels repeat.
        """
        divisors = {target.name: self._divisor(target, block) for target in predicted}
        return {name: 1 / divisor for name, divisor in divisors.items() if divisor > 1}

    def needs_orthogonal(self, name: str) -> bool:
        """Whether a layer's weight is orthogonalized wherever it is."""
        return name in self.standardized and not self.standardized.isdisjoint(self.chained)

    def _divisor(self, target: Target, block: int) -> float:
        name = target.name
        divisor = self.branches.get(name, 1.0)
        if target.role is Role.WEIGHT and (divisor > 1 or name in self.chained or name in self.products):
            in_channels = target.shape[0 if target.layout is Layout.TRANSPOSED else 1]
            divisor *= math.sqrt(max(in_channels / block, 1.0))
        if target.role is Role.BIAS and self.chains.get(name, 0) > MAX_CHAIN:
            divisor = max(divisor, self.chains[name])
        return divisor * self.products.get(name, 1)


def find_structure(analyses: Analyses, start: Start = lambda _: None) -> Structure:
    """Read residual streams, products of activations, chains without norms and silent channels from a forward pass.

    Args:
        analyses: Those of the forward pass.
        start: Starting values of the parameters that are kept. Learned scales of unknown size count as small.
    """
    steps, trace = Steps(analyses), analyses.trace
    streams = find_streams(steps)
    scales, chains, growths = find_scales(steps, streams, start), find_chains(steps), find_growth(steps, streams)
    products = find_products(steps, streams, scales, chains, growths)
    counted = (product for total in streams.sums.values() for product in products.get(total.branch, ()))
    layers = [
        (index, chains[output.index])
        for operation, _, (output, *_) in steps.flow.steps
        for index in steps.layer(operation)
    ]
    long = (chain for _, chain in layers if chain.length > MAX_CHAIN)
    return Structure(
        branches=_largest(trace, _branches(steps, streams, scales, growths)),
        products=_largest(trace, ((index, product.divisor) for product in counted for index in product.layers)),
        chains=_largest(trace, ((index, chain.length) for index, chain in layers)),
        chained=_names(trace, (index for chain in long for index in chain.layers)),
        standardized=_names(trace, steps.standardized),
        silencing=_names(trace, find_silencing(steps)),
    )


def _largest(trace: Trace, found: Iterable[tuple[int, float]]) -> dict[str, float]:
    """The largest number that was found for each parameter, by name."""
    largest: dict[str, float] = {}
    for index, number in found:
        for name in trace.parameters[index]:
            largest[name] = max(largest.get(name, 0), number)
    return largest


def _names(trace: Trace, parameters: Iterable[int]) -> frozenset[str]:
    return frozenset(name for index in parameters for name in trace.parameters[index])


def _branches(
    steps: Steps, streams: Streams, scales: Mapping[int, Scale], growths: Mapping[int, Growth]
) -> Iterator[tuple[int, float]]:
    """What ends each branch, by number of the parameter, with the number of sums of the stream times the gain."""
    overflowing = find_overflowing(steps, streams, growths)
    norms = find_last_batch_norms(steps, streams, scales, growths) if overflowing else {}
    of_norm = {output.index: steps.learned(op.inputs) for op, _, (output, *_) in steps.flow.steps} if norms else {}
    for _, sources, (output, *_) in steps.flow.steps:
        total = streams.sums.get(output.index)
        if total is None:
            continue
        scale, norm = scales[total.branch], norms.get(total.branch)
        ends = scale.layers or frozenset()
        is_before_branch = norm is not None and streams.places[sources[total.trunk]].ancestors >> norm & 1
        if norm is not None and total.stream in overflowing and not is_before_branch:
            ends |= of_norm[norm]
        yield from ((index, streams.lengths[total.stream] * scale.gain) for index in ends)
