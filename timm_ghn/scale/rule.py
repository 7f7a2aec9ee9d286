"""The scale of predicted parameters: a rule of five parts that reads operators, graph structure and shapes, no names.

**Part 1, single tensors.** GHNs aim at a nominal scale: kernels at `sqrt(2 / fan-in)` (`sqrt(1 / fan-in)` for
depthwise and wide ones), norm weights, biases and tables of positions at about 1 or less. A tensor whose root mean
square lies within a band around it is left as it is; one outside is brought back to the nominal scale. Weights of norm
layers may be small, as those that end residual branches are in trained networks. A GHN that was trained well stays
within the bands, so that nothing is changed. But a layer norm that does not end a branch multiplies all that follows it
up to the next norm, where orthogonalized weights have a scale of their own: its weights may be too small for that, and
those below 1 are brought to 1.

Parts 2 and 3 are about sums. A GHN gives similar layers similar weights, and a kernel with more channels than a block
repeats it. So terms that would be independent with random weights have the same direction: n of them add up to n times
one of them, not to sqrt(n) times. Where a norm layer follows, that does not matter.

**Part 2, residual branches.** A stream `x = x + f(x)` passes through n such sums without a layer in between, and f
ends in a layer whose output no norm layer sees, multiplied with a learned scale that starts at g (1 without one; scales
whose elements differ count as 0). If n g > 1, the predicted bias of that layer is divided by n g, and the weight by
n g sqrt(r), where r is how often the block repeats along the input channels.

**Part 3, chains.** On paths of more than 8 layers without a norm layer (residual sums do not end them), kernels are
divided by sqrt(r), and biases of layers from the ninth on by the number of layers up to there. A kernel that is
standardized when it is used has no scale to correct; where there is such a path through one, a method that
orthogonalizes does so with all standardized kernels of the network, before L as well.

**Part 4, products of activations.** What adds up in phase is squared where two activations are multiplied, or one with
itself. So where the product of two, none of which is a softmax or bounded, reaches a residual sum unnormalized, kernels
of all layers behind it up to the last norm layer are divided by sqrt(r). Where it is a matrix product, a sum over n
such products, the layer that ends one of the factors is divided by n as well, or by its root if it ends both.

**Part 5, batch norms before any training.** In evaluation an untrained batch norm does nothing, and a deep network
overflows. So where branches raise a stream to more than its square (ReLU attention: a product of three), or a stream
reaches beyond 96 layers without another kind of norm layer, the weight and bias of the last batch norm of each of its
branches are divided by its n; so are those of the streams that lead to it.

Weights that are orthogonalized are left as they are: a Q is a Q. All of it depends on graph, prediction, and the value
of constant scales alone: neither on what else the model held before, nor on data, nor on the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from timm_ghn.ghn import Prediction
from timm_ghn.ghn.decoder import kernel_scale
from timm_ghn.ghn.layout import repeats
from timm_ghn.graph.graph import Graph
from timm_ghn.graph.nodes import Layout, Op, Role, Target

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


def bounded(prediction: Prediction, gains: bool = False) -> Prediction:
    """Part 1 of the rule: the prediction itself, or one of nominal scale if its scale is out of the band.

    Args:
        prediction: Any prediction.
        gains: Whether it is one of `gaining_norms`.
    """
    factor = bounding_factor(prediction, gains)
    return prediction if factor == 1 else replace(prediction, block=prediction.block * factor)


def bounding_factor(prediction: Prediction, gains: bool = False) -> float:
    """What a prediction is multiplied with so that its scale is sane; 1 for most. Arguments as of `bounded`."""
    rms = float(torch.linalg.vector_norm(prediction.block, dtype=torch.float64)) / math.sqrt(prediction.block.numel())
    nominal = nominal_scale(prediction)
    if rms == 0 or not math.isfinite(rms):
        return 1.0
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
        nominal /= repeats(prediction.kernel, prediction.target.shape, Layout.DEPTH)
    return nominal


# --- structure ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Structure:
    """What the rule reads from a forward pass, by name of parameter.

    Attributes:
        branches: Parameters of layers that end a residual branch without a norm: the number of sums that their stream
            passes, times what the branch is multiplied with. The same for the last batch norm of each branch of a
            stream that overflows while batch norms do nothing, or leads to one that does.
        products: Parameters of layers behind a product of activations: the number of products that are added up for
            the layer that ends a factor, its root if it ends both; 1 for other layers and products.
        chains: Parameters of layers: the number of layers on the longest path to them, themselves included, without a
            norm layer.
        chained: Parameters of layers on paths of more than `MAX_CHAIN` layers without a norm layer.
        standardized: Parameters of which standardized copies are used.
    """

    branches: Mapping[str, float]
    products: Mapping[str, float]
    chains: Mapping[str, int]
    chained: frozenset[str]
    standardized: frozenset[str]

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
        phase = math.sqrt(max(_in_channels(target) / block, 1.0)) if target.role is Role.WEIGHT else 1.0
        if divisor > 1 or name in self.chained or name in self.products:
            divisor *= phase
        if target.role is Role.BIAS and self.chains.get(name, 0) > MAX_CHAIN:
            divisor = max(divisor, self.chains[name])
        return divisor * self.products.get(name, 1)


def _in_channels(target: Target) -> int:
    """Channels that an output of a predicted kernel sums over."""
    return target.shape[0 if target.layout is Layout.TRANSPOSED else 1]


def describe_factor(factors: Mapping[str, float], name: str) -> str:
    """How a prediction was scaled, for the report; empty if it was not."""
    factor = factors.get(name, 1.0)
    return "" if factor == 1 else f"divided by {1 / factor:.3g}: what adds up in phase without a norm layer"
