"""Products of activations that nothing normalizes, from which what adds up in phase comes out squared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from timm_ghn.scale.batch_norms import Depth, power_after
from timm_ghn.scale.branches import Scale
from timm_ghn.scale.chains import Chain
from timm_ghn.scale.steps import Steps
from timm_ghn.scale.streams import Streams
from timm_ghn.trace.operations import Kind, kind_of, operands, row_of
from timm_ghn.trace.records import Operation, Value


class Weights(IntEnum):
    """Whether a value weights a mean, as the outcome of a softmax or of a division by a norm does.

    A layer that mixes the heads of weights (talking heads) gives weights again; a layer behind features that weights
    were multiplied with does not.
    """

    NONE = 0
    APPLIED = 1
    PURE = 2


@dataclass(frozen=True, slots=True)
class Product:
    """A product of two activations, of one with itself, or a sum of such products.

    Attributes:
        layers: Numbers of the parameters of all layers behind the factors; of a sum, of the layer that ends one of the
            factors, or both.
        divisor: What makes a sum as large as one of its products, when the layer is divided by it; 1 for a product.
    """

    layers: frozenset[int]
    divisor: float = 1.0


Products = frozenset[Product]


def find_weights(steps: Steps, streams: Streams) -> Mapping[int, Weights]:
    """Whether values weight a mean, by number."""

    def step(operation: Operation, output: Value, known: Sequence[Weights | None]) -> Weights | None:
        kind, found = kind_of(operation), [weights or Weights.NONE for weights in known]
        trunk = streams.before(output, known)
        if kind in (Kind.SOFTMAX, Kind.NORMALIZE):
            return Weights.PURE
        if trunk is not None or not any(found):
            return trunk
        merged = Weights.APPLIED if kind is Kind.MULTIPLICATION and len(found) > 1 else min(found)
        if steps.layer(operation) and not steps.is_norm(operation):
            return merged if merged is Weights.PURE else None
        return None if kind is Kind.PRODUCT and len(found) == 2 else merged

    return steps.flow.follow(step)


@dataclass(frozen=True)
class Factors:
    """What is known of the factors of products, by number of the value.

    Attributes:
        chains: The layers behind them.
        depths: How many layers there are since something held their scale.
        scales: The layers that end them.
        weights: Whether they weight a mean.
    """

    chains: Mapping[int, Chain]
    depths: Mapping[int, Depth]
    scales: Mapping[int, Scale]
    weights: Mapping[int, Weights]


def find_products(steps: Steps, streams: Streams, factors: Factors) -> Mapping[int, Products]:
    """The products that values were computed from and nothing has normalized since, by number of the value."""

    def step(operation: Operation, output: Value, known: Sequence[Products | None]) -> Products | None:
        if steps.is_norm(operation):
            return None
        total = streams.sums.get(output.index)
        if total is not None:
            return known[total.trunk]
        is_held = row_of(operation).is_bounded or (kind_of(operation) is Kind.DIVISION and len(known) == 2)
        before = Products().union(*(products or () for products in known if not is_held))
        return (before if steps.layer(operation) else before | _products_of(operation, factors)) or None

    return steps.flow.follow(step)


def _products_of(operation: Operation, known: Factors) -> Products:
    """The products that an operation computes.

    A factor that a norm layer or a bound holds counts as none: what adds up in phase goes into the other one alone. So
    does a product with a factor that weights a mean.
    """
    data = [value.index for value in operands(operation) if value.index in known.chains]
    if any(index in known.weights for index in data):
        return frozenset()
    is_pair, kind = len(data) == 2, kind_of(operation)
    counted = {_sum_of_products(operation, data, known)} if is_pair and kind is Kind.PRODUCT else set()
    growing = [known.chains[i].layers for i in data if known.chains[i].layers and known.depths[i].layers]
    is_product = len(growing) == 2 and kind in (Kind.PRODUCT, Kind.MULTIPLICATION)
    is_power = len(growing) == 1 and power_after(operation, [1.0]) > 1
    if is_product or is_power:
        counted.add(Product(growing[0] | growing[-1]))
    return frozenset(product for product in counted if product.layers)


def _sum_of_products(operation: Operation, data: Sequence[int], known: Factors) -> Product:
    """What a matrix product of two activations adds up.

    The factor that is scaled is the one with more layers behind it: what ends there serves nothing else. A layer that
    ends both of them (queries, keys and values in one) counts twice in every product.
    """
    ends = [known.scales[index].layers for index in data]
    layer = known.scales[max(data, key=lambda index: known.chains[index].length)].layers or frozenset()
    count = operation.inputs[0].shape[-1]
    is_shared = all(end is not None and layer <= end for end in ends)
    return Product(layer, math.sqrt(count) if is_shared else count)
