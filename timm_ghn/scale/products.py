"""Products of activations that nothing normalizes, from which what adds up in phase comes out squared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from timm_ghn.scale.batch_norms import Growth, power_after
from timm_ghn.scale.branches import Scale
from timm_ghn.scale.steps import Chain, Steps
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


def find_products(
    steps: Steps,
    streams: Streams,
    scales: Mapping[int, Scale],
    chains: Mapping[int, Chain],
    growths: Mapping[int, Growth],
) -> Mapping[int, Products]:
    """The products that values were computed from and nothing has normalized since, by number of the value."""
    weights = find_weights(steps, streams)

    def step(operation: Operation, output: Value, known: Sequence[Products | None]) -> Products | None:
        if steps.is_norm(operation):
            return None
        if output.index in streams.sums:
            return streams.before(output, known)
        is_held = row_of(operation).is_bounded or (kind_of(operation) is Kind.DIVISION and len(known) == 2)
        before = Products().union(*(products or () for products in known if not is_held))
        return (before if steps.layer(operation) else before | made_by(operation)) or None

    def made_by(operation: Operation) -> Products:
        """The products that an operation computes.

        A factor that a norm layer or a bound holds counts as none: what adds up in phase goes into the other one alone.
        So does a product with a factor that weights a mean.
        """
        data = [value.index for value in operands(operation) if value.index in chains]
        if any(index in weights for index in data):
            return frozenset()
        is_pair, kind = len(data) == 2, kind_of(operation)
        counted = {sum_of(operation, data)} if is_pair and kind is Kind.PRODUCT else set()
        growing = [chains[index].layers for index in data if chains[index].layers and growths[index].layers]
        is_product = len(growing) == 2 and kind in (Kind.PRODUCT, Kind.MULTIPLICATION)
        is_power = len(growing) == 1 and power_after(operation, [1.0]) > 1
        if is_product or is_power:
            counted.add(Product(growing[0] | growing[-1]))
        return frozenset(product for product in counted if product.layers)

    def sum_of(operation: Operation, data: Sequence[int]) -> Product:
        """What a matrix product of two activations adds up.

        The factor that is scaled is the one with more layers behind it: what ends there serves nothing else. A layer
        that ends both of them (queries, keys and values in one) counts twice in every product.
        """
        layer = scales[max(data, key=lambda index: chains[index].length)].layers or frozenset()
        count = operation.inputs[0].shape[-1]
        ends = [scales[index].layers for index in data]
        is_shared = all(end is not None and layer <= end for end in ends)
        return Product(layer, math.sqrt(count) if is_shared else count)

    return steps.flow.follow(step)
